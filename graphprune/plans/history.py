"""What was done to a module, remembered by the module itself: the plans that were applied to it, in order.

The memory is one entry in the module's own `__dict__`. Copies, pickles, `to()` and later prunings carry it along; the
state dict does not show it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from ..support.walking import all_modules
from .structure import structure_of

KEY = "_graphprune_history"


class Applied(Protocol):
    """What is remembered: a plan, of which this is what can be done with it later.

    A protocol, since surgery carries histories along, and `Plan` is made of what surgery does.
    """

    @property
    def removed(self) -> Mapping[str, Mapping[int, tuple[int, ...]]]: ...

    @property
    def folds(self) -> Sequence[Any]: ...

    @property
    def structure(self) -> Mapping[str, tuple[int, ...]]: ...

    def to_dict(self) -> dict[str, Any]: ...

    def check(self, model: nn.Module) -> None: ...

    def apply(self, model: nn.Module) -> nn.Module: ...


@dataclasses.dataclass(frozen=True)
class History:
    """`plans`: in the order in which they were applied. `structure`: names and shapes after the last of them.
    `repairs`: for each plan how what it lost was repaired ("least_squares", say), "" for not at all."""

    plans: tuple[Applied, ...]
    structure: Mapping[str, tuple[int, ...]]
    repairs: tuple[str, ...]

    def __copy__(self) -> History:
        return self

    def __deepcopy__(self, memo: Any) -> History:
        return self


def history_of(module: nn.Module) -> History | None:
    """The history of `module` itself, not of its parts; None if no plan was applied to it."""
    found = module.__dict__.get(KEY)
    return found if isinstance(found, History) else None


def histories(model: nn.Module) -> dict[str, History]:
    """The histories in `model` by module path; that of a module with several paths once."""
    seen: set[int] = set()
    out = {}
    for path, module in all_modules(model).items():
        found = history_of(module)
        if found is not None and id(module) not in seen:
            seen.add(id(module))
            out[path] = found
    return out


def remember(pruned: nn.Module, original: nn.Module, plan: Applied, repair: str = "") -> nn.Module:
    """Note in `pruned` that it is `original` after `plan`, and how it was repaired; returns it."""
    before = history_of(original) or History((), {}, ())
    pruned.__dict__[KEY] = History((*before.plans, plan), structure_of(pruned), (*before.repairs, repair))
    return pruned


def renewed(pruned: nn.Module, plan: Applied) -> nn.Module:
    """Note that the last of the plans of `pruned` is `plan`, the same in other names, and that its own names are as
    they are now; returns it."""
    found = history_of(pruned)
    if found is not None:
        plans = (*found.plans[:-1], plan)
        pruned.__dict__[KEY] = dataclasses.replace(found, plans=plans, structure=structure_of(pruned))
    return pruned


def repair_after(pruned: nn.Module, plan: Applied) -> str:
    """How `pruned` was repaired after `plan`; "" where it was not, or where that was not the last plan."""
    found = history_of(pruned)
    return found.repairs[-1] if found is not None and found.plans and found.plans[-1].removed == plan.removed else ""


def note_repairs(model: nn.Module, repairs: Mapping[str, tuple[str, ...]]) -> None:
    """Put back what was known of repairs, by module path, for plans that were applied again."""
    for path, module in all_modules(model).items():
        found = history_of(module)
        if found is not None and len(repairs.get(path, ())) == len(found.plans):
            module.__dict__[KEY] = dataclasses.replace(found, repairs=repairs[path])


def carry(old: nn.Module, new: nn.Module) -> None:
    """`new` takes the place of `old`: it remembers the same."""
    found = history_of(old)
    if found is not None:
        new.__dict__[KEY] = found


def changed_since(model: nn.Module) -> str:
    """What has been done to the tensors' names and shapes since plans were applied, in words; "" if nothing has.

    Where a part was pruned by itself and with the whole, the later of the two plans is the one that still holds. A bias
    that a layer was given (by recovery) is no change: its place was there.
    """
    now = structure_of(model)
    found = {f"{path}." if path else "": history.structure for path, history in histories(model).items()}
    covered = [name for name in now if name.startswith(tuple(found))]
    for name in dict.fromkeys([*(prefix + name for prefix, names in found.items() for name in names), *covered]):
        known = [names.get(name.removeprefix(prefix)) for prefix, names in found.items() if name.startswith(prefix)]
        shape = now.get(name)
        if shape in known or (shape is not None and not any(known) and name.rpartition(".")[2] == "bias"):
            continue
        if shape is None:
            return f"{name} is gone"
        return f"{name} has shape {shape} instead of {known[-1]}" if any(known) else f"{name} was added"
    return ""
