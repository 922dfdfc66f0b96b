"""A plan in the names of the user's model, and in those of its plain twin, where computed weights are weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from ..dependency.reparametrised import forms_in
from .data import PlanData
from .structure import structure_of

P = TypeVar("P", bound=PlanData)
Removed = dict[str, Mapping[int, tuple[int, ...]]]


def in_users_names(plan: P, bare: nn.Module, model: nn.Module) -> P:
    """`plan`, made for `bare`, as one for `model`, of which `bare` is the plain twin: what is removed from a computed
    weight is removed from what it is computed from."""
    if bare is model:
        return plan
    forms = forms_in(bare)
    removed: Removed = {}
    for name, axes in plan.removed.items():
        form = forms.get(name)
        if form is None:
            removed[name] = axes
            continue
        for source, cut in form.cuts(axes).items():
            removed[_beside(name, source)] = {a: tuple(sorted(i)) for a, i in sorted(cut.items())}
    return dataclasses.replace(plan, removed=removed, structure=structure_of(model))


def in_plain_names(plan: P, bare: nn.Module, model: nn.Module) -> P:
    """The inverse of `in_users_names`."""
    if bare is model:
        return plan
    removed: Removed = dict(plan.removed)
    for name, form in forms_in(bare).items():
        cuts = {s: removed.pop(_beside(name, s)) for s in form.sources() if _beside(name, s) in removed}
        axes = form.axes(cuts) if cuts else {}
        if axes:
            removed[name] = {axis: tuple(sorted(indices)) for axis, indices in sorted(axes.items())}
    return dataclasses.replace(plan, removed=removed, structure=structure_of(bare))


def _beside(name: str, source: str) -> str:
    """The name of what a weight is computed from, which lies in the module of the weight."""
    path = name.rpartition(".")[0]
    return f"{path}.{source}" if path else source


__all__ = ["in_plain_names", "in_users_names"]
