"""What modules, tensors, names and patterns in an argument mean: one matcher for all functions that take them.

An item is a module or tensor of the model (that very object), the name of one, or a pattern (`fnmatch`: `*` crosses
points). What is a name is no pattern. It means what it names and all that lies in it, and that under all of its names
where it is registered several times; "" and "*" mean the whole model.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import GraphPruneError
from ..support.suggestions import did_you_mean
from ..support.walking import all_modules, named_tensors

# The higher, the better a pattern matches: length of the path of the module that it hits, whether it is a name, its own
# length, and the place among the patterns, from the last.
Rank = tuple[int, bool, int, int]
_SEE = "; see model.named_modules() and model.named_parameters()"


def items_of(argument: Any, where: str) -> list[Any]:
    """The items of an argument, one by one: nothing for None, and a single one need not be in a list."""
    if argument is None:
        return []
    if isinstance(argument, (str, nn.Module, Tensor)):
        return [argument]
    if not hasattr(argument, "__iter__"):
        raise _no_item(argument, where)
    items = list(argument)
    for item in items:
        if not isinstance(item, (str, nn.Module, Tensor)):
            raise _no_item(item, where)
    return items


def _no_item(value: Any, where: str) -> GraphPruneError:
    return GraphPruneError(f"{where}: expected modules, parameters, names or patterns, got {type(value).__name__}")


@dataclasses.dataclass(frozen=True, eq=False)
class OtherNames:
    """What the user may call things of a model that stands for his own: `objects`, his modules by identity, and
    `tensors`, names of his tensors, each with the name of what stands for it."""

    objects: Mapping[int, str]
    tensors: Mapping[str, str]

    def __deepcopy__(self, memo: Any) -> OtherNames:
        return self

    def put_on(self, model: nn.Module) -> None:
        """From here on the model goes by them too."""
        model.__dict__[_OTHERS] = self

    @staticmethod
    def of(model: nn.Module) -> OtherNames:
        """Those of a model; none for most."""
        found = model.__dict__.get(_OTHERS)
        return found if isinstance(found, OtherNames) else OtherNames({}, {})

    @staticmethod
    def take_off(model: nn.Module) -> None:
        """The model has its own names alone."""
        model.__dict__.pop(_OTHERS, None)


_OTHERS = "_graphprune_other_names"


class NameTable:
    """The modules and tensors of a network by name.

    `modules`, `tensors`: name -> what is the same for all names of one thing, and for no other. Modules come before
    those inside them. Tensors and modules themselves are found where that is their `id`, or `objects` has it.
    """

    def __init__(
        self,
        modules: Mapping[str, Hashable],
        tensors: Mapping[str, Hashable],
        objects: Mapping[int, str] | None = None,
    ) -> None:
        self._keys: dict[str, Hashable] = {**modules, **tensors}
        self._modules = modules.keys()
        names: dict[Hashable, list[str]] = {}
        for name, key in self._keys.items():
            names.setdefault(key, []).append(name)
        self._shared = {name: found for found in names.values() if len(found) > 1 for name in found}
        self._objects = objects if objects is not None else {k: f[0] for k, f in names.items() if isinstance(k, int)}

    @classmethod
    def of(cls, model: nn.Module) -> NameTable:
        """Of a model: all modules, parameters and buffers."""
        modules, tensors, others = all_modules(model), named_tensors(model), OtherNames.of(model)
        keys = {name: id(tensor) for name, tensor in tensors.items()}
        keys.update((name, id(tensors[first])) for name, first in others.tensors.items())
        table = cls({n: id(m) for n, m in modules.items()}, keys)
        table._objects = {**table._objects, **others.objects}
        return table

    def meant(self, item: Any, where: str) -> dict[str, str]:
        """The names of all that `item` means, each with the name that was hit: its own, or that of the outermost module
        around it which the item names. `where`: the name of the argument, for errors.

        Raises GraphPruneError for what is no item, belongs to another model, or matches nothing.
        """
        hits = self._hits(item, where)
        out: dict[str, str] = {}
        for name in self._keys:
            parent = name.rpartition(".")[0]
            if name and parent in out:
                out[name] = out[parent]
            elif name in hits:
                out[name] = name
        for name in [name for name in out if name in self._shared] if self._shared else ():
            for other in self._shared[name]:
                out.setdefault(other, out[name])
        return out

    def all_meant(self, argument: Any, where: str) -> set[str]:
        """The names of all that any item of an argument means."""
        return {name for item in items_of(argument, where) for name in self.meant(item, where)}

    def texts(self, argument: Any, where: str) -> list[str]:
        """The items as names and patterns, which mean the same in copies of the model. Errors are those of `meant`."""
        out = []
        for item in items_of(argument, where):
            hits = self._hits(item, where)
            out.append(item if isinstance(item, str) else next(iter(hits)) or "*")
        return out

    def ranked(self, patterns: Iterable[str], where: str) -> dict[str, tuple[Rank, str]]:
        """For every name that any of the patterns means, the one that counts, and how well it matches: the match that
        lies innermost counts, of those at one module an exact name before a pattern, then the longest, then the first.
        """
        best: dict[str, tuple[Rank, str]] = {}
        for place, pattern in enumerate(patterns):
            for name, hit in self.meant(pattern, where).items():
                module = hit if hit in self._modules else hit.rpartition(".")[0]
                rank = (len(module), pattern in self._keys, len(pattern), -place)
                if name not in best or rank > best[name][0]:
                    best[name] = rank, pattern
        return best

    def _hits(self, item: Any, where: str) -> set[str]:
        """The names that an item names itself."""
        if isinstance(item, (nn.Module, Tensor)):
            name = self._objects.get(id(item))
            if name is None:
                kind = "module" if isinstance(item, nn.Module) else "parameter or buffer"
                raise GraphPruneError(f"{where}: {type(item).__name__} is no {kind} of this model")
            return {name}
        if not isinstance(item, str):
            raise _no_item(item, where)
        if item in self._keys:
            return {item}
        match = re.compile(fnmatch.translate(item)).match
        found = {name for name in self._keys if match(name)}
        if not found:
            hint = did_you_mean(item, self._keys) or _SEE
            raise GraphPruneError(f"{where}: no module or parameter matches {item!r}{hint}")
        return found


def modules_around(names: Iterable[str]) -> Iterator[str]:
    """The paths of all modules that any of the names lies in, the model's "" included."""
    seen: set[str] = set()
    for name in names:
        while name:
            name = name.rpartition(".")[0]
            if name in seen:
                break
            seen.add(name)
            yield name
