"""Follow a constructor through its source, beside the object that it made.

Loops over what is known are unrolled, a branch that is not decided is followed both ways, methods and functions that
are called are followed too. Whatever is not understood is `UNKNOWN`, which says nothing about any layer.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from ..origin import Attribute, Expr, Literal, Operation
from .source import function_of, tree_of
from .values import (
    UNKNOWN,
    Child,
    Either,
    Items,
    Known,
    Made,
    Number,
    Open,
    Value,
    arithmetic,
    either,
    literal,
    number_of,
    text_of,
)

# Statements of one constructor, with all that it calls; calls inside calls; rounds of one loop.
_STEPS, _DEPTH, _ROUNDS = 2000, 6, 128
_OPERATORS: dict[type, str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.FloorDiv: "floordiv",
    ast.Div: "truediv",
    ast.Mod: "mod",
    ast.Pow: "pow",
}
_COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_MISSING = object()
Names = dict[str, Value]


class _TooLong(Exception):
    """The code does more than is followed."""


class Reading:
    """What a constructor gave its object.

    `fields`: the object's attributes by name, as the code left them. `definitions`: what a number with a name of its
    own was computed from. `values`: what numbers are, where that is known.
    """

    def __init__(self, path: str, module: nn.Module, start: Reading | None = None) -> None:
        self.path, self.module = path, module
        self.fields: Names = {} if start is None else dict(start.fields)
        self.definitions: dict[Attribute, Expr] = {}
        self.values: dict[Attribute, int | float] = {}
        self.serial: Iterator[int] = itertools.count() if start is None else start.serial
        self.steps = 0
        self.loose = 0  # inside a loop of which it is not known how often it runs


def read(path: str, module: nn.Module, method: str = "__init__", start: Reading | None = None) -> Reading:
    """What a method of `module`'s class does to it, from the source. `start`: what the constructor left."""
    reading = Reading(path, module, start)
    home, function = _method(type(module), method)
    if function is not None and home is not None:
        names = _arguments(reading, function, method == "__init__")
        with contextlib.suppress(_TooLong, RecursionError):  # what was understood until then stands
            _Frame(reading, function, home, 0).run(names)
    return reading


def _method(kind: type, name: str, after: type | None = None) -> tuple[type | None, types.FunctionType | None]:
    """The class that defines a method, of those after one of the classes, and its function."""
    order = kind.__mro__
    for home in order[order.index(after) + 1 if after in order else 0 :]:
        if name in vars(home):
            return home, function_of(vars(home)[name])
    return None, None


def _arguments(reading: Reading, function: types.FunctionType, constructor: bool) -> Names:
    """The parameters as open values; known where the code keeps them, unchanged, in an attribute."""
    tree = tree_of(function)
    home = f"{reading.path}()" if constructor else f"{reading.path}({function.__name__})"
    names: Names = {name: Open(Attribute(home, name)) for name in inspect.signature(function).parameters}
    if tree is None or not constructor:
        return names
    stored = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    for step in tree.body:
        plain = _copied(step.value) if isinstance(step, ast.Assign) else None
        if not isinstance(step, ast.Assign) or plain is None:
            continue
        name, kept = plain, vars(reading.module)
        for field in filter(None, map(_field_in, step.targets)):
            if name in names and name not in stored and field in kept:
                found = names[name]
                assert isinstance(found, Open)
                names[name] = Open(found.leaf, kept[field], True)
    return names


