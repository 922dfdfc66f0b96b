from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from graphprune.errors import GraphPruneError
from graphprune.runtimes.adapters import Opening, adapter, quantisation
from graphprune.runtimes.adapters import onnxruntime as module
from graphprune.runtimes.adapters.source import Source
from graphprune.runtimes.parity import relative_error
from tests.runtimes.adapters.cases import Residual, Tokens, expected, l2, open_file, outputs, source
from tests.runtimes.nets import lively_statistics

RUNTIME = adapter("onnxruntime")


def batches(count: int, *shape: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [[torch.randn(shape, generator=generator)] for _ in range(count)]


Made = tuple[nn.Module, tuple[Tensor, ...], Source]


def make(folder: Path, **export: bool) -> Made:
    torch.manual_seed(0)
    model = lively_statistics(Residual().eval())
    inputs = batches(5, 2, 3, 12, 12)
    return model, tuple(inputs[0]), source(model, tuple(inputs[0]), folder, calibration=inputs[1:], **export)


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("residual"))


@pytest.fixture
def takes_all(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let the quantiser take all nodes, as it does by itself."""
    every = lambda graph: [node.name for node in graph.node]  # noqa: E731
    return lambda: monkeypatch.setattr(quantisation, "between_layers", every)


def weights(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}


def test_every_layer_of_a_residual_network_is_integer(residual: Made, tmp_path: Path) -> None:
    _, tensors, made = residual
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


def test_a_mask_does_not_widen_the_range_of_scores(tmp_path: Path, takes_all: Callable[[], None]) -> None:
    torch.manual_seed(0)
    model = Masked().eval()
    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    inputs = [[x, mask] for (x,) in batches(5, 2, 5, 16)]
    made = source(model, tuple(inputs[0]), tmp_path, calibration=inputs[1:])
    errors, in_force = quantised_twice(model, made, inputs[0], tmp_path, takes_all)
    assert errors[0] < 0.1 and errors[1] > 4 * errors[0]
    assert in_force == "4 of 6 layers int8, 2 of 6 layers float32"


def quantised_twice(
    model: nn.Module, made: Source, tensors: list[Tensor], folder: Path, takes_all: Callable[[], None]
) -> tuple[list[float], str]:
    """Errors of the first result as we quantise and as the quantiser would; what is in force in ours."""
    wanted = expected(model, tensors)[0]
    errors, in_force = [], []
    for number in range(2):
        path = folder / f"int8-{number}.onnx"
        RUNTIME.write(made, "int8", path)
        session = open_file(RUNTIME, path, made, tensors, "int8")
        errors.append(l2(outputs(session)[0], wanted))
        in_force.append(session.in_force())
        takes_all()
    return errors, in_force[0]


class Stream(nn.Module):
    """A residual stream, without its channel 3."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Tokens()

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        y, _ = self.layer(x, shift)
        return torch.cat([y[..., :3], y[..., 4:]], -1)


def test_a_residual_stream_stays_float(tmp_path: Path, takes_all: Callable[[], None]) -> None:
    """A channel of it that is 100 times the others, as in trained transformers, would take all of 8 bits."""
    torch.manual_seed(0)
    model = Stream().eval()
    inputs = [[x, x[:, 0] / 2] for (x,) in batches(5, 2, 6, 16)]
    for x, _ in inputs:
        x[..., 3] += 100
    made = source(model, tuple(inputs[0]), tmp_path, calibration=inputs[1:])
    errors, _ = quantised_twice(model, made, inputs[0], tmp_path, takes_all)
    assert errors[0] < 0.03 and errors[1] > 4 * errors[0]


def test_nothing_to_quantise(tmp_path: Path) -> None:
    inputs = batches(2, 2, 4)
    made = source(nn.ReLU(), tuple(inputs[0]), tmp_path, calibration=inputs)
    with pytest.raises(GraphPruneError, match="int8: the network has no convolution"):
        RUNTIME.write(made, "int8", tmp_path / "int8.onnx")


def test_weights_of_seven_bits_where_sums_saturate(
    residual: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tensors, made = residual
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


def test_float16_keeps_inputs_and_outputs(residual: Made, tmp_path: Path) -> None:
    """What a GPU gets: on the CPU it runs with conversions, and is as near."""
    model, tensors, made = residual
    path = tmp_path / "half.onnx"
    RUNTIME.write(made, "fp16", path)
    assert {w.dtype for w in weights(path).values() if w.dtype.kind == "f"} == {np.dtype("float16")}
    actual = outputs(open_file(RUNTIME, path, made, tensors, "fp16"))
    assert actual[0].dtype == torch.float32
    assert 1e-6 < relative_error(actual[0], expected(model, tensors)[0]) < 1e-2


def test_weights_in_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (quantisation, module):
        monkeypatch.setattr(place, "is_large", lambda graph: True)
    (tmp_path / "made").mkdir()
    model, tensors, made = make(tmp_path / "made", external_data=True)
    for precision in ("fp32", "fp16", "int8"):
        written, there = tmp_path / precision, tmp_path / f"{precision}-moved"
        written.mkdir()
        there.mkdir()
        path = written / "network.onnx"
        RUNTIME.write(made, precision, path)
        files = RUNTIME.files(path)
        assert len(files) == 2 and files[-1] == path and set(files) == set(written.iterdir())
        assert files[0].name.startswith("network.onnx.") and files[0].suffix == ".data"
        for file in files:
            shutil.move(file, there / file.name)
        session = RUNTIME.open(there / path.name, Opening(("x",), tensors, precision))
        assert l2(outputs(session)[0], expected(model, tensors)[0]) < 0.05


def test_precision_depends_on_the_provider() -> None:
    assert RUNTIME.precisions() == RUNTIME.precisions("cpu") == ("fp32", "int8")
    for name in ("cuda", "tensorrt", "CUDAExecutionProvider"):
        assert RUNTIME.precisions(name) == ("fp32", "fp16")
    with pytest.raises(GraphPruneError, match=r"'fp16' is not offered for onnxruntime: .*openvino.* fp32, int8"):
        RUNTIME.check_precision("fp16")
    with pytest.raises(GraphPruneError, match=r"'int8' is not offered for onnxruntime with provider 'cuda': .*fp16"):
        RUNTIME.check_precision("int8", "cuda")
    with pytest.raises(GraphPruneError, match=r"'bf16' is not offered .*openvino"):
        RUNTIME.check_precision("bf16", "cuda")


def test_what_the_quantiser_says_is_passed_on(
    residual: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime.quantization

    def fail(*args: object, **kwargs: object) -> None:
        raise ValueError("no range for tensor 'a'\nmore")

    _, _, made = residual
    monkeypatch.setattr(onnxruntime.quantization, "quantize_static", fail)
    with pytest.raises(GraphPruneError, match="cannot quantise the network: ValueError: no range for tensor 'a'"):
        RUNTIME.write(made, "int8", tmp_path / "int8.onnx")


def test_shapes_that_symbolic_inference_does_not_find(
    residual: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    def fail(*args: object) -> None:
        raise Exception("Incomplete symbolic shape inference")

    model, tensors, made = residual
    monkeypatch.setattr(SymbolicShapeInference, "infer_shapes", fail)
    RUNTIME.write(made, "int8", tmp_path / "int8.onnx")
    actual = outputs(open_file(RUNTIME, tmp_path / "int8.onnx", made, tensors, "int8"))
    assert l2(actual[0], expected(model, tensors)[0]) < 0.03
