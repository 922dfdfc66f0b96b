"""Recovery without training (mean compensation, batch norm re-estimation, least squares against the dense network) and
with it (fine-tuning, distillation)."""

from .carrying import carry_optimizer
from .distillation import Distillation
from .evaluation import Evaluation
from .finetune import finetune
from .layers import LayerRecovery
from .recover import METHODS, Recovery, check_method, recover
from .runs import Epoch, Finetuning

__all__ = [
    "METHODS",
    "Distillation",
    "Epoch",
    "Evaluation",
    "Finetuning",
    "LayerRecovery",
    "Recovery",
    "carry_optimizer",
    "check_method",
    "finetune",
    "recover",
]
