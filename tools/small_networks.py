"""Prune every small network of a file and say for each what came of it.

    python -m tools.small_networks CASES.py --ratio 0.5

The file defines CASES, a dict from names to functions that return (model, example input, modules whose outputs stay).
One line per case: the share of parameters removed, or the reason why nothing could be removed, or WRONG or CRASH with
what was found; then the counts. Exit status 1 if anything was wrong or crashed, or if fewer than --minimum shrank.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphprune.plans.rewriting import OUTPUTS
from tests.examination import Demands, Outcome, examine
from tests.networks.registry import settle

Case = Callable[[], tuple[nn.Module, Any, list[nn.Module]]]


def load_cases(path: Path) -> dict[str, Case]:
    """CASES of a Python file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cases: dict[str, Case] | None = getattr(module, "CASES", None)
    if not cases:
        raise SystemExit(f"{path} defines no CASES")
    return cases


def examine_case(case: Case, ratio: float, fold_bn: bool, seed: int, output: str = "module") -> Outcome:
    """One case, with weights and running statistics in which a wrong index shows."""
    torch.manual_seed(seed)
    try:
        model, example, ignored = case()
    except Exception as error:
        return Outcome(crash=f"the case itself fails: {error}")
    settle(model)
    model.eval()
    # Whether a statistic runs over channels is not known here: the reference with absent channels covers both.
    demands = Demands(
        ratio=ratio,
        fold_bn=fold_bn,
        ignore=tuple(ignored),
        statistics=True,
        temperature=True,
        prove=True,
        seed=seed,
        output=output,
    )
    return examine(model, example, demands)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", type=Path, help="a Python file that defines CASES")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of channels to remove (default 0.5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", choices=OUTPUTS, default="module", help="what becomes of code that blocks")
    parser.add_argument("--minimum", type=int, default=0, help="how many have to shrink (default 0)")
    parser.add_argument("--only", nargs="*", help="names of cases (default: all)")
    options = parser.parse_args()
    torch.set_num_threads(1)

    counts = {"smaller": 0, "left alone": 0, "failed": 0}
    cases = load_cases(options.cases)
    for name, case in cases.items():
        if options.only and name not in options.only:
            continue
        outcome = examine_case(case, options.ratio, False, options.seed, options.output)
        if not outcome.failed:
            folded = examine_case(case, options.ratio, True, options.seed, options.output)
            outcome = folded if folded.failed else outcome
        counts["failed" if outcome.failed else "smaller" if outcome.share > 0 else "left alone"] += 1
        print(f"{name:32} {outcome}", flush=True)
    print(", ".join(f"{count} {what}" for what, count in counts.items()) + f", of {sum(counts.values())}")
    return 1 if counts["failed"] or counts["smaller"] < options.minimum else 0


if __name__ == "__main__":
    sys.exit(main())
