"""What a pruned network must equal: slow, obvious references in plain PyTorch that know nothing of the engine.

Everything is compared in double precision, so that an error of one channel cannot hide behind rounding.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tests.absent import absent_positions
from tests.networks.registry import map_tensors

Removed = Mapping[str, Mapping[int, Sequence[int]]]
TINY = 1e-40
"""Instead of zero: a weight divided by its own norm stays a number. Far below the last bit of anything it meets."""


class Member(Protocol):
    """One axis of one parameter: `positions[unit]` are the indices of that unit, shape (units, k)."""

    @property
    def parameter(self) -> str: ...

    @property
    def axis(self) -> int: ...

    @property
    def positions(self) -> Any: ...


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in any nest of tuples, lists, dicts and plain objects but caches, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors_in(item)]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors_in(item)]
    if type(value).__name__.endswith("Cache"):  # state for the next step, no answer
        return []
    if hasattr(value, "__dict__") and not isinstance(value, nn.Module):
        return [t for item in vars(value).values() for t in tensors_in(item)]
    return []


def call(model: nn.Module, example: Any) -> Any:
    """`model` on a copy of the example: a tensor, a tuple of arguments or a dict of keyword arguments."""
    example = map_tensors(example, torch.clone)
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def double(example: Any) -> Any:
    """The example with every floating-point tensor in double precision."""
    return map_tensors(example, lambda t: t.double() if t.is_floating_point() else t)


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy."""
    # Hooks of the older torch.nn.utils leave tensors with a history in the modules, which deepcopy refuses.
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def double_copy(model: nn.Module) -> nn.Module:
    """A deep copy in double precision and eval mode, with no gradient."""
    return copy_of(model).double().eval().requires_grad_(False)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name they have."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


def with_slices(model: nn.Module, removed: Removed, value: float) -> nn.Module:
    """A copy in double precision whose removed slices hold `value`. Integer buffers stay: they are no channels."""
    result = double_copy(model)
    computed = make_permanent(result)
    tensors = named_tensors(result)
    for name, axes in computed.seen(removed, result).items():
        tensor = tensors.get(name)
        if tensor is None:
            # Folding a BatchNorm gives its convolution a bias: where the original has none, nothing is to be filled.
            owner, _, leaf = name.rpartition(".")
            if leaf == "bias" and getattr(result.get_submodule(owner), "bias", 0) is None:
                continue
            raise KeyError(f"the plan names {name}, which the original model does not have")
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        there = torch.ones_like(tensor)
        for axis, indices in axes.items():
            tensor.data.index_fill_(axis, torch.as_tensor(list(indices), dtype=torch.int64), value)
            there.index_fill_(axis, torch.as_tensor(list(indices), dtype=torch.int64), 0.0)
        if name in computed.rows:  # normalised anew
            tensor.data.div_(spectral_norm_of(torch.where(there == 1, tensor, 0.0), computed.rows[name]))
    return result


def spectral_norm_of(weight: Tensor, rows: int) -> Tensor:
    """The largest singular value of a weight as a matrix."""
    found: Tensor = torch.linalg.matrix_norm(weight.movedim(rows, 0).flatten(1), 2)
    return found


@dataclasses.dataclass
class Computed:
    """Weights that modules compute. `weight_of`: name of what one is computed from -> its name. `rows`: of the matrix
    that a spectral norm is of, by the name of the weight."""

    weight_of: dict[str, str] = dataclasses.field(default_factory=dict)
    rows: dict[str, int] = dataclasses.field(default_factory=dict)

    def seen(self, removed: Removed, model: nn.Module) -> Removed:
        """What goes, by names of weights. `model`: after `make_permanent`."""
        tensors, found = named_tensors(model), dict(removed)
        for name in found.keys() & self.weight_of.keys():
            axes, weight = found.pop(name), self.weight_of[name]
            if max(axes) < tensors[weight].dim() and self.alike[name] == tensors[weight].shape:
                found[weight] = {**found.get(weight, {}), **axes}
        return found

    alike: dict[str, torch.Size] = dataclasses.field(default_factory=dict)


