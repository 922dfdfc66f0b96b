"""From a module to a file that runs: ONNX export with proof, and latency measured in ONNX Runtime."""

from .benchmark import benchmark
from .export import ExportReport, export_onnx
from .providers import Provider, resolve_provider, usable_providers
from .results import BenchmarkReport, BenchmarkRow

__all__ = [
    "BenchmarkReport",
    "BenchmarkRow",
    "ExportReport",
    "Provider",
    "benchmark",
    "export_onnx",
    "resolve_provider",
    "usable_providers",
]
