"""Kill every writer at random moments; what has the file's name then must be the whole old file or the whole new one.

    python -m tools.kill_writers --count 20

A child writes without end and is killed (SIGKILL) after a random time, `--count` times for each writer; then the file
is loaded. Runs that resume (finetune, pipeline, lottery_ticket) must end as a run does that was never killed.
Prints a table and writes docs/robustness.json; exit status 1 where a file was damaged or something stayed behind.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.killing import WRITERS, kill
from tools._robustness import record, show

COLUMNS = ("writer", "kills", "old", "new", "while_writing", "failures")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=20, help="kills of each writer (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="other moments (default 0)")
    parser.add_argument("--only", choices=list(WRITERS), help="one writer; nothing is recorded")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in [options.only] if options.only else WRITERS:
        with tempfile.TemporaryDirectory() as folder:
            found = kill(WRITERS[name], Path(folder) / "files", options.count, options.seed)
        for text in found.failures:
            print(f"{name}: {text}", flush=True)
        rows.append({
            "writer": name, "kills": found.kills, "old": found.old, "new": found.new, "while_writing": found.inside,
            "failures": len(found.failures),
        })  # fmt: skip
        print(f"{name}: {found.kills} kills", file=sys.stderr, flush=True)
    show(rows, COLUMNS)
    failures = sum(row["failures"] for row in rows)
    print(f"{sum(row['kills'] for row in rows)} kills, {failures} failures")
    if not options.only:
        record("kills", rows, count=options.count, seed=options.seed)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