def make_permanent(model: nn.Module) -> Computed:
    """Turn the weights that the modules of a copy compute into ordinary ones, in place."""
    found = Computed()
    before = {name: tensor.shape for name, tensor in named_tensors(model).items()}
    for path, module in list(model.named_modules()):
        prefix = f"{path}." if path else ""
        for hook in list(module._forward_pre_hooks.values()):
            if not isinstance(hook, (SpectralNorm, WeightNorm)):
                continue
            name = f"{prefix}{hook.name}"
            if isinstance(hook, SpectralNorm):
                found.rows[name] = hook.dim
                value = hook.compute_weight(module, do_power_iteration=False).detach()
                nn.utils.remove_spectral_norm(module, hook.name)
                getattr(module, hook.name).data = value
            else:
                nn.utils.remove_weight_norm(module, hook.name)
            ends = [f"{name}_{end}" for end in ("v", "g", "orig", "u")]
            found.weight_of.update((source, name) for source in ends if source in before)
        if parametrize.is_parametrized(module):
            chains = dict(module.parametrizations.items())
            values = {name: getattr(module, name).detach() for name in chains}
            found.rows.update((prefix + n, c[0].dim) for n, c in chains.items() if hasattr(c[0], "_power_method"))
            inside = {f"{prefix}parametrizations.{n}.": prefix + n for n in chains}
            found.weight_of.update((n, w) for n in before for start, w in inside.items() if n.startswith(start))
            del module._modules["parametrizations"]
            module.__class__ = type(module).__bases__[0]
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value))
    found.alike = {name: before[name] for name in found.weight_of}
    return found


def zero_reference(model: nn.Module, removed: Removed, fill: float = TINY) -> nn.Module:
    """The untouched model with every removed slice set to (practically) zero: equal to the pruned model wherever no
    statistic runs over the channels."""
    return with_slices(model, removed, fill)


def absent_output(model: nn.Module, removed: Removed, example: Any) -> Any:
    """What the untouched model would return if the removed slices were not there; NaN where they are missed."""
    marked = with_slices(model, removed, float("nan"))
    with absent_positions():
        return call(marked, double(example))


def relative_error(actual: Any, expected: Any) -> float:
    """The largest max|actual - expected| / max|expected| over all tensors; infinite for other shapes or NaN."""
    left, right = tensors_in(actual), tensors_in(expected)
    if len(left) != len(right):
        return float("inf")
    return max((_tensor_error(a, b) for a, b in zip(left, right, strict=True)), default=0.0)


def _tensor_error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(actual, expected) else float("inf")
    actual, expected = actual.detach(), expected.detach()
    difference, size = float((actual - expected).abs().max()), float(expected.abs().max())
    if not np.isfinite(difference) or not np.isfinite(size):
        return float("inf")
    return difference / size if size > 0 else (0.0 if difference == 0 else float("inf"))


def permute_check(model: nn.Module, members: Sequence[Member], example: Any, rng: np.random.Generator) -> float | None:
    """Relative change of the output when the units of a group are permuted at random in every member.

    None where the group cannot be judged this way: integer members would have to be renumbered as well.
    """
    result = double_copy(model)
    make_permanent(result)
    before = call(result, double(example))
    tensors = named_tensors(result)
    units = rng.permutation(len(members[0].positions))
    order = np.empty_like(units)
    order[units] = np.roll(units, 1)  # one long cycle: every unit moves, so that no member left out goes unnoticed
    done: set[tuple[int, int, bytes]] = set()
    for member in members:
        tensor = tensors[member.parameter]
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return None
        positions = np.asarray(member.positions)
        key = (id(tensor), member.axis, positions.tobytes())
        if key in done:  # a tied parameter under its other name
            continue
        done.add(key)
        index = np.arange(tensor.shape[member.axis])
        index[positions.reshape(-1)] = positions[order].reshape(-1)
        tensor.data = tensor.data.index_select(member.axis, torch.as_tensor(index))
    return relative_error(call(result, double(example)), before)


