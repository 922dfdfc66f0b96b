"""Exports that must fail: with a reason, and leaving everything as it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from graphprune.errors import GraphPruneError
from graphprune.plans.plan import Plan
from graphprune.runtimes import export, export_onnx, freeing, parity
from tests.runtimes import nets

FAILURES: dict[str, tuple[nn.Module, Any, str]] = {
    "unsupported operator": (
        nets.Unsupported(),
        torch.randn(2, 4),
        r"aten\._linalg_svd\.default has no ONNX form \(in module 'inner', Singular\).*nets\.py:\d+ in forward",
    ),
    "fixed batch": (nets.FixedBatch(), torch.randn(2, 4), "dynamic batch.*dynamic_batch=False.*batch size 2 only"),
    "control flow": (nets.DataDependent(), torch.ones(2, 4), r"data-dependent.*nets\.py:\d+ in forward: return x \* 2"),
    "wrong input": (nets.ConvNet(), torch.randn(2, 5, 8, 8), r"cannot be run on example_input.*nets\.py:\d+ in forw"),
    "random": (nets.Noisy(), torch.randn(2, 4), "'output' differs.*Two runs of the model itself differ"),
    "other batch": (nets.RightForTwo(), torch.randn(2, 4), "'output' differs.*batch size 3.*dynamic_batch=False"),
    "no output": (nets.Noisy(), {"x": None}, "no tensor"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_leave_everything_as_it_was(tmp_path: Path, name: str) -> None:
    model, example, message = FAILURES[name]
    target = tmp_path / "net.onnx"
    target.write_bytes(b"what was here before")
    model.train()
    with pytest.raises(GraphPruneError, match=message) as caught:
        export_onnx(model, example, target)
    assert len(str(caught.value)) < 1500
    assert os.listdir(tmp_path) == ["net.onnx"] and target.read_bytes() == b"what was here before"
    assert all(module.training for module in model.modules())


def test_tampered_outputs_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = parity.run_once
    x = torch.randn(2, 3, 8, 8)
    for factor, passes in ((1 + 1e-6, True), (1 + 1e-3, False)):
        monkeypatch.setattr(parity, "run_once", lambda *a, f=factor: [t * f for t in original(*a)])
        if passes:
            export_onnx(nets.ConvNet(), x, tmp_path / "good.onnx")
        else:
            with pytest.raises(GraphPruneError, match=r"no file was written: output 'output' differs.*0\.001"):
                export_onnx(nets.ConvNet(), x, tmp_path / "bad.onnx")
            export_onnx(nets.ConvNet(), x, tmp_path / "loose.onnx", tolerance=0.01)
    assert sorted(os.listdir(tmp_path)) == ["good.onnx", "loose.onnx"]


def tamper(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Change the file between the exporter and the checks."""
    original = export._save

    def save(program: Any, path: Path, external_data: bool | None) -> Path | None:
        result = original(program, path, external_data)
        proto = onnx.load(path)
        change(proto)
        onnx.save(proto, path)
        return result

    monkeypatch.setattr(export, "_save", save)


