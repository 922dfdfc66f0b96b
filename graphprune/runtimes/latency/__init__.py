"""Latency on a target: measured tables, the machine's favourite widths, predictions for a network's widths."""

from .device import latency_table
from .table import LatencyTable
from .target import Target

__all__ = ["LatencyTable", "Target", "latency_table"]
