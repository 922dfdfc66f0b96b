"""Modules equal to torch.nn's closed ones, but with free widths: what pruning puts in place of those where needed."""

from .attention import MultiheadAttention, attend, recorded_openly

__all__ = ["MultiheadAttention", "attend", "recorded_openly"]
