"""Proof that pruning changed nothing but what the plan says."""

from .oracles import Check, VerificationReport, verify

__all__ = ["Check", "VerificationReport", "verify"]
