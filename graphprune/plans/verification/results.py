"""What a proof says: one verdict per check, and how far apart two outputs are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from ...errors import GraphPruneError
from ...tracing.example import result_tensors

# Largest relative error accepted in float32; a larger one is looked at again in float64, where only real differences
# survive.
TOLERANCE = 1e-4
# By the precision that outputs are compared in. Half precision: for code that cannot run in any other.
TOLERANCES = {torch.float64: 1e-9, torch.float32: TOLERANCE, torch.float16: 2.0**-6, torch.bfloat16: 2.0**-3}


@dataclasses.dataclass(frozen=True)
class Check:
    """One oracle's verdict. `error` is max|a - b| / max|b| over all outputs, NaN where nothing was compared."""

    name: str
    passed: bool
    error: float
    detail: str = ""

    def __str__(self) -> str:
        error = "" if math.isnan(self.error) else f", relative error {self.error:.1e}"
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}{error}{': ' + self.detail if self.detail else ''}"


@dataclasses.dataclass(frozen=True)
class VerificationReport:
    """What was checked and with which result."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(c.passed for c in self.checks)

    def __str__(self) -> str:
        return "\n".join(map(str, self.checks))

    def raise_on_failure(self) -> None:
        """Raise GraphPruneError with the failed checks."""
        failed = [str(c) for c in self.checks if not c.passed]
        if failed:
            raise GraphPruneError("verification failed, the pruned network is not returned:\n" + "\n".join(failed))


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory has run out."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(t in str(error) for t in ("allocate memory", "out of memory", "bad_alloc"))


def failure_of(prove: Callable[[], VerificationReport]) -> str:
    """Why a proof fails: the checks that failed, or the first line of the error it ended with; "" where it holds."""
    try:
        report = prove()
    except GraphPruneError as error:
        return str(error).splitlines()[0]
    return "; ".join(str(c) for c in report.checks if not c.passed)


def relative_error(got: Any, want: Any) -> float:
    """max|a - b| / max|b| over corresponding tensors; infinite where shapes, counts or NaN patterns differ."""
    a, b = result_tensors(got), result_tensors(want)
    if len(a) != len(b):
        return math.inf
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape:
            return math.inf
        if not x.numel():
            continue
        if not (y.is_floating_point() or y.is_complex()):
            worst = max(worst, 0.0 if torch.equal(x, y) else math.inf)
            continue
        x, y = (
            x.detach().to(torch.complex128 if y.is_complex() else torch.float64),
            y.detach().to(torch.complex128 if y.is_complex() else torch.float64),
        )
        same = (x == y) | (torch.isnan(x) & torch.isnan(y))
        difference = torch.where(same, 0, (x - y).abs())
        finite = y.abs()[torch.isfinite(y.abs())]
        scale = float(finite.max()) if finite.numel() else 0.0
        error = float(difference.max()) / max(scale, 1e-12)
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst
