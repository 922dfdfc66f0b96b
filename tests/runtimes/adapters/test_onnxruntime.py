from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from graphprune.errors import GraphPruneError
from graphprune.runtimes.adapters import adapter, quantisation
from graphprune.runtimes.adapters import onnxruntime as module
from graphprune.runtimes.parity import relative_error
from tests.runtimes.adapters.cases import Residual, Tokens, expected, l2, open_file, outputs, source
from tests.runtimes.nets import lively_statistics

RUNTIME = adapter("onnxruntime")


def batches(count: int, *shape: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [[torch.randn(shape, generator=generator)] for _ in range(count)]


def residual(folder: Path, **export: bool) -> tuple[nn.Module, tuple[Tensor, ...], quantisation.Source]:
    torch.manual_seed(0)
    model = lively_statistics(Residual().eval())
    inputs = batches(5, 2, 3, 12, 12)
    first = tuple(inputs[0])
    return model, first, source(model, first, folder, calibration=inputs[1:], **export)


def weights(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}


def test_every_layer_of_a_residual_network_is_integer(tmp_path: Path) -> None:
    _, tensors, made = residual(tmp_path)
    path = tmp_path / "int8.onnx"
    notes = RUNTIME.write(made, "int8", path)
    assert open_file(RUNTIME, path, made, tensors, "int8").in_force() == "int8"
    assert not any("stay" in note for note in notes)
    scales = [w for name, w in weights(path).items() if name.endswith("weight_scale") and w.ndim]
    assert scales and all(len(np.unique(scale)) > 1 for scale in scales), "one scale a channel"


def test_layers_without_integer_kernels_are_named(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()
    inputs = batches(4, 2, 3, 8, 8)
    made = source(model, tuple(inputs[0]), tmp_path, calibration=inputs)
    notes = RUNTIME.write(made, "int8", tmp_path / "int8.onnx")
    assert any(note.startswith("1 of 3 layers stay float32: ") for note in notes)
    session = open_file(RUNTIME, tmp_path / "int8.onnx", made, inputs[0], "int8")
    assert session.in_force() == "2 of 3 layers int8, 1 of 3 layers float32"


class Masked(nn.Module):
    """Attention with the mask that language models use: the lowest number there is."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-1, -2) + (1 - mask).unsqueeze(1) * torch.finfo(x.dtype).min
        return self.out(scores.softmax(-1) @ self.v(x))


def test_a_mask_does_not_widen_the_range_of_scores(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Masked().eval()
    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    inputs = [[x, mask] for (x,) in batches(5, 2, 5, 16)]
    made = source(model, tuple(inputs[0]), tmp_path, calibration=inputs[1:])
    path = tmp_path / "int8.onnx"
    RUNTIME.write(made, "int8", path)
    session = open_file(RUNTIME, path, made, inputs[0], "int8")
    assert l2(outputs(session)[0], expected(model, inputs[0])[0]) < 0.03
    assert session.in_force() == "4 of 6 layers int8, 2 of 6 layers float32"


def test_a_residual_stream_stays_float(tmp_path: Path) -> None:
    """A channel of it that is 100 times the others, as in trained transformers, would take all of 8 bits."""
    torch.manual_seed(0)
    model = Tokens().eval()
    generator = torch.Generator().manual_seed(3)
    inputs = []
    for _ in range(5):
        x = torch.randn(2, 6, 16, generator=generator)
        x[..., 3] += 100
        inputs.append([x, torch.randn(2, 16, generator=generator)])
    made = source(model, tuple(inputs[0]), tmp_path, calibration=inputs[1:])
    path = tmp_path / "int8.onnx"
    RUNTIME.write(made, "int8", path)
    wanted = expected(model, inputs[0])
    actual = outputs(open_file(RUNTIME, path, made, inputs[0], "int8"))
    others = [i for i in range(16) if i != 3]
    assert l2(actual[0][..., others], wanted[0][..., others]) < 0.03


def test_nothing_to_quantise(tmp_path: Path) -> None:
    inputs = batches(2, 2, 4)
    made = source(nn.ReLU(), tuple(inputs[0]), tmp_path, calibration=inputs)
    with pytest.raises(GraphPruneError, match="int8: the network has no convolution"):
        RUNTIME.write(made, "int8", tmp_path / "int8.onnx")


def test_weights_of_seven_bits_where_sums_saturate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tensors, made = residual(tmp_path)
    largest, notes = {}, {}
    for features in (("avx2",), ("avx2", "avx_vnni"), ("avx512f", "avx512_vnni"), ()):
        monkeypatch.setattr(quantisation, "cpu_features", lambda features=features: features)
        monkeypatch.setattr(quantisation, "is_x86", lambda: True)
        path = tmp_path / f"{len(features)}{features[-1:]}.onnx"
        notes[features] = " ".join(RUNTIME.write(made, "int8", path))
        values = [w for name, w in weights(path).items() if name.endswith("weight_quantized")]
        largest[features] = max(int(np.abs(w.astype(int)).max()) for w in values)
        actual = outputs(open_file(RUNTIME, path, made, tensors, "int8"))
        assert l2(actual[0], expected(model, tensors)[0]) < 0.05
    assert largest["avx2",] <= 64 and largest[()] <= 64 and "7 bits" in notes["avx2",]
    assert largest["avx2", "avx_vnni"] >= 127 and largest["avx512f", "avx512_vnni"] >= 127
    assert "VNNI" in notes["avx512f", "avx512_vnni"] and "7 bits" not in notes["avx512f", "avx512_vnni"]


def test_float16_keeps_inputs_and_outputs(tmp_path: Path) -> None:
    """What a GPU gets: on the CPU it runs with conversions, and is as near."""
    model, tensors, made = residual(tmp_path)
    path = tmp_path / "half.onnx"
    RUNTIME.write(made, "fp16", path)
    assert {w.dtype for w in weights(path).values() if w.dtype.kind == "f"} == {np.dtype("float16")}
    actual = outputs(open_file(RUNTIME, path, made, tensors, "fp16"))
    assert actual[0].dtype == torch.float32
    assert 1e-6 < relative_error(actual[0], expected(model, tensors)[0]) < 1e-2


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_weights_in_a_file_of_their_own(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (quantisation, module):
        monkeypatch.setattr(place, "is_large", lambda graph: True)
    made_in, written, there = (tmp_path / name for name in ("made", "written", "there"))
    for folder in (made_in, written, there):
        folder.mkdir()
    model, tensors, made = residual(made_in, external_data=True)
    path = written / "network.onnx"
    RUNTIME.write(made, precision, path)
    shutil.rmtree(made_in)
    files = RUNTIME.files(path)
    assert len(files) == 2 and files[-1] == path and set(files) == set(written.iterdir())
    assert files[0].name.startswith("network.onnx.") and files[0].suffix == ".data"
    for file in files:
        shutil.move(file, there / file.name)
    example = tuple(tensors)
    session = RUNTIME.open(there / path.name, module.Opening(("x",), example, precision))
    assert l2(outputs(session)[0], expected(model, tensors)[0]) < 0.05


def test_precision_depends_on_the_provider() -> None:
    assert RUNTIME.precisions() == RUNTIME.precisions("cpu") == ("fp32", "int8")
    for name in ("cuda", "tensorrt", "CUDAExecutionProvider"):
        assert RUNTIME.precisions(name) == ("fp32", "fp16")
    with pytest.raises(GraphPruneError, match="'fp16' is not offered for onnxruntime: .*openvino.* Offered: fp32, int8"):
        RUNTIME.check_precision("fp16")
    with pytest.raises(GraphPruneError, match=r"'int8' is not offered for onnxruntime with provider 'cuda': .*use fp16"):
        RUNTIME.check_precision("int8", "cuda")
    with pytest.raises(GraphPruneError, match="'bf16' is not offered .*openvino"):
        RUNTIME.check_precision("bf16", "cuda")


def test_what_the_quantiser_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime.quantization

    def fail(*args: object, **kwargs: object) -> None:
        raise ValueError("no range for tensor 'a'\nmore")

    _, _, made = residual(tmp_path)
    monkeypatch.setattr(onnxruntime.quantization, "quantize_static", fail)
    with pytest.raises(GraphPruneError, match="cannot quantise the network: ValueError: no range for tensor 'a'"):
        RUNTIME.write(made, "int8", tmp_path / "int8.onnx")


def test_shapes_that_symbolic_inference_does_not_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    def fail(*args: object) -> None:
        raise Exception("Incomplete symbolic shape inference")

    model, tensors, made = residual(tmp_path)
    monkeypatch.setattr(SymbolicShapeInference, "infer_shapes", fail)
    RUNTIME.write(made, "int8", tmp_path / "int8.onnx")
    actual = outputs(open_file(RUNTIME, tmp_path / "int8.onnx", made, tensors, "int8"))
    assert l2(actual[0], expected(model, tensors)[0]) < 0.03
