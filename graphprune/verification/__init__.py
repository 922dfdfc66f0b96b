"""Proof that pruning changed nothing but what the plan says."""

from .experts import RouterWatch, verify_experts
from .layers import bypassed, verify_layers
from .oracles import Check, VerificationReport, verify

__all__ = [
    "Check",
    "RouterWatch",
    "VerificationReport",
    "bypassed",
    "verify",
    "verify_experts",
    "verify_layers",
]
