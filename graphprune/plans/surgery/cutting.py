"""Apply a decision to a copy of a model: fold, cut, rescale, set attributes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...dependency.reparametrised import forms_in
from ...dependency.temperature import Rescale
from ...errors import GraphPruneError
from ...support.cutting import Kept, cut_tensor
from ...support.walking import all_modules, named_tensors
from ..history import carry
from ..modules.recurrent import replacement_of
from .attributes import refresh, set_attribute
from .copying import clone_with
from .folding import Fold, fold_names, folded_tensors

Removed = Mapping[str, Mapping[int, Sequence[int]]]


def operate(
    model: nn.Module,
    removed: Removed,
    attributes: Sequence[tuple[str, str, tuple[int | str, ...], int]],
    folds: Sequence[Fold],
    rescales: Sequence[Rescale],
    caches: Sequence[tuple[str, str]] = (),
) -> nn.Module:
    """A pruned copy. `model` is not touched, and nothing is returned unless every step succeeded."""
    gone = {f"{f.batch_norm}.{p}" for f in folds for p in ("weight", "bias", "running_mean", "running_var")}
    named = named_tensors(model)
    cuts: dict[str, Mapping[int, Sequence[int]]] = {n: a for n, a in removed.items() if n not in gone}
    for fold in folds:
        weight, bias = fold_names(fold)
        if bias not in named:
            lost = _output_cut(model, fold, cuts.get(weight, {}), removed)
            if len(lost):
                cuts[bias] = {0: lost}
    forms = forms_in(model)
    keep = Kept()
    new, done = _folded(model, folds, cuts, {scale.parameter for scale in rescales}, keep)
    with torch.no_grad():
        for scale in rescales:
            tensor = new.get(scale.parameter, named[scale.parameter])
            factor = torch.ones(tensor.shape[scale.axis], dtype=torch.promote_types(tensor.dtype, torch.float32))
            factor[list(scale.indices)] = scale.factor
            view = [1] * tensor.dim()
            view[scale.axis] = -1
            factor = factor.to(tensor.device).reshape(view)
            new[scale.parameter] = (tensor.detach().to(factor.dtype) * factor).to(tensor.dtype)
        for name, axes in cuts.items():
            if name not in done:
                new[name] = _cut(name, new[name] if name in new else named[name], axes, keep)
            if name in forms:
                new[name] = forms[name].settled(new[name])
    out = clone_with(model, new, {fold.batch_norm: nn.Identity() for fold in folds}, caches)
    modules = all_modules(out)
    whole = with_free_widths(out, modules, new)
    if whole is not None:
        out, modules = whole, all_modules(whole)
    for module, attribute, key, value in attributes:
        set_attribute(modules, module, attribute, key, value)
    changed = {id(named[n]) for n in new if n in named}
    tied = {n for n, t in named.items() if id(t) in changed}  # under all their names
    touched = {n.rpartition(".")[0] for n in tied | new.keys()}
    touched |= {path.rpartition(".")[0] for path in touched}
    refresh([module for path, module in modules.items() if path in touched])
    return out


def _cut(name: str, tensor: Tensor, axes: Mapping[int, Sequence[int]], keep: Kept) -> Tensor:
    try:
        return cut_tensor(tensor, axes, keep)
    except IndexError as error:
        raise GraphPruneError(f"the plan removes from {name} what it does not have: {error}") from error


def _folded(
    model: nn.Module,
    folds: Sequence[Fold],
    cuts: Mapping[str, Mapping[int, Sequence[int]]],
    rescaled: set[str],
    keep: Kept,
) -> tuple[dict[str, Tensor], set[str]]:
    """The tensors of layers with their batch norms folded in, and the names of those that are cut already: a weight is
    cut before, so that only what stays is multiplied, unless its outputs lie in several axes or it is rescaled."""

    def cut(name: str, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        axes = cuts.get(name, {})
        return _cut(name, weight, axes, keep), _cut(name, scale, {0: axes[0]} if 0 in axes else {}, keep)

    def can_be(fold: Fold) -> bool:
        return fold.axis == 0 and fold_names(fold)[0] not in rescaled

    early = list(filter(can_be, folds))
    new = folded_tensors(model, list(itertools.filterfalse(can_be, folds))) | folded_tensors(model, early, cut)
    return new, {fold_names(fold)[0] for fold in early}


def with_free_widths(
    model: nn.Module, modules: Mapping[str, nn.Module], touched: Iterable[str]
) -> nn.Module | None:
    """`model` with modules of ours where torch's cannot express the widths that its tensors `touched` have now; None
    where there are none. `modules`: those of `model` by path."""
    made = {}
    for path in {name.rpartition(".")[0] for name in touched}:
        new = replacement_of(modules[path]) if path in modules else None
        if new is not None:
            carry(modules[path], new)
            made[id(modules[path])] = new
    if not made:
        return None
    for parent in modules.values():
        for name, child in parent._modules.items():
            if id(child) in made:
                parent._modules[name] = made[id(child)]
    return made.get(id(model), model)


def _output_cut(
    model: nn.Module, fold: Fold, weight_cut: Mapping[int, Sequence[int]], removed: Removed
) -> Sequence[int]:
    """Which outputs of the layer go: what its batch norm loses (a grouped transposed weight does not say)."""
    norm = f"{fold.batch_norm}.running_mean"
    if norm in removed:
        return removed[norm].get(0, ())
    if not weight_cut:
        return ()
    if fold.axis == 0:
        return weight_cut.get(0, ())
    raise GraphPruneError(f"the plan has no entry for {norm}, which is folded into {fold.layer}")
