"""Writers that are killed at any moment: what has the name is the whole old file or the whole new one, and loads."""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphprune
from graphprune import sparsity
from graphprune.runtimes import freeing
from graphprune.runtimes.arguments import FlatArguments
from graphprune.runtimes.capture import capture
from graphprune.runtimes.dynamic import FreeAxes
from tests.attacks import X, Y
from tests.runtimes.latency.law import table

State = dict[str, Tensor]
EPOCHS = 4


def net(seed: int, outputs: int = 4000) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, outputs)).eval()


def state(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: Any, b: Any) -> bool:
    if not isinstance(a, dict):
        return bool(a == b)
    return a.keys() == b.keys() and all(
        torch.equal(a[n], b[n]) if isinstance(a[n], Tensor) else a[n] == b[n] for n in a
    )


@dataclasses.dataclass(frozen=True)
class Writer:
    """`write(path, version)` replaces the file at `path` by one of version 0 or 1, `read(path)` gives what is there:
    `expected(version)`, for one of them. Runs that resume have one version, and may have no file yet."""

    name: str
    file: str
    write: Callable[[Path, int], Any]
    read: Callable[[Path], Any]
    expected: Callable[[int], Any]
    resumes: bool = False
    beside: int = 0  # files beside the one that is named
    trains: bool = False  # torch cannot train in a fork of a process that has trained


@functools.cache
def _plan(version: int) -> graphprune.Plan:
    return graphprune.plan(net(version), X, 0.5)


def _curves(version: int) -> graphprune.Sensitivity:
    return graphprune.Sensitivity("error", "l2", str(version) * 1000, ())


def _table(version: int) -> graphprune.LatencyTable:
    made = table(8)
    made.about = {"provider": "law", "threads": version, "text": "x" * 100_000}
    return made


@functools.cache
def _captured(version: int) -> Any:
    arguments = FlatArguments.of(X, net(version))
    return capture(net(version), arguments, ["output"], opset=None, free=FreeAxes.batch(arguments))


def _export(path: Path, version: int, external: bool) -> None:
    """An export whose network was captured before, so that most of its time goes into writing."""
    original = vars(freeing)["capture"]
    vars(freeing)["capture"] = lambda *_, **__: _captured(version)
    try:
        graphprune.export_onnx(net(version), X, path, check=False, external_data=external)
    finally:
        vars(freeing)["capture"] = original


