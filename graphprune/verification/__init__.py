"""Proof that pruning changed nothing but what the plan says."""

from .layers import bypassed, verify_layers
from .oracles import Check, VerificationReport, verify

__all__ = ["Check", "VerificationReport", "bypassed", "verify", "verify_layers"]
