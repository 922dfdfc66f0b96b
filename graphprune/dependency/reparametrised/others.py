"""Weights that any other parametrisation computes: followed through its operators, then tried."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import GraphPruneError
from ...support.cutting import cut_tensor
from ...support.walking import all_modules, first_names, named_tensors
from ...tracing.cloning import clone_modules
from ...tracing.trace import record_run
from ..analysis import Analysis, analyse
from ..sizes import gone_on_axis, gone_with
from ..state import State
from .forms import Axes, Form, Held


class _Sum(nn.Module):
    """Something that can be recorded and whose output is no channel of the weight."""

    def __init__(self, chain: nn.Module) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, _: Tensor) -> Tensor:
        weight: Tensor = self.chain()
        return weight.sum()


@dataclasses.dataclass(frozen=True, eq=False)
class Computed(Form):
    """What a chain of parametrisations of `torch.nn.utils.parametrize` computes. `prefix`: of its tensors' names.

    An axis of the weight is free where dependency analysis finds the indices of the sources that belong to each of its
    indices and to no other, and where the parametrisation without some of them computes the weight without these.
    """

    chain: nn.Module
    prefix: str

    @property
    def title(self) -> str:  # type: ignore[override]
        return " and ".join(type(step).__name__ for step in self.chain.children())

    @functools.cached_property
    def _value(self) -> Tensor:
        return _computed(clone_modules(first_names(all_modules(self.chain)), lambda tensor: tensor).modules[""])

    def value(self) -> Tensor:
        return self._value

    @property
    def steady(self) -> bool:
        """Whether it computes the same each time."""
        again = _computed(clone_modules(first_names(all_modules(self.chain)), lambda tensor: tensor).modules[""])
        return self._value.is_meta or torch.equal(self._value, again)

    def sources(self) -> dict[str, Tensor]:
        return {self.prefix + name: tensor for name, tensor in named_tensors(self.chain).items()}

    def cuts(self, axes: Axes) -> dict[str, Axes]:
        return {self.prefix + name: cut for name, cut in self._cuts(axes).items()}

    def axes(self, cuts: Mapping[str, Axes]) -> Axes:
        if isinstance(self._followed, str):
            return {}
        analysis, state = self._followed
        gone = gone_with(analysis, {f"chain.{name.removeprefix(self.prefix)}": cut for name, cut in cuts.items()})
        lost = {a: gone_on_axis(analysis, state.axis(a), n, gone) for a, n in enumerate(state.shape)}
        return {axis: np.nonzero(mask)[0].tolist() for axis, mask in lost.items() if mask.any()}

    def tensors(self, weight: Tensor, axes: Axes) -> dict[str, Tensor]:
        return {self.prefix + name: tensor for name, tensor in self._cut(axes).items()}

    # -- which sources belong to which indices

    @functools.cached_property
    def _followed(self) -> tuple[Analysis, State] | str:
        """The analysis of the parametrisation and the coordinates of the weight, or why there are none."""
        probe = _Sum(self.chain)
        try:
            analysis = analyse(record_run(probe, torch.zeros(1)))
        except GraphPruneError as error:
            return str(error).partition("\n")[0]
        total = next(node for node in analysis.trace.graph.nodes if node.op == "output").args[0][0]
        return analysis, analysis.state(total.args[0])

    def _labels(self, axis: int) -> np.ndarray | None:
        """The component of every index of an axis; None where they have not one each."""
        assert not isinstance(self._followed, str)
        analysis, state = self._followed
        found = list(state.axis(axis).items())
        if len(found) != 1 or (found[0][1] < 0).any():
            return None
        return np.asarray(analysis.label[analysis.dims.offset[found[0][0]] + found[0][1]])

    def _cuts(self, axes: Axes) -> dict[str, dict[int, list[int]]]:
        """What belongs to these indices of the weight, by name in the chain."""
        if not axes:
            return {}
        labels = {} if isinstance(self._followed, str) else {axis: self._labels(axis) for axis in axes}
        if any(labels.get(axis) is None for axis in axes):
            raise GraphPruneError(f"{self.title} cannot lose what the plan removes from the weight that it computes")
        assert not isinstance(self._followed, str)
        analysis, _ = self._followed
        gone = np.zeros(analysis.components, bool)
        for axis, indices in axes.items():
            found = labels[axis]
            assert found is not None
            gone[found[list(indices)]] = True
        gone[analysis.label[0]] = False
        cuts: dict[str, dict[int, list[int]]] = {}
        for (name, axis), axis_map in analysis.dims.roots.items():
            length = analysis.trace.parameters[name].meta["val"].shape[axis]
            lost = np.nonzero(gone_on_axis(analysis, axis_map, length, gone))[0]
            if len(lost):
                cuts.setdefault(name.removeprefix("chain."), {})[axis] = lost.tolist()
        return cuts

    def _cut(self, axes: Axes) -> dict[str, Tensor]:
        """The sources, by name in the chain, without what belongs to these indices of the weight."""
        cuts = self._cuts(axes)
        named = named_tensors(self.chain)
        return {name: cut_tensor(tensor, cuts[name]) if name in cuts else tensor for name, tensor in named.items()}

    # -- what is held

    def held(self) -> tuple[Held, ...]:
        return self._held

    @functools.cached_property
    def _held(self) -> tuple[Held, ...]:
        shape = self._value.shape
        if isinstance(self._followed, str):
            return tuple(_whole(axis, n, self._followed) for axis, n in enumerate(shape) if n > 1)
        out: list[Held] = []
        labels = {axis: self._labels(axis) for axis, n in enumerate(shape) if n > 1}
        free: dict[int, list[int]] = {}
        for axis, found in labels.items():
            others = [v for a, v in labels.items() if a != axis and v is not None]
            why, mask = self._why(axis, found, others)
            if found is None or mask.all():
                out.append(_whole(axis, shape[axis], why))
                continue
            if mask.any():
                out.append(Held(axis, mask, why))
            free[axis] = np.nonzero(~mask)[0][::2].tolist()[: max(shape[axis] - 1, 0)]
        held_now = [axis for axis in free if not self._works({axis: free[axis]})]
        rest = {axis: indices for axis, indices in free.items() if axis not in held_now}
        if len(rest) > 1 and not self._works(rest):
            held_now += list(rest)
        other = "without some of its channels it computes other weights"
        return (*out, *(_whole(axis, shape[axis], other) for axis in held_now))

    def _why(self, axis: int, labels: np.ndarray | None, others: list[np.ndarray]) -> tuple[str, np.ndarray]:
        """Which indices cannot go, and why."""
        assert not isinstance(self._followed, str)
        analysis, state = self._followed
        length = state.shape[axis]
        if labels is None:
            positions = [analysis.dims.positions(d) for d in state.axis(axis)]
            told = self._reasons(np.concatenate(positions)) if positions else ""
            return told or self._unfollowed() or "its channels cannot be told apart in it", np.ones(length, bool)
        _, where, count = np.unique(labels, return_inverse=True, return_counts=True)
        tied = (count[where] > 1) | np.isin(labels, np.concatenate(others) if others else ())
        stuck = labels == analysis.label[0]
        if stuck.any():
            ((dim, vector),) = state.axis(axis).items()
            return self._reasons(analysis.dims.offset[dim] + vector[stuck]), stuck | tied
        return "it ties channels of this axis to others", tied

    def _reasons(self, positions: np.ndarray) -> str:
        assert not isinstance(self._followed, str)
        analysis, _ = self._followed
        wanted = np.unique(analysis.tied[positions])
        told = [r.text for frozen, r in analysis.freezes if np.isin(analysis.tied[frozen], wanted).any()]
        return "; ".join(dict.fromkeys(told)) or "its channels cannot be told apart in it"

    def _unfollowed(self) -> str:
        """What any rule said, where the weight has no coordinates at all."""
        assert not isinstance(self._followed, str)
        return "; ".join(list(dict.fromkeys(reason.text for _, reason in self._followed[0].freezes))[:3])

    def _works(self, axes: Axes) -> bool:
        """Whether the parametrisation of the cut sources computes the cut weight."""
        if self._value.is_meta:
            return True
        try:
            found = _computed(self._copy(self._cut(axes)))
        except Exception:  # whatever it cannot do, it cannot do without these channels
            return False
        wanted = cut_tensor(self._value, axes)
        if found.shape != wanted.shape:
            return False
        scale = 8 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
        return bool(((found - wanted).abs() <= scale).all())

    def _copy(self, tensors: dict[str, Tensor]) -> nn.Module:
        memo: dict[int, Any] = {}
        for name, old in named_tensors(self.chain).items():
            new = tensors[name].detach().clone()
            memo[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        return copy.deepcopy(self.chain, memo)


def _whole(axis: int, length: int, why: str) -> Held:
    return Held(axis, np.ones(length, bool), why)


def _computed(chain: nn.Module) -> Tensor:
    """What a chain of ours computes in eval mode."""
    for module in chain.modules():
        module.training = False
    with torch.no_grad():
        weight: Tensor = chain()
    return weight.detach()
