"""A proof that ends the command where it fails."""

from __future__ import annotations

from typing import Any

from ..plans.plan import Plan
from ..plans.verification import VerificationReport, verify
from .factories import Loaded


def proof_of(loaded: Loaded, small: Any, decided: Plan, example: Any) -> VerificationReport:
    """The verification of `small`. Raises GraphPruneError where it does not pass."""
    report = verify(loaded.model, small, decided, example)
    report.raise_on_failure()
    return report
