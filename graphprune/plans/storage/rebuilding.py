"""The pruned structure from the dense network: the plans of a file, applied in their order."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ...errors import GraphPruneError
from ...tracing.names import all_modules
from ..history import Applied, history_of


def rebuilt(model: nn.Module, histories: Mapping[str, tuple[Applied, ...]]) -> nn.Module:
    """`model` after the plans of each module. `model` itself may be changed where only its parts were pruned.

    A part may have been pruned before or after the whole: the order between modules is the one in which the plans fit.
    """
    pending = {path: list(_left(model, path, plans)) for path, plans in histories.items()}
    while any(pending.values()):
        failures = []
        for path, plans in pending.items():
            if not plans:
                continue
            module = _module(model, path)
            try:
                plans[0].check(module)
            except GraphPruneError as error:
                failures.append(f"{error}{f' (in {path})' if path else ''}")
                continue
            model = _with(model, path, _applied(plans.pop(0), module))
            break
        else:
            raise GraphPruneError(failures[0])
    return model


def _left(model: nn.Module, path: str, plans: tuple[Applied, ...]) -> tuple[Applied, ...]:
    """The plans that have not been applied: the model may be built pruned in part."""
    known = history_of(_module(model, path))
    done = len(known.plans) if known is not None else 0
    if known is not None and [p.removed for p in known.plans] != [p.removed for p in plans[:done]]:
        raise GraphPruneError(f"{path or 'the model'} has been pruned already, and otherwise than in the file")
    return plans[done:]


def _module(model: nn.Module, path: str) -> nn.Module:
    found = all_modules(model).get(path)
    if found is None:
        raise GraphPruneError(f"the file describes another model: this one has no module {path}")
    return found


def _applied(plan: Applied, module: nn.Module) -> nn.Module:
    try:
        return plan.apply(module)
    except GraphPruneError:
        raise
    except Exception as error:  # a plan made to mislead: whatever it broke, it broke in a copy
        raise GraphPruneError(f"the plan cannot be carried out ({type(error).__name__}: {error})") from error


def _with(model: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """`model` with `new` in the place of the module at `path`, under all its paths."""
    if not path:
        return new
    modules = all_modules(model)
    old = modules[path]
    for parent in modules.values():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return model