def parameters_match_plan(
    model: nn.Module, pruned: nn.Module, removed: Removed, temperature: bool = False
) -> list[str]:
    """Where the pruned tensors are not what is left of the original ones, in words; empty if all is well.

    For plans that fold nothing. `temperature`: some rows may carry one common factor. The inside of closed torch.nn
    modules (attention, recurrent networks) may be laid out anew and is not compared.
    """
    closed = tuple(
        name + "." for name, module in model.named_modules() if isinstance(module, (nn.MultiheadAttention, nn.RNNBase))
    )
    original, result = named_tensors(model), named_tensors(pruned)
    problems, own = _computed_problems(model, pruned, removed)
    removed = _by_every_name(original, removed)
    for name, tensor in original.items():
        if closed and name.startswith(closed):
            continue
        if name not in result:
            problems.append(f"{name} is gone")
            continue
        expected = tensor.detach()
        for axis, indices in removed.get(name, {}).items():
            if list(indices) != sorted(set(indices)):
                problems.append(f"{name}: the indices removed along axis {axis} are not sorted or not unique")
            kept = np.setdiff1d(np.arange(tensor.shape[axis]), np.asarray(list(indices), dtype=np.int64))
            expected = expected.index_select(axis, torch.as_tensor(kept))
        actual = result[name].detach()
        if actual.shape != expected.shape:
            problems.append(f"{name} has shape {tuple(actual.shape)}, by the plan {tuple(expected.shape)}")
        elif actual.dtype != expected.dtype:
            problems.append(f"{name} has dtype {actual.dtype}, not {expected.dtype}")
        elif not actual.is_floating_point() or name in own:
            pass  # indices are renumbered; what weights are computed from is told by the weights
        elif not torch.equal(actual, expected) and not (temperature and _rescaled(actual, expected)):
            problems.append(f"{name} is not the part of the original that the plan keeps")
    return problems


def _computed_problems(model: nn.Module, pruned: nn.Module, removed: Removed) -> tuple[list[str], set[str]]:
    """Which weights that modules compute are not what is left of them; and the names of what they are computed from."""
    before, after = double_copy(model), double_copy(pruned)
    computed = make_permanent(before)
    if make_permanent(after).weight_of != computed.weight_of:
        return ["other weights are computed than before"], set()
    gone, problems = computed.seen(removed, before), []
    for name in set(computed.weight_of.values()):
        wanted, found = named_tensors(before)[name], named_tensors(after)[name]
        for axis, indices in gone.get(name, {}).items():
            wanted = wanted.index_select(axis, torch.tensor(sorted({*range(wanted.shape[axis])} - {*indices})))
        if name in computed.rows and name in gone:
            wanted = wanted / spectral_norm_of(wanted, computed.rows[name])
        if not relative_error(found, wanted) < 1e-6:
            problems.append(f"the computed {name} is not the part of the original that the plan keeps")
    return problems, set(computed.weight_of)


def _by_every_name(tensors: Mapping[str, Tensor], removed: Removed) -> Removed:
    """What is removed from a tied tensor, under each of its names."""
    by_tensor = {id(tensors[name]): axes for name, axes in removed.items() if name in tensors}
    return {name: by_tensor[id(tensor)] for name, tensor in tensors.items() if id(tensor) in by_tensor}


def _rescaled(actual: Tensor, expected: Tensor) -> bool:
    """Whether every value is the original one or the original one times one positive factor."""
    ratio = (actual.double() / expected.double())[expected != 0]
    changed = ratio[(ratio - 1).abs() > 1e-6]
    return changed.numel() == 0 or bool((changed.min() > 0) & (changed.max() - changed.min() < 1e-5 * changed.max()))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that pruning a copy of it must leave alone, by name."""
    state: dict[str, Any] = {f"value of {n}": t.detach().clone() for n, t in named_tensors(model).items()}
    state.update({f"identity of {n}": id(t) for n, t in named_tensors(model).items()})
    state.update({f"requires_grad of {n}": p.requires_grad for n, p in model.named_parameters()})
    for name, module in model.named_modules():
        state[f"training flag of {name or 'the model'}"] = module.training
        state[f"hooks of {name or 'the model'}"] = len(module._forward_hooks) + len(module._forward_pre_hooks)
        for key, value in vars(module).items():
            if isinstance(value, (int, str, float)):
                state[f"{key} of {name or 'the model'}"] = value
                state[f"type of {key} of {name or 'the model'}"] = type(value)
    return state


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The entries in which two snapshots differ."""
    changed = [key for key in before.keys() | after.keys() if (key in before) != (key in after)]
    for key in before.keys() & after.keys():
        a, b = before[key], after[key]
        same = torch.equal(a, b) if isinstance(a, Tensor) else a == b
        if not same:
            changed.append(key)
    return sorted(changed)
