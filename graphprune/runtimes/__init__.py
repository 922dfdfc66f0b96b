"""From a module to a file that runs, and to numbers: ONNX export with proof, adapters of runtimes, latency measured in
ONNX Runtime, and latency tables of a machine to plan with."""

from .export import export_onnx
from .exported import ExportReport
from .latency import LatencyTable, Target, latency_table
from .listing import RuntimeList, RuntimeStatus, usable_runtimes
from .providers import Provider, resolve_provider, usable_providers
from .results import BenchmarkReport, BenchmarkRow

__all__ = [
    "BenchmarkReport",
    "BenchmarkRow",
    "ExportReport",
    "LatencyTable",
    "Provider",
    "RuntimeList",
    "RuntimeStatus",
    "Target",
    "export_onnx",
    "latency_table",
    "resolve_provider",
    "usable_providers",
    "usable_runtimes",
]
