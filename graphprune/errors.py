"""The one family of errors that graphprune raises on purpose, and its one kind of warning."""

from __future__ import annotations


class GraphPruneError(Exception):
    """Something the caller can act on: names the parameter or module, what was expected and what to do."""


class GraphPruneWarning(UserWarning):
    """Something was asked for and nothing came of it, such as a pruning that removes nothing: names the option or the
    code that leaves nothing, and what to do. With `strict=True` it is a GraphPruneError."""
