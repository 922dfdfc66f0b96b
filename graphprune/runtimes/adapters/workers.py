"""The other end of a worker process: requests as methods, its death as an error that can be read."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from ...errors import GraphPruneError
from ...support.types import PathLike
from ..profiles import NodeTime
from .source import Source, read_batches, write_batches

_ROOT = Path(__file__).resolve().parents[3]


class Worker:
    """A process for one runtime. A context manager: at its end the process and its files are gone.

    `python`: another interpreter, of an environment that has graphprune and the runtime, where they cannot share this
    one. `threads`: what libraries that look at the environment may use.

    Raises GraphPruneError, from every method, with what the runtime says, or how the process ended.
    """

    def __init__(self, runtime: str, *, python: PathLike | None = None, threads: int = 1) -> None:
        self.runtime = runtime
        self._python = os.fspath(python) if python is not None else sys.executable
        self._threads = threads
        self._counter = 0

    def __enter__(self) -> Worker:
        self._folder = tempfile.TemporaryDirectory(prefix="graphprune-")
        self.folder = Path(self._folder.name)
        self._log = (self.folder / "log.txt").open("w+b")
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            environment[name] = str(self._threads)
        if self._python == sys.executable:
            # The same graphprune as here, wherever it was imported from.
            environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            self._process = subprocess.Popen(
                [self._python, "-m", "graphprune.runtimes.adapters.worker", self.runtime],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment, text=True,
                encoding="utf-8",
            )  # fmt: skip
        except OSError as error:
            self._end()
            raise GraphPruneError(
                f"runtime {self.runtime!r}: {self._python} cannot be started ({error.strerror or error}); give the "
                f"path of a Python interpreter whose environment has graphprune and the runtime"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        process = self._process
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            process.wait(timeout=0.2 if kind is None else 0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._end()

    def _end(self) -> None:
        self._log.close()
        self._folder.cleanup()

    def ask(self, request: str, **values: Any) -> Any:
        """The answer to one request of `worker.Served`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": request, **values}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise GraphPruneError(f"runtime {self.runtime!r}: its process {self._death(request)}")
        answer = json.loads(line)
        if "error" in answer:
            named = f"runtime {self.runtime!r}: "
            raise GraphPruneError(named + str(answer["error"]).removeprefix(named))
        return answer["ok"]

    def _death(self, request: str) -> str:
        code = self._process.wait()
        self._log.flush()
        self._log.seek(0)
        text = self._log.read().decode("utf-8", "replace")
        last = [line.strip() for line in text.splitlines() if line.strip()][-2:]
        if code < 0:
            names = {item.value: item.name for item in signal.Signals}
            how = f"was ended by {names.get(-code, f'signal {-code}')} at the request {request!r}"
        else:
            how = f"ended with status {code} at the request {request!r}"
        return how + (f": {' | '.join(last)[:600]}" if last else "")

    def describe(self, precision: str) -> dict[str, Any]:
        """Versions, layout, and why the runtime cannot be used ("missing", None where it can)."""
        found: dict[str, Any] = self.ask("describe", precision=precision)
        return found

    def check(self, precision: str) -> dict[str, Any]:
        """What `describe` says. Raises GraphPruneError where the runtime cannot be used there."""
        described = self.describe(precision)
        if described["missing"] is not None:
            raise GraphPruneError(f"runtime {self.runtime!r}: {described['missing']}")
        return described

    def write(self, source: Source, precision: str, path: Path) -> list[str]:
        """Write an artifact; notes."""
        notes: list[str] = self.ask("write", source=source.as_dict(), precision=precision, path=str(path))
        return notes

    def open(
        self,
        path: Path,
        names: Sequence[str],
        tensors: Sequence[Tensor],
        *,
        precision: str,
        provider: str | None = None,
    ) -> RemoteSession:
        """A session in the worker that has run once."""
        self._counter += 1
        key = str(self._counter)
        inputs = write_batches(self.folder / f"{key}.inputs", [tensors])
        in_force = self.ask(
            "open", key=key, path=str(path), names=list(names), inputs=str(inputs), precision=precision,
            threads=self._threads, provider=provider,
        )  # fmt: skip
        inputs.unlink()
        return RemoteSession(self, key, in_force)


    def nodes(
        self,
        path: Path,
        names: Sequence[str],
        tensors: Sequence[Tensor],
        *,
        precision: str,
        provider: str | None = None,
        runs: int,
    ) -> tuple[NodeTime, ...]:
        """What each node of a file takes in a run; none where the runtime does not tell."""
        inputs = write_batches(self.folder / "nodes.inputs", [tensors])
        found = self.ask(
            "nodes", path=str(path), names=list(names), inputs=str(inputs), runs=runs, precision=precision,
            threads=self._threads, provider=provider,
        )  # fmt: skip
        inputs.unlink()
        return tuple(NodeTime.of(node) for node in found)


class RemoteSession:
    """A session that lives in a worker."""

    def __init__(self, worker: Worker, key: str, in_force: str) -> None:
        self._worker, self._key = worker, key
        self.in_force = in_force

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The outputs on these inputs."""
        return self.run_all([tensors])[0]

    def run_all(self, batches: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """The outputs of each of these batches."""
        folder = self._worker.folder
        inputs = write_batches(folder / f"{self._key}.inputs", batches)
        outputs = folder / f"{self._key}.outputs"
        self._worker.ask("run", key=self._key, outputs=str(outputs), inputs=str(inputs))
        found = list(read_batches(outputs))
        for path in (inputs, outputs):
            path.unlink()
        return found

    def sample(self, calls: int) -> tuple[float, float]:
        """Seconds per call: on the wall, and of the worker's CPU time."""
        wall, cpu = self._worker.ask("sample", key=self._key, calls=calls)
        return wall, cpu

    def close(self) -> None:
        """Let the worker forget it."""
        self._worker.ask("close", key=self._key)
