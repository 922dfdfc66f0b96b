"""From a module to the file that a runtime takes, and to numbers: export, accuracy and latency in every runtime."""

from .artifact import Artifact
from .benchmark import benchmark
from .exporting import export
from .runner import Runner

__all__ = ["Artifact", "Runner", "benchmark", "export"]
