"""What pruning has done to a network, as one object and as documents."""

from . import documents  # noqa: F401  (importing it registers the forms that reports are written in)
from .summary import Point, Report, report

__all__ = ["Point", "Report", "report"]