def _copied(node: ast.expr) -> str | None:
    """x in `x`, `list(x)` and `tuple(x)`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("list", "tuple"):
        node = node.args[0] if len(node.args) == 1 else node
    return node.id if isinstance(node, ast.Name) else None


def _field_in(node: ast.expr) -> str | None:
    """x in `self.x`."""
    mine = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if mine and isinstance(node, ast.Attribute) else None


class _Frame:
    """One function being followed."""

    def __init__(self, reading: Reading, function: types.FunctionType, home: type | None, depth: int) -> None:
        self.reading, self.function, self.home, self.depth = reading, function, home, depth
        self.names: Names = {}
        self.returned: list[Value] = []
        code = function.__code__
        cells = function.__closure__ or ()
        self.outer = dict(zip(code.co_freevars, cells, strict=False))
        self.me = code.co_varnames[0] if home is not None and code.co_argcount else None

    def run(self, names: Names) -> Value:
        tree = tree_of(self.function)
        if tree is None:
            return UNKNOWN
        self.names = names
        self._block(tree.body)
        return either(self.returned) if self.returned else Known(None)

    # -- statements

    def _block(self, steps: Iterable[ast.stmt]) -> bool:
        """Whether the code goes on behind these."""
        return all(self._step(step) for step in steps)

    def _step(self, step: ast.stmt) -> bool:
        self.reading.steps += 1
        if self.reading.steps > _STEPS:
            raise _TooLong
        match step:
            case ast.Assign():
                value = self.value(step.value)
                value = self._named(step.targets[0], value)
                for target in step.targets:
                    self._assign(target, value)
            case ast.AnnAssign() if step.value is not None:
                self._assign(step.target, self._named(step.target, self.value(step.value)))
            case ast.AugAssign():
                self._augment(step)
            case ast.Expr():
                self.value(step.value)
            case ast.If():
                return self._if(step)
            case ast.For():
                self._for(step)
            case ast.While():
                self._loosely(step.body)
            case ast.With():
                return self._block(step.body)
            case ast.Try():
                return self._block([*step.body, *step.orelse, *step.finalbody])
            case ast.Return():
                self.returned.append(Known(None) if step.value is None else self.value(step.value))
                return False
            case ast.Raise() | ast.Break() | ast.Continue():
                return False
            case ast.FunctionDef() | ast.ClassDef():
                self.names[step.name] = UNKNOWN
        return True

    def _named(self, target: ast.expr, value: Value) -> Value:
        """A number that gets a name is one by itself from here on: what is made with it is made with the name."""
        if isinstance(value, Items):
            for i, item in enumerate(value.values):
                value.values[i] = self._named(_entry(target, i), item)
            return value
        number = number_of(value, self.reading.path) if isinstance(value, (Number, Made, Either)) else None
        if number is None or isinstance(number.expr, Attribute):
            return value if number is None or isinstance(value, Number) else (value if _is_module(value) else number)
        leaf = Attribute(f"{self.reading.path}()", f"{ast.unparse(target)}#{next(self.reading.serial)}")
        if isinstance(number.expr, Operation):
            self.reading.definitions[leaf] = number.expr
        if number.value is not None:
            self.reading.values[leaf] = number.value
        return Number(leaf, number.value)

    def _assign(self, target: ast.expr, value: Value) -> None:
        match target:
            case ast.Name():
                self.names[target.id] = value
            case ast.Attribute() if self._is_me(target.value):
                self.reading.fields[target.attr] = self._kept(target.attr, value)
            case ast.Tuple() | ast.List():
                parts = self._parts(value, len(target.elts))
                for part, inner in zip(target.elts, parts, strict=False):
                    self._assign(part, self._named(part, inner))
            case ast.Subscript():
                owner = self.value(target.value)
                if isinstance(owner, Items):
                    owner.loose.append(value)
                elif isinstance(owner, Made):
                    owner.added.loose.append(value)
            case ast.Starred():
                self._assign(target.value, UNKNOWN)

    def _kept(self, name: str, value: Value) -> Value:
        """What goes into an attribute: where the code does not say which number, the object does."""
        kept = vars(self.reading.module).get(name)
        if type(kept) is not int or (isinstance(value, Number) and value.value is not None):
            return value
        number = number_of(value, self.reading.path)
        leaf = number.expr if number is not None and isinstance(number.expr, Attribute) else None
        leaf = Attribute(self.reading.path, name) if leaf is None else leaf
        self.reading.values[leaf] = kept
        return Number(leaf, kept)

    def _parts(self, value: Value, count: int) -> list[Value]:
        if isinstance(value, Items) and len(value.values) == count and not value.loose:
            return value.values
        if isinstance(value, Either):
            options = [self._parts(option, count) for option in value.options]
            return [either(column) for column in zip(*options, strict=True)]
        return [UNKNOWN] * count

    def _augment(self, step: ast.AugAssign) -> None:
        reading = ast.copy_location(_loading(step.target), step)
        before, more = self.value(reading), self.value(step.value)
        if isinstance(before, Items) and isinstance(step.op, ast.Add):
            before.values.extend(more.values if isinstance(more, Items) else ())
            before.loose.extend(more.loose if isinstance(more, Items) else (more,))
            return
        self._assign(step.target, self._named(step.target, self._operation(step.op, before, more)))

    def _if(self, step: ast.If) -> bool:
        decided = self._truth(self.value(step.test))
        if decided is not None:
            return self._block(step.body if decided else step.orelse)
        before, fields = dict(self.names), dict(self.reading.fields)
        self.reading.loose += 1
        goes_on = self._block(step.body)
        names, made = self.names, self.reading.fields
        self.names, self.reading.fields = before, fields
        other = self._block(step.orelse)
        self.reading.loose -= 1
        if not goes_on:
            if not other:  # what both made stands, whichever it was
                self.reading.fields = _merged(made, self.reading.fields)
            return other
        if not other:
            self.names, self.reading.fields = names, made
            return True
        self.names, self.reading.fields = _merged(names, self.names), _merged(made, self.reading.fields)
        return True

    def _for(self, step: ast.For) -> None:
        items = self._iterated(self.value(step.iter))
        if items.loose or len(items.values) > _ROUNDS:
            self._assign(step.target, either([*items.values, *items.loose]))
            self._loosely(step.body)
            return
        for item in items.values:
            self._assign(step.target, item)
            self._block(step.body)

    def _loosely(self, steps: list[ast.stmt]) -> None:
        """A loop of which it is not known how often it runs: once, and what it adds is added nobody knows where."""
        before, fields = dict(self.names), dict(self.reading.fields)
        self.reading.loose += 1
        self._block(steps)
        self.reading.loose -= 1
        self.names, self.reading.fields = _merged(self.names, before), _merged(self.reading.fields, fields)

    # -- expressions

    def value(self, node: ast.expr) -> Value:
        """What an expression gives."""
        match node:
            case ast.Constant():
                return literal(node.value)
            case ast.Name():
                return self._name(node.id)
            case ast.Attribute():
                return self._attribute(node)
            case ast.Tuple() | ast.List() | ast.Set():
                return self._items(node.elts)
            case ast.BinOp():
                return self._operation(node.op, self.value(node.left), self.value(node.right))
            case ast.UnaryOp():
                return self._unary(node)
            case ast.BoolOp():
                return self._bool(node)
            case ast.Compare():
                return self._compare(node)
            case ast.IfExp():
                decided = self._truth(self.value(node.test))
                if decided is not None:
                    return self.value(node.body if decided else node.orelse)
                return either((self.value(node.body), self.value(node.orelse)))
            case ast.Call():
                return self._call(node)
            case ast.Subscript():
                return self._subscript(node)
            case ast.ListComp() | ast.GeneratorExp():
                return self._comprehension(node)
            case ast.Starred():
                return self.value(node.value)
            case ast.JoinedStr():
                return self._text(node)
            case ast.NamedExpr():
                value = self._named(node.target, self.value(node.value))
                self._assign(node.target, value)
                return value
        return UNKNOWN

    def _is_me(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id == self.me

    def _name(self, name: str) -> Value:
        if name in self.names:
            return self.names[name]
        if name in self.outer:
            try:
                return literal(self.outer[name].cell_contents)
            except ValueError:
                return UNKNOWN
        found = self.function.__globals__.get(name, getattr(builtins, name, _MISSING))
        return UNKNOWN if found is _MISSING else literal(found)

    def _attribute(self, node: ast.Attribute) -> Value:
        if self._is_me(node.value):
            return self._field(node.attr)
        return self._part(self.value(node.value), node.attr)

    def _field(self, name: str) -> Value:
        fields, module = self.reading.fields, self.reading.module
        if name in fields:
            child = module._modules.get(name)
            value = fields[name]
            return Child(self._below(name), child) if child is not None and not _is_growing(value) else value
        child = module._modules.get(name)
        if child is not None:
            return Child(self._below(name), child)
        kept = vars(module).get(name)
        if type(kept) is int:
            leaf = Attribute(self.reading.path, name)
            self.reading.values[leaf] = kept
            return Number(leaf, kept)
        found = inspect.getattr_static(type(module), name, _MISSING)
        if found is not _MISSING and not isinstance(found, property) and function_of(found) is None:
            return literal(found)
        return UNKNOWN

    def _finished(self, node: ast.expr, value: Value) -> Value:
        """Of a list of modules that the object has, this list."""
        child = self.reading.module._modules.get(node.attr) if isinstance(node, ast.Attribute) else None
        if child is None or not isinstance(node, ast.Attribute) or not self._is_me(node.value):
            return value
        return Child(self._below(node.attr), child)

    def _below(self, name: str) -> str:
        return f"{self.reading.path}.{name}" if self.reading.path else name

    def _part(self, value: Value, name: str) -> Value:
        if isinstance(value, Known):
            found = inspect.getattr_static(value.value, name, _MISSING)
            if isinstance(value.value, (types.ModuleType, type)):
                found = getattr(value.value, name, _MISSING)
            return UNKNOWN if found is _MISSING else literal(found)
        if isinstance(value, Open):
            kept = getattr(value.value, "__dict__", {}) if value.known else {}
            return value.part(name, kept.get(name), name in kept)
        if isinstance(value, Child):
            module = value.module
            child = module._modules.get(name)
            if child is not None:
                return Child(f"{value.path}.{name}", child)
            kept = vars(module).get(name, _MISSING)
            if isinstance(kept, int) and not isinstance(kept, bool):
                leaf = Attribute(value.path, name)
                self.reading.values[leaf] = kept
                return Number(leaf, kept)
            return UNKNOWN
        if isinstance(value, Made):
            return _argument(value, name)
        if isinstance(value, Either):
            return either(self._part(option, name) for option in value.options)
        return UNKNOWN

    def _items(self, nodes: list[ast.expr]) -> Items:
        made = Items()
        for node in nodes:
            value = self.value(node)
            if isinstance(node, ast.Starred):
                inner = self._iterated(value)
                made.values.extend(inner.values)
                made.loose.extend(inner.loose)
            else:
                (made.loose if made.loose else made.values).append(value)
        return made

    def _operation(self, op: ast.operator, left: Value, right: Value) -> Value:
        if isinstance(left, Items) or isinstance(right, Items):
            return _of_lists(op, left, right)
        a, b = number_of(left, self.reading.path), number_of(right, self.reading.path)
        function = _OPERATORS.get(type(op))
        return UNKNOWN if a is None or b is None or function is None else arithmetic(function, a, b)

    def _unary(self, node: ast.UnaryOp) -> Value:
        value = self.value(node.operand)
        if isinstance(node.op, ast.Not):
            truth = self._truth(value)
            return UNKNOWN if truth is None else Known(not truth)
        number = number_of(value, self.reading.path)
        if number is None:
            return UNKNOWN
        return arithmetic("neg", number) if isinstance(node.op, ast.USub) else number

    def _bool(self, node: ast.BoolOp) -> Value:
        """`a or b`: the first that is true, as far as that is known."""
        stops = isinstance(node.op, ast.Or)
        possible: list[Value] = []
        for operand in node.values:
            value = self.value(operand)
            truth = self._truth(value)
            if truth is not None and truth != stops and operand is not node.values[-1]:
                continue
            possible.append(value)
            if truth is stops:
                break
        return either(possible)

    def _truth(self, value: Value) -> bool | None:
        if isinstance(value, Number):
            return None if value.value is None else bool(value.value)
        if isinstance(value, Known):
            return bool(value.value) if value.value is None or isinstance(value.value, (bool, str)) else True
        if isinstance(value, Open) and value.known:
            plain = value.value is None or isinstance(value.value, (bool, int, float, str, list, tuple))
            return bool(value.value) if plain else None
        if isinstance(value, Items) and not value.loose:
            return bool(value.values)
        return None

    def _compare(self, node: ast.Compare) -> Value:
        if len(node.ops) != 1:
            return UNKNOWN
        left, right = (_plain(self.value(n)) for n in (node.left, node.comparators[0]))
        compare = _COMPARISONS.get(type(node.ops[0]))
        if left is _MISSING or right is _MISSING or compare is None:
            return UNKNOWN
        try:
            return Known(bool(compare(left, right)))
        except Exception:  # of the user's values
            return UNKNOWN

    def _subscript(self, node: ast.Subscript) -> Value:
        owner = self._finished(node.value, self.value(node.value))
        at = node.slice
        if isinstance(owner, Child):
            index = _plain(self.value(at)) if not isinstance(at, ast.Slice) else _MISSING
            children = owner.module._modules
            if isinstance(index, int) and -len(children) <= index < len(children):
                name = list(children)[index]
                child = children[name]
                return UNKNOWN if child is None else Child(f"{owner.path}.{name}", child)
            return UNKNOWN
        if isinstance(owner, Open):
            owner_items = self._iterated(owner)
            if not owner_items.loose:
                owner = owner_items
            else:
                key = _plain(self.value(at)) if not isinstance(at, ast.Slice) else _MISSING
                return owner.part(str(key)) if isinstance(key, (str, int)) else UNKNOWN
        if isinstance(owner, Items) and not owner.loose:
            if isinstance(at, ast.Slice):
                ends = [None if n is None else _plain(self.value(n)) for n in (at.lower, at.upper, at.step)]
                if all(end is None or isinstance(end, int) for end in ends):
                    return Items(owner.values[slice(*ends)])
                return UNKNOWN
            index = _plain(self.value(at))
            if isinstance(index, int) and -len(owner.values) <= index < len(owner.values):
                return owner.values[index]
        return UNKNOWN

    def _comprehension(self, node: ast.ListComp | ast.GeneratorExp) -> Items:
        made = Items()
        before = dict(self.names)
        self._generate(node.elt, node.generators, made, loose=False)
        self.names = before
        return made

    def _generate(self, element: ast.expr, rest: list[ast.comprehension], made: Items, loose: bool) -> None:
        if not rest:
            (made.loose if loose or made.loose else made.values).append(self.value(element))
            return
        items = self._iterated(self.value(rest[0].iter))
        many = bool(items.loose) or len(items.values) > _ROUNDS
        for item in [either([*items.values, *items.loose])] if many else items.values:
            self.reading.steps += 1
            self._assign(rest[0].target, item)
            truths = [self._truth(self.value(test)) for test in rest[0].ifs]
            if False not in truths:
                self._generate(element, rest[1:], made, loose or many or None in truths)

    def _text(self, node: ast.JoinedStr) -> Value:
        parts = []
        for part in node.values:
            found = _plain(self.value(part.value if isinstance(part, ast.FormattedValue) else part))
            if found is _MISSING:
                return UNKNOWN
            parts.append(str(found))
        return Known("".join(parts))

    def _iterated(self, value: Value) -> Items:
        """What a loop over a value gets to see."""
        if isinstance(value, Items):
            return value
        if isinstance(value, Made) and value.added.values and not value.args:
            return value.added
        if isinstance(value, Child):
            inner = value.module._modules.items()
            return Items([Child(f"{value.path}.{name}", child) for name, child in inner if child is not None])
        if isinstance(value, Open) and value.known and isinstance(value.value, (list, tuple)):
            return Items([value.part(str(i), item, True) for i, item in enumerate(value.value)])
        if isinstance(value, Open):
            return Items(loose=[value.part("[]")])
        return Items(loose=[UNKNOWN])

    # -- calls

    def _call(self, node: ast.Call) -> Value:
        args = self._items(node.args)
        kwargs = {k.arg: self.value(k.value) for k in node.keywords if k.arg is not None}
        called = node.func
        if isinstance(called, ast.Attribute):
            found = self._method_call(called, args, kwargs)
            if found is not None:
                return found
        target = self.value(called)
        if isinstance(target, Known):
            return self._known_call(target.value, _label(called), args, kwargs)
        return _made(None, _label(called), args, kwargs)

    def _method_call(self, called: ast.Attribute, args: Items, kwargs: dict[str, Value]) -> Value | None:
        """A call of a method: of the object, of its base class, of a list. None: something else."""
        owner, name = called.value, called.attr
        if isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super":
            return self._method_of(self.home, name, args, kwargs)
        if self._is_me(owner):
            child = self.reading.fields.get(name)
            if child is not None:
                return None
            if name in ("add_module", "register_module", "register_buffer", "register_parameter"):
                return self._set_by_name(args)
            return self._method_of(None, name, args, kwargs)
        value = self.value(owner)
        if isinstance(value, Known) and isinstance(value.value, type) and name == "__init__" and args.values:
            inner = Items(args.values[1:], args.loose)  # Base.__init__(self, ...)
            order = type(self.reading.module).__mro__
            if value.value in order:
                before = order[order.index(value.value) - 1] if order.index(value.value) else None
                return self._method_of(before, name, inner, kwargs)
        if name in ("append", "extend", "insert", "add_module") and isinstance(value, (Items, Made)):
            self._grow(value, name, args)
            return Known(None)
        if isinstance(value, Open) and name in ("get", "pop") and args.values:
            key = _plain(args.values[0])
            return either((value.part(str(key)), *args.values[1:2])) if isinstance(key, str) else UNKNOWN
        return None

    def _set_by_name(self, args: Items) -> Value:
        name = _plain(args.values[0]) if args.values else _MISSING
        if isinstance(name, str) and len(args.values) > 1:
            self.reading.fields[name] = args.values[1]
        return Known(None)

    def _grow(self, value: Items | Made, how: str, args: Items) -> None:
        items = value if isinstance(value, Items) else value.added
        new = self._iterated(args.values[0]) if how == "extend" and args.values else Items(args.values[-1:])
        if self.reading.loose or items.loose or how == "insert":
            items.loose.extend([*new.values, *new.loose])
        else:
            items.values.extend(new.values)
            items.loose.extend(new.loose)

    def _method_of(self, after: type | None, name: str, args: Items, kwargs: dict[str, Value]) -> Value:
        """Follow a method of the object's class, or of those after one of its classes."""
        kind = type(self.reading.module)
        home, function = _method(kind, name, after)
        if home is None:
            return UNKNOWN
        if name == "__init__" and _is_torchs(home):
            if home is not nn.Module:  # a layer of torch's is what the object is
                self.reading.fields[""] = _made(home, home.__name__, args, kwargs)
            return Known(None)
        if function is None or _is_torchs(home):
            return UNKNOWN
        static = isinstance(vars(home).get(name), staticmethod)
        return self._follow(function, None if static else home, args, kwargs)

    def _known_call(self, target: Any, name: str, args: Items, kwargs: dict[str, Value]) -> Value:
        if isinstance(target, type):
            if target in (list, tuple):
                if args.values and isinstance(args.values[0], Open):
                    return args.values[0]
                return Items(list(self._iterated(args.values[0]).values)) if args.values else Items()
            if target is int and len(args.values) == 1:
                number = number_of(args.values[0], self.reading.path)
                if number is not None and _is_whole(number.expr):
                    return number
            found = self._iteration(target, args)
            return _made(target, name, args, kwargs) if found is None else found
        if target is len and args.values:
            items = self._iterated(args.values[0])
            return UNKNOWN if items.loose else literal(len(items.values))
        if target is setattr and len(args.values) == 3 and self._is_self(args.values[0]):
            return self._set_by_name(Items(args.values[1:]))
        if target is getattr and len(args.values) > 1:
            part = _plain(args.values[1])
            return self._part(args.values[0], part) if isinstance(part, str) else UNKNOWN
        if isinstance(target, types.FunctionType) and not (target.__module__ or "").startswith("torch."):
            function = function_of(target)
            return UNKNOWN if function is None else self._follow(function, None, args, kwargs)
        return _made(target, name, args, kwargs)

    def _is_self(self, value: Value) -> bool:
        return isinstance(value, Open) and self.me is not None and value is self.names.get(self.me)

    def _iteration(self, target: type, args: Items) -> Value | None:
        """range, zip, enumerate and reversed of what is known."""
        if target is range:
            ends = [_plain(v) for v in args.values]
            if ends and all(isinstance(end, int) for end in ends):
                return Items([literal(i) for i in itertools.islice(range(*ends), _ROUNDS + 1)])
            return Items(loose=[UNKNOWN])
        if target not in (zip, enumerate, reversed):
            return None
        lists = [self._iterated(value) for value in args.values[: None if target is zip else 1]]
        if target is zip:
            if any(items.loose for items in lists):
                return Items(loose=[Items([either([*i.values, *i.loose]) for i in lists])])
            return Items([Items(list(row)) for row in zip(*(i.values for i in lists), strict=False)])
        if lists and target is enumerate:
            first: list[Value] = [Items([literal(i), value]) for i, value in enumerate(lists[0].values)]
            return Items(first, [Items([UNKNOWN, value]) for value in lists[0].loose])
        return Items(lists[0].values[::-1], lists[0].loose) if lists else None

    def _follow(self, function: types.FunctionType, home: type | None, args: Items, kwargs: dict[str, Value]) -> Value:
        """Into a function of the user's; `home`: the class whose method it is."""
        if self.depth >= _DEPTH:
            return UNKNOWN
        mine: list[Value] = [self.names.get(self.me or "", UNKNOWN)] if home is not None else []
        names = bound(function, [*mine, *args.values], kwargs, bool(args.loose))
        if names is None:
            return UNKNOWN
        return _Frame(self.reading, function, home, self.depth + 1).run(names)


