"""Proof that pruning changed nothing but what the plan says."""

from .experts import RouterWatch, verify_experts
from .layers import bypassed, verify_layers
from .oracles import verify
from .results import Check, VerificationReport

__all__ = [
    "Check",
    "RouterWatch",
    "VerificationReport",
    "bypassed",
    "verify",
    "verify_experts",
    "verify_layers",
]
