"""Proof that pruning changed nothing but what the plan says."""

from .experts import RouterWatch, verify_experts
from .layers import bypassed, verify_layers
from .oracles import verify
from .results import Check, VerificationReport, failure_of

__all__ = [
    "Check",
    "RouterWatch",
    "VerificationReport",
    "bypassed",
    "failure_of",
    "verify",
    "verify_experts",
    "verify_layers",
]
