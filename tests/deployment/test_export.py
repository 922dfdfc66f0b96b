from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import Artifact, GraphPruneError, Runner, export
from graphprune.deployment.calibrating import check_data
from graphprune.runtimes.adapters import Opening, Session, adapter
from graphprune.runtimes.adapters.onnxruntime import OnnxRuntime
from tests.deployment.local import LocalWorker
from tests.runtimes import nets

QUICK: dict[str, Any] = {"rounds": 0}


class Pair(nn.Module):
    """Two inputs, two results that count samples and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        made = self.fc(x) * scale
        return {"made": made, "sums": made.sum(1)}


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nets.ConvNet().eval(), torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(("runtime", "suffix", "precision"), [
    ("onnxruntime", ".onnx", "fp32"), ("torch", ".pt2", "fp32"), ("torch", ".pt2", "bf16"),
])  # fmt: skip
def test_what_is_written_runs_and_is_described(
    local: None, tmp_path: Path, runtime: str, suffix: str, precision: str
) -> None:
    model, x = network()
    path = tmp_path / f"small{suffix}"
    found = export(model, x, path, runtime, precision, rounds=3)
    assert isinstance(found, Artifact) and found.path == path and found.files == (path,)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert found.size == path.stat().st_size and found.inputs == ("x",) and found.outputs == ("output",)
    assert found.any_batch and found.batch_size == 2
    assert found.max_relative_error is not None and found.relative_error is not None and found.tolerance is not None
    assert 0 <= found.max_relative_error <= found.tolerance
    assert (found.max_relative_error > 1e-4) == (precision == "bf16")
    assert found.latency_ms is not None and found.latency_ms > 0
    assert found.versions and json.loads(json.dumps(found.to_dict(), allow_nan=False))["runtime"] == runtime
    assert precision in str(found)


def test_a_real_process_gives_the_same(tmp_path: Path) -> None:
    model, x = network()
    data = torch.randn(5, 3, 8, 8)
    found = export(model, x, tmp_path / "a.onnx", evaluate=lambda run: run(data), **QUICK)
    assert torch.allclose(found.evaluation, model(data), atol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


@pytest.mark.parametrize("samples", [1, 2, 3, 7])
def test_a_runner_takes_any_number_of_samples(local: None, tmp_path: Path, samples: int) -> None:
    model, x = network()
    data = torch.randn(samples, 3, 8, 8)

    def seen(run: Runner) -> Tensor:
        result = run(data)
        assert isinstance(result, Tensor) and result.shape == (samples, 4)
        return (result - model(data)).abs().max()

    assert export(model, x, tmp_path / "a.onnx", dynamic_batch=False, evaluate=seen, **QUICK).evaluation < 1e-5


def test_a_runner_takes_what_the_model_takes(local: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Pair().eval()
    example = {"x": torch.randn(2, 3), "scale": torch.randn(2, 1)}

    def seen(run: Runner) -> float:
        call = {"scale": torch.randn(5, 1), "x": torch.randn(5, 3)}  # another order
        found, wanted = run(**call), model(**call)
        assert found.made is found["made"] and set(found) == {"made", "sums"}
        with pytest.raises(AttributeError, match="there are made, sums"):
            _ = found.nothing
        for wrong, said in (
            ({"x": call["x"]}, "a call with 1 tensors"),
            ({**call, "scale": call["scale"][:3]}, r"\[3, 5\] samples"),
            ({**call, "x": call["x"].double()}, "only the number of samples may differ"),
            ({}, "no inputs"),
        ):
            with pytest.raises(GraphPruneError, match=said):
                run(**wrong)
        return max(float((found[name] - wanted[name]).abs().max()) for name in wanted)

    assert export(model, example, tmp_path / "a.onnx", evaluate=seen, **QUICK).evaluation < 1e-5


def test_tuples_come_back_as_tuples(local: None, tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, x * 2

    x = torch.ones(1, 2)
    first, second = export(Two(), x, tmp_path / "a.onnx", evaluate=lambda run: run(x), **QUICK).evaluation
    assert first.tolist() == [[2, 2]] and second.tolist() == [[2, 2]]


@pytest.mark.parametrize(("changes", "said"), [
    ({"runtime": "onnxruntme"}, "unknown runtime 'onnxruntme'; did you mean 'onnxruntime'"),
    ({"precision": "fp8"}, "precision: expected one of"),
    ({"precision": "int8"}, "data: int8 needs inputs"),
    ({"data": torch.zeros(4, 3, 8, 8)}, "only int8 looks at data"),
    ({"path": "a.pte"}, "files end in '.onnx'"),
    ({"path": "none/a.onnx"}, "create it first"),
    ({"runtime": "torch", "path": "a.pt2", "precision": "int8"}, "not offered for torch: .* use onnxruntime"),
    ({"runtime": "torch", "path": "a.pt2", "provider": "cuda"}, "torch has no execution providers"),
    ({"evaluate": 3}, "evaluate: expected a function"),
    ({"threads": 0}, "threads: expected an integer of at least 1"),
    ({"rounds": -1}, "rounds: expected"),
    ({"tolerance": float("nan")}, "tolerance: expected"),
    ({"tolerance": "small"}, "tolerance: expected a number of at least 0 or None"),
    ({"python": "/no/such/python"}, "cannot be started"),
])  # fmt: skip
def test_bad_arguments_are_said_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    model, x = network()
    values = {"path": "a.onnx", **changes}
    with pytest.raises(GraphPruneError, match=said):
        export(model, x, tmp_path / values.pop("path"), **values)
    assert not list(tmp_path.iterdir())


def test_models_in_half_precision_are_refused_by_name(local: None, tmp_path: Path) -> None:
    model, x = network()
    with pytest.raises(GraphPruneError, match=r"'conv1.weight' is in torch.float16; expected float32"):
        export(model.half(), x.half(), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


class _Wrong(Session):
    """A runtime that is a little off."""

    def __init__(self, off: float) -> None:
        self._off = off

    def load(self, tensors: Sequence[Tensor]) -> None:
        self._input = tensors[0]

    def run(self) -> None:
        self._output = network()[0](self._input) + self._off

    def outputs(self) -> list[Tensor]:
        return [self._output]


@pytest.mark.parametrize("off", [0.5, float("nan")])
def test_outputs_that_differ_leave_everything_as_it_was(
    local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: float
) -> None:
    def opened(self: OnnxRuntime, path: Path, opening: Opening) -> Session:
        made = _Wrong(off)
        made.load(opening.tensors)
        return made

    monkeypatch.setattr(OnnxRuntime, "open", opened)
    model, x = network()
    path = tmp_path / "a.onnx"
    path.write_bytes(b"before")
    with pytest.raises(GraphPruneError, match="no file was written: output 'output' differs"):
        export(model, x, path, rounds=0)
    assert path.read_bytes() == b"before" and [file.name for file in tmp_path.iterdir()] == ["a.onnx"]
    assert export(model, x, path, rounds=0, check=False).max_relative_error is None
    assert path.read_bytes() != b"before"


def test_an_error_of_evaluate_passes_and_nothing_is_written(local: None, tmp_path: Path) -> None:
    model, x = network()

    def broken(run: Runner) -> float:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        export(model, x, tmp_path / "a.onnx", evaluate=broken, **QUICK)
    assert not list(tmp_path.iterdir())


def test_files_that_belong_together_come_back_together(
    local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two files cannot be put in place: the first is what it was."""
    kind = type(adapter("onnxruntime"))
    write = kind.write

    def two(self: OnnxRuntime, source: Any, precision: str, path: Path) -> Sequence[str]:
        path.with_suffix(".bin").write_bytes(b"new")
        return write(self, source, precision, path)

    monkeypatch.setattr(kind, "write", two)
    monkeypatch.setattr(kind, "files", lambda self, path: (path.with_suffix(".bin"), path))
    model, x = network()
    found = export(model, x, tmp_path / "a.onnx", **QUICK)
    assert [file.name for file in found.files] == ["a.bin", "a.onnx"]
    (tmp_path / "a.bin").write_bytes(b"old")
    put = graphprune.deployment.exporting.put_in_place

    def failing(new: Path, final: Path) -> None:
        if final.suffix == ".onnx":
            raise GraphPruneError("no room")
        put(new, final)

    monkeypatch.setattr(graphprune.deployment.exporting, "put_in_place", failing)
    with pytest.raises(GraphPruneError, match="no room"):
        export(model, x, tmp_path / "a.onnx", **QUICK)
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.bin", "a.onnx"]


