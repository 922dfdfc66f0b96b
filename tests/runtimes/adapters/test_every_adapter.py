"""What every adapter must do: each of `RUNTIMES` is asked, if its package is installed."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from graphprune.errors import GraphPruneError
from graphprune.runtimes.adapters import PRECISIONS, RUNTIMES, Adapter, adapter
from graphprune.runtimes.adapters.source import write_batches
from graphprune.runtimes.parity import relative_error
from tests.runtimes.adapters.cases import NETWORKS, Case, l2, open_file, outputs

# It compiles C++ for every network, precision and shape.
SLOW = ("inductor",)
# Largest relative L2 error of int8 on these networks; measured: 0.004 to 0.02.
INT8 = 0.04


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {name: Case(name, tmp_path_factory.mktemp(name)) for name in NETWORKS}


def asked(name: str) -> Adapter:
    found = adapter(name)
    if found.missing is not None:
        pytest.skip(found.missing)
    return found


@pytest.fixture
def runtime(request: pytest.FixtureRequest) -> Adapter:
    return asked(request.param)


@pytest.fixture(params=[name for name in RUNTIMES if name not in SLOW])
def quick(request: pytest.FixtureRequest) -> Adapter:
    return asked(request.param)


@pytest.fixture(params=list(RUNTIMES))
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def pairs() -> list[Any]:
    return [
        pytest.param(runtime, network, id=f"{runtime}-{network}")
        for runtime in RUNTIMES
        for network in NETWORKS
        if runtime not in SLOW or network == "depthwise"
    ]


def written(runtime: Adapter, case: Case, precision: str, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"network{runtime.suffix}"
    notes = runtime.write(case.source(runtime), precision, path)
    assert all(isinstance(note, str) and note for note in notes)
    assert sorted(folder.iterdir()) == sorted(runtime.files(path))
    assert runtime.files(path)[-1] == path
    return path


@pytest.mark.parametrize(("runtime", "network"), pairs(), indirect=["runtime"])
def test_matches_the_model(runtime: Adapter, network: str, cases: dict[str, Case], tmp_path: Path) -> None:
    found = cases[network]
    source = found.source(runtime)
    slow = runtime.name in SLOW
    for precision in ("fp32",) if slow else runtime.precisions():
        path = written(runtime, found, precision, tmp_path / precision)
        first, second = found.inputs(20), found.inputs(21)
        session = open_file(runtime, path, source, first, precision)
        check(outputs(session), found.expected(first), runtime, precision)
        session.load(second)
        check(outputs(session), found.expected(second), runtime, precision)
        assert session.in_force()
        if runtime.any_batch and not slow:
            other = found.inputs(22, batch=3)
            session = open_file(runtime, path, source, other, precision)
            check(outputs(session), found.expected(other), runtime, precision)


def check(actual: list[torch.Tensor], wanted: list[torch.Tensor], runtime: Adapter, precision: str) -> None:
    assert [(tensor.shape, tensor.dtype) for tensor in actual] == [(t.shape, torch.float32) for t in wanted]
    for got, right in zip(actual, wanted, strict=True):
        if precision == "int8":
            # An error of 0 would be float32 under another name.
            assert 1e-5 < l2(got, right) < INT8
        else:
            assert relative_error(got, right) <= runtime.tolerances[precision]


def test_the_files_are_all_that_is_needed(quick: Adapter, cases: dict[str, Case], tmp_path: Path) -> None:
    found = cases["residual"]
    source, tensors = found.source(quick), found.inputs(20)
    path = written(quick, found, "fp32", tmp_path / "made")
    before = outputs(open_file(quick, path, source, tensors, "fp32"))
    there = tmp_path / "moved"
    there.mkdir()
    for file in quick.files(path):
        shutil.copyfile(file, there / file.name)
    shutil.rmtree(path.parent)
    after = outputs(open_file(quick, there / path.name, source, tensors, "fp32"))
    assert torch.equal(after[0], before[0])


def test_results_are_copies(quick: Adapter, cases: dict[str, Case], tmp_path: Path) -> None:
    """Neither the next run nor a change of the caller's own inputs reaches what was handed out or put in place."""
    found = cases["depthwise"]
    path = written(quick, found, "fp32", tmp_path / "made")
    first = found.inputs(20)
    given = [tensor.clone() for tensor in first]
    session = open_file(quick, path, found.source(quick), given, "fp32")
    before = outputs(session)
    kept = [tensor.clone() for tensor in before]
    for tensor in given:
        tensor.zero_()
    assert torch.equal(outputs(session)[0], kept[0])
    session.load(found.inputs(21))
    session.run()
    assert torch.equal(before[0], kept[0])


