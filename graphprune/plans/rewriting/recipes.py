"""From a recorded part to a recipe: the steps of a graph as plain data, with every size as it must be after pruning."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import torch

from ...dependency.sizes import COMPARE, describe
from ...errors import GraphPruneError
from ...tracing.origin import Attribute, Expr, Literal, Operation, evaluate, recorded_value
from ...tracing.recorder import Guard
from ..fields import listed, table, text
from .arguments import rewritten, takes_sizes
from .fitting import Survivors, Unfit
from .parts import Call, Choice, Number, Part, Ref

Step = list[Any]  # [op, target, args, kwargs], encoded


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """The module at `module` becomes a graph of these `steps`. `home`: the Python module that defines its class."""

    module: str
    home: str
    steps: tuple[Step, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"module": self.module, "home": self.home, "steps": [list(s) for s in self.steps]}

    @classmethod
    def from_dict(cls, data: Any) -> Rewrite:
        """The inverse of `to_dict`. Raises KeyError, TypeError or ValueError for anything else."""
        steps = [[text(op), text(target), listed(args), table(kwargs)] for op, target, args, kwargs in data["steps"]]
        return cls(text(data["module"]), text(data["home"]), tuple(steps))


# -- values as plain data


def encode(value: Any) -> Any:
    """A value of a recorded call as JSON data. Raises Unfit for what JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise Unfit(f"passes on {value}, which has more than 64 bits")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Ref):
        return {"ref": value.index}
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, dict):
        return {"dict": [[k, encode(v)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return {"torch": str(value).removeprefix("torch.")}
    raise Unfit(f"passes on a {type(value).__name__}, which a recorded graph cannot hold")


def decode(data: Any, nodes: list[Any]) -> Any:
    """The inverse of `encode`; results of earlier steps are taken from `nodes`."""
    if isinstance(data, list):
        return [decode(v, nodes) for v in data]
    if not isinstance(data, dict):
        return data
    ((kind, value),) = data.items()
    if kind == "ref":
        return nodes[value]
    if kind == "tuple":
        return tuple(decode(v, nodes) for v in value)
    if kind == "dict":
        return {k: decode(v, nodes) for k, v in value}
    if kind == "slice":
        return slice(*(decode(v, nodes) for v in value))
    if kind == "ellipsis":
        return Ellipsis
    if kind == "float" and value in ("inf", "-inf", "nan"):
        return float(value)
    if kind == "device":
        return torch.device(value)
    found = getattr(torch, value, None) if kind == "torch" else None
    if not isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
        raise GraphPruneError(f"not a plan: {data!r} is no value of a recorded call")
    return found


# -- two recordings of one part: eval and training mode


def merge(evaluation: Part, training: Part) -> str:
    """Make `evaluation` follow the training flag where the two recordings differ in a plain value.

    Returns "" or why they cannot be one graph.
    """
    different = "does something else in training mode"
    if training.refusal:
        return f"in training mode {training.refusal}"
    if len(evaluation.calls) != len(training.calls):
        return different
    merged = []
    for mine, theirs in zip(evaluation.calls, training.calls, strict=True):
        if (mine.op, mine.target, mine.module) != (theirs.op, theirs.target, theirs.module):
            return different
        try:
            args = _merged(mine.args, theirs.args, evaluation, training)
            kwargs = _merged(mine.kwargs, theirs.kwargs, evaluation, training)
        except ValueError:
            return different
        merged.append(dataclasses.replace(mine, args=args, kwargs=kwargs))
    try:
        evaluation.output = _merged(evaluation.output, training.output, evaluation, training)
    except ValueError:
        return different
    evaluation.calls = merged
    return ""


def _merged(a: Any, b: Any, evaluation: Part, training: Part) -> Any:
    if isinstance(a, Choice):
        return a
    if isinstance(a, Ref) and isinstance(b, Ref) and a == b:
        return a
    if isinstance(a, Number) and isinstance(b, Number):
        if evaluation.canonical(a.expr) != training.canonical(b.expr):
            raise ValueError
        return a
    if type(a) is not type(b):
        raise ValueError
    if isinstance(a, (tuple, list)) and len(a) == len(b):
        items = [_merged(x, y, evaluation, training) for x, y in zip(a, b, strict=True)]
        return type(a)(items)
    if isinstance(a, dict) and a.keys() == b.keys():
        return {k: _merged(v, b[k], evaluation, training) for k, v in a.items()}
    if isinstance(a, slice):
        return slice(*(_merged(getattr(a, n), getattr(b, n), evaluation, training) for n in ("start", "stop", "step")))
    if isinstance(a, (Ref, Number, tuple, list, dict)):
        raise ValueError
    if a == b:
        return a
    if isinstance(a, (bool, int, float)):
        return Choice(b, a)
    raise ValueError


# -- recipes


class _Writer:
    """Writes the steps of one part."""

    def __init__(self, part: Part, survivors: Survivors) -> None:
        self.part = part
        self.survivors = survivors
        self.steps: list[Step] = []
        self.place: dict[int, int] = {}  # number of a recorded call -> number of its step
        self.written: dict[tuple[Any, ...], Ref] = {}
        self.changed = False

    def write(self) -> tuple[Step, ...]:
        part = self.part
        for index, call in enumerate(part.calls):
            self._checks(index)
            new = rewritten(call, self.survivors)
            sizes = takes_sizes(call) or call.op in ("call_module", "build")
            if (new.target, new.args, new.kwargs) != (call.target, call.args, call.kwargs):
                self.changed = True
            args = tuple(self._value(a, sizes, call.module) for a in new.args)
            kwargs = {k: self._value(v, sizes, call.module) for k, v in new.kwargs.items()}
            self.place[index] = self._step(new.op, new.target, args, kwargs).index
        self._checks(len(part.calls))
        self._step("output", "output", (self._value(part.output, True, ""),), {})
        return tuple(self.steps)

    def _step(self, op: str, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ref:
        self.steps.append([op, target, encode(list(args)), {k: encode(v) for k, v in kwargs.items()}])
        return Ref(len(self.steps) - 1)

    def _value(self, value: Any, sizes: bool, module: str) -> Any:
        """Recorded values become references to steps; `sizes`: numbers are right, else they keep their value."""
        if isinstance(value, Ref):
            return Ref(self.place[value.index])
        if isinstance(value, Number):
            if not sizes:
                held = self.survivors.other(value)
                self.changed |= held != value and not (isinstance(held, (int, float)) and self._stays(value.expr))
                value = held
            return self._number(value.expr) if isinstance(value, Number) else value
        if isinstance(value, Choice):
            flag = self._once("get_attr", f"{module}.training" if module else "training", ())
            return self._once("call_function", "graphprune.choose", (flag, value.training, value.evaluation))
        if isinstance(value, slice):
            return slice(*(self._value(v, sizes, module) for v in (value.start, value.stop, value.step)))
        if isinstance(value, (tuple, list)):
            return type(value)([self._value(v, sizes, module) for v in value])
        if isinstance(value, dict):
            return {k: self._value(v, sizes, module) for k, v in value.items()}
        return value

    def _once(self, op: str, target: str, args: tuple[Any, ...]) -> Ref:
        key = (op, target, json.dumps(encode(args)))
        if key not in self.written:
            self.written[key] = self._step(op, target, args, {})
        return self.written[key]

    def _number(self, expr: Expr) -> Any:
        """An expression as steps that compute it; what is the same on every input becomes a plain number."""
        argument = self.part.argument(expr)
        if argument is not None:
            return Ref(self.place[argument.index])
        if isinstance(expr, Literal):
            return expr.value
        if isinstance(expr, Attribute):
            return self.survivors.value(expr)
        if isinstance(expr, Operation):
            if not any(True for _ in _sizes(expr)):
                return evaluate(expr, self.survivors.value)
            args = tuple(self._number(a) for a in expr.args)
            return self._once("call_function", _FUNCTIONS.get(expr.function, f"operator.{expr.function}"), args)
        if self.survivors.fixed(expr):
            return self.survivors.value(expr)
        tensor = self.part.sizes.get(expr.node)
        if tensor is None or tensor.index not in self.place:
            raise Unfit("uses a size of a tensor that other code has made")
        return self._once("call_method", "size", (Ref(self.place[tensor.index]), expr.axis))

    def _stays(self, expr: Expr) -> bool:
        """The module's own code would compute the recorded number in the pruned network, too."""
        return self.survivors.now(expr) == evaluate(expr, recorded_value)

    def _checks(self, place: int) -> None:
        """What the code asked, before this call, about sizes that depend on the input must turn out as recorded."""
        for guard in (g for g, asked in self.part.guards.items() if asked == place):
            left, right = self.survivors, guard.right
            self.changed |= not self._holds(guard)
            if not (left.free(guard.left) or left.free(right)):
                continue
            where = f" ({guard.source})" if guard.source else ""
            text = f"{describe(guard.left)} {_SYMBOLS.get(guard.comparison, '==')} {describe(right)}{where}"
            if guard.comparison == "same":
                number = describe(guard.left)
                raise Unfit(f"uses {number} as a plain number{where}, so that a recording fits one size only")
            numbers = (self._number(self._as_recorded(guard.left)), self._number(self._as_recorded(right)))
            args = (guard.comparison, *numbers, guard.outcome, text)
            self._step("call_function", "graphprune.expect_comparison", args, {})

    def _holds(self, guard: Guard) -> bool:
        """The comparison turns out as recorded in the pruned network, too."""
        left, right = self.survivors.now(guard.left), self.survivors.now(guard.right)
        return left is not None and right is not None and COMPARE[guard.comparison](left, right) == guard.outcome

    def _as_recorded(self, expr: Expr) -> Expr:
        held = self.survivors.other(Number(expr, 0)) if not isinstance(expr, Literal) else expr
        return held.expr if isinstance(held, Number) else held if isinstance(held, Literal) else expr


_FUNCTIONS = {"sqrt": "math.sqrt"}
_SYMBOLS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def _sizes(expr: Expr) -> Iterator[Expr]:
    if isinstance(expr, Operation):
        for arg in expr.args:
            yield from _sizes(arg)
    elif not isinstance(expr, (Literal, Attribute)):
        yield expr


def recipe(part: Part, survivors: Survivors) -> tuple[tuple[Step, ...], bool]:
    """The steps of a part after pruning, and whether any size in them is another than recorded.

    Raises Unfit, with the reason, for a part that no graph with these sizes can stand for.
    """
    writer = _Writer(part, survivors)
    return writer.write(), writer.changed


__all__ = ["Call", "Rewrite", "decode", "encode", "merge", "recipe"]
