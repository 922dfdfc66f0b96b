"""Prune many random networks and hold each against every oracle.

    python -m tools.fuzz --start 0 --count 5000
    python -m tools.fuzz --start 1234 --count 1 --ratio 0.5
    python -m tools.fuzz --programs --count 1000

Prints every failing seed as it is found and a summary at the end; exit status 1 if there was any.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

import torch

from tests.examination import Outcome, examine_program, examine_random
from tests.waiting import time_limit


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--start", type=int, default=0, help="first seed (default 0)")
    parser.add_argument("--count", type=int, default=5000, help="number of seeds (default 5000)")
    parser.add_argument("--ratio", type=float, help="share of channels to remove (default: another one for each seed)")
    parser.add_argument("--prove", action="store_true", help="also run the engine's own verification")
    parser.add_argument(
        "--programs", action="store_true",
        help="networks of the second generator, functions on bare parameters in three precisions, always with --prove",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, default=120, help="seconds for one network (default 120, 0 for no limit)")
    parser.add_argument("--every", type=int, default=100, help="networks between two lines of progress (default 100)")
    options = parser.parse_args()
    torch.set_num_threads(1)

    failures: dict[int, Outcome] = {}
    shares: list[float] = []
    reasons: Counter[str] = Counter()
    for done, seed in enumerate(range(options.start, options.start + options.count), 1):
        try:
            with time_limit(options.limit, TimeoutError(f"not done after {options.limit} s")):
                if options.programs:
                    outcome = examine_program(seed, options.ratio)
                else:
                    outcome = examine_random(seed, options.ratio, prove=options.prove)
        except TimeoutError as error:
            outcome = Outcome(crash=str(error))
        shares.append(outcome.share)
        reasons.update([outcome.reason] if outcome.reason else [])
        if outcome.failed:
            failures[seed] = outcome
            print(f"seed {seed}: {outcome}", flush=True)
        if done % options.every == 0:
            print(f"{done} of {options.count} networks, {len(failures)} failures", flush=True)
    smaller = [share for share in shares if share > 0]
    mean = sum(smaller) / len(smaller) if smaller else 0.0
    print(
        f"{options.count} networks, seeds {options.start} to {options.start + options.count - 1}: "
        f"{len(failures)} failures, {len(smaller)} became smaller, by {mean:.1%} of their parameters on average"
    )
    for reason, number in reasons.most_common(10):
        print(f"{number:5d} stayed whole: {reason}")
    if failures:
        print("failing seeds: " + " ".join(map(str, failures)))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
