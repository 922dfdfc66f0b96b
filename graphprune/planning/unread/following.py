"""Which attributes follow the widths of layers, which stay, and which of the two the code does not tell."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping

from torch import nn

from ...errors import GraphPruneError
from ...plans.data import AttributeChange, UnsettledSize
from ...support.suggestions import did_you_mean
from ...support.walking import all_modules, first_names
from ...tracing.blueprints.equations import sizes_of
from ...tracing.blueprints.solving import Solution
from ...tracing.cloning import INTERNAL
from ...tracing.origin import Attribute
from ..request import FOLLOW, HOLD
from .methods import counts_with
from .network import Network, is_torchs
from .shapes import Removed
from .used import Used

# What torch's layers say of themselves, and surgery keeps true.
_DESCRIBED = frozenset(
    "in_channels out_channels groups in_features out_features in1_features in2_features num_features num_channels "
    "num_groups normalized_shape num_embeddings embedding_dim num_parameters input_size hidden_size embed_dim kdim "
    "vdim num_heads head_dim kernel_size stride padding dilation output_padding num_layers proj_size padding_idx "
    "_reversed_padding_repeated_twice".split()
)


@dataclasses.dataclass(frozen=True)
class Unread:
    """`changes`: attributes that follow. `unsettled`: those of which the code does not tell."""

    changes: tuple[AttributeChange, ...] = ()
    unsettled: tuple[UnsettledSize, ...] = ()


def unread_sizes(model: nn.Module, removed: Removed, used: Used, asked: Mapping[str, str]) -> Unread:
    """The attributes that nothing read. `used`: those that were. `asked`: the option `sizes`."""
    modules = first_names(all_modules(model))
    wanted = _attributes(modules, used.known)
    choices = _choices(asked, wanted, used.known)
    if not removed or not wanted:
        return Unread()
    return _Following(Network(model, modules, removed, used), used).settle(wanted, choices)


def _attributes(modules: Mapping[str, nn.Module], known: Mapping[Attribute, int]) -> list[Attribute]:
    """Whole numbers above 1, and those in lists and tuples, that the user's modules keep and the run did not read."""
    read_ones = {(a.module, a.name, a.key) for a in known}
    found: list[Attribute] = []
    for path, module in modules.items():
        if is_torchs(module):
            continue
        layer = sizes_of(module) is not None
        for name, value in vars(module).items():
            if name in INTERNAL or (layer and name in _DESCRIBED):
                continue
            if type(value) is int:
                found.append(Attribute(path, name, (), value))
            elif type(value) in (list, tuple):
                found += [Attribute(path, name, (i,), item) for i, item in enumerate(value) if type(item) is int]
    return [a for a in found if a.value > 1 and (a.module, a.name, a.key) not in read_ones]


def _choices(
    asked: Mapping[str, str], wanted: Iterable[Attribute], known: Mapping[Attribute, int]
) -> dict[Attribute, str]:
    """What the user says of attributes. Raises GraphPruneError for names that are none, and for those whose size the
    recorded call reads."""
    found: dict[Attribute, str] = {}
    for pattern, choice in asked.items():
        mine = [a for a in wanted if _named(pattern, a)]
        if not mine:
            used = next((a for a in known if _named(pattern, a)), None)
            if used is not None:
                raise GraphPruneError(
                    f"sizes: {used} is read by the call itself, so it is what the widths make it; to hold the channels "
                    f"use ignore"
                )
            names = [_name(a) for a in wanted]
            raise GraphPruneError(
                f"sizes: no module keeps a whole number above 1 called {pattern!r}{did_you_mean(pattern, names)}"
            )
        found.update(dict.fromkeys(mine, choice))
    return found


def _name(attribute: Attribute) -> str:
    return f"{attribute.module}.{attribute.name}" if attribute.module else attribute.name


def _named(pattern: str, attribute: Attribute) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (_name(attribute), attribute.name, str(attribute)))


class _Following:
    """Which of a network's attributes follow."""

    def __init__(self, network: Network, used: Used) -> None:
        self.network, self.used = network, used

    def settle(self, wanted: list[Attribute], choices: Mapping[Attribute, str]) -> Unread:
        """What becomes of each attribute."""
        found, after = self._solved(wanted)
        changes, unsettled = [], []
        for attribute in wanted:
            choice, new = choices.get(attribute), found[attribute]
            place = attribute.module, attribute.name, attribute.key, attribute.value
            if choice == HOLD or (choice is None and new == attribute.value):
                continue
            if choice == FOLLOW and new in (None, attribute.value):
                new = self._equal(attribute) or new
            change = None if new is None else AttributeChange(*place, new)
            why = self._doubt(attribute, after) if change is None else self._held(change, choice == FOLLOW)
            if why:
                unsettled.append(UnsettledSize(*place, why))
            elif change is not None and new != attribute.value:
                changes.append(change)
        return Unread(tuple(changes), tuple(unsettled))

    def _solved(self, wanted: list[Attribute]) -> tuple[dict[Attribute, int | None], Solution]:
        """What each attribute must be: by the constructors, and where they do not tell by other methods."""
        network = self.network
        for path in dict.fromkeys(a.module for a in wanted):
            network.read(path)
        before, after = network.solve()
        found = {attribute: network.found(attribute, before, after) for attribute in wanted}
        missing = [a for a in wanted if found[a] is None]
        if missing and network.read_methods(missing):
            again = network.solve()
            found.update((attribute, network.found(attribute, *again)) for attribute in missing)
        return found, after

    def _held(self, change: AttributeChange, asked: bool) -> str:
        """Why the recorded call would do something else with an attribute changed; "" where it would not."""
        guard = self.used.asks(change)
        if guard:
            return f"it would be {change.new}, and the call asks whether {guard}"
        kind = type(self.network.modules[change.module])
        if not asked and counts_with(kind, change.name):  # type: ignore[arg-type]
            return f"it would be {change.new}, and the code loops over it or makes lists of that length"
        return ""

    # -- what the code does not tell

    def _changed(self, attribute: Attribute) -> dict[int, str]:
        """The new sizes of axes at or below the module that were as long as the attribute says, each with one."""
        prefix = f"{attribute.module}." if attribute.module else ""
        found: dict[int, str] = {}
        for name, axis in self.network.cut_by_size.get(attribute.value, ()):
            if name.startswith(prefix):
                found.setdefault(self.network.after[name][axis], f"axis {axis} of {name}")
        return found

    def _equal(self, attribute: Attribute) -> int | None:
        """The new size of the layers that are as wide as the attribute says; None where none changes. Raises
        GraphPruneError where they differ."""
        found = self._changed(attribute)
        if len(found) < 2:
            return next(iter(found), None)
        said = ", ".join(f"{size} ({where})" for size, where in found.items())
        raise GraphPruneError(
            f"sizes: {attribute} = {attribute.value} is to follow the layers in its module that are as wide, and their "
            f"new widths differ: {said}; leave it out, and set it yourself"
        )

    def _doubt(self, attribute: Attribute, after: Solution) -> str:
        """Why the attribute may be out of date; "" where nothing speaks for it."""
        torn = {int(v) for v in self.network.torn(attribute, after)}
        if torn:
            return f"layers made with it have different widths now: {' and '.join(map(str, sorted(torn)))}"
        equal = self._changed(attribute)
        if equal:
            new, where = next(iter(equal.items()))
            return f"{where} was as long and is {new} now; the code does not say whether they are one number"
        return ""


__all__ = ["Unread", "unread_sizes"]
