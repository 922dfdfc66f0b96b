"""A plan carried out on a copy of a model: whether it fits, and surgery in order."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..dependency.reparametrised import plain
from ..errors import GraphPruneError
from ..support.walking import all_modules
from .data import PlanData
from .naming import in_plain_names
from .rewriting import replace
from .structure import structure_of
from .surgery import attribute_at, bypass_layers, check_folds, close_gaps, operate, remove_listed_experts, worn

_OTHER = "the plan was made for another model"


def apply(plan: PlanData, model: nn.Module) -> nn.Module:
    """The pruned copy. Raises GraphPruneError where the plan does not fit `model` or cannot be carried out."""
    return _carried_out(plan, model, lambda own, bare: close_gaps(_operated(own, bare), bare, own.layers))


def operated(plan: PlanData, model: nn.Module) -> nn.Module:
    """The pruned copy while the layers that are left out still have their places, and all others their names."""
    return _carried_out(plan, model, _operated)


def _carried_out(plan: PlanData, model: nn.Module, how: Callable[[PlanData, nn.Module], nn.Module]) -> nn.Module:
    """What `how` makes of a plan and a model whose weights are all ordinary ones, computed as in `model` again."""
    check(plan, model)
    bare = plain(model)
    try:
        own = in_plain_names(plan, bare, model)
        small = how(own, bare)
        return small if bare is model else worn(small, own.removed)
    except GraphPruneError:
        raise
    except Exception as error:  # whatever a plan made to mislead broke, it broke in a copy
        raise GraphPruneError(f"the plan cannot be carried out ({type(error).__name__}: {error})") from error


def _operated(plan: PlanData, model: nn.Module) -> nn.Module:
    small = bypass_layers(model, plan.layers) if plan.layers else model
    if plan.changes_widths or not plan.layers:
        attributes = [(a.module, a.name, a.key, a.new) for a in plan.attributes]
        small = operate(small, plan.removed, attributes, plan.folds, plan.rescales, plan.caches)
        remove_listed_experts(small, plan.experts)
        small = replace(small, plan.rewrites)
    return small


def check(plan: PlanData, model: nn.Module) -> None:
    """Raise GraphPruneError unless the plan fits `model`."""
    found = structure_of(model)
    for name, shape in plan.structure.items():
        if name not in found:
            raise GraphPruneError(f"{_OTHER}: this one has no {name}")
        if found[name] != tuple(shape):
            raise GraphPruneError(f"{_OTHER}: {name} has shape {found[name]}, the plan expects {tuple(shape)}")
    extra = [n for n in found if n not in plan.structure]
    if extra:
        raise GraphPruneError(f"{_OTHER}: it knows no {extra[0]}")
    modules = all_modules(model)
    for a in plan.attributes:
        value = attribute_at(modules, a.module, a.name, a.key)
        if value != a.old:
            raise GraphPruneError(f"{_OTHER}: expected {a}, found {value!r}")
    check_folds(model, plan.folds)
