"""Structured pruning for PyTorch: physically smaller networks, proven, exported and measured.

small = graphprune.prune(model, example_input, 0.5)
graphprune.export_onnx(small, example_input, "small.onnx")
graphprune.benchmark({"dense": model, "small": small}, example_input)
"""

from . import importance, rules, runtimes, sparsity
from ._version import __version__
from .dependency import DependencyGraph, Frozen, Group, GroupKind, Member, trace
from .deployment import Artifact, Runner, benchmark, export
from .errors import GraphPruneError, GraphPruneWarning
from .importance import criterion
from .planning.allocation import Budget
from .planning.calls import plan, prune
from .planning.kernels import plan_kernels, shrink_kernels
from .plans.folding import fold_conv_bn
from .plans.latency import Attempt, Latency
from .plans.plan import Plan
from .plans.storage import load, save
from .plans.verification import VerificationReport, verify
from .recovery import (
    BlockFit,
    Distillation,
    Evaluation,
    Finetuning,
    GroupLasso,
    GroupPenalty,
    GrowingPenalty,
    Recovery,
    carry_optimizer,
    finetune,
    recover,
)
from .rules import rule
from .runtimes import LatencyTable, Target, export_onnx, latency_table
from .support.progress import Progress
from .synthesis import Synthetic, SyntheticInputs, synthesize
from .tracing.counting import Count, LayerCount, count
from .workflows.configs import ConfigFit, fit_config
from .workflows.curves import Curve, Sensitivity, sensitivity
from .workflows.diagnosis import Advice, Blocker, Doctor, Interface, Prunable, advise, doctor
from .workflows.gradual import prune_gradually
from .workflows.pipelines import PipelineResult, pipeline
from .workflows.reporting.summary import Point, Report, report

__all__ = [
    "Advice",
    "Artifact",
    "Attempt",
    "BlockFit",
    "Blocker",
    "Budget",
    "ConfigFit",
    "Count",
    "Curve",
    "DependencyGraph",
    "Distillation",
    "Doctor",
    "Evaluation",
    "Finetuning",
    "Frozen",
    "GraphPruneError",
    "GraphPruneWarning",
    "Group",
    "GroupKind",
    "GroupLasso",
    "GroupPenalty",
    "GrowingPenalty",
    "Interface",
    "Latency",
    "LatencyTable",
    "LayerCount",
    "Member",
    "PipelineResult",
    "Plan",
    "Point",
    "Progress",
    "Prunable",
    "Recovery",
    "Report",
    "Runner",
    "Sensitivity",
    "Synthetic",
    "SyntheticInputs",
    "Target",
    "VerificationReport",
    "__version__",
    "advise",
    "benchmark",
    "carry_optimizer",
    "count",
    "criterion",
    "doctor",
    "export",
    "export_onnx",
    "finetune",
    "fit_config",
    "fold_conv_bn",
    "importance",
    "latency_table",
    "load",
    "pipeline",
    "plan",
    "plan_kernels",
    "prune",
    "prune_gradually",
    "recover",
    "report",
    "rule",
    "rules",
    "runtimes",
    "save",
    "sensitivity",
    "shrink_kernels",
    "sparsity",
    "synthesize",
    "trace",
    "verify",
]
