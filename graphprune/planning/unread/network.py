"""The code of a network's classes beside the sizes that its layers have: what each number in it must be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ...tracing.blueprints import Alikeness, Equation, Summary, Width, summary_of
from ...tracing.blueprints.equations import sizes_of
from ...tracing.blueprints.solving import Solution, System
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
        self.alikeness = Alikeness()
        self.said: dict[str, Summary] = {}
        self.sizes: tuple[dict[Width, int], dict[Width, int]] = ({}, {})

    def read(self, path: str) -> None:
        """The code of a module, and of those inside it that get numbers from it."""
        if path in self.said or is_torchs(self.modules.get(path, _NOTHING)):
            return
        self._add(path, summary_of(path, self.modules[path], self.alikeness))

    def _add(self, path: str, said: Summary) -> None:
        self.said[path] = said
        for equation in said.equations:
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
        for path, said in self.said.items():
            old.update(said.values)
            for name, parts in said.parts.items():
                for key, part in parts:
                    now = _kept(self.modules[path], name, key)
                    if isinstance(part, Attribute) and now is not None:
                        old[part] = now
                        if (path, name, key) in self.known:
                            kept[part] = self.known[path, name, key]
        for leaf in self._leaves():
            if isinstance(leaf, Attribute) and not leaf.module.endswith(")"):
                self._of_another(leaf, old, kept)
        equations = [equation for said in self.said.values() for equation in said.equations]
        before = self._system(equations, self.sizes[0]).solve(old, {})
        sound = [e for e in equations if self._holds(e, before)]
        idle = {leaf: v for leaf, v in before.numbers.items() if leaf.name.endswith("()") and leaf not in before.torn}
        return before, self._system(sound, self.sizes[1]).solve(kept, idle)

    def _leaves(self) -> set[Attribute | TensorSize]:
        """All numbers that the code speaks of."""
        exprs: list[Expr] = []
        for said in self.said.values():
            exprs += [equation.left for equation in said.equations]
            exprs += said.definitions.values()
            exprs += [part for parts in said.parts.values() for _, part in parts]
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
        for path, said in self.said.items():
            definitions.update(said.definitions)
            for name, parts in said.parts.items():  # another module may read it
                for key, part in parts:
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
        said = self.said.get(attribute.module)
        parts = said.parts.get(attribute.name, ()) if said is not None else ()
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
        more = False
        for path, needed in names.items():
            kind = type(self.modules[path])
            methods = building(kind, frozenset(needed)) if path in self.said else ()  # type: ignore[arg-type]
            if methods:
                said = summary_of(path, self.modules[path], self.alikeness, methods)
                more = more or len(said.equations) > len(self.said[path].equations)
                self._add(path, said)
        return more


def _kept(module: nn.Module, name: str, key: tuple[int | str, ...]) -> int | None:
    found: Any = vars(module).get(name)
    for step in key:
        found = found[step] if isinstance(found, (list, tuple)) and type(step) is int and step < len(found) else None
    return found if type(found) is int else None


__all__ = ["Network", "is_torchs"]