def test_calibration_matters(quick: Adapter, cases: dict[str, Case], tmp_path: Path) -> None:
    """Ranges from inputs 20 times too small cut off what the real ones give."""
    if "int8" not in quick.precisions():
        pytest.skip(f"{quick.name} offers no int8")
    found = cases["residual"]
    right = found.source(quick)
    small = [[tensor / 20 for tensor in batch] for batch in right.batches()]
    wrong = dataclasses.replace(right, calibration=write_batches(tmp_path / "small", small))
    tensors = found.inputs(20)
    wanted = found.expected(tensors)[0]
    errors = []
    for number, source in enumerate((right, wrong)):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / f"network{quick.suffix}"
        quick.write(source, "int8", path)
        errors.append(l2(outputs(open_file(quick, path, source, tensors, "int8"))[0], wanted))
    assert errors[1] > 5 * errors[0]


def test_a_file_of_another_kind(quick: Adapter, cases: dict[str, Case], tmp_path: Path) -> None:
    path = tmp_path / f"network{quick.suffix}"
    for file in quick.files(path):
        file.write_bytes(b"a text, and nothing else\n" * 50)
    found = cases["residual"]
    with pytest.raises(GraphPruneError, match=path.name.replace(".", r"\.")):
        open_file(quick, path, found.source(quick), found.inputs(20), "fp32")


def test_inputs_of_another_shape(quick: Adapter, cases: dict[str, Case], tmp_path: Path) -> None:
    found = cases["residual"]
    path = written(quick, found, "fp32", tmp_path / "made")
    with pytest.raises(GraphPruneError):
        session = open_file(quick, path, found.source(quick), (torch.randn(2, 5, 12, 12),), "fp32")
        session.run()


def test_a_precision_that_is_not_offered_says_why(name: str) -> None:
    found = adapter(name)
    offered = found.precisions()
    assert "fp32" in offered and set(offered) <= set(found.offered) and found.tolerances["fp32"] <= 5e-3
    for precision in PRECISIONS:
        if precision in offered:
            assert found.why_refused(precision) is None
            found.check_precision(precision)
        else:
            with pytest.raises(GraphPruneError, match=rf"precision '{precision}' is not offered .*Offered: fp32"):
                found.check_precision(precision)
    with pytest.raises(GraphPruneError, match="precision"):
        found.check_precision("int7")


def test_a_package_that_is_missing_names_its_cure(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = RUNTIMES[name]

    def absent(self: Adapter, module: str) -> Any:
        raise ModuleNotFoundError(f"No module named '{module}'")

    def broken(self: Adapter, module: str) -> Any:
        raise OSError("lib.so: undefined symbol")

    monkeypatch.setattr(kind, "bring", absent)
    missing = kind()
    assert missing.missing is not None and missing.missing.endswith(missing.cure) and "pip install" in missing.cure
    with pytest.raises(GraphPruneError, match=rf"runtime '{name}': .*No module named.*pip install"):
        missing.check_usable()
    monkeypatch.setattr(kind, "bring", broken)
    with pytest.raises(GraphPruneError, match=r"fails when it is imported: OSError: lib\.so: undefined symbol"):
        kind().check_usable()


def test_the_name_of_the_file(name: str) -> None:
    found = adapter(name)
    found.check_path(Path("folder") / f"network{found.suffix}")
    for wrong in ("network.bin", "network", found.suffix):
        with pytest.raises(GraphPruneError, match=rf"files end in '{found.suffix}'"):
            found.check_path(Path(wrong))
