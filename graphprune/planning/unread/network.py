"""The code of a network's classes beside the sizes that its layers have: what each number in it must be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from ...tracing.blueprints import Equation, Reading, Width, equations_of, read
from ...tracing.blueprints.equations import sizes_of
from ...tracing.blueprints.solving import Solution, System
from ...tracing.blueprints.values import Items, Number, Open, Value, number_of
from ...tracing.origin import Attribute, Expr, TensorSize, leaves
from .methods import building
from .shapes import Removed, shapes_of, stated
from .used import Used

_NOTHING = nn.Identity()


def is_torchs(module: nn.Module) -> bool:
    """A layer or a list of torch's own."""
    return type(module).__module__.startswith("torch.nn")


class Network:
    """The code of a network's classes beside the sizes that its layers have, before and after."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        removed: Removed,
        used: Used,
    ) -> None:
        self.modules = modules
        self.known = {(a.module, a.name, a.key): v for a, v in used.known.items()}
        self.before, self.after, self.cut = shapes_of(model, removed)
        self.readings: dict[str, Reading] = {}
        self.sizes: tuple[dict[Width, int], dict[Width, int]] = ({}, {})
        self.equations: list[Equation] = []

    def read(self, path: str) -> None:
        """The code of a module, and of those inside it that get numbers from it."""
        if path in self.readings or is_torchs(self.modules.get(path, _NOTHING)):
            return
        reading = self.readings[path] = read(path, self.modules[path])
        self._add(equations_of(reading))

    def _add(self, equations: Iterable[Equation]) -> None:
        for equation in equations:
            self.equations.append(equation)
            if isinstance(equation.right, Width):
                self._measure(equation.right)
            else:
                self.read(equation.right.module.removesuffix("()"))

    def _measure(self, width: Width) -> None:
        if width not in self.sizes[0]:
            for sizes, shapes, new in ((self.sizes[0], self.before, False), (self.sizes[1], self.after, True)):
                size = self._size(width, shapes, new)
                if size is not None:
                    sizes[width] = size

    def _size(self, width: Width, shapes: Mapping[str, tuple[int, ...]], new: bool) -> int | None:
        module = self.modules.get(width.module)
        if module is None:
            return None
        prefix = f"{width.module}." if width.module else ""
        if width.name in module._parameters or width.name in module._buffers:
            shape = shapes.get(prefix + width.name, ())
            return shape[width.axis] if width.axis is not None and width.axis < len(shape) else None
        if sizes_of(module) is None:
            return None

        def number(name: str) -> int:
            now = vars(module).get(name)
            return self.known.get((width.module, name, ()), now) if new else now  # type: ignore[return-value]

        return stated(module, width, lambda name: shapes.get(prefix + name), number)

    def solve(self) -> tuple[Solution, Solution]:
        """The numbers of the code before and after."""
        old, kept = dict[Attribute, int | float](), dict[Attribute, int | float]()
        for path, reading in self.readings.items():
            old.update(reading.values)
            for name, value in reading.fields.items():
                for key, part in _parts(value, path):
                    now = _kept(self.modules[path], name, key)
                    if isinstance(part, Attribute) and now is not None:
                        old[part] = now
                        if (path, name, key) in self.known:
                            kept[part] = self.known[path, name, key]
        for leaf in self._leaves():
            if isinstance(leaf, Attribute) and not leaf.module.endswith(")"):
                self._of_another(leaf, old, kept)
        before = self._system(self.equations, self.sizes[0]).solve(old, {})
        sound = [e for e in self.equations if self._holds(e, before)]
        idle = {leaf: v for leaf, v in before.numbers.items() if leaf.name.endswith("()") and leaf not in before.torn}
        return before, self._system(sound, self.sizes[1]).solve(kept, idle)

    def _leaves(self) -> set[Attribute | TensorSize]:
        """All numbers that the code speaks of."""
        exprs = [equation.left for equation in self.equations]
        for path, reading in self.readings.items():
            exprs += reading.definitions.values()
            exprs += [part for value in reading.fields.values() for _, part in _parts(value, path)]
        return {leaf for expr in exprs for leaf in leaves(expr)}

    def _of_another(self, leaf: Attribute, old: dict[Attribute, Any], kept: dict[Attribute, Any]) -> None:
        """`self.body.out_channels`: a size of a layer, or a number that another module keeps."""
        width = Width(leaf.module, leaf.name)
        self._measure(width)
        if width in self.sizes[0]:
            old[leaf], kept[leaf] = self.sizes[0][width], self.sizes[1][width]
        elif (leaf.module, leaf.name, ()) in self.known:
            kept[leaf] = self.known[leaf.module, leaf.name, ()]

    def _system(self, equations: Iterable[Equation], sizes: Mapping[Width, int]) -> System:
        definitions: dict[Attribute, Expr] = {}
        for path, reading in self.readings.items():
            definitions.update(reading.definitions)
            for name, value in reading.fields.items():  # another module may read it
                for key, part in _parts(value, path):
                    leaf = Attribute(path, name, key)
                    if part != leaf:
                        definitions[leaf] = part
        return System(equations, sizes, definitions)

    def _holds(self, equation: Equation, before: Solution) -> bool:
        """The code made what is there. Otherwise it was misread, or somebody has changed the layer."""
        left = before.value(equation.left)
        right = equation.right
        size = before.value(right) if isinstance(right, Attribute) else self.sizes[0].get(right)
        return left is None or size is None or left == size

    def expr(self, attribute: Attribute) -> Expr:
        reading = self.readings.get(attribute.module)
        parts = _parts(reading.fields.get(attribute.name), attribute.module) if reading is not None else ()
        bare = Attribute(attribute.module, attribute.name, attribute.key)
        return dict(parts).get(attribute.key, bare)

    def found(self, attribute: Attribute, before: Solution, after: Solution) -> int | None:
        """What the attribute must be; None where that is not clear."""
        expr = self.expr(attribute)
        old, new = before.value(expr), after.value(expr)
        if new is None or (old is not None and old != attribute.value):
            return None
        return int(new) if new == int(new) and new >= 1 else None

    def read_methods(self, missing: Iterable[Attribute]) -> bool:
        """What other methods would build with these attributes."""
        names: dict[str, set[str]] = defaultdict(set)
        for attribute in missing:
            names[attribute.module].add(attribute.name)
        before = len(self.equations)
        for path, needed in names.items():
            start = self.readings.get(path)
            for name in building(type(self.modules[path]), frozenset(needed)) if start is not None else ():
                made = read(path, self.modules[path], name, start)
                assert start is not None
                made.fields = {n: v for n, v in made.fields.items() if v is not start.fields.get(n)}
                start.values.update(made.values)
                start.definitions.update(made.definitions)
                self._add(equations_of(made))
        return len(self.equations) > before


def _parts(value: Value | None, path: str) -> Iterator[tuple[tuple[int | str, ...], Expr]]:
    """The numbers in an attribute, by key."""
    if isinstance(value, Items):
        for i, item in enumerate(value.values if not value.loose else ()):
            for key, part in _parts(item, path):
                yield (i, *key), part
    elif isinstance(value, Open) and value.known and isinstance(value.value, (list, tuple)):
        for i, item in enumerate(value.value):
            if type(item) is int:
                yield (i,), value.part(str(i)).leaf
    elif value is not None:
        number = number_of(value, path)
        if isinstance(number, Number):
            yield (), number.expr


def _kept(module: nn.Module, name: str, key: tuple[int | str, ...]) -> int | None:
    found: Any = vars(module).get(name)
    for step in key:
        found = found[step] if isinstance(found, (list, tuple)) and type(step) is int and step < len(found) else None
    return found if type(found) is int else None


__all__ = ["Network", "is_torchs"]
