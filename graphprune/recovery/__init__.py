"""Recovery without labels (mean compensation, batch norm re-estimation, least squares against the dense network, whole
blocks by gradient) and with them (fine-tuning, distillation)."""

from .repair.blocks import BlockFit
from .repair.methods import METHODS, Recovery, auto_possible, check_method, name_of, recover
from .repair.steps import LayerRecovery
from .training.carrying import carry_optimizer
from .training.distillation import Distillation
from .training.evaluation import Evaluation
from .training.penalties import GroupLasso, GroupPenalty, GrowingPenalty
from .training.runs import Epoch, Finetuning
from .training.tuning import finetune

__all__ = [
    "METHODS",
    "BlockFit",
    "Distillation",
    "Epoch",
    "Evaluation",
    "Finetuning",
    "GroupLasso",
    "GroupPenalty",
    "GrowingPenalty",
    "LayerRecovery",
    "Recovery",
    "auto_possible",
    "carry_optimizer",
    "check_method",
    "finetune",
    "name_of",
    "recover",
]
