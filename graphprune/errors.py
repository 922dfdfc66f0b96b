"""The one family of errors that graphprune raises on purpose."""

from __future__ import annotations


class GraphPruneError(Exception):
    """Something the caller can act on: names the parameter or module, what was expected and what to do."""
