from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphprune import GraphPruneError, benchmark, export
from graphprune.runtimes.providers import CUDA, Provider
from tests.runtimes import nets

QUICK: dict[str, Any] = {"warmup": 1, "rounds": 2, "min_time": 0.0, "provider": "cpu"}


def network(width: int = 8) -> nn.Module:
    torch.manual_seed(width)
    return nets.ConvNet(width).eval()


X = torch.ones(2, 3, 8, 8)


def test_one_table_over_runtimes_precisions_and_batch_sizes(local: None, tmp_path: Path) -> None:
    models = {"dense": network(), "small": network(4)}
    found = benchmark(
        models, X, runtimes=["onnxruntime", "torch"], precisions=["fp32", "bf16"], batch_sizes=[2, 3], **QUICK
    )
    cells = {(row.runtime, row.precision, row.batch_size) for row in found.rows}
    assert cells == {("onnxruntime", "fp32", b) for b in (2, 3)} | {
        ("torch", p, b) for p in ("fp32", "bf16") for b in (2, 3)
    }
    assert any("onnxruntime in bf16 is left out" in note for note in found.notes)
    for runtime, precision, batch in cells:
        dense, small = (found.row(name, batch, runtime, precision) for name in models)
        assert dense.speedup == dense.speedup_low == dense.speedup_high == 1
        assert small.speedup == pytest.approx(dense.median_ms / small.median_ms)
        assert small.speedup_low <= small.speedup <= small.speedup_high
        assert small.parameters == sum(p.numel() for p in models["small"].parameters())
        assert small.max_relative_error is not None and small.max_relative_error < 0.05
    assert found.row("small", runtime="torch", precision="bf16").in_force == "bfloat16"
    assert "torch" in str(found) and "bf16" in str(found)
    assert json.loads(found.to_json(tmp_path / "a.json").read_text())["rows"][0]["runtime"] == "onnxruntime"
    with pytest.raises(GraphPruneError, match=r"no row for model 'small' .* bf16"):
        found.row("small", runtime="onnxruntime", precision="bf16")


def test_files_of_a_runtime_and_modules_side_by_side(local: None, tmp_path: Path) -> None:
    model = network()
    path = export(model, X, tmp_path / "a.pt2", "torch", rounds=0).path
    found = benchmark({"module": model, "file": path}, X, runtimes="torch", **QUICK)
    assert found.row("file").file_mib == pytest.approx(path.stat().st_size / 2**20)
    assert found.row("file").max_relative_error is None and found.row("file").parameters is None
    with pytest.raises(GraphPruneError, match=r"'file': a.pt2 is a file of PyTorch, and ONNX Runtime takes .onnx"):
        benchmark({"module": model, "file": path}, X, runtimes="onnxruntime", precisions="fp32", **QUICK)


def test_int8_without_data_and_other_mistakes(local: None) -> None:
    models = {"dense": network()}
    for changes, said in (
        ({"precisions": "int8"}, "data: int8 needs inputs"),
        ({"data": X}, "only int8 looks at data"),
        ({"runtimes": "torch", "data": X}, "only int8 looks at data"),
        ({"runtimes": ["torch", "torch"]}, "an entry twice"),
        ({"runtimes": []}, "runtimes is empty"),
        ({"runtimes": "torhc"}, "did you mean 'torch'"),
        ({"precisions": []}, "precisions: expected some of"),
        ({"precisions": "fp7"}, "precisions: expected one of"),
        ({"runtimes": "torch", "opset": 18}, "opset belongs to ONNX Runtime alone"),
        ({"runtimes": {"torch": 3}}, "expected the path of a Python interpreter"),
        ({"runtimes": "torch", "precisions": "int8", "data": X}, "not offered for torch"),
        ({"runtimes": "torch", "samples": 0}, "samples: expected"),
    ):
        with pytest.raises(GraphPruneError, match=said):
            benchmark(models, X, **{**QUICK, **changes})


def test_a_model_that_fails_in_one_runtime_leaves_the_others(local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphprune.runtimes.adapters.torch import Torch

    def refused(self: Torch, source: Any, precision: str, path: Path) -> Any:
        raise GraphPruneError("operator aten.none is not there")

    monkeypatch.setattr(Torch, "write", refused)
    found = benchmark({"dense": network()}, X, runtimes=["torch", "onnxruntime"], **QUICK)
    assert [row.runtime for row in found.rows] == ["onnxruntime"]
    assert any("torch in fp32 is left out" in note and "aten.none" in note for note in found.notes)


def test_calibration_is_cut_into_batches_of_the_example(tmp_path: Path) -> None:
    from graphprune.deployment.calibrating import write_calibration
    from graphprune.runtimes.adapters.source import read_batches
    from graphprune.runtimes.arguments import FlatArguments

    model = nn.Linear(3, 2)
    rows = torch.arange(30.0).reshape(10, 3)
    labels = torch.zeros(10)

    def given(lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(rows.split(lengths), labels.split(lengths), strict=True))

    for batch, lengths, samples, kept in (
        (1, [10], 300, 10), (4, [3, 3, 3, 1], 300, 8), (3, [5, 5], 7, 6), (2, [1] * 10, 5, 4), (10, [4, 6], 10, 10),
    ):  # fmt: skip
        arguments = FlatArguments.of(torch.ones(batch, 3), model)
        path = write_calibration(given(lengths), model, arguments, samples, tmp_path / "c")
        found = [tensors[0] for tensors in read_batches(path)]
        assert all(len(part) == batch for part in found)
        assert torch.equal(torch.cat(found), rows[:kept])
    with pytest.raises(GraphPruneError, match="fewer samples than a batch"):
        write_calibration(rows[:2], model, FlatArguments.of(torch.ones(4, 3), model), 300, tmp_path / "c")
    with pytest.raises(GraphPruneError, match="only the number of samples may differ"):
        write_calibration(torch.ones(4, 5), model, FlatArguments.of(torch.ones(1, 3), model), 300, tmp_path / "c")


def test_precisions_are_those_of_the_provider(local: None) -> None:
    """As in `export`: int8 is not for CUDA, and fp16 not for the CPU; runtimes without providers do not ask."""
    models, cuda = {"dense": network()}, Provider(CUDA)
    changes: dict[str, Any] = {**QUICK, "provider": cuda}
    with pytest.raises(GraphPruneError, match=f"'int8' is not offered for onnxruntime with provider '{CUDA}'"):
        benchmark(models, X, runtimes="onnxruntime", precisions="int8", data=X, **changes)
    with pytest.raises(GraphPruneError, match="'fp16' is not offered for onnxruntime"):
        benchmark(models, X, runtimes="onnxruntime", precisions="fp16", **QUICK)
    found = benchmark(models, X, runtimes="torch", precisions="bf16", **changes)
    assert [row.runtime for row in found.rows] == ["torch"]