def _answers(path: Path) -> list[bool]:
    """Whether the network in an ONNX file answers as each of the two."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    with torch.no_grad():
        return [torch.allclose(torch.from_numpy(found), net(version)(X), atol=1e-4) for version in (0, 1)]


def _finetuned(path: Path | None) -> State:
    done = graphprune.finetune(
        net(0, 40), [(X, Y)] * 2, epochs=EPOCHS, optimizer="adamw", evaluate=lambda m: float(m[0].weight.sum()),
        patience=EPOCHS, checkpoint=path, progress=False,
    )  # fmt: skip
    return state(done.model)


def _piped(path: Path | None) -> State:
    done = graphprune.pipeline(
        net(0, 40), X, [(X, Y)], 0.5, schedule="linear", prune_epochs=2, train_epochs=2, finetune_epochs=2,
        progress=False, checkpoint=None if path is None else path.parent,
    )  # fmt: skip
    return state(done.model)


def _ticket(path: Path | None) -> State:
    def train(model: nn.Module, first: int, last: int) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    found = sparsity.lottery_ticket(net(0, 40), train, 0.5, steps=2, rounds=3, checkpoint=path)
    return state(found.model)


def _made(path: Path | None) -> State:
    torch.manual_seed(0)
    normed = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))
    found = graphprune.synthesize(normed, X, 24, steps=3, batch_size=8, path=path)
    return {str(number): batch for number, batch in enumerate(found)}


def _again(run: Callable[[Path | None], State]) -> Callable[[Path, int], None]:
    """A whole run, and then from the start."""

    def write(path: Path, version: int) -> None:
        run(path)
        for file in path.parent.glob("*.safetensors"):
            file.unlink()

    return write


@functools.cache
def _pruned(version: int) -> nn.Module:
    return graphprune.prune(net(version), X, 0.5)


WRITERS = {
    w.name: w
    for w in (
        Writer("save", "m.safetensors", lambda p, v: graphprune.save(_pruned(v), p),
               lambda p: state(graphprune.load(p, net(0))), lambda v: state(_pruned(v))),
        Writer("Plan.save", "plan.json", lambda p, v: _plan(v).save(p),
               lambda p: graphprune.Plan.load(p).to_dict(), lambda v: _plan(v).to_dict()),
        Writer("sparsity.save", "m.gps", lambda p, v: sparsity.save(net(v), p), sparsity.load, lambda v: state(net(v))),
        Writer("Sensitivity.save", "s.json", lambda p, v: _curves(v).save(p), graphprune.Sensitivity.load, _curves),
        Writer("LatencyTable.save", "t.json", lambda p, v: _table(v).save(p),
               lambda p: dict(graphprune.LatencyTable.load(p).about), lambda v: _table(v).about),
        Writer("export_onnx", "m.onnx", lambda p, v: _export(p, v, False), _answers, lambda v: [v == 0, v == 1]),
        Writer("export_onnx, weights beside", "e.onnx", lambda p, v: _export(p, v, True), _answers,
               lambda v: [v == 0, v == 1], beside=1),
        Writer("finetune", "run.safetensors", _again(_finetuned), _finetuned, lambda v: _finetuned(None), True,
               trains=True),
        Writer("pipeline", "tuning.safetensors", _again(_piped), _piped, lambda v: _piped(None), True,
               trains=True),
        Writer("lottery_ticket", "ticket.safetensors", _again(_ticket), _ticket, lambda v: _ticket(None), True),
        Writer("synthesize", "made.safetensors", _again(_made), _made, lambda v: _made(None), True),
    )
}  # fmt: skip


@dataclasses.dataclass
class Result:
    """Of the kills of one writer. `old`, `new`: what was there after them; `inside`: kills that left a folder of an
    unfinished file."""

    kills: int = 0
    old: int = 0
    new: int = 0
    inside: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)


def _write_on(writer: Writer, path: Path) -> None:
    for turn in range(1, 10**9):
        writer.write(path, 0 if writer.resumes else turn % 2)


def _kill_fork(writer: Writer, path: Path, delay: float) -> int:
    """How a fork that writes without end ended when it was killed after `delay` seconds."""
    child = os.fork()
    if not child:
        try:
            _write_on(writer, path)
        finally:
            os._exit(1)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill_process(writer: Writer, path: Path, delay: float) -> int:
    """The same with a process that begins anew; `delay` runs from when it begins to write."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.killing", writer.name, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        time.sleep(delay)
        child.kill()
        return child.wait()


def attempt(writer: Writer, folder: Path, delay: float, expected: list[Any], result: Result) -> None:
    """Kill a writer after `delay` seconds; what has the name then must be whole."""
    path = folder / writer.file
    ended = (_kill_process if writer.trains else _kill_fork)(writer, path, delay)
    result.kills += 1
    result.inside += any(file.name.endswith(".unfinished") for file in folder.iterdir())
    if ended != -signal.SIGKILL:
        result.failures.append(f"{result.kills}: the writer ended by itself")
    try:
        found = writer.read(path)
    except Exception as error:
        result.failures.append(f"{result.kills}: {type(error).__name__}: {str(error)[:200]}")
        return
    fits = [equal(found, known) for known in expected]
    result.old, result.new = result.old + fits[0], result.new + (not fits[0] and fits[-1])
    if not any(fits):
        result.failures.append(f"{result.kills}: neither the old file nor the new one")


def kill(writer: Writer, folder: Path, count: int, seed: int = 0) -> Result:
    """Kill a writer `count` times at random moments, and see that the next one leaves nothing behind."""
    chance, result = random.Random(f"{seed} {writer.name}"), Result()
    versions = (0,) if writer.resumes else (0, 1)
    expected = [writer.expected(version) for version in versions]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / writer.file
    start = time.perf_counter()
    for version in (1, 0, 1, 0):
        writer.write(path, version)
    longest = (1 if writer.resumes else 4) * (time.perf_counter() - start) / 4 + 0.01
    for _ in range(count):
        if writer.resumes:
            shutil.rmtree(folder)
            folder.mkdir()
        attempt(writer, folder, chance.uniform(0, longest), expected, result)
    for left in folder.iterdir():
        if not left.name.endswith(".safetensors"):
            os.utime(left, (0, 0))  # as if time had passed since
    for _ in range(2):  # a run that was killed after its end has nothing to write
        writer.write(path, 0)
    kept = sorted(file.name for file in folder.iterdir())
    if len(kept) > (0 if writer.resumes else 1 + writer.beside):
        result.failures.append(f"left behind: {', '.join(kept)}")
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("ready", flush=True)
    _write_on(WRITERS[sys.argv[1]], Path(sys.argv[2]))
