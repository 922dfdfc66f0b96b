"""What real inputs say: calibration batches, the layers that read channels, and second moments of what they read."""

from .data import CalibrationData, refuse_infinite
from .layers import Reader, find_readers
from .moments import Moments, NoProducts, as_weight, rows_of, weight_matrix
from .observe import Call, observe
from .statistics import Calibration

__all__ = [
    "Calibration",
    "CalibrationData",
    "Call",
    "Moments",
    "NoProducts",
    "Reader",
    "as_weight",
    "find_readers",
    "observe",
    "refuse_infinite",
    "rows_of",
    "weight_matrix",
]
