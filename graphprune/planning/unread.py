"""Sizes that modules keep in attributes and the recorded call does not read: another method may, an exporter, or
whoever puts a new head on.

Such a number follows where the code of its class builds a layer with it whose width changes; one that only happens to
be equal stays; what the code does not tell is listed.
"""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
import types
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import GraphPruneError
from ..plans.data import AttributeChange, UnsettledSize
from ..support.suggestions import did_you_mean
from ..support.walking import all_modules, first_names, named_tensors
from ..tracing.blueprints import Equation, Reading, Width, equations_of, read
from ..tracing.blueprints.equations import sizes_of
from ..tracing.blueprints.solving import Solution, System
from ..tracing.blueprints.source import function_of, tree_of
from ..tracing.blueprints.values import Items, Number, Open, Value, number_of
from ..tracing.cloning import INTERNAL
from ..tracing.origin import Attribute, Expr, leaves
from .request import FOLLOW, HOLD

_NOTHING = nn.Identity()
# What torch's layers say of themselves, and surgery keeps true.
_DESCRIBED = frozenset(
    "in_channels out_channels groups in_features out_features in1_features in2_features num_features num_channels "
    "num_groups normalized_shape num_embeddings embedding_dim num_parameters input_size hidden_size embed_dim kdim vdim "
    "num_heads head_dim kernel_size stride padding dilation output_padding num_layers proj_size padding_idx "
    "_reversed_padding_repeated_twice".split()
)
Removed = Mapping[str, Mapping[int, Sequence[int]]]
Sizes = Mapping[Width, int]


@dataclasses.dataclass(frozen=True)
class Unread:
    """`changes`: attributes that follow. `unsettled`: those of which the code does not tell."""

    changes: tuple[AttributeChange, ...] = ()
    unsettled: tuple[UnsettledSize, ...] = ()


def unread_sizes(
    model: nn.Module, removed: Removed, known: Mapping[Attribute, int], asked: Mapping[str, str]
) -> Unread:
    """The attributes that nothing read. `known`: what those that were read must be, changed or not. `asked`: the
    option `sizes`."""
    modules = first_names(all_modules(model))
    wanted = _attributes(modules, known)
    choices = _choices(asked, wanted, known)
    if not removed or not wanted:
        return Unread()
    network = _Network(model, modules, removed, known)
    return network.settle(wanted, choices)


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn")


def _attributes(modules: Mapping[str, nn.Module], known: Mapping[Attribute, int]) -> list[Attribute]:
    """Whole numbers above 1, and those in lists and tuples, that the user's modules keep and the run did not read."""
    read_ones = {(a.module, a.name, a.key) for a in known}
    found: list[Attribute] = []
    for path, module in modules.items():
        if _is_torchs(module):
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