def test_the_model_is_as_it_was(local: None, tmp_path: Path) -> None:
    model, x = network()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, x, tmp_path / "a.pt2", "torch", **QUICK)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("provider", ["cuda", "CUDAExecutionProvider", "tensorrt"])
def test_precisions_are_those_of_the_provider(
    local: None, tmp_path: Path, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU has float16, which CPUs have not, and no int8, which they have; whether there is one comes afterwards."""

    def reached(self: OnnxRuntime, *_: Any) -> Sequence[str]:
        raise GraphPruneError("it is written")

    monkeypatch.setattr(OnnxRuntime, "write", reached)
    model, x = network()
    path = tmp_path / "a.onnx"
    with pytest.raises(GraphPruneError, match=r"'int8' is not offered for onnxruntime with provider .* use fp16"):
        export(model, x, path, precision="int8", data=x, provider=provider)
    with pytest.raises(GraphPruneError, match="it is written"):
        export(model, x, path, precision="fp16", provider=provider)
    with pytest.raises(GraphPruneError, match=r"'fp16' is not offered for onnxruntime: .* provider='cuda'"):
        export(model, x, path, precision="fp16")


def test_a_worker_is_asked_once_what_it_is(
    local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    ask = LocalWorker.ask

    def noted(self: LocalWorker, request: str, **values: Any) -> Any:
        asked.append(request)
        return ask(self, request, **values)

    monkeypatch.setattr(LocalWorker, "ask", noted)
    model, x = network()
    export(model, x, tmp_path / "a.onnx", **QUICK)
    assert asked == ["describe", "write", "open", "run"]


@pytest.mark.parametrize(("data", "samples", "precisions", "said"), [
    (None, 1, ["fp32", "bf16"], None),
    ([1], 1, ["fp32", "int8"], None),
    (None, 1, ["fp32", "int8"], "data: int8 needs inputs"),
    ([1], 1, ["fp32", "bf16"], "only int8 looks at data, not fp32, bf16"),
    (None, 0, ["fp32"], "samples: expected"),
    (None, True, ["fp32"], "samples: expected"),
    (None, 1.5, ["fp32"], "samples: expected"),
])  # fmt: skip
def test_data_belong_to_int8(data: Any, samples: Any, precisions: list[str], said: str | None) -> None:
    if said is None:
        check_data(data, samples, precisions)
    else:
        with pytest.raises(GraphPruneError, match=said):
            check_data(data, samples, precisions)
