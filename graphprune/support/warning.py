"""Warnings that name the user's own line, however deep in this package they are raised."""

from __future__ import annotations

import os
import sys
import warnings

from ..errors import GraphPruneWarning
from .progress import make_way

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def warn(message: str, kind: type[Warning] = GraphPruneWarning) -> None:
    """Warn at the line outside this package that called it."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and _own(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    make_way()
    warnings.warn(message, kind, stacklevel=level)


def _own(file: str) -> bool:
    """A file of this package, or of the standard library's decorators between two of them."""
    return file.startswith(_PACKAGE) or os.path.basename(file) == "contextlib.py"
