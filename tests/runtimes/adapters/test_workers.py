"""Worker processes: answers whatever a library prints, a readable error when one dies, and nothing left behind."""

from __future__ import annotations

import os
import stat
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from graphprune.errors import GraphPruneError
from graphprune.runtimes.adapters import Opening, adapter
from graphprune.runtimes.adapters.source import read_batches, write_batches
from graphprune.runtimes.adapters.workers import Worker
from tests.runtimes.adapters.making import made, written

ROOT = Path(__file__).resolve().parents[3]

# A runtime that does what the name of its file says. It doubles what is not boolean, and its first result counts the
# sessions that are alive.
RUNTIME = """
import ctypes, os, sys
import torch
from graphprune.runtimes.adapters import RUNTIMES, Adapter, Session, worker

alive = 0

class Doubling(Session):
    def __init__(self, tensors):
        global alive
        alive += 1
        self.load(tensors)
    def __del__(self):
        global alive
        alive -= 1
    def load(self, tensors):
        self.tensors = tensors
    def run(self):
        print("from Python")
        os.write(1, b"from C\\n")
    def outputs(self):
        return [torch.tensor(alive), *(t if t.dtype == torch.bool else t * 2 for t in self.tensors)]
    def in_force(self):
        return "doubles"

class Scripted(Adapter):
    name, title, suffix, form, offered = "scripted", "Scripted", ".txt", "program", {"fp32": "as it is"}
    def write(self, source, precision, path):
        print('{"ok": "no answer"}', flush=True)
        path.write_text("written")
        return ["a note"]
    def open(self, path, opening):
        if path.stem == "abort":
            print("checking weights")
            print("core dumped soon", file=sys.stderr, flush=True)
            os.abort()
        if path.stem == "exit":
            print("licence expired", flush=True)
            os._exit(3)
        if path.stem == "fail":
            raise ValueError("first line\\n\\n  second line")
        return Doubling(opening.tensors)

RUNTIMES.add("scripted", Scripted)
worker.main()
"""