def bound(
    function: Callable[..., Any], args: list[Value], kwargs: Mapping[str, Value], more: bool = False
) -> Names | None:
    """The values of a function's parameters in a call, defaults among them; None where they do not fit. `more`: there
    are further ones that are not known."""
    try:
        signature = _signature(function)
        found = signature.bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return None
    names: Names = {}
    for name, parameter in signature.parameters.items():
        value = found.get(name)
        if parameter.kind is parameter.VAR_POSITIONAL:
            names[name] = Items(list(value or ()), [UNKNOWN] if more else [])
        elif parameter.kind is parameter.VAR_KEYWORD:
            names[name] = UNKNOWN
        elif value is not None:
            names[name] = value
        elif parameter.default is parameter.empty or more:
            names[name] = UNKNOWN
        else:
            names[name] = literal(parameter.default)
    return names


def _made(target: Any, name: str, args: Items, kwargs: dict[str, Value]) -> Made:
    return Made(target, name, tuple(args.values), kwargs, Items([], list(args.loose)))


def _argument(made: Made, name: str) -> Value:
    """`layer.out_channels` of a layer that was just made."""
    if not (isinstance(made.target, type) and issubclass(made.target, nn.Module)):
        return UNKNOWN
    names = bound(made.target, list(made.args), made.kwargs)
    return UNKNOWN if names is None or name not in names else names[name]


