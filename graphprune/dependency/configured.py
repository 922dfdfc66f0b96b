"""Widths that a configuration states in one number: they are one width, or the model cannot be built from it again.

BERT's pooler maps `hidden_size` to `hidden_size`: nothing in the recorded run says that the two are one number, only
the code of its class. Their channels go together, then, each with the one of the same index, or stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from torch import nn

from ..support.settings import is_settings, settings_of
from ..support.walking import all_modules
from ..tracing.blueprints import Equation, Width, equations_of, read
from ..tracing.origin import Attribute, Expr, leaves
from .analysis import Analysis
from .dims import Root
from .state import Vector


def tied_by_configuration(model: nn.Module, analysis: Analysis) -> Analysis:
    """The analysis of `model` with the two sides of a layer tied where its configuration has one number for both; the
    same where it has none, or these cannot be tied index by index (a side that is cut into heads)."""
    config = getattr(model, "config", None)
    if not is_settings(config):
        return analysis
    modules = all_modules(model)
    pairs = [(path, pair) for path in modules if (pair := _apart(modules[path], path, analysis)) is not None]
    code = _Code(modules, frozenset(settings_of(config) if isinstance(config, dict) else ()))
    return analysis.tying(pair for path, pair in pairs if code.states_once(path))


def _apart(module: nn.Module, path: str, analysis: Analysis) -> tuple[Vector, Vector] | None:
    """The positions of the two sides of a square layer, where they are whole and not tied already."""
    if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or getattr(module, "groups", 1) != 1:
        return None
    shape = tuple(module.weight.shape[:2])
    if shape[0] != shape[1]:
        return None
    name = analysis.trace.canonical(f"{path}.weight" if path else "weight")
    sides = [_whole(analysis, (name, axis)) for axis in (0, 1)]
    if sides[0] is None or sides[1] is None or (analysis.tied[sides[0]] == analysis.tied[sides[1]]).all():
        return None
    return sides[0], sides[1]


def _whole(analysis: Analysis, root: Root) -> Vector | None:
    """The positions of an axis, one an index; None where it is cut into parts."""
    axis_map = analysis.dims.roots.get(root, {})
    if len(axis_map) != 1:
        return None
    (dim, vector), = axis_map.items()
    if (vector < 0).any() or len(np.unique(vector)) != len(vector):
        return None
    return analysis.dims.offset[dim] + vector


class _Code:
    """What the code of a model's classes says of its layers, each read when first asked for. `entries`: of a
    configuration that is a dict, which the model's constructor gets as arguments."""

    def __init__(self, modules: Mapping[str, nn.Module], entries: frozenset[str]) -> None:
        self.modules, self.entries = modules, entries
        self._read: dict[str, tuple[Equation, ...]] = {}

    def states_once(self, path: str) -> bool:
        """Whether both sides of the layer are one entry of a configuration."""
        said: dict[str, set[Expr]] = {"in": set(), "out": set()}
        for equation in self._around(path):
            width = equation.right
            if isinstance(width, Width) and width.module == path and width.axis is None:
                said[width.name.partition("_")[0]].add(self._from_outside(equation.left))
        both = said["in"] & said["out"]
        return any(map(self._is_configured, both))

    def _is_configured(self, expr: Expr) -> bool:
        """Whether it is made of entries of a configuration."""
        found = [leaf for leaf in leaves(expr) if isinstance(leaf, Attribute)]
        return bool(found) and all(leaf.key or (leaf.module == "()" and leaf.name in self.entries) for leaf in found)

    def _around(self, path: str) -> Iterator[Equation]:
        """What the modules that a module lies in say; the nearest first."""
        while path:
            path = path.rpartition(".")[0]
            yield from self._equations(path)

    def _equations(self, path: str) -> tuple[Equation, ...]:
        if path not in self._read:
            module = self.modules[path]
            torchs = type(module).__module__.startswith("torch.nn")
            self._read[path] = () if torchs else equations_of(read(path, module))
        return self._read[path]

    def _from_outside(self, expr: Expr) -> Expr:
        """What a constructor's argument was for whoever called it."""
        seen: set[Expr] = set()
        while isinstance(expr, Attribute) and not expr.key and expr.module.endswith("()") and expr not in seen:
            seen.add(expr)
            said = _said_of(expr, self._around(expr.module.removesuffix("()")))
            if said is None:
                break
            expr = said
        return expr


def _said_of(leaf: Attribute, equations: Iterable[Equation]) -> Expr | None:
    return next((equation.left for equation in equations if equation.right == leaf), None)


__all__ = ["tied_by_configuration"]
