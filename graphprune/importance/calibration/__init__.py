"""What real inputs say: calibration batches, the layers that read channels, and second moments of what they read."""

from .data import ONE_INPUT, CalibrationData, refuse_infinite
from .layers import Reader, find_readers
from .loss import batch_loss, default_loss, labels_of, logits_of, loss_in, without_loss
from .moments import Moments, NoProducts, as_weight, rows_of, weight_matrix
from .observe import Call, observe
from .statistics import Calibration

__all__ = [
    "ONE_INPUT",
    "Calibration",
    "CalibrationData",
    "Call",
    "Moments",
    "NoProducts",
    "Reader",
    "as_weight",
    "batch_loss",
    "default_loss",
    "find_readers",
    "labels_of",
    "logits_of",
    "loss_in",
    "observe",
    "refuse_infinite",
    "rows_of",
    "weight_matrix",
    "without_loss",
]
