"""Presentation: tables for a terminal, plots, and files that are never half written."""

from .files import replacing
from .plots import grouped_bars
from .tables import Column, render, table

__all__ = ["Column", "grouped_bars", "render", "replacing", "table"]
