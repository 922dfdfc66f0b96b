"""Train, prune, fine-tune: the whole way as one call."""

from .pipeline import PipelineResult, pipeline
from .steps import PruningStep

__all__ = ["PipelineResult", "PruningStep", "pipeline"]
