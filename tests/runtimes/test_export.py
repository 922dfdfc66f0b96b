from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from graphprune.errors import GraphPruneError
from graphprune.runtimes import ExportReport, export_onnx, external, parity
from tests.runtimes import nets


def run(path: str | os.PathLike[str], **inputs: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """The outputs of a file by name, computed without any of graphprune's code."""
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, session.run(names, {k: v.numpy() for k, v in inputs.items()}), strict=True))


def test_a_convolutional_network(tmp_path: Path) -> None:
    model = nets.ConvNet()
    x = torch.randn(2, 3, 8, 8)
    report = export_onnx(model, x, tmp_path / "net.onnx")
    assert os.listdir(tmp_path) == ["net.onnx"]
    assert report.path == tmp_path / "net.onnx" and os.fspath(report) == str(report.path)
    assert (report.inputs, report.outputs) == (("x",), ("output",))
    assert report.dynamic_batch and report.batch_size == 2 and report.checked_batch_sizes == (2, 3)
    assert report.max_relative_error is not None and 0 < report.max_relative_error <= 1e-5
    assert report.tolerance == 1e-4 and report.external_data is None and report.notes == ()
    assert report.size == report.path.stat().st_size
    proto = onnx.load(report.path)
    assert report.nodes == len(proto.graph.node)
    assert report.opset == proto.opset_import[0].version
    assert "dynamic batch" in str(report) and "relative error" in str(report)
    # BN is folded into the convolutions, the spare Linear is used by nothing.
    assert {"conv1.weight", "conv2.weight", "fc.weight"} <= set(report.initializers.exact)
    assert set(report.initializers.unused) == {"spare.weight", "spare.bias"}
    model.eval()
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            expected = model(images).numpy()
        np.testing.assert_allclose(run(report, x=images)["output"], expected, rtol=1e-4, atol=1e-5)