class _Network:
    """The code of a network's classes beside the sizes that its layers have, before and after."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        removed: Removed,
        known: Mapping[Attribute, int],
    ) -> None:
        self.modules, self.known = modules, {(a.module, a.name, a.key): v for a, v in known.items()}
        self.before, self.after, self.cut = _shapes(model, removed)
        self.readings: dict[str, Reading] = {}
        self.sizes: tuple[dict[Width, int], dict[Width, int]] = ({}, {})
        self.equations: list[Equation] = []

    def _read(self, path: str) -> None:
        """The code of a module, and of those inside it that get numbers from it."""
        if path in self.readings or _is_torchs(self.modules.get(path, _NOTHING)):
            return
        reading = self.readings[path] = read(path, self.modules[path])
        self._add(equations_of(reading))

    def _add(self, equations: Iterable[Equation]) -> None:
        for equation in equations:
            self.equations.append(equation)
            if isinstance(equation.right, Width):
                self._measure(equation.right)
            else:
                self._read(equation.right.module.removesuffix("()"))

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

        return _stated(module, width, lambda name: shapes.get(prefix + name), number)

    # -- settling

    def settle(self, wanted: list[Attribute], choices: Mapping[Attribute, str]) -> Unread:
        """What becomes of each attribute."""
        for path in dict.fromkeys(a.module for a in wanted):
            self._read(path)
        solved = self._solve()
        found = {attribute: self._found(attribute, *solved) for attribute in wanted}
        missing = [a for a in wanted if found[a] is None]
        if missing and self._read_methods(missing):
            again = self._solve()
            found.update((attribute, self._found(attribute, *again)) for attribute in missing)
        changes, unsettled = [], []
        for attribute in wanted:
            choice, new = choices.get(attribute), found[attribute]
            if choice == HOLD:
                continue
            if new is None and choice == FOLLOW:
                new = self._equal(attribute)
            if new is None:
                why = self._doubt(attribute, *solved)
                if why:
                    unsettled.append(
                        UnsettledSize(attribute.module, attribute.name, attribute.key, attribute.value, why)
                    )
            elif new != attribute.value:
                changes.append(
                    AttributeChange(attribute.module, attribute.name, attribute.key, attribute.value, new)
                )
        return Unread(tuple(changes), tuple(unsettled))

    def _solve(self) -> tuple[Solution, Solution]:
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
        for leaf in {leaf for e in self.equations for leaf in leaves(e.left)}:
            if isinstance(leaf, Attribute) and not leaf.module.endswith(")"):
                self._of_another(leaf, old, kept)
        before = self._system(self.equations, self.sizes[0]).solve(old, {})
        sound = [e for e in self.equations if self._holds(e, before)]
        idle = {leaf: v for leaf, v in before.numbers.items() if leaf.name.endswith("()") and leaf not in before.torn}
        return before, self._system(sound, self.sizes[1]).solve(kept, idle)

    def _of_another(self, leaf: Attribute, old: dict[Attribute, Any], kept: dict[Attribute, Any]) -> None:
        """`self.body.out_channels`: a size of a layer, or a number that another module keeps."""
        width = Width(leaf.module, leaf.name)
        self._measure(width)
        if width in self.sizes[0]:
            old[leaf], kept[leaf] = self.sizes[0][width], self.sizes[1][width]
        elif (leaf.module, leaf.name, ()) in self.known:
            kept[leaf] = self.known[leaf.module, leaf.name, ()]

    def _system(self, equations: Iterable[Equation], sizes: Sizes) -> System:
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

    def _expr(self, attribute: Attribute) -> Expr:
        reading = self.readings.get(attribute.module)
        parts = _parts(reading.fields.get(attribute.name), attribute.module) if reading is not None else ()
        bare = Attribute(attribute.module, attribute.name, attribute.key)
        return dict(parts).get(attribute.key, bare)

    def _found(self, attribute: Attribute, before: Solution, after: Solution) -> int | None:
        """What the attribute must be; None where that is not clear."""
        expr = self._expr(attribute)
        old, new = before.value(expr), after.value(expr)
        if new is None or (old is not None and old != attribute.value):
            return None
        return int(new) if new == int(new) and new >= 1 else None

    def _read_methods(self, missing: Iterable[Attribute]) -> bool:
        """What other methods would build with these attributes."""
        names: dict[str, set[str]] = defaultdict(set)
        for attribute in missing:
            names[attribute.module].add(attribute.name)
        before = len(self.equations)
        for path, needed in names.items():
            start = self.readings.get(path)
            for name in _building(type(self.modules[path]), frozenset(needed)) if start is not None else ():
                made = read(path, self.modules[path], name, start)
                assert start is not None
                made.fields = {n: v for n, v in made.fields.items() if v is not start.fields.get(n)}
                start.values.update(made.values)
                start.definitions.update(made.definitions)
                self._add(equations_of(made))
        return len(self.equations) > before

    # -- what the code does not tell

    def _changed(self, attribute: Attribute) -> dict[int, str]:
        """The new sizes of axes at or below the module that were as long as the attribute says, each with one."""
        prefix = f"{attribute.module}." if attribute.module else ""
        found: dict[int, str] = {}
        for name, axis in self.cut:
            if name.startswith(prefix) and self.before[name][axis] == attribute.value:
                found.setdefault(self.after[name][axis], f"axis {axis} of {name}")
        return found

    def _equal(self, attribute: Attribute) -> int:
        """The new size of the layers that are as wide as the attribute says. Raises GraphPruneError unless it is one."""
        found = self._changed(attribute)
        if len(found) == 1:
            return next(iter(found))
        said = ", ".join(f"{n} ({where})" for n, where in found.items()) or "none of them changes"
        raise GraphPruneError(
            f"sizes: {attribute} = {attribute.value} is to follow the layers in its module that are as wide, and "
            f'{"their new widths differ: " if found else ""}{said}; leave it out, or set it yourself'
        )

    def _doubt(self, attribute: Attribute, before: Solution, after: Solution) -> str:
        """Why the attribute may be out of date; "" where nothing speaks for it."""
        expr = self._expr(attribute)
        torn = {int(v) for leaf in leaves(expr) if isinstance(leaf, Attribute) for v in after.torn.get(leaf, ())}
        if torn:
            return f"layers made with it have different widths now: {' and '.join(map(str, sorted(torn)))}"
        equal = self._changed(attribute)
        if equal:
            new, where = next(iter(equal.items()))
            return f"{where} was as long and is {new} now; the code does not say whether they are one number"
        return ""


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


def _building(kind: type, names: frozenset[str]) -> Iterator[str]:
    """The methods that set an attribute of the object and mention one of these."""
    for name in dict.fromkeys(n for home in kind.__mro__ if not home.__module__.startswith("torch.") for n in vars(home)):
        function = function_of(next(vars(home)[name] for home in kind.__mro__ if name in vars(home)))
        if name in ("__init__", "forward") or function is None or not _mentions(function.__code__, names):
            continue
        tree = tree_of(function)
        if tree is not None and any(_sets_field(node) for node in ast.walk(tree)):
            yield name


def _mentions(code: types.CodeType, names: frozenset[str]) -> bool:
    return not names.isdisjoint(code.co_names) or any(
        _mentions(inner, names) for inner in code.co_consts if isinstance(inner, types.CodeType)
    )


def _sets_field(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)


def _shapes(
    model: nn.Module, removed: Removed
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]], list[tuple[str, int]]]:
    """The shapes of all tensors by name before and after, and the axes that lose something."""
    tensors = named_tensors(model)
    axes = {id(tensors[name]): cut for name, cut in removed.items() if name in tensors}
    before = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    after = dict(before)
    cuts = []
    for name, tensor in tensors.items():
        cut = axes.get(id(tensor), {})
        if cut:
            after[name] = tuple(n - len(cut.get(axis, ())) for axis, n in enumerate(before[name]))
            cuts += [(name, axis) for axis in cut]
    return before, after, cuts


def _stated(module: nn.Module, width: Width, shape: Any, number: Any) -> int | None:
    """The size of a layer of torch's, from the shapes of its tensors by name, and the numbers that it keeps."""
    weight = next(
        (s for n in ("weight", "running_mean", "parametrizations.weight.original1", "weight_v", "weight_orig")
         if (s := shape(n)) is not None), None,
    )  # fmt: skip
    if weight is None:
        weight = shape("parametrizations.weight.original")
    name = width.name
    if isinstance(module, nn.modules.conv._ConvNd) and weight is not None:
        turned = module.transposed != (name == "in_channels")
        return weight[1] * number("groups") if turned else weight[0]
    if isinstance(module, nn.Linear) and weight is not None:
        return weight[name == "in_features"]
    if isinstance(module, nn.Bilinear) and weight is not None:
        return weight[("out_features", "in1_features", "in2_features").index(name)]
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
        return weight[width.axis or 0] if width.axis is not None or len(weight) == 1 else None
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and weight is not None:
        return weight[name == "embedding_dim"]
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        end = "" if isinstance(module, nn.RNNCellBase) else "_l0"
        found = shape(f"weight_ih{end}" if name == "input_size" else f"weight_hh{end}")
        return None if found is None or getattr(module, "proj_size", 0) else found[1]
    if isinstance(module, nn.MultiheadAttention):
        found = shape("out_proj.weight") if name == "embed_dim" else None
        return number("num_heads") if name == "num_heads" else None if found is None else found[0]
    return weight[0] if weight else None


__all__ = ["Unread", "unread_sizes"]