def _of_lists(op: ast.operator, left: Value, right: Value) -> Value:
    """`a + b` and `n * a` of lists."""
    if isinstance(op, ast.Add) and isinstance(left, Items) and isinstance(right, Items):
        if left.loose:
            return Items(list(left.values), [*left.loose, *right.values, *right.loose])
        return Items([*left.values, *right.values], list(right.loose))
    if isinstance(op, ast.Mult):
        items, times = (left, right) if isinstance(left, Items) else (right, left)
        count = _plain(times)
        if isinstance(items, Items):
            if isinstance(count, int) and 0 <= count <= _ROUNDS:
                return Items(items.values * count, list(items.loose))
            return Items(loose=[*items.values, *items.loose])
    return UNKNOWN


def _plain(value: Value) -> Any:
    """The value itself, where it is known."""
    if isinstance(value, Number):
        return _MISSING if value.value is None else value.value
    if isinstance(value, Known):
        return value.value
    if isinstance(value, Open) and value.known:
        return value.value
    if isinstance(value, Items) and not value.loose:
        inner = [_plain(item) for item in value.values]
        return _MISSING if any(item is _MISSING for item in inner) else tuple(inner)
    return _MISSING


def _is_whole(expr: Expr) -> bool:
    """No division or float in it: `int()` of it is the number itself."""
    if isinstance(expr, Literal):
        return isinstance(expr.value, int)
    if isinstance(expr, Operation):
        return expr.function in ("add", "sub", "mul", "floordiv", "mod", "neg") and all(map(_is_whole, expr.args))
    return False


