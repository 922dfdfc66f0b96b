"""Do the tensors in an ONNX file have the shapes of the model's parameters, and those of the plan?"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from ..errors import GraphPruneError

Shape = tuple[int, ...]

# Operators that look at the size or the dtype of a tensor and not at its values: a parameter used by these alone
# need not be in the file.
_SIZE_ONLY = frozenset(
    "new_zeros new_ones new_full new_empty zeros_like ones_like full_like empty_like rand_like randn_like "
    "sym_size sym_numel size numel".split()
)


class Removal(Protocol):
    """What is read of a plan: {parameter name: {axis: sorted removed indices, in the original numbering}}.

    If it also has `structure`, {parameter or buffer name: shape before pruning}, as a `Plan` has, the shape of every
    parameter is computed from both; without, only those of `removed` are checked, and only for consistency.
    """

    @property
    def removed(self) -> Mapping[str, Mapping[int, Sequence[int]]]:
        """The removed indices."""


@dataclasses.dataclass(frozen=True)
class Initializers:
    """How the model's parameters were found in the file; those of one dimension (biases, norms) only by name.

    `exact`: under their name and with their shape. `transposed`: under their name or another, axes permuted.
    `folded`: matrices and kernels that the exporter computed with (weight norm, stacked LSTM gates...), so that
    only the parity check vouches for them. `unused`: not used by this forward pass.
    """

    exact: tuple[str, ...]
    transposed: tuple[str, ...]
    folded: tuple[str, ...]
    unused: tuple[str, ...]


def planned_shapes(model: nn.Module, plan: Removal) -> dict[str, Shape]:
    """The shape that each parameter or buffer that `plan` knows must have in a model pruned by it.

    Names that the model does not have are left out: their modules were folded or replaced.

    Raises:
        GraphPruneError: `model` was not pruned by this plan, or `plan` is no plan.
    """
    removed = getattr(plan, "removed", None)
    if not isinstance(removed, Mapping):
        raise GraphPruneError(f"plan: expected what graphprune.plan returns, got {type(plan).__name__}")
    before: Mapping[str, Sequence[int]] = getattr(plan, "structure", None) or {}
    tensors = _tensors(model)
    expected: dict[str, Shape] = {}
    for name, now in tensors.items():
        if name not in removed and name not in before:
            continue
        axes = removed.get(name, {})
        original = list(before.get(name, ()))
        if name not in before:
            original = [size + len(axes.get(axis, ())) for axis, size in enumerate(now)]
        for axis, indices in axes.items():
            if not 0 <= axis < len(original) or (len(indices) and not 0 <= indices[0] <= indices[-1] < original[axis]):
                raise GraphPruneError(
                    f"plan: {name!r} of shape {now} cannot come from removing {len(indices)} indices of axis {axis} "
                    f"(up to {indices[-1] if len(indices) else '-'}); export the model that this plan was applied to"
                )
        planned = tuple(size - len(axes.get(axis, ())) for axis, size in enumerate(original))
        if planned != now:
            raise GraphPruneError(
                f"plan: {name!r} has shape {now} in the model, but the plan leaves {planned}; "
                f"export the model that this plan was applied to"
            )
        expected[name] = planned
    return expected


def check_captured(program: Any, model: nn.Module, planned: Mapping[str, Shape]) -> set[str]:
    """Check a program that is not optimised yet: every parameter that is computed with is there, with its shape.

    Returns the names of the parameters and buffers that this forward pass computes with (each with its aliases).

    Raises:
        GraphPruneError: a parameter of two or more dimensions is missing, or a shape is not the model's.
    """
    tensors, aliases = _tensors(model), _aliases(model)
    found = {name: _shape(value) for name, value in program.model.graph.initializers.items()}
    exported = program.exported_program
    targets = {**exported.graph_signature.inputs_to_parameters, **exported.graph_signature.inputs_to_buffers}
    used: set[str] = set()
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in targets:
            if any(_operator(user) not in _SIZE_ONLY for user in node.users):
                used.update(aliases.get(targets[node.name], ()))
    for name, shape in found.items():
        _check_shape(name, shape, tensors, planned, permuted=False)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in sorted(used & parameters):
        if len(tensors[name]) >= 2 and not any(alias in found for alias in aliases[name]):
            raise GraphPruneError(f"the exporter lost parameter {name!r} of shape {tensors[name]}; no file was written")
    return used


def check_file(
    found: Mapping[str, Shape], model: nn.Module, used: set[str], planned: Mapping[str, Shape]
) -> Initializers:
    """Check the optimised file, where constants were folded: what still has a parameter's name has its shape.

    `found`: the shapes of the file's initializers. `used`: from `check_captured`.

    Raises:
        GraphPruneError: an initializer with the name of a parameter has neither its shape nor a permutation of it.
    """
    tensors, aliases = _tensors(model), _aliases(model)
    for name, shape in found.items():
        _check_shape(name, shape, tensors, planned, permuted=True)
    spare = Counter(tuple(sorted(shape)) for name, shape in found.items() if name not in tensors)
    exact: list[str] = []
    transposed: list[str] = []
    folded: list[str] = []
    unused: list[str] = []
    for name, _ in model.named_parameters():
        own = next((alias for alias in aliases[name] if alias in found), None)
        key = tuple(sorted(tensors[name]))
        if own is not None:
            (exact if found[own] == tensors[name] else transposed).append(name)
        elif name not in used:
            unused.append(name)
        elif len(key) >= 2:
            if spare[key] > 0:
                spare[key] -= 1
                transposed.append(name)
            else:
                folded.append(name)
    return Initializers(tuple(exact), tuple(transposed), tuple(folded), tuple(unused))


def _check_shape(
    name: str, shape: Shape, tensors: Mapping[str, Shape], planned: Mapping[str, Shape], *, permuted: bool
) -> None:
    expected = planned.get(name, tensors.get(name))
    if expected is None or shape == expected or (permuted and sorted(shape) == sorted(expected)):
        return
    source = "the plan leaves" if name in planned else "the model has"
    raise GraphPruneError(f"initializer {name!r} has shape {shape} in the exported file, but {source} {expected}")


def _operator(node: Any) -> str:
    """The bare name of the operator that an fx node calls."""
    name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))
    return str(name).split(".")[0]


def _shape(value: Any) -> Shape:
    return tuple(int(size) for size in value.shape)


def _tensors(model: nn.Module) -> dict[str, Shape]:
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tuple(tensor.shape) for name, tensor in named}


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """For each parameter and buffer, all names of the same tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        names.setdefault(id(tensor), []).append(name)
    return {name: group for group in names.values() for name in group}
