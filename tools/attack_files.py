"""Mutate every kind of file that graphprune reads and load what comes out.

    python -m tools.attack_files --count 400
    python -m tools.attack_files --only model --count 5000 --seed 7

`--count` mutations of each kind of file, half of them with a digest that fits. Fails, with exit status 1, where a load
raises anything but GraphPruneError, waits, takes more than 256 MiB of memory or accepts damage that a digest shows.
Prints a table and, run over all kinds, writes docs/robustness.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.attacks import FORMATS, attack
from tools._robustness import record, show

MEMORY = 256 * 2**20
COLUMNS = ("file", "mutations", "refused", "accepted", "memory_mib", "failures")


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def one(name: str, count: int, seed: int) -> dict[str, Any]:
    """The attacks on one kind of file, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        attack(FORMATS[name], Path(folder) / "good", 0)  # what a good file takes
        before = peak()
        found = attack(FORMATS[name], Path(folder) / "bad", count, seed)
        grown = peak() - before
    if grown > MEMORY:
        found.failures.append(f"loading took {grown / 2**20:.0f} MiB more than loading a good file")
    return {
        "file": name, "mutations": found.attacks, "refused": found.refused, "accepted": found.accepted,
        "memory_mib": round(grown / 2**20), "failures": len(found.failures), "told": found.failures[:20],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=400, help="mutations of each kind of file (default 400)")
    parser.add_argument("--seed", type=int, default=0, help="other mutations (default 0)")
    parser.add_argument("--only", choices=list(FORMATS), help="one kind of file, in this process")
    options = parser.parse_args()
    if options.only:
        row = one(options.only, options.count, options.seed)
        print(json.dumps(row))
        return bool(row["failures"])
    rows = []
    for name in FORMATS:  # each in a process of its own, whose memory is its own
        command = [sys.executable, "-W", "ignore", "-m", "tools.attack_files", "--only", name]
        command += ["--count", str(options.count), "--seed", str(options.seed)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        if not lines:
            print(f"{name}: the process ended with {done.returncode}: {done.stderr[-500:]}")
            return 1
        rows.append(json.loads(lines[-1]))
        for text in rows[-1].pop("told"):
            print(f"{name}: {text}", flush=True)
    show(rows, COLUMNS)
    total = sum(row["mutations"] for row in rows)
    failures = sum(row["failures"] for row in rows)
    print(f"{total} mutations, {failures} failures")
    record("attacks", rows, count=options.count, seed=options.seed, memory_limit_mib=MEMORY // 2**20)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
