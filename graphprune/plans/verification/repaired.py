"""A repaired network beside the one that its plan makes: what else may differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...support.walking import named_tensors
from ...tracing.example import ExampleInput
from .results import Check
from .running import run, same_shapes

# What a layer adds to all its results, or takes from them: a repair of means moves these alone.
_CONSTANTS = ("bias", "running_mean")


def checks_of_repaired(pruned: nn.Module, cut: nn.Module, repair: str, example: ExampleInput) -> list[Check]:
    """Two checks: the repaired network runs, and has the tensors of `cut` but for what the method changes."""
    outputs = run(cut, example, "verify (cut)"), run(pruned, example, "verify (repaired)")
    forward = dataclasses.replace(same_shapes(outputs[1], outputs[0]), name="forward, repaired")
    wrong = _unlike(named_tensors(pruned), named_tensors(cut), repair)
    told = f"recover={repair!r} changed it after it was cut; the other checks are of what the plan makes"
    return [forward, Check("repaired", not wrong, math.nan, wrong or told)]


def _unlike(found: Mapping[str, Tensor], cut: Mapping[str, Tensor], repair: str) -> str:
    """What the repair cannot have done, in words; "" if nothing. It may have given layers a bias."""
    for name in {**cut, **found}:
        constant = name.rpartition(".")[2] in _CONSTANTS
        if name not in cut and constant:
            continue
        if name not in cut or name not in found or cut[name].shape != found[name].shape:
            return f"{name} is not what the plan leaves"
        if repair == "mean" and not constant and not _equal(cut[name], found[name]):
            return f"{name} has other values, and a repair of means changes constant terms alone"
    return ""


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.is_meta or b.is_meta or torch.equal(a, b.to(a.device))
