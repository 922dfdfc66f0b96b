"""What a criterion may look at: the members of a group as matrices, norms and BatchNorm scales."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..dependency.groups import Group, Member, Role
from ..errors import GraphPruneError
from .calibration import Calibration
from .calibration.stored import StoredStatistics

Floats = npt.NDArray[np.float64]

# Elements reduced at a time: the powers of one block stay in the processor's cache, so that a norm costs about one
# read of the weight and never a copy of it. An accelerator has memory to spare and wants few, long kernels.
_BLOCK = {"cpu": 1 << 18}
_BLOCK_ELSEWHERE = 1 << 25
# Rows up to this length torch sums up to within 1e-6 without splitting them, in half the time or less; longer ones are
# cut into parts.
_SHORT = 1 << 13
# A float32 sum of powers below this may have lost terms to underflow; it is then done again in float64.
_TRUSTED = 1e-30


@dataclasses.dataclass(frozen=True, eq=False)
class BatchNormLink:
    """A BatchNorm scale that is no longer a tensor of its own, because it was folded into the layer before it.

    `gamma`: the scale before folding, shape (channels,), not folded into anything.
    `axis`: the axis of the linked parameter along which channel c sits at index c. Default 0, right for the weight
    of a Linear or a convolution and for any bias; 1 for a transposed convolution without groups.
    `module`: name of the BatchNorm in the user's model, if it is there, for criteria that look at modules.
    """

    gamma: Tensor
    axis: int = 0
    module: str | None = None


class Layer(NamedTuple):
    """One place where a tensor lives: `module`, called `name` in the model, holds it as `attribute`."""

    name: str
    module: nn.Module
    attribute: str


class ImportanceContext:
    """The tensors behind the groups of one model, read-only. Nothing in it may change while it is in use.

    `model`: the user's model; its modules say which tensors are BatchNorm scales, and criteria that need gradients
    find them here.
    `tensors`: fully qualified parameter or buffer name -> effective tensor, as importance should see it (for
    example with Conv-BN folded in). A member whose name is missing here has no value and is skipped.
    `bn`: parameter name -> BatchNorm scale folded into that parameter. Default none.
    `seed`: non-negative; only `generator` uses it. Default 0.
    `calibration`: what data say about the network with these tensors, for criteria that need it. Default none.
    `stored`: what the network's own statistics say of its activations. Default none.
    `compared`: whether scores of different groups will be held against each other; a criterion may save itself the
    work of making them comparable where they are not. Default True.

    Raises GraphPruneError for a seed that is not a non-negative integer, and from the reading methods for a tensor
    on the meta device, which has no values.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        *,
        bn: Mapping[str, BatchNormLink] | None = None,
        seed: int = 0,
        calibration: Calibration | None = None,
        compared: bool = True,
        stored: StoredStatistics | None = None,
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
            raise GraphPruneError(f"seed: expected a non-negative integer, got {seed!r}")
        self.model = model
        self.tensors = tensors
        self.bn: Mapping[str, BatchNormLink] = {} if bn is None else bn
        self.seed = int(seed)
        self.compared = compared
        self._calibration = calibration
        self._stored = stored
        self._power_sums: dict[tuple[str, int, float], Floats] = {}

    # Members and their values

    def members(self, group: Group, roles: Sequence[Role] = ("out",)) -> list[Member]:
        """Members of `group` with one of `roles` and a floating point (or complex) tensor, in the group's order."""
        return [m for m in group.members if m.role in roles and self._tensor(m.parameter) is not None]

    def weights(self, group: Group, roles: Sequence[Role] = ("out",)) -> list[Tensor]:
        """One matrix (group.size, features) for each of `members(group, roles)`, see `matrix`."""
        return [self.matrix(member) for member in self.members(group, roles)]

    def norms(self, group: Group, p: float, roles: Sequence[Role] = ("out",)) -> list[Floats]:
        """One vector (group.size,) for each of `members(group, roles)`, see `norm`."""
        return [self.norm(member, p) for member in self.members(group, roles)]

    def matrix(self, member: Member) -> Tensor:
        """Row u holds every element that goes with unit u: the k slices at `member.positions[u]`, flattened.

        Shape (units, k * elements per slice), float64 for a float64 tensor and float32 for all others, on the tensor's
        device, detached. It may share memory with the tensor: do not write to it. Complex numbers count as pairs.
        """
        tensor = self._values(member.parameter)
        rows = tensor.movedim(member.axis, 0)
        flat = np.ascontiguousarray(member.positions, dtype=np.int64).reshape(-1)
        if not (flat.size == rows.shape[0] and np.array_equal(flat, np.arange(flat.size))):
            rows = rows.index_select(0, torch.tensor(flat, device=rows.device))
        rows = rows.reshape(member.positions.shape[0], -1)
        if rows.is_complex():
            rows = torch.view_as_real(rows.resolve_conj()).flatten(1)
        return rows if rows.dtype in (torch.float32, torch.float64) else rows.to(torch.float32)

    def norm(self, member: Member, p: float) -> Floats:
        """The p-norm of every row of `matrix(member)`, shape (units,), without building that matrix.

        p: a finite number above 0. The tensor is reduced over its other axes first, once for all groups that share
        it, and only the resulting vector is gathered by positions.
        """
        if not (p > 0 and math.isfinite(p)):
            raise GraphPruneError(f"norm: p must be a finite number above 0, got {p!r}")
        by_unit: Floats = self._powers(member, float(p)).sum(axis=1)
        return by_unit if p == 1 else np.power(by_unit, 1.0 / p)

    def squares(self, member: Member) -> Floats:
        """The sum of squares of every slice that belongs to a unit, shape (units, k) as `member.positions`."""
        return self._powers(member, 2.0)

    def _powers(self, member: Member, p: float) -> Floats:
        key = (member.parameter, member.axis, p)
        sums = self._power_sums.get(key)
        if sums is None:
            sums = self._power_sums[key] = _power_sums(self._values(member.parameter), member.axis, p)
        found: Floats = sums[member.positions]
        return found

    def nonfinite(self, group: Group) -> list[str]:
        """Names of the group's floating point parameters and buffers that hold NaN or infinity."""
        names = dict.fromkeys(m.parameter for m in group.members if self._tensor(m.parameter) is not None)
        return [name for name in names if not bool(torch.isfinite(self._values(name)).all())]

    # BatchNorm scales

    def bn_scales(self, group: Group) -> list[Floats]:
        """`|gamma|` of each BatchNorm that scales the group's units, a vector (group.size,) each; empty if there is
        none.

        BatchNorms are the model's own modules and those in `bn`; always the trained scale, whether or not `tensors`
        holds it folded into another layer. A unit of k channels gets the mean of their k scales.
        """
        scales: list[Floats] = []
        seen: set[tuple[int, bytes]] = set()
        for member in group.members:
            name, found = member.parameter, []
            if name in self._module_gammas:
                found.append((id(self._module_gammas[name]), self._gamma(name)))
            link = self.bn.get(name)
            if link is not None and link.axis == member.axis:
                found.append((id(link.gamma), _with_values(name, link.gamma)))
            for identity, gamma in found:
                # a weight and its bias may both link to one scale
                key = (identity, member.positions.tobytes())
                if key not in seen:
                    seen.add(key)
                    scales.append(_magnitudes(gamma)[member.positions].mean(axis=1))
        return scales

    @functools.cached_property
    def mean_bn_scale(self) -> float | None:
        """Mean `|gamma|` over all channels of all BatchNorms of the model and of `bn`; None if there is none."""
        gammas = {id(weight): self._gamma(name) for name, weight in self._module_gammas.items()}
        gammas.update((id(link.gamma), _with_values(name, link.gamma)) for name, link in self.bn.items())
        if not gammas:
            return None
        return float(np.concatenate([_magnitudes(gamma) for gamma in gammas.values()]).mean())

    # Other things to look at

    def layers(self, name: str) -> tuple[Layer, ...]:
        """Every module that holds the parameter or buffer called `name`; more than one where it is shared.

        A name that is not in the model (the bias that folding adds) belongs to the module of its prefix.
        """
        tensor = self._named.get(name)
        if tensor is not None:
            return tuple(self._holders[id(tensor)])
        prefix, _, attribute = name.rpartition(".")
        module = self.modules.get(prefix)
        return () if module is None else (Layer(prefix, module, attribute),)

    @functools.cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """Every module of the model by name, also under the second name of a shared one."""
        return dict(self.model.named_modules(remove_duplicate=False))

    @property
    def calibration(self) -> Calibration:
        """What data say. Raises GraphPruneError, naming `data`, where none were passed."""
        if self._calibration is None:
            raise GraphPruneError("this criterion needs data: pass data=, a loader or list of batches")
        return self._calibration

    def stored_variance(self, name: str) -> Floats | None:
        """Variances of what the linear layer or convolution with the weight `name` reads, one per index of its input
        axis, by the statistics that the network stores; NaN where unknown. None for other parameters."""
        found = None if self._stored is None else self._stored.variance(name)
        return None if found is None else found.cpu().numpy()

    @property
    def factors(self) -> frozenset[str]:
        """Parameters and buffers with which the network does no more than to multiply others, by name; empty where it
        was not looked at."""
        return frozenset() if self._stored is None else self._stored.factors

    def generator(self, group: Group) -> np.random.Generator:
        """Random numbers that depend on the seed and the group's index alone, not on what was drawn before."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(group.index,)))

    # Inside

    def _tensor(self, name: str) -> Tensor | None:
        tensor = self.tensors.get(name)
        if tensor is None or not (tensor.is_floating_point() or tensor.is_complex()):
            return None
        return tensor

    def _values(self, name: str) -> Tensor:
        tensor = self._tensor(name)
        if tensor is None:
            raise GraphPruneError(f"'{name}' has no floating point value to judge: leave it out of the criterion")
        return _with_values(name, tensor)

    def _gamma(self, name: str) -> Tensor:
        gamma, given = self._module_gammas[name], self._tensor(name)
        # a model without values may be judged by those of a checkpoint
        return _with_values(name, given if gamma.is_meta and given is not None else gamma)

    @functools.cached_property
    def _module_gammas(self) -> dict[str, Tensor]:
        gammas: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            # not getattr: a parametrised weight would be computed
            weight = module._parameters.get("weight", module._buffers.get("weight"))
            if weight is not None and weight.dim() == 1 and _normalises_by_running_statistics(module, weight):
                gammas[f"{name}.weight" if name else "weight"] = weight
        return gammas

    @functools.cached_property
    def _named(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        named.update(self.model.named_buffers(remove_duplicate=False))
        return named

    @functools.cached_property
    def _holders(self) -> dict[int, list[Layer]]:
        holders: dict[int, list[Layer]] = {}
        for name, module in self.model.named_modules():
            for own in (
                module.named_parameters(recurse=False, remove_duplicate=False),
                module.named_buffers(recurse=False, remove_duplicate=False),
            ):
                for attribute, tensor in own:
                    holders.setdefault(id(tensor), []).append(Layer(name, module, attribute))
        return holders


def _normalises_by_running_statistics(module: nn.Module, weight: Tensor) -> bool:
    """BatchNorm of any kind, also the frozen ones of detectors, which are no subclass of torch's."""
    if isinstance(module, _BatchNorm):
        return True
    variance = getattr(module, "running_var", None)
    return isinstance(variance, Tensor) and variance.shape == weight.shape


def _with_values(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise GraphPruneError(
            f"'{name}' is on the meta device and has no values to judge: load the weights first, or use "
            f"criterion='random', which needs none"
        )
    return tensor.detach()


def _magnitudes(gamma: Tensor) -> Floats:
    values: Floats = gamma.detach().abs().to("cpu", torch.float64).numpy()
    return values


def _power_sums(tensor: Tensor, axis: int, p: float) -> Floats:
    """Sum of |t| ** p over every axis but `axis`, shape (tensor.shape[axis],)."""
    wide = tensor.dtype in (torch.float64, torch.complex128)
    sums = _blockwise(tensor, axis, p, torch.float64 if wide else torch.float32)
    if not wide and not (np.isfinite(sums).all() and (p <= 1 or bool((sums > _TRUSTED).all()))):
        sums = _blockwise(tensor, axis, p, torch.float64)
    return sums


def _parts(length: int) -> int:
    """Into how many equal parts, none too long, rows of this length can be cut; 0 where there are only many."""
    least = -(-length // _SHORT)
    return next((n for n in range(least, 4 * least) if length % n == 0), 0)


def _blockwise(tensor: Tensor, axis: int, p: float, dtype: torch.dtype) -> Floats:
    if tensor.device.type == "mps":  # has no float64
        tensor = tensor.cpu()
    axis %= tensor.dim()
    length = tensor[:1].numel()
    plain = tensor.is_contiguous() and not tensor.is_complex()
    parts = _parts(length)
    if p == 2 and axis == 0 and plain and tensor.dim() > 1 and parts:
        norms = torch.linalg.vector_norm(tensor.reshape(len(tensor), parts, -1).to(dtype), 2, 2)
        squares: Floats = np.square(norms.to("cpu", torch.float64).numpy()).sum(1)
        return squares
    others = [d for d in range(tensor.dim()) if d != axis]
    sums: Floats = np.zeros(tensor.shape[axis], dtype=np.float64)
    rows = max(1, _BLOCK.get(tensor.device.type, _BLOCK_ELSEWHERE) // max(1, length))
    for start in range(0, tensor.shape[0], rows):
        block = tensor[start : start + rows]
        if block.is_complex():
            block = block.to(torch.complex128 if dtype == torch.float64 else torch.complex64).abs()
        block = block.to(dtype)
        block = block.square() if p == 2 else block.abs() if p == 1 else block.abs().pow(p)
        part: Floats = (block.sum(others) if others else block).to("cpu", torch.float64).numpy()
        if axis == 0:
            sums[start : start + rows] = part
        else:
            sums += part
    return sums

