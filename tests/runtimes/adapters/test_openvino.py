from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphprune.errors import GraphPruneError
from graphprune.runtimes.adapters import Opening, adapter
from graphprune.runtimes.adapters import openvino as module
from graphprune.runtimes.adapters.source import Source
from tests.runtimes.adapters.cases import Depthwise, Tokens, expected, open_file, outputs, source
from tests.runtimes.nets import lively_statistics

RUNTIME = adapter("openvino")
installed = pytest.mark.skipif(RUNTIME.missing is not None, reason=str(RUNTIME.missing))


def images(count: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [[torch.randn(2, 3, 12, 12, generator=generator)] for _ in range(count)]


Made = tuple[nn.Module, list[list[Tensor]], Source]


@pytest.fixture(scope="module")
def depthwise(tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.manual_seed(0)
    model = lively_statistics(Depthwise().eval())
    inputs = images(5)
    folder = tmp_path_factory.mktemp("depthwise")
    return model, inputs, source(model, tuple(inputs[0]), folder, calibration=inputs[1:])


@installed
def test_weights_are_not_rounded(depthwise: Made, tmp_path: Path) -> None:
    model, _, made = depthwise
    sizes = {}
    for precision in ("fp32", "fp16"):
        path = tmp_path / f"{precision}.xml"
        RUNTIME.write(made, precision, path)
        sizes[precision] = path.with_suffix(".bin").stat().st_size
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert sizes["fp32"] >= 4 * weights and 0.45 < sizes["fp16"] / sizes["fp32"] < 0.6


class SignalStack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def memory_is_there(address: int) -> bool:
    spans = (line.split(maxsplit=1)[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(end, 16) for start, end in spans)


@installed
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's table of memory")
def test_signals_can_be_handled_after_the_last_session(depthwise: Made, tmp_path: Path) -> None:
    _, inputs, made = depthwise
    path = tmp_path / "model.xml"
    RUNTIME.write(made, "fp32", path)
    sessions = [open_file(RUNTIME, path, made, inputs[0], "fp32")]
    sessions[0].run()
    last = threading.Thread(target=sessions.clear)
    last.start()
    last.join()
    gc.collect()
    stack = SignalStack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    assert not stack.start or memory_is_there(stack.start)


@installed
def test_depthwise_convolutions_are_integer_too(depthwise: Made, tmp_path: Path) -> None:
    _, inputs, made = depthwise
    path = tmp_path / "int8.xml"
    notes = RUNTIME.write(made, "int8", path)
    session = open_file(RUNTIME, path, made, inputs[0], "int8")
    assert session.in_force() == "int8" and not any("stay" in note for note in notes)


@installed
def test_attention_stays_float_and_is_counted(tmp_path: Path) -> None:
    """OpenVINO makes one piece of it, which bears no name of a layer."""
    torch.manual_seed(0)
    model = Tokens().eval()
    generator = torch.Generator().manual_seed(5)
    inputs = [[torch.randn(2, 6, 16, generator=generator), torch.randn(2, 16, generator=generator)] for _ in range(4)]
    made = source(model, tuple(inputs[0]), tmp_path, calibration=inputs)
    path = tmp_path / "int8.xml"
    notes = RUNTIME.write(made, "int8", path)
    assert any(note.startswith("2 of 7 layers stay float32: ") for note in notes)
    session = open_file(RUNTIME, path, made, inputs[0], "int8")
    assert session.in_force() == "5 of 7 layers int8, 2 of 7 layers float32"


class Mixed(nn.Module):
    """Integers, booleans and a number without dimensions go in; integers come out too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, ids: Tensor, keep: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        y = self.fc(self.embed(ids) * keep.unsqueeze(-1)) * scale
        return y, y.argmax(-1)


@installed
def test_other_types(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    tensors = torch.randint(11, (2, 4)), torch.rand(2, 4) < 0.5, torch.tensor(1.5)
    made = source(model, tensors, tmp_path)
    path = tmp_path / "network.xml"
    RUNTIME.write(made, "fp32", path)
    actual = outputs(open_file(RUNTIME, path, made, tensors, "fp32"))
    wanted = expected(model, tensors)
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(GraphPruneError, match=r"input 'ids' of the file is torch.int64, .* torch.int32"):
        open_file(RUNTIME, path, made, (tensors[0].int(), *tensors[1:]), "fp32")
    with pytest.raises(GraphPruneError, match="has the inputs ids, keep, scale, but the example holds ids"):
        RUNTIME.open(path, Opening(("ids",), tensors[:1]))


@installed
def test_only_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match="CPU alone, got 'cuda'"):
        RUNTIME.open(tmp_path / "network.xml", Opening(("x",), (torch.ones(1),), provider="cuda"))


@installed
def test_weights_that_are_not_there(depthwise: Made, tmp_path: Path) -> None:
    _, inputs, made = depthwise
    path = tmp_path / "network.xml"
    RUNTIME.write(made, "fp32", path)
    path.with_suffix(".bin").unlink()
    with pytest.raises(GraphPruneError, match=r"cannot (read|compile) network\.xml"):
        open_file(RUNTIME, path, made, inputs[0], "fp32")


def test_types_that_the_cpu_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cpu_features", lambda: ("avx2", "avx512f", "avx512_vnni"))
    assert RUNTIME.precisions() == ("fp32", "int8")
    with pytest.raises(GraphPruneError, match=r"'bf16' is not offered .*none of avx512_bf16, .*use fp32 or int8"):
        RUNTIME.check_precision("bf16")
    monkeypatch.setattr(module, "cpu_features", lambda: ("avx512f", "amx_bf16"))
    assert RUNTIME.precisions() == ("fp32", "bf16", "int8")
    monkeypatch.setattr(module, "cpu_features", lambda: ("asimd",))
    assert RUNTIME.precisions() == ("fp32", "fp16", "int8")


@installed
def test_another_type_in_force_is_an_error(
    depthwise: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system does not say what its CPU can, OpenVINO is asked: here it is made to compute in float32."""
    _, inputs, made = depthwise
    path = tmp_path / "network.xml"
    RUNTIME.write(made, "bf16", path)
    monkeypatch.setattr(module, "_settings", lambda opening: {"INFERENCE_PRECISION_HINT": "f32"})
    with pytest.raises(GraphPruneError, match="precision 'bf16': OpenVINO computes in float32 on this CPU"):
        open_file(RUNTIME, path, made, inputs[0], "bf16")


@installed
def test_its_import_leaves_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "0"):
        monkeypatch.delenv("CI", raising=False)
        if value is not None:
            monkeypatch.setenv("CI", value)
        module._openvino()
        assert os.environ.get("CI") == value
