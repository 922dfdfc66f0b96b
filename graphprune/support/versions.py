"""Which versions made something: written into every file, so that a surprise can be traced."""

from __future__ import annotations

import torch

from .._version import __version__


def running_versions() -> dict[str, str]:
    """This library's version and torch's."""
    return {"graphprune": __version__, "torch": str(torch.__version__)}