def script(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that knows one more runtime."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "scripted.py").write_text(RUNTIME, encoding="utf-8")
    text = f"""\
        #!/bin/sh
        # python -m graphprune.runtimes.adapters.worker NAME
        PYTHONPATH='{ROOT}' exec '{sys.executable}' '{folder / "scripted.py"}' "$3"
        """
    return script(folder / "python", text)


@pytest.fixture(scope="module")
def worker(python: Path) -> Iterator[Worker]:
    with Worker("scripted", python=python) as found:
        yield found


def gone(worker: Worker) -> bool:
    return worker._process.poll() is not None and not worker.folder.exists()


TENSORS = (torch.tensor(1.5), torch.tensor([True, False]), torch.zeros(0, 3), torch.arange(4).reshape(2, 2))


def test_what_libraries_print_is_no_answer(worker: Worker, tmp_path: Path) -> None:
    model, inputs = torch.nn.Linear(2, 2), (torch.randn(1, 2),)
    source = made(model, inputs, adapter("torch"), tmp_path, False)
    assert worker.write(source, "fp32", tmp_path / "network.txt") == ["a note"]
    assert (tmp_path / "network.txt").read_text() == "written"
    session = worker.open(tmp_path / "network.txt", ("x",), inputs, precision="fp32")
    assert session.in_force == "doubles"
    assert torch.equal(session.run(inputs)[1], inputs[0] * 2)
    assert all(seconds >= 0 for seconds in session.sample(3))
    session.close()


def test_tensors_of_every_kind_travel(worker: Worker, tmp_path: Path) -> None:
    session = worker.open(tmp_path / "network.txt", ("a", "b", "c", "d"), TENSORS, precision="fp32")
    _, *found = session.run(TENSORS)
    session.close()
    for got, given in zip(found, TENSORS, strict=True):
        wanted = given if given.dtype == torch.bool else given * 2
        assert got.dtype == wanted.dtype and got.shape == wanted.shape and torch.equal(got, wanted)


def test_closed_sessions_are_given_back(worker: Worker, tmp_path: Path) -> None:
    sessions = [worker.open(tmp_path / "network.txt", ("x",), TENSORS[:1], precision="fp32") for _ in range(3)]
    assert int(sessions[2].run(TENSORS[:1])[0]) == 3
    sessions[0].close()
    sessions[1].close()
    assert int(sessions[2].run(TENSORS[:1])[0]) == 1
    sessions[2].close()
    # Nor do files of inputs and outputs pile up.
    assert [path.name for path in worker.folder.iterdir()] == ["log.txt"]


def test_an_error_is_told_and_the_process_goes_on(worker: Worker, tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match=r"runtime 'scripted': ValueError: first line second line"):
        worker.open(tmp_path / "fail.txt", ("x",), TENSORS[:1], precision="fp32")
    assert worker.describe("fp32")["missing"] is None


def test_a_death_by_signal_is_told_with_the_last_lines(python: Path, tmp_path: Path) -> None:
    with Worker("scripted", python=python) as worker:
        wanted = r"runtime 'scripted': its process was ended by SIGABRT .*'open'.*checking weights \| core dumped soon"
        with pytest.raises(GraphPruneError, match=wanted):
            worker.open(tmp_path / "abort.txt", ("x",), TENSORS[:1], precision="fp32")
        # It stays dead, and says so again.
        with pytest.raises(GraphPruneError, match="SIGABRT"):
            worker.describe("fp32")
    assert gone(worker)


def test_an_exit_is_told_with_its_status(python: Path, tmp_path: Path) -> None:
    wanted = r"ended with status 3 at the request 'open'.*licence expired"
    with Worker("scripted", python=python) as worker, pytest.raises(GraphPruneError, match=wanted):
        worker.open(tmp_path / "exit.txt", ("x",), TENSORS[:1], precision="fp32")
    assert gone(worker)


def test_nothing_is_left_after_an_error_of_the_caller(python: Path) -> None:
    with pytest.raises(KeyError), Worker("scripted", python=python) as worker:
        raise KeyError("the caller's")
    assert gone(worker)


def test_a_python_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(GraphPruneError, match=r"cannot be started .*path of a Python interpreter"):
            Worker("torch", python=path).__enter__()
    assert not list(tmp_path.iterdir())


def test_a_python_without_graphprune(tmp_path: Path) -> None:
    other = script(tmp_path / "python", "#!/bin/sh\necho 'No module named graphprune' >&2\nexit 1\n")
    wanted = r"ended with status 1 .*No module named graphprune"
    with Worker("torch", python=other) as worker, pytest.raises(GraphPruneError, match=wanted):
        worker.check("fp32")
    assert gone(worker)


def test_the_same_outputs_as_in_this_process(tmp_path: Path) -> None:
    model, inputs = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()), (torch.randn(2, 3),)
    torch_runtime = adapter("torch")
    path = written(model, inputs, torch_runtime, tmp_path)
    here = torch_runtime.open(path, Opening(("input",), inputs))
    here.run()
    with Worker("torch") as worker:
        assert worker.check("fp32") == worker.describe("fp32") and worker.check("fp32")["versions"]
        there = worker.open(path, ("input",), inputs, precision="fp32")
        for got, wanted in zip(there.run(inputs), here.outputs(), strict=True):
            assert torch.equal(got, wanted)
        with pytest.raises(GraphPruneError, match="no program of torch"):
            worker.open(tmp_path / "none.pt2", ("input",), inputs, precision="fp32")
    assert gone(worker)


def test_batches_keep_their_order(tmp_path: Path) -> None:
    """More than ten of them, whose names do not sort as numbers do."""
    batches = [[torch.tensor(float(100 * batch + place)) for place in range(12)] for batch in range(12)]
    found = list(read_batches(write_batches(tmp_path / "batches", batches)))
    assert [[float(t) for t in batch] for batch in found] == [[float(t) for t in batch] for batch in batches]


def test_views_and_shared_memory_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    batch = [base, base.t(), base[:, ::2], base[0].expand(2, 4), torch.tensor(3.0, requires_grad=True)]
    found = next(read_batches(write_batches(tmp_path / "batch", [batch])))
    for got, given in zip(found, batch, strict=True):
        assert got.shape == given.shape and torch.equal(got, given)
    assert os.path.getsize(tmp_path / "batch") > sum(t.nbytes for t in batch)