def test_dict_inputs_and_a_nested_result(tmp_path: Path) -> None:
    model = nets.TokenNet()
    ids = torch.randint(0, 11, (2, 5))
    example = {"mask": torch.rand(2, 5), "ids": ids, "extra": {"bias": torch.rand(8)}, "flag": False}
    report = export_onnx(model, example, tmp_path / "net.onnx")
    assert report.inputs == ("mask", "ids", "extra_bias")
    # "mask" is an input already, and a parameter is called "scale".
    assert report.outputs == ("hidden", "pair_0", "pair_1", "mask_1", "scale_1")
    ids, mask, bias = torch.randint(0, 11, (4, 5)), torch.rand(4, 5), torch.rand(8)
    with torch.no_grad():
        expected = model(ids, mask, extra={"bias": bias})
    found = run(report, ids=ids, mask=mask, extra_bias=bias)
    np.testing.assert_allclose(found["hidden"], expected["hidden"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found["pair_0"], found["hidden"])
    np.testing.assert_array_equal(found["pair_1"], expected["pair"][1])
    np.testing.assert_array_equal(found["mask_1"], mask)
    assert found["scale_1"] == 2.0


def test_several_inputs_and_a_dataclass(tmp_path: Path) -> None:
    model = nets.DataclassNet()
    x = torch.randn(1, 4)
    report = export_onnx(model, (x, x), tmp_path / "net.onnx")
    assert report.inputs == ("x", "y") and report.outputs == ("logits", "aux_1")
    # A batch of one is traced as two, so both that and a third size were checked.
    assert report.checked_batch_sizes == (1, 3)
    a, b = torch.randn(5, 4), torch.randn(5, 4)
    found = run(report, x=a, y=b)
    np.testing.assert_allclose(found["logits"], model.fc(a + b).detach(), rtol=1e-4, atol=1e-6)


def test_attention_transposed_and_tied_weights(tmp_path: Path) -> None:
    report = export_onnx(nets.Attention(), torch.randn(2, 5, 8), tmp_path / "net.onnx")
    where = report.initializers
    assert {"layer.linear1.weight", "layer.linear2.weight", "first.weight"} <= {*where.exact, *where.transposed}
    assert where.transposed and not where.folded and not where.unused


def test_a_wrapper_a_graph_and_hooks(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    inner = nn.Sequential(nn.Linear(4, 3))
    inner.register_forward_hook(lambda module, args, output: output * 2)
    expected = inner(x).detach()
    compiled = torch.compile(inner)
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    assert list(run(export_onnx(traced, x, tmp_path / "graph.onnx"), input=x)) == ["output"]
    report = export_onnx(compiled, x, tmp_path / "net.onnx")  # type: ignore[arg-type]
    assert report.initializers.exact == ("0.weight", "0.bias")
    np.testing.assert_allclose(run(report, input=x)["output"], expected, rtol=1e-4, atol=1e-6)


class Stateful(nn.Module):
    """Training flags that differ, and a train() that does more than set them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nets.ConvNet()
        self.switched = 0
        self.net.bn2.eval()

    def train(self, mode: bool = True) -> Stateful:
        self.switched = getattr(self, "switched", -1) + 1
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before(tmp_path: Path, fails: bool) -> None:
    model: Any = Stateful()
    if fails:
        model.net.fc = nn.Sequential(model.net.fc, nets.Noisy())
    flags = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    x = torch.randn(2, 3, 8, 8)
    kept = x.clone()
    after_x = torch.get_rng_state()
    if fails:
        with pytest.raises(GraphPruneError, match="remove what is random"):
            export_onnx(model, x, tmp_path / "net.onnx")
        assert os.listdir(tmp_path) == []
    else:
        export_onnx(model, x, tmp_path / "net.onnx")
    assert [module.training for module in model.modules()] == flags and model.switched == 0
    assert not torch.equal(random, after_x) and torch.equal(torch.get_rng_state(), after_x)
    assert torch.backends.mha.get_fastpath_enabled() == fastpath and torch.is_grad_enabled()
    assert torch.equal(x, kept)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_exporter_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(nets.TokenNet(), torch.zeros(2, 5, dtype=torch.long), tmp_path / "net.onnx")
        with pytest.raises(GraphPruneError):
            export_onnx(nets.DataDependent(), torch.ones(2, 4), tmp_path / "other.onnx")
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_opsets(tmp_path: Path) -> None:
    model, x = nets.Attention(), torch.randn(2, 5, 8)
    for opset in (18, 21):
        report = export_onnx(model, x, tmp_path / f"{opset}.onnx", opset=opset)
        assert report.opset == opset == onnx.load(report.path).opset_import[0].version
    with pytest.raises(GraphPruneError, match=r"opset 11 cannot be written.*opset 18"):
        export_onnx(model, x, tmp_path / "old.onnx", opset=11)
    for wrong in (0, 999, True, "20"):
        with pytest.raises(GraphPruneError, match="opset must be an integer"):
            export_onnx(model, x, tmp_path / "bad.onnx", opset=wrong)  # type: ignore[arg-type]
    assert sorted(os.listdir(tmp_path)) == ["18.onnx", "21.onnx"]


def test_a_fixed_batch_on_request(tmp_path: Path) -> None:
    report = export_onnx(nets.FixedBatch(), torch.randn(2, 4), tmp_path / "net.onnx", dynamic_batch=False)
    assert not report.dynamic_batch and report.checked_batch_sizes == (2,)
    assert [d.dim_value for d in onnx.load(report.path).graph.input[0].type.tensor_type.shape.dim] == [2, 4]
    assert "batch size 2" in str(report)
    with pytest.raises(GraphPruneError, match="no tensor of example_input has a batch"):
        export_onnx(nets.Noisy(), torch.tensor(1.0), tmp_path / "scalar.onnx")


def test_names_that_the_graph_uses_itself(tmp_path: Path) -> None:
    class Clashing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, relu: Tensor, linear: Tensor, val_0: Tensor) -> dict[str, Tensor]:
            hidden = self.fc(relu.unsqueeze(1)).relu().squeeze(1)
            return {"relu_1": hidden + linear, "add": (hidden * val_0).relu(), "val_1": hidden.sum(-1)}

    x = [torch.randn(2, 4) for _ in range(3)]
    model = Clashing()
    report = export_onnx(model, tuple(x), tmp_path / "net.onnx")
    assert report.inputs == ("relu", "linear", "val_0") and report.outputs == ("relu_1", "add", "val_1")
    found = run(report, relu=x[0], linear=x[1], val_0=x[2])
    for name, expected in model(*x).items():
        np.testing.assert_allclose(found[name], expected.detach(), rtol=1e-4, atol=1e-6)


def weights_beside(folder: Path) -> list[str]:
    """The names of files of weights, each of which must be that of what is in it."""
    found = sorted(set(os.listdir(folder)) - {"net.onnx"})
    for name in found:
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert name == f"net.onnx.{digest[:12]}.data"
    return found


def test_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, target = torch.randn(2, 3, 8, 8), tmp_path / "net.onnx"
    report = export_onnx(nets.ConvNet(width=32), x, target, external_data=True)
    assert report.external_data is not None and weights_beside(tmp_path) == [report.external_data.name]
    assert report.size == sum(file.stat().st_size for file in tmp_path.iterdir())
    first = run(report, x=x)["output"]
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(parity, "run_once", lambda *a: [torch.zeros(2, 4)])
    with pytest.raises(GraphPruneError, match="differs"):
        export_onnx(nets.ConvNet(width=32), x, target, external_data=True)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.undo()
    # Too large for one file: the same without being asked for.
    monkeypatch.setattr(external, "LARGE", 1000)
    torch.manual_seed(5)
    again = export_onnx(nets.ConvNet(width=32), x, target)
    assert again.external_data is not None and weights_beside(tmp_path) == [again.external_data.name]
    assert again.external_data != report.external_data
    assert not np.allclose(first, run(again, x=x)["output"])
    # In one file again: nothing is left beside it.
    export_onnx(nets.ConvNet(width=32), x, target, external_data=False)
    assert os.listdir(tmp_path) == ["net.onnx"]


def test_only_weights_that_are_certainly_superseded_are_removed(tmp_path: Path) -> None:
    x, target = torch.randn(2, 3, 8, 8), tmp_path / "net.onnx"
    fresh, old = tmp_path / f"net.onnx.{'a' * 12}.data", tmp_path / f"net.onnx.{'b' * 12}.data"
    others = [tmp_path / name for name in ("net.onnx.data", "net.onnx.abc.data", f"other.onnx.{'b' * 12}.data")]
    for path in (fresh, old, *others):
        path.write_text("")
        os.utime(path, (0, 0))
    os.utime(fresh)  # perhaps of an export that is about to put its graph in place
    target.write_text("no graph at all")
    report = export_onnx(nets.ConvNet(), x, target, external_data=True)
    assert report.external_data is not None
    assert set(tmp_path.iterdir()) == {target, report.external_data, fresh, *others}
    assert export_onnx(nets.ConvNet(), x, target, external_data=True, check=False).path == target


def test_the_same_weights_again_and_a_graph_that_cannot_be_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, target = torch.randn(2, 3, 8, 8), tmp_path / "net.onnx"
    model, other = nets.ConvNet(), nets.ConvNet(width=24)
    report = export_onnx(model, x, target, external_data=True, check=False)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    original = os.replace

    def fail(source: Any, final: Any) -> None:
        if Path(final) == target:
            raise OSError(28, "No space left on device")
        original(source, final)

    monkeypatch.setattr(os, "replace", fail)
    for tried in (model, other):
        with pytest.raises(GraphPruneError, match="No space left"):
            export_onnx(tried, x, target, external_data=True, check=False)
        assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.undo()
    assert export_onnx(model, x, target, external_data=True).external_data == report.external_data
    assert weights_beside(tmp_path) == [report.external_data.name]  # type: ignore[union-attr]


def test_half_precision(tmp_path: Path) -> None:
    model = nets.ConvNet().half()
    report = export_onnx(model, torch.randn(2, 3, 8, 8).half(), tmp_path / "half.onnx")
    assert report.tolerance == 1e-2 and report.max_relative_error is not None and report.max_relative_error > 0
    assert onnx.load(report.path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_dtype_that_onnx_runtime_cannot_run(tmp_path: Path, dtype: torch.dtype) -> None:
    model, x = nets.ConvNet().to(dtype), torch.randn(2, 3, 8, 8).to(dtype)
    with pytest.raises(GraphPruneError, match=r"cannot load net.onnx.*Conv.*model.float\(\), or pass check=False"):
        export_onnx(model, x, tmp_path / "net.onnx")
    assert os.listdir(tmp_path) == []
    assert export_onnx(model, x, tmp_path / "net.onnx", check=False).nodes > 0


def test_an_output_that_proves_nothing(tmp_path: Path) -> None:
    model = nets.ConvNet()
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    report = export_onnx(model, torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")
    assert report.max_relative_error == 0 and "'output' is zero throughout" in str(report)


def test_the_same_tensor_twice_and_an_unused_argument(tmp_path: Path) -> None:
    class Three(nn.Module):
        def forward(self, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
            return a * 2 - b

    x = torch.randn(2, 4)
    report = export_onnx(Three(), (x, x, torch.ones(2)), tmp_path / "net.onnx")
    assert report.inputs == ("a", "b", "c")
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    np.testing.assert_allclose(run(report, a=a, b=b, c=torch.ones(3))["output"], a * 2 - b, rtol=1e-6)


def test_the_report_is_a_path(tmp_path: Path) -> None:
    report = export_onnx(nets.Noisy(), torch.zeros(2, 4), tmp_path / "net.onnx", check=False)
    assert isinstance(report, ExportReport) and Path(report) == report.path
