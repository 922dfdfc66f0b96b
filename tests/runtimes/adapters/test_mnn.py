"""MNN: its converter kept from doing more than converting, batches, what precision means, and what it does not take."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphprune.errors import GraphPruneError
from graphprune.runtimes.adapters import Opening, adapter
from tests.runtimes.adapters.making import error, made, ran, written

MNN = adapter("mnn")
pytestmark = pytest.mark.skipif(MNN.missing is not None, reason=str(MNN.missing))


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x).abs()


class Unsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.fc(x))


class Labels(nn.Module):
    """Integers in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.fc = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        y = self.fc(self.embed(ids))
        return y, y.argmax(-1)


@pytest.fixture(scope="module")
def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(64 * 144, 4)).eval()


@pytest.fixture(scope="module")
def files(layers: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Written where a `pip` stands first on the path that would tell if it is called."""
    folder = tmp_path_factory.mktemp("mnn")
    pip = folder / "pip"
    pip.write_text(f"#!/bin/sh\necho called >> '{folder / 'called'}'\nexit 1\n", encoding="utf-8")
    pip.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", os.pathsep.join([str(folder), os.environ["PATH"]]))
        source = made(layers, (torch.randn(2, 64, 12, 12),), MNN, folder, True)
        found = {}
        for precision in ("fp32", "fp16"):
            own = folder / precision
            own.mkdir()
            found[precision] = own / "network.mnn"
            MNN.write(source, precision, found[precision])
            assert [file.name for file in own.iterdir()] == ["network.mnn"]
    found["called"] = folder / "called"
    return found


def test_nothing_is_installed_and_nobody_told(files: dict[str, Path]) -> None:
    assert not files["called"].exists()
    assert not {"MNN.tools", "aliyun"} & set(sys.modules)


def test_every_batch_size(files: dict[str, Path], layers: nn.Module) -> None:
    for batch in (1, 2, 5):
        inputs = (torch.randn(batch, 64, 12, 12),)
        assert error(ran(files["fp32"], layers, inputs, MNN), layers, inputs) < MNN.tolerances["fp32"]


def test_float16_is_half_the_file(files: dict[str, Path], layers: nn.Module) -> None:
    inputs = (torch.randn(1, 64, 12, 12),)
    assert files["fp16"].stat().st_size < 0.6 * files["fp32"].stat().st_size
    found = error(ran(files["fp16"], layers, inputs, MNN, "fp16"), layers, inputs)
    assert 1e-5 < found < MNN.tolerances["fp16"]
    for precision, said in (("fp32", "float32"), ("fp16", "float16")):
        assert said in MNN.open(files[precision], Opening(("input",), inputs, precision)).in_force()


def test_a_layer_without_large_tiles_is_exact(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)).eval()
    inputs = (torch.randn(2, 8, 4, 4),)
    path = written(model, inputs, MNN, tmp_path)
    assert error(ran(path, model, inputs, MNN), model, inputs) < 5e-6


def test_integers(tmp_path: Path) -> None:
    model, inputs = Labels().eval(), (torch.tensor([[3, 8, 0], [1, 1, 2]]),)
    path = written(model, inputs, MNN, tmp_path)
    values, labels = ran(path, model, inputs, MNN)
    with torch.no_grad():
        wanted, right = model(*inputs)
    torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-6)
    assert not labels.is_floating_point() and torch.equal(labels.long(), right)
    session = MNN.open(path, Opening(("ids",), inputs))
    with pytest.raises(GraphPruneError, match="32 bits: input 'ids'"):
        session.load((torch.tensor([[2**40, 0, 0], [0, 0, 0]]),))


def test_an_lstm_is_converted(tmp_path: Path) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    model, inputs = Recurrent().eval(), (torch.randn(2, 5, 4),)
    path = written(model, inputs, MNN, tmp_path)
    assert error(ran(path, model, inputs, MNN), model, inputs) < 1e-5


def test_an_operator_that_it_lacks_is_named_with_its_module(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match=r"MNN cannot convert the network: it has no DFT \(in module 'inner', In"):
        written(Unsupported(), (torch.randn(1, 3, 4),), MNN, tmp_path)
    assert list((tmp_path / "made-fp32").iterdir()) == []


def test_inputs_and_files_that_it_does_not_take(files: dict[str, Path], tmp_path: Path) -> None:
    inputs = (torch.randn(1, 64, 12, 12),)
    with pytest.raises(GraphPruneError, match="has other inputs than other"):
        MNN.open(files["fp32"], Opening(("other",), inputs))
    with pytest.raises(GraphPruneError, match=r"cannot run .*\[1, 64, 9, 9\]"):
        MNN.open(files["fp32"], Opening(("input",), (torch.randn(1, 64, 9, 9),))).run()
    with pytest.raises(GraphPruneError, match="'input' is float64"):
        MNN.open(files["fp32"], Opening(("input",), (inputs[0].double(),)))
    path = tmp_path / "network.mnn"
    path.write_bytes(files["fp32"].read_bytes()[:1000])
    with pytest.raises(GraphPruneError, match=r"cannot load network\.mnn"):
        MNN.open(path, Opening(("input",), inputs))


def test_a_converter_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made(nn.Linear(2, 2), (torch.randn(1, 2),), MNN, tmp_path, False)
    monkeypatch.setattr(
        "graphprune.runtimes.adapters.mnn._CONVERT", "import os; print('halfway', flush=True); os.abort()"
    )
    with pytest.raises(GraphPruneError, match=r"halfway \| its converter was ended by signal 6"):
        MNN.write(source, "fp32", tmp_path / "network.mnn")


@pytest.mark.parametrize(("precision", "said"), [("int8", "no faster"), ("bf16", "no kernels")])
def test_refused_precisions(precision: str, said: str) -> None:
    with pytest.raises(GraphPruneError, match=said):
        MNN.check_precision(precision)
