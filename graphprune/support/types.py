"""Arguments that many functions take, by one name each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

Parts = Iterable[nn.Module | Tensor | str] | nn.Module | Tensor | str | None
"""Parts of a model: modules or parameters of it, names of them, or patterns (`tracing/matching.py`); one or several."""

Ignore = Parts
"""Parts of a model that stay as they are."""

LossFunction = Callable[[Any, Any], Any]
"""(output, targets) -> a scalar tensor."""

PathLike = str | os.PathLike[str]
"""The path of a file."""
