"""Numbers after pruning: what a size has to be when channels are gone, and how to write it for every input."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import fx

from ...dependency.analysis import Analysis
from ...dependency.sizes import gone_on_axis
from ...dependency.state import Mask
from ...tracing.origin import Attribute, Expr, Literal, Operation, TensorSize, evaluate, leaves, recorded_value
from .parts import Number


class Unfit(Exception):
    """A size that cannot be written for the pruned network; the message completes "its forward ..."."""


class Survivors:
    """How many indices of a recorded axis stay, and which sizes are the same on every input."""

    def __init__(self, analysis: Analysis, gone: Mask, attributes: Mapping[Attribute, int]) -> None:
        self.analysis = analysis
        self.gone = gone
        self.attributes = attributes

    def kept(self, node: fx.Node, axis: int) -> np.ndarray:
        state = self.analysis.state(node)
        axis %= max(len(state.shape), 1)
        return ~gone_on_axis(self.analysis, state.axis(axis), state.shape[axis], self.gone)

    def count(self, node: fx.Node, axis: int, start: int | None = None, stop: int | None = None) -> int:
        return int(self.kept(node, axis)[start:stop].sum())

    def value(self, leaf: Attribute | TensorSize) -> int:
        """A leaf after pruning."""
        if isinstance(leaf, Attribute):
            return self.attributes.get(leaf, leaf.value)
        return self.count(leaf.node, leaf.axis)

    def fixed(self, leaf: Attribute | TensorSize) -> bool:
        """The same on every input: an attribute, a parameter's size, a number of channels."""
        if isinstance(leaf, Attribute) or leaf.node.op == "get_attr":
            return True
        return bool(self.analysis.state(leaf.node).axis(leaf.axis))

    def free(self, expr: Expr) -> bool:
        """The number depends on the input's size."""
        return any(not self.fixed(leaf) for leaf in leaves(expr))

    # -- sizes

    def size(self, number: int | Number, wanted: int) -> int | Number:
        """The number a size has to become, still computed from the input's sizes where it was."""
        expr = number.expr if isinstance(number, Number) else Literal(number)
        if self.now(expr) == wanted:
            return number
        for candidate in self._variants(expr, wanted):
            if self.now(candidate) == wanted:
                return Number(candidate, wanted)
        if self.free(expr):
            raise Unfit("computes a size from the input's in a way that fits the pruned channels for this input only")
        return wanted

    def now(self, expr: Expr) -> float | None:
        """A number after pruning, as the module's own code would compute it."""
        try:
            return evaluate(expr, self.value)
        except ArithmeticError:
            return None

    def _variants(self, expr: Expr, wanted: int) -> Iterator[Expr]:
        """The expression with one literal, attribute or number of channels in it replaced so that it may fit."""
        now = self.now(expr)
        for path, leaf in list(_positions(expr)):
            if isinstance(leaf, TensorSize) and not self.fixed(leaf):
                continue
            value = leaf.value if isinstance(leaf, Literal) else self.value(leaf)
            guesses = [wanted]
            if now and value:
                guesses = [round(value * wanted / now), round(value * now / wanted) if wanted else 0]
                guesses += [round(value + wanted - now)]
            for guess in guesses:
                if guess > 0:
                    yield _replaced(expr, path, Literal(guess))

    def other(self, number: Number) -> int | float | Number:
        """A number that is no size keeps its value: what changes in it is replaced by what it was."""
        expr = self._held(number.expr)
        return Number(expr, number.value) if self.free(expr) or _has_sizes(expr) else number.value

    def _held(self, expr: Expr) -> Expr:
        if isinstance(expr, Operation):
            return dataclasses.replace(expr, args=tuple(self._held(a) for a in expr.args))
        if isinstance(expr, Literal) or self.value(expr) == recorded_value(expr):
            return expr
        return Literal(recorded_value(expr))


def _has_sizes(expr: Expr) -> bool:
    return any(isinstance(leaf, TensorSize) for leaf in leaves(expr))


def _positions(expr: Expr, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    if isinstance(expr, Operation):
        for i, arg in enumerate(expr.args):
            yield from _positions(arg, (*path, i))
    else:
        yield path, expr


def _replaced(expr: Expr, path: tuple[int, ...], new: Expr) -> Expr:
    if not path:
        return new
    assert isinstance(expr, Operation)
    args = list(expr.args)
    args[path[0]] = _replaced(args[path[0]], path[1:], new)
    return dataclasses.replace(expr, args=tuple(args))
