"""Arguments that many functions take, by one name each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

Ignore = Iterable[nn.Module | str] | nn.Module | str
"""Parts of a model that stay: modules of it, names of modules or parameters, or patterns; one or several."""

Names = Iterable[str] | str
"""Names of modules or parameters, or patterns; one or several."""

LossFunction = Callable[[Any, Any], Any]
"""(output, targets) -> a scalar tensor."""

PathLike = str | os.PathLike[str]
"""The path of a file."""
