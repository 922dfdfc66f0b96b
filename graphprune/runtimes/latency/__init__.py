"""Latency on a target: measured tables, predictions for widths, and plans within a budget of milliseconds."""

from ...plans.latency import Attempt, Latency
from .table import LatencyTable
from .target import Target

__all__ = ["Attempt", "Latency", "LatencyTable", "Target"]
