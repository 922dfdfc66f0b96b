"""A process that writes and runs files of one runtime: what dies in there does not take the user's process with it.

    python -m graphprune.runtimes.adapters.worker RUNTIME

It reads requests, a line of JSON each, and answers each with one: {"ok": ...}, or {"error": text}. Tensors travel in
files. What libraries print goes to standard error. `workers.Worker` is the other end.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...errors import GraphPruneError
from . import adapter
from .base import Adapter, Opening, Session
from .naming import first_lines
from .source import Source, read_batches, write_batches


class Served:
    """What a worker can do: a method for each request."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._sessions: dict[str, Session] = {}

    def describe(self, precision: str) -> dict[str, Any]:
        """What is installed, or why it cannot be used."""
        return {
            "missing": self._adapter.missing,
            "versions": self._adapter.versions,
            "layout": self._adapter.layout(precision),
        }

    def write(self, source: dict[str, Any], precision: str, path: str) -> list[str]:
        """Notes of `Adapter.write`."""
        self._adapter.check_usable()
        return list(self._adapter.write(Source.of(source), precision, Path(path)))

    def open(self, key: str, path: str, names: list[str], inputs: str, **settings: Any) -> str:
        """Open a file under a key, run it once; the precision in force."""
        self._adapter.check_usable()
        tensors = tuple(next(read_batches(Path(inputs))))
        session = self._adapter.open(Path(path), Opening(tuple(names), tensors, **settings))
        session.run()
        self._sessions[key] = session
        return session.in_force()

    def nodes(self, path: str, names: list[str], inputs: str, runs: int, **settings: Any) -> list[dict[str, Any]]:
        """What each node of a file takes in a run."""
        self._adapter.check_usable()
        tensors = tuple(next(read_batches(Path(inputs))))
        found = self._adapter.nodes(Path(path), Opening(tuple(names), tensors, **settings), runs)
        return [dataclasses.asdict(node) for node in found]

    def run(self, key: str, outputs: str, inputs: str) -> None:
        """Run on each of some batches, and write what comes out of each."""
        session = self._sessions[key]
        found = []
        for batch in read_batches(Path(inputs)):
            session.load(batch)
            session.run()
            found.append([t.clone() for t in session.outputs()])
        write_batches(Path(outputs), found)

    def sample(self, key: str, calls: int) -> list[float]:
        """Seconds of the clock on the wall and of this process's CPU time, per call."""
        run = self._sessions[key].run
        collecting = gc.isenabled()
        gc.disable()
        try:
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(calls):
                run()
            return [(time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls]
        finally:
            if collecting:
                gc.enable()

    def close(self, key: str) -> None:
        """Forget a session."""
        self._sessions.pop(key, None)


def serve(name: str, answers: Any, requests: Any) -> None:
    """Answer until there are no requests left."""
    served: Served | None = None
    for line in requests:
        asked = json.loads(line)
        try:
            served = served or Served(adapter(name))
            method: Callable[..., Any] = getattr(served, asked.pop("do"))
            with torch.no_grad():
                said: dict[str, Any] = {"ok": method(**asked)}
        except GraphPruneError as error:
            said = {"error": str(error)}
        except Exception as error:
            said = {"error": first_lines(error, 3)}
        answers.write(json.dumps(said) + "\n")
        answers.flush()


def main() -> None:
    """Keep standard output for answers alone, and serve."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    serve(sys.argv[1], answers, sys.stdin)


if __name__ == "__main__":
    main()