def _is_module(value: Value) -> bool:
    if isinstance(value, Either):
        return any(map(_is_module, value.options))
    return isinstance(value, Made) and (value.target is None or isinstance(value.target, type))


def _is_growing(value: Value) -> bool:
    """A list of modules that may still be added to."""
    return isinstance(value, Items) or (isinstance(value, Made) and value.target in (nn.ModuleList, nn.Sequential))


def _is_torchs(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn") or kind.__module__ == "builtins"


def _merged(one: Names, other: Names) -> Names:
    return {name: either((one.get(name, UNKNOWN), other.get(name, UNKNOWN))) for name in (*one, *other)}


def _entry(target: ast.expr, index: int) -> ast.expr:
    return ast.Subscript(target, ast.Constant(index), ast.Load())


def _label(called: ast.expr) -> str:
    if isinstance(called, ast.Attribute):
        return called.attr
    return called.id if isinstance(called, ast.Name) else "?"


@functools.lru_cache(maxsize=2048)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _loading(target: ast.expr) -> ast.expr:
    new = ast.parse(ast.unparse(target), mode="eval").body
    assert isinstance(new, ast.expr)
    return new


def nested(value: Value) -> Iterator[Value]:
    """The value, and of a choice its options."""
    if isinstance(value, Either):
        yield from value.options
    else:
        yield value


__all__ = ["Reading", "bound", "nested", "read", "text_of"]
