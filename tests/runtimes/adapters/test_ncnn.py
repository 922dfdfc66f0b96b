"""ncnn: what pnnx leaves behind, batches, integers, half precision, and what it does not take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphprune.errors import GraphPruneError
from graphprune.runtimes.adapters import Opening, adapter
from tests.runtimes.adapters.making import error, made, ran, written
from tests.runtimes.nets import lively_statistics

NCNN = adapter("ncnn")
pytestmark = pytest.mark.skipif(NCNN.missing is not None, reason=str(NCNN.missing))


class Head(nn.Module):
    """Layers that ncnn would round to half precision, behind those that it would not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)
        lively_statistics(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.conv(x)).relu()
        y = self.second(self.first(x.mean((2, 3))).relu())
        return y, x.mean((1, 2, 3), keepdim=True)


class Attention(nn.Module):
    """As vision transformers have it: five axes on the way, and the batch not the first of them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x + shift).reshape(batch, length, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.mT).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, length, 16)), y.sum((1, 2, 3))


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.fc = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.embed(ids))


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


def image(batch: int = 1) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, 8, 8),)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["image", "tokens"])
def test_float32_is_exact_at_every_batch_size(kind: str, batch: int, tmp_path: Path) -> None:
    model = Head().eval() if kind == "image" else Attention().eval()
    inputs = image(batch) if kind == "image" else (torch.randn(batch, 5, 16), torch.randn(batch, 5, 16))
    path = written(model, inputs, NCNN, tmp_path)
    # ncnn's own default is off by 1e-3 in a Linear.
    assert error(ran(path, model, inputs, NCNN), model, inputs) < 2e-6


def test_only_what_is_needed_lies_there(tmp_path: Path) -> None:
    path = written(Head(), image(), NCNN, tmp_path)
    names = ["network.ncnn.bin", "network.ncnn.json", "network.ncnn.param"]
    assert sorted(file.name for file in path.parent.iterdir()) == names
    assert [file.name for file in NCNN.files(path)] == names


def test_half_precision_and_its_size(tmp_path: Path) -> None:
    model, inputs = Head().eval(), image()
    sizes, errors, forces = {}, {}, {}
    for precision in ("fp32", "bf16", "fp16"):
        path = written(model, inputs, NCNN, tmp_path, precision)
        sizes[precision] = NCNN.files(path)[0].stat().st_size
        session = NCNN.open(path, Opening(("x",), inputs, precision))
        session.run()
        errors[precision], forces[precision] = error(session.outputs(), model, inputs), session.in_force()
    assert sizes["fp16"] < 0.6 * sizes["fp32"] == 0.6 * sizes["bf16"]
    assert errors["fp32"] < 2e-6 < errors["fp16"] < 2e-3 and 1e-4 < errors["bf16"] < 3e-2
    assert forces["fp32"] == "float32" and forces["bf16"].startswith("bfloat16")


def test_float16_that_is_storage_alone_is_said(tmp_path: Path) -> None:
    import ncnn

    folder = tmp_path / "made"
    folder.mkdir()
    notes = NCNN.write(made(Head().eval(), image(), NCNN, tmp_path, False), "fp16", folder / "network.ncnn.param")
    assert bool(notes) != bool(ncnn.cpu_support_arm_asimdhp())


def test_embeddings_of_integers(tmp_path: Path) -> None:
    model, inputs = Table(), (torch.tensor([[3, 8, 0]]),)
    path = written(model, inputs, NCNN, tmp_path)
    assert error(ran(path, model, inputs, NCNN), model, inputs) < 2e-6
    session = NCNN.open(path, Opening(("ids",), inputs))
    with pytest.raises(GraphPruneError, match="32 bits: input 'ids'"):
        session.load((torch.tensor([[2**40, 0, 0]]),))


def test_integers_that_are_computed_with_are_refused(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x * mask

    with pytest.raises(GraphPruneError, match=r"input 'mask' goes into layer .*give it in float32"):
        written(Masked(), (torch.randn(1, 4), torch.tensor([[1, 0, 1, 1]])), NCNN, tmp_path)


def test_an_operator_that_it_lacks_is_named_with_its_module(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match=r"ncnn has no layer for torch\.fft\.rfft \(in module 'inner', Inner\)"):
        written(Unsupported(), (torch.randn(1, 3, 4),), NCNN, tmp_path)
    assert list((tmp_path / "made-fp32").iterdir()) == []


def test_results_that_are_integers_are_refused(tmp_path: Path) -> None:
    class Label(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(-1)

    with pytest.raises(GraphPruneError, match=r"output 'output' of the model is int64"):
        written(Label(), (torch.randn(1, 4),), NCNN, tmp_path)


def test_types_and_shapes_of_inputs_that_it_lacks(tmp_path: Path) -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1.0

    for tensor, said in ((torch.randn(1, 1, 1, 1, 1, 2), "1 to 4 axes"), (torch.tensor([[True]]), "is bool")):
        folder = tmp_path / said.replace(" ", "-")
        folder.mkdir()
        with pytest.raises(GraphPruneError, match=said):
            written(Same(), (tensor,), NCNN, folder)


def test_inputs_of_another_shape_and_files_of_another_network(tmp_path: Path) -> None:
    """Nothing of this is checked by ncnn, which reads past the end of its memory."""
    model = Head().eval()
    path = written(model, image(), NCNN, tmp_path)
    with pytest.raises(GraphPruneError, match=r"input 'x' of shape \(1, 3, 8, 8\) in float32, got \(1, 3, 9, 8\)"):
        NCNN.open(path, Opening(("x",), (torch.randn(1, 3, 9, 8),)))
    with pytest.raises(GraphPruneError, match="has the inputs"):
        NCNN.open(path, Opening(("y",), image()))
    described = NCNN.files(path)[1]
    kept = described.read_text()
    for text in ("{}", json.dumps({"inputs": [{"name": "x"}], "outputs": []}), "[]", ""):
        described.write_text(text)
        with pytest.raises(GraphPruneError, match=r"network\.ncnn\.param cannot be opened: network\.ncnn\.json"):
            NCNN.open(path, Opening(("x",), image()))
    described.unlink()
    with pytest.raises(GraphPruneError, match=r"graphprune\.export"):
        NCNN.open(path, Opening(("x",), image()))
    described.write_text(kept)
    NCNN.files(path)[0].write_bytes(b"")
    with pytest.raises(GraphPruneError, match="damaged"):
        NCNN.open(path, Opening(("x",), image()))


def test_an_input_that_nothing_reads(tmp_path: Path) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, unused: Tensor, x: Tensor) -> Tensor:
            return self.fc(x)

    model, inputs = Half(), (torch.randn(1, 3), torch.randn(1, 4))
    path = written(model, inputs, NCNN, tmp_path)
    assert error(ran(path, model, inputs, NCNN), model, inputs) < 2e-6


def test_int8_is_refused() -> None:
    with pytest.raises(GraphPruneError, match="no tool that finds the ranges"):
        NCNN.check_precision("int8")
