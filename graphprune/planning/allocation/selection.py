"""What names in a request mean: ratios by name or pattern, and what is ignored."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import nn

from ...dependency import DependencyGraph, Reason
from ...errors import GraphPruneError
from ...support.types import Ignore


def module_of(parameter: str) -> str:
    """The path of the module that holds a parameter."""
    return parameter.rpartition(".")[0]


def check_ratio(value: Any, where: str = "ratio") -> float:
    """A fraction of channels to remove, in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)) or not 0 <= float(value) < 1:
        raise GraphPruneError(
            f"{where}: expected a number in [0, 1), the fraction of channels to remove; got {value!r}"
        )
    return float(value)


def matches(pattern: str, parameter: str) -> bool:
    """Whether a name, or a pattern, means this parameter or a module that holds it."""
    return (
        pattern in ("", "*")
        or parameter == pattern
        or parameter.startswith(pattern + ".")
        or fnmatch.fnmatchcase(parameter, pattern)
        or fnmatch.fnmatchcase(module_of(parameter), pattern)
        or any(fnmatch.fnmatchcase(prefix, pattern) for prefix in _prefixes(parameter))
    )


def _prefixes(parameter: str) -> Iterable[str]:
    parts = parameter.split(".")
    return (".".join(parts[:i]) for i in range(1, len(parts)))


def _check_known(pattern: str, graph: DependencyGraph, where: str) -> None:
    names = [*graph.trace.aliases, *graph.trace.modules]
    if not any(matches(pattern, name) or name == pattern for name in names):
        close = difflib.get_close_matches(pattern, names, 1)
        hint = f"; did you mean {close[0]!r}?" if close else "; see model.named_modules() and model.named_parameters()"
        raise GraphPruneError(f"{where}: no module or parameter matches {pattern!r}{hint}")


def matching_ratios(ratio: float | Mapping[str, float], graph: DependencyGraph) -> list[float]:
    """The ratio of every group: the longest pattern that matches a parameter producing it wins; 0 where none does."""
    if not isinstance(ratio, Mapping):
        return [ratio] * len(graph.groups)
    for pattern in ratio:
        _check_known(pattern, graph, "ratio")
    return [0.0 if pattern is None else ratio[pattern] for pattern in winners(ratio, graph)]


def winners(patterns: Iterable[str], graph: DependencyGraph) -> list[str | None]:
    """For every group the longest of the patterns that match what produces it; None where none does."""
    fitting = ([p for p in patterns if any(matches(p, name) for name in names)] for names in producers(graph))
    return [max(found, key=len, default=None) for found in fitting]


def producers(graph: DependencyGraph) -> list[list[str]]:
    """For every group the parameters that produce its channels, under all their names."""
    aliases: dict[str, list[str]] = {}
    for name, first in graph.trace.aliases.items():
        aliases.setdefault(first, []).append(name)
    out = []
    for group in graph.groups:
        makers = [m for m in group.members if m.role == "out"] or list(group.members)
        out.append([name for m in makers for name in aliases.get(m.parameter, [m.parameter])])
    return out


def ignored_items(ignore: Any) -> tuple[nn.Module | str, ...]:
    """What is ignored, one by one; nothing where it is None. Raises GraphPruneError for what can be no such thing."""
    if isinstance(ignore, (nn.Module, str)):
        return (ignore,)
    items = () if ignore is None else tuple(ignore) if hasattr(ignore, "__iter__") else (ignore,)
    for item in items:
        if not isinstance(item, (nn.Module, str)):
            raise GraphPruneError(f"ignore: expected modules, names or patterns, got {type(item).__name__}")
    return items


def ignored_positions(
    ignore: Ignore, graph: DependencyGraph, model: nn.Module
) -> list[tuple[Any, Reason]]:
    """The outputs of ignored modules and parameters, as positions to freeze."""
    items = ignored_items(ignore)
    if not items:
        return []
    paths = {id(m): n for n, m in model.named_modules()}
    analysis, roles = graph.analysis, graph.roles
    out = []
    for item in items:
        if isinstance(item, nn.Module):
            if id(item) not in paths:
                raise GraphPruneError(f"ignore: {type(item).__name__} is no module of this model")
            pattern = paths[id(item)]
            if pattern == "":
                pattern = "*"
        else:
            pattern = item
            _check_known(pattern, graph, "ignore")
        for name, first in graph.trace.aliases.items():
            if first not in graph.trace.parameters or not matches(pattern, name):
                continue
            for axis in range(len(graph.trace.parameters[first].meta["val"].shape)):
                if (first, axis) in analysis.dims.roots and roles[(first, axis)] != "in":
                    for d in analysis.dims.roots[(first, axis)]:
                        out.append(
                            (
                                analysis.dims.positions(d),
                                Reason("ignored", f"{item if isinstance(item, str) else name} is ignored"),
                            )
                        )
    return out
