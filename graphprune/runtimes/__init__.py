"""From a module to a file that runs, and to numbers: ONNX export with proof, latency measured in ONNX Runtime, and
latency tables of a machine to plan with."""

from .benchmark import benchmark
from .export import ExportReport, export_onnx
from .latency import LatencyTable, Target, latency_table
from .providers import Provider, resolve_provider, usable_providers
from .results import BenchmarkReport, BenchmarkRow

__all__ = [
    "BenchmarkReport",
    "BenchmarkRow",
    "ExportReport",
    "LatencyTable",
    "Provider",
    "Target",
    "benchmark",
    "export_onnx",
    "latency_table",
    "resolve_provider",
    "usable_providers",
]
