"""Structured pruning for PyTorch: physically smaller networks, proven, exported and measured.

small = graphprune.prune(model, example_input, 0.5)
graphprune.export_onnx(small, example_input, "small.onnx")
graphprune.benchmark({"dense": model, "small": small}, example_input)
"""

from . import sparsity
from ._version import __version__
from .allocation import Budget
from .configs import ConfigFit, fit_config
from .counting import Count, LayerCount, count
from .curves import Curve, Sensitivity, sensitivity
from .dependency import DependencyGraph, Frozen, Group, Member, trace
from .deploy import benchmark, export_onnx
from .diagnosis import Advice, Blocker, Doctor, Prunable, advise, doctor
from .engine import plan, prune
from .errors import GraphPruneError
from .folding import fold_conv_bn
from .gradual import prune_gradually
from .importance import criterion
from .kernels import plan_kernels, shrink_kernels
from .latency import Attempt, Latency, LatencyTable, Target
from .latency.planning import latency_table
from .pipelines import PipelineResult, pipeline
from .plans import Plan
from .recovery import Distillation, Evaluation, Finetuning, Recovery, carry_optimizer, finetune, recover
from .report.summary import Point, Report, report
from .rules import rule
from .storage import load, save
from .verification import VerificationReport, verify

__all__ = [
    "Advice",
    "Attempt",
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
    "Group",
    "Latency",
    "LatencyTable",
    "LayerCount",
    "Member",
    "PipelineResult",
    "Plan",
    "Point",
    "Prunable",
    "Recovery",
    "Report",
    "Sensitivity",
    "Target",
    "VerificationReport",
    "__version__",
    "advise",
    "benchmark",
    "carry_optimizer",
    "count",
    "criterion",
    "doctor",
    "export_onnx",
    "finetune",
    "fit_config",
    "fold_conv_bn",
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
    "save",
    "sensitivity",
    "shrink_kernels",
    "sparsity",
    "trace",
    "verify",
]
