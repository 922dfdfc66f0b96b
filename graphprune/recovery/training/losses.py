"""What a loss holds itself - class vectors, centres, averages, queues, counters - as part of how far a training has
come."""

from __future__ import annotations

import dataclasses
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...errors import GraphPruneError
from ...support.walking import all_modules, tensors_in
from .holders import Table, tables
from .values import DATA, Written, fits, taken, written

_PREFIX = "loss/"
_OF_MODULES = frozenset(vars(nn.Module()))  # flags and tables that every module has


@dataclasses.dataclass
class _Look:
    """What a value is when it is looked at. `form`: as JSON without tensors, `marks`: which tensors, in which versions,
    `stays`: the objects in it that are no data."""

    form: Written
    marks: list[Any]
    stays: set[str]

    def has_changed(self, before: _Look | None) -> bool:
        return before is None or (self.form, self.marks) != (before.form, before.marks)

    def storable(self, before: _Look | None) -> bool:
        """Whether it is data, but for objects that were there from the beginning."""
        return _is_data(self.form) and self.stays <= (set() if before is None else before.stays)


class LossState:
    """The data that a loss holds: of its modules, wherever it keeps them, of itself where it is an object, of the
    objects that it leads to, and of what its functions have kept or name. Not the tensors of `apart`: networks that are
    stored elsewhere, or stay."""

    def __init__(self, loss_fn: Any, apart: Iterable[nn.Module | None] = ()) -> None:
        others = [all_modules(model) for model in apart if model is not None]
        self._apart = {id(t) for modules in others for t in tensors_in(modules).values()}
        skipped = {id(module) for modules in others for module in modules.values()}
        self._tables = [] if loss_fn is None else list(tables(loss_fn, skipped))
        self._start = {name: self._look(value) for name, _, value in self._values()}
        self._moved: set[str] = set()  # values that have changed, in this process or before

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are stored, by name, each once."""
        return self.state()[1]

    def state(self) -> tuple[dict[str, Written], dict[str, Tensor]]:
        """What has changed, which counts something and does not set it, as JSON by name; and tensors by name, those in
        such values too."""
        values: dict[str, Written] = {}
        names: dict[int, tuple[str, Tensor]] = {}

        def naming(place: str, tensor: Tensor, own: bool) -> str | None:
            return None if id(tensor) in self._apart else names.setdefault(id(tensor), (place, tensor))[0]

        for name, table, value in self._values():
            look, before = self._look(value), self._start.get(name)
            if look.has_changed(before):
                self._moved.add(name)
            if look.storable(before) and (name in self._moved or (table.whole and look.marks)):
                stored = written(value, name, naming)
                if stored != {"tensor": name}:
                    values[name] = stored
        return values, dict(names.values())

    def unstored(self) -> list[str]:
        """Names of values that have changed to what cannot be stored."""
        found = {}
        for name, _, value in self._values():
            look, before = self._look(value), self._start.get(name)
            found[name] = look.storable(before) or not look.has_changed(before)
        return sorted(name.removeprefix(_PREFIX) for name in {*found, *self._start} if not found.get(name))

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Written]) -> None:
        """Go on from what `state` gave. Raises GraphPruneError, changing nothing, where it does not fit this loss."""
        stored = {name: tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
        wanted = {name: {"tensor": name} for name in stored if name == _entry(name)} | dict(values)
        whole = ((name, value) for name, table, value in self._values() if table.whole)
        own = {name for name, value in whole if isinstance(value, Tensor) and id(value) not in self._apart}
        for name in (own | {_entry(name) for name in stored}) - wanted.keys():
            raise _other(name)
        for name, value in wanted.items():
            if not self._possible(name, value, stored):
                raise _other(name)
        for name, value in wanted.items():
            table, key = self._place(name)
            table.values[key] = taken(value, table.values.get(key), stored)
        self._moved |= values.keys()

    def _values(self) -> Iterator[tuple[str, Table, Any]]:
        for number, table in enumerate(self._tables):
            for key in [key for key in table.values if key not in _OF_MODULES]:
                value = table.values[key]
                if isinstance(value, DATA):
                    yield f"{_PREFIX}{number}.{table.kind}.{key}", table, value

    def _look(self, value: Any) -> _Look:
        marks: list[Any] = []
        stays: set[str] = set()

        def naming(place: str, tensor: Tensor, own: bool) -> str | None:
            if id(tensor) in self._apart:
                return None
            version = 0 if is_lazy(tensor) or tensor.is_inference() else tensor._version
            marks.append((weakref.ref(tensor), version) if own else zlib.crc32(tensor.numpy().tobytes()))
            return ""

        form = written(value, "", naming, staying=stays.add)
        return _Look(form, marks, stays)

    def _possible(self, name: str, value: Written, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a run of this loss may have made such a value there: no other attributes of a class are touched."""
        try:
            table, key = self._place(name)
        except LookupError:
            return False
        if key in table.values:
            return isinstance(now := table.values[key], DATA) and fits(value, now, tensors)
        of_class = getattr(type(table.owner), key, None)
        return table.values is getattr(table.owner, "__dict__", None) and (
            isinstance(of_class, DATA) and not key.startswith("__") and fits(value, None, tensors)
        )

    def _place(self, name: str) -> tuple[Table, str]:
        """The table and the key of a name; LookupError where there is none."""
        number, kind, key = name.removeprefix(_PREFIX).split(".", 2)
        table = self._tables[int(number)]
        if table.kind != kind or not key.isidentifier():
            raise LookupError(name)
        return table, key


def _entry(name: str) -> str:
    """The value that a tensor is in, by the name of the tensor."""
    return _PREFIX + name.removeprefix(_PREFIX).partition("/")[0]


def _is_data(form: Written) -> bool:
    return not (isinstance(form, dict) and "stays" in form)


def _other(name: str) -> GraphPruneError:
    return GraphPruneError(f"it is of another loss: {name.removeprefix(_PREFIX)} does not fit; pass the same loss_fn")
