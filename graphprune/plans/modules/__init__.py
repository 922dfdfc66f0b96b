"""Modules equal to torch.nn's closed ones, but with free widths: what pruning puts in place of those where needed."""

from .attention import MultiheadAttention
from .bypass import Bypass, Gap, Silence
from .recurrent import Recurrent, replacement_of, run_layers

__all__ = ["Bypass", "Gap", "MultiheadAttention", "Recurrent", "Silence", "replacement_of", "run_layers"]
