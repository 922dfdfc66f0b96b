"""Every function that writes or reads a file: full disks, pipes, and what is no path."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprune
from graphprune import GraphPruneError, sparsity
from graphprune.cli.factories import common_input, load_weights
from graphprune.runtimes.latency.target import Target
from tests.runtimes.latency.law import table
from tests.waiting import time_limit

pytest.importorskip("matplotlib")
X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1] * 4)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 2))


MODEL = net()


@functools.cache
def plan() -> graphprune.Plan:
    return graphprune.plan(MODEL, X, 0.5)


@functools.cache
def small() -> nn.Module:
    return plan().apply(MODEL)


@functools.cache
def report() -> graphprune.Report:
    return graphprune.report(MODEL, small(), X)


@functools.cache
def curves() -> graphprune.Sensitivity:
    return graphprune.sensitivity(MODEL, X, [X])


@functools.cache
def times() -> Any:
    return graphprune.benchmark({"a": MODEL, "b": small()}, X, warmup=1, rounds=3, min_time=0.0001, check=False)


@functools.cache
def graph() -> graphprune.DependencyGraph:
    return graphprune.trace(MODEL, X)


def finetune(path: Any) -> Any:
    return graphprune.finetune(net(), [(X, Y)], epochs=1, checkpoint=path, progress=False)


def pipeline(folder: Any) -> Any:
    return graphprune.pipeline(net(), X, [(X, Y)], finetune_epochs=1, checkpoint=folder, progress=False)


def lottery(path: Any) -> Any:
    return sparsity.lottery_ticket(net(), lambda model, a, b: None, 0.5, steps=1, rounds=1, checkpoint=path)


def made(path: Any) -> Any:
    torch.manual_seed(0)
    normed = nn.Sequential(nn.Linear(3, 40), nn.BatchNorm1d(40)).eval()
    return graphprune.synthesize(normed, X, 40, steps=1, path=path)


def cached(path: Any) -> Any:
    return graphprune.sensitivity(MODEL, X, [X], cache=path)


# name -> (what it is called, the call)
WRITERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "save": ("m.safetensors", lambda path: graphprune.save(small(), path)),
    "Plan.save": ("plan.json", lambda path: plan().save(path)),
    "sparsity.save": ("m.gps", lambda path: sparsity.save(MODEL, path)),
    **{f"report {end}": (f"r.{end}", lambda path: report().save(path)) for end in ("json", "csv", "md", "txt", "html")},
    "times": ("t.json", lambda path: times().to_json(path)),
    **{f"times {end}": (f"t.{end}", lambda path: times().plot(path)) for end in ("png", "svg", "pdf")},
    "curves": ("c.json", lambda path: curves().save(path)),
    "curves png": ("c.png", lambda path: curves().plot(path)),
    "curves kept": ("k.json", cached),
    "table": ("l.json", lambda path: table(8).save(path)),
    **{f"drawing {end}": (f"d.{end}", lambda path: graph().draw(path)) for end in ("dot", "svg", "png", "pdf")},
    "onnx": ("m.onnx", lambda path: graphprune.export_onnx(MODEL, X, path, check=False)),
    "onnx external": (
        "e.onnx", lambda path: graphprune.export_onnx(MODEL, X, path, check=False, external_data=True)
    ),
    "finetune": ("run.safetensors", finetune),
    "pipeline": ("tuning.safetensors", lambda path: pipeline(Path(path).parent)),
    "lottery": ("ticket.safetensors", lottery),
    "inputs": ("made.safetensors", made),
}  # fmt: skip
RESUMING = ("curves kept", "finetune", "pipeline", "lottery", "inputs")

READERS: dict[str, Callable[[Any], Any]] = {
    "load": lambda path: graphprune.load(path, MODEL),
    "Plan.load": graphprune.Plan.load,
    "sparsity.load": sparsity.load,
    "sparsity.load into": lambda path: sparsity.load(path, net()),
    "curves": graphprune.Sensitivity.load,
    "curves kept": cached,
    "table": graphprune.runtimes.LatencyTable.load,
    "target": lambda path: graphprune.runtimes.LatencyTable.of(Target(table=path).table),  # type: ignore[arg-type]
    "finetune": finetune,
    "lottery": lottery,
    "inputs": made,
    "benchmark": lambda path: graphprune.benchmark({"a": path}, X),
    "weights": lambda path: load_weights(net(), path),
    "onnx input": lambda path: common_input([], [path], []),
}


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(name: str, tmp_path: Path) -> None:
    file, write = WRITERS[name]
    path = tmp_path / file
    write(path)
    whole = contents(tmp_path)
    largest = max(map(len, whole.values()))
    for resumed in RESUMING:  # otherwise what is there would be read
        if name == resumed:
            for there in tmp_path.iterdir():
                there.unlink()
    before = contents(tmp_path)
    nearly = largest * 9 // 10 if name in RESUMING else largest - 1  # times in a checkpoint are longer or shorter
    for size in (0, 1, largest // 3, nearly):
        with largest_file(size), pytest.raises(GraphPruneError, match=r"cannot write .*\.\w+: |written"):
            write(path)
        if name not in ("pipeline", "lottery"):  # these have written how far they came, in smaller files
            assert contents(tmp_path) == before
        assert contents(tmp_path).keys() <= whole.keys()
    write(path)
    assert contents(tmp_path).keys() == whole.keys()


@pytest.mark.parametrize("name", WRITERS)
def test_a_pipe_stays_one(name: str, tmp_path: Path) -> None:
    file, write = WRITERS[name]
    os.mkfifo(tmp_path / file)
    with time_limit(60, AssertionError("it waits")), pytest.raises(GraphPruneError, match="it is a pipe"):
        write(tmp_path / file)
    assert stat.S_ISFIFO(os.stat(tmp_path / file).st_mode)
    assert {p.name for p in tmp_path.iterdir()} <= {file, "training.safetensors"}


@pytest.mark.parametrize("name", READERS)
def test_no_reader_waits(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    for path in (tmp_path / "pipe.onnx", "/dev/zero"):
        with time_limit(60, AssertionError("it waits")), pytest.raises(GraphPruneError, match="pipe"):
            READERS[name](path)


BAD: list[Any] = [None, 3, 2.5, True, b"file", ["file"], "a\0b.json", "\ud800.png", ""]


@pytest.mark.parametrize("name", WRITERS)
def test_writers_want_a_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write = pipeline if name == "pipeline" else WRITERS[name][1]
    for path in BAD:
        if (path is None and name in RESUMING) or (path == "" and name == "pipeline"):
            continue
        with pytest.raises(GraphPruneError, match=r"path|folder|end in one of"):
            write(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", READERS)
def test_readers_want_a_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in [*BAD, "missing.file", tmp_path]:
        if (path is None and name in (*RESUMING, "target")) or (path == "missing.file" and name in RESUMING):
            continue
        with pytest.raises(GraphPruneError):
            READERS[name](path)