def test_a_wrong_weight_in_the_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(proto: onnx.ModelProto) -> None:
        tensor = next(t for t in proto.graph.initializer if t.name == "conv2.weight")
        values = onnx.numpy_helper.to_array(tensor).copy()
        values[3, 2, 1, 1] += 1.0
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    tamper(monkeypatch, change)
    with pytest.raises(GraphPruneError, match="differs between ONNX Runtime and torch"):
        export_onnx(nets.ConvNet(), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")
    assert os.listdir(tmp_path) == []
    report = export_onnx(nets.ConvNet(), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx", check=False)
    assert report.max_relative_error is None and report.checked_batch_sizes == ()
    assert "parity not checked" in str(report)


def test_integer_outputs_are_compared_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = parity.run_once

    def wrong(*args: Any) -> list[Tensor]:
        outputs = original(*args)
        outputs[2] = outputs[2].roll(1)
        return outputs

    monkeypatch.setattr(parity, "run_once", wrong)
    with pytest.raises(GraphPruneError, match=r"'pair_1' is not equal.*compared exactly"):
        export_onnx(nets.TokenNet(), torch.arange(10).reshape(2, 5), tmp_path / "net.onnx", tolerance=1e9)


def test_an_optimiser_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise RuntimeError("a pass failed") from ValueError("two shapes of one value\nand a long story")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "optimize", fail)
    with pytest.raises(GraphPruneError, match=r"ConvNet cannot be exported: the optimiser .* ValueError: two shapes"):
        export_onnx(nets.ConvNet(), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")
    assert os.listdir(tmp_path) == []


def test_an_invalid_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tamper(monkeypatch, lambda proto: proto.graph.node.reverse())
    with pytest.raises(GraphPruneError, match="invalid file"):
        export_onnx(nets.ConvNet(), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx", check=False)

    def rename(proto: onnx.ModelProto) -> None:
        proto.graph.input[0].name = proto.graph.node[0].input[0] = "image"

    monkeypatch.undo()
    tamper(monkeypatch, rename)
    with pytest.raises(GraphPruneError, match="other inputs and outputs"):
        export_onnx(nets.ConvNet(), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx", check=False)
    assert os.listdir(tmp_path) == []


def test_shapes_are_checked_against_the_plan(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    dense = nets.ConvNet(width=8)
    gone = {0: (1, 4, 7)}
    vectors = ("conv1.bias", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var")
    plan = Plan(
        removed={"conv1.weight": gone, "conv2.weight": {1: gone[0]}, **dict.fromkeys(vectors, gone)},
        structure={name: tuple(tensor.shape) for name, tensor in dense.state_dict().items()},
    )
    report = export_onnx(nets.ConvNet(width=5), x, tmp_path / "pruned.onnx", plan=plan)
    kernel = next(t for t in onnx.load(report.path).graph.initializer if t.name == "conv1.weight")
    assert list(kernel.dims) == [5, 3, 3, 3]
    with pytest.raises(GraphPruneError, match="the plan leaves"):
        export_onnx(dense, x, tmp_path / "dense.onnx", plan=plan)
    assert os.listdir(tmp_path) == ["pruned.onnx"]


def test_an_initializer_of_another_shape_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(proto: onnx.ModelProto) -> None:
        tensor = next(t for t in proto.graph.initializer if t.name == "conv1.weight")
        smaller = onnx.numpy_helper.to_array(tensor)[:, :2]
        tensor.CopyFrom(onnx.numpy_helper.from_array(smaller, tensor.name))

    monkeypatch.setattr(onnx.checker, "check_model", lambda path: None)
    tamper(monkeypatch, change)
    with pytest.raises(GraphPruneError, match=r"'conv1.weight' has shape \(8, 2, 3, 3\) in the exported file"):
        export_onnx(nets.ConvNet(), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx", check=False)


def test_a_parameter_that_the_exporter_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = freeing.capture

    def capture(*args: Any, **kwargs: Any) -> Any:
        program = original(*args, **kwargs)
        initializers = program.model.graph.initializers
        value = initializers.pop("conv2.weight")
        value.name = "gone"
        initializers["gone"] = value
        return program

    monkeypatch.setattr(freeing, "capture", capture)
    with pytest.raises(GraphPruneError, match=r"lost parameter 'conv2.weight'"):
        export_onnx(nets.ConvNet(), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx", check=False)


@pytest.mark.parametrize("reason", ["no folder", "folder is a file", "path is a folder", "no permission", "no name"])
def test_paths_are_checked_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the export started")

    monkeypatch.setattr(freeing, "capture", never)
    (tmp_path / "file").write_bytes(b"")
    path, message = {
        "no folder": (tmp_path / "missing" / "net.onnx", "does not exist; create it"),
        "folder is a file": (tmp_path / "file" / "net.onnx", "is not a folder"),
        "path is a folder": (tmp_path, "it is a folder"),
        "no permission": (tmp_path / "net.onnx", "Permission denied; choose another folder"),
        "no name": (Path(""), "is not the path of a file"),
    }[reason]
    if reason == "no permission":

        def refuse(*args: Any, **kwargs: Any) -> str:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(GraphPruneError, match=message):
        export_onnx(nets.ConvNet(), torch.randn(2, 3, 8, 8), path)
    assert os.listdir(tmp_path) == ["file"]


def test_bad_arguments(tmp_path: Path) -> None:
    x, path = torch.randn(2, 3, 8, 8), tmp_path / "net.onnx"
    with pytest.raises(GraphPruneError, match=r"expected a torch.nn.Module, got the function"):
        export_onnx(lambda x: x, x, path)  # type: ignore[arg-type]
    with pytest.raises(GraphPruneError, match=r"'conv1.weight' is on the meta device"):
        export_onnx(nets.ConvNet().to("meta"), x, path)
    with pytest.raises(GraphPruneError, match="example_input"):
        export_onnx(nets.ConvNet(), None, path)
    for tolerance in (-1.0, float("nan"), float("inf")):
        with pytest.raises(GraphPruneError, match="tolerance"):
            export_onnx(nets.ConvNet(), x, path, tolerance=tolerance)
    with pytest.raises(GraphPruneError, match="provider 'gpu9'"):
        export_onnx(nets.ConvNet(), x, path, provider="gpu9")
    assert os.listdir(tmp_path) == []
