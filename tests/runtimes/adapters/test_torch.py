"""PyTorch programs: what is in force in half precision, threads, and errors."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphprune.errors import GraphPruneError
from graphprune.runtimes.adapters import Opening, adapter
from graphprune.runtimes.parity import relative_error
from tests.runtimes.adapters.making import error, ran, written

TORCH = adapter("torch")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Recurrent(nn.Module):
    """A state that starts at zeros, which the program makes in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0])


class Constants(nn.Module):
    """Constants that are no buffers, those that are made on the way, and a detour through float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.scale = torch.tensor([1.0, 2.0, 0.5, 1.5])

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) * self.scale * torch.tensor([1.0, 3.0, 1.0, 2.0])
        y = (y.float() + torch.ones(4)).relu().to(self.second.weight.dtype)
        return self.second(y)


class Positions(nn.Module):
    """Angles of positions far from the start: bfloat16 has no integers between 512 and 516."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        angles = (ids.float() + torch.arange(0.0, 1.0, 0.25)).cos().to(self.fc.weight.dtype)
        return self.fc(x * angles)


def image() -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, 8, 8),)


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (convolutions, image),
        (Recurrent, lambda: (torch.randn(2, 5, 4),)),
        (Constants, lambda: (torch.randn(2, 4),)),
        (Positions, lambda: (torch.randn(2, 4), torch.tensor([[514], [1027]]))),
    ],
)
def test_half_precision_is_in_force_and_near(model, inputs, precision: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, tensors = model().eval(), inputs()
    path = written(network, tensors, TORCH, tmp_path, precision)
    session = TORCH.open(path, Opening(tuple(f"input_{i}" for i in range(len(tensors))), tensors, precision))
    session.run()
    assert session.in_force() == str(DTYPES[precision]).removeprefix("torch.") + (
        "" if getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported")() else ", not by oneDNN"
    )
    found = error(session.outputs(), network, tensors)
    # Not float32 under another name, and not further off than rounding is.
    assert 1e-6 < found < {"bf16": 2e-2, "fp16": 3e-3}[precision]


def test_float32_is_the_model(tmp_path: Path) -> None:
    model, tensors = convolutions(), image()
    path = written(model, tensors, TORCH, tmp_path)
    assert error(ran(path, model, tensors, TORCH), model, tensors) < 1e-6


def test_a_file_of_an_example_of_one_takes_every_batch_size(tmp_path: Path) -> None:
    model = convolutions()
    path = written(model, (torch.randn(1, 3, 8, 8),), TORCH, tmp_path, any_batch=True)
    for batch in (1, 2, 5):
        tensors = (torch.randn(batch, 3, 8, 8),)
        assert error(ran(path, model, tensors, TORCH), model, tensors) < 1e-6


def test_products_that_stay_in_float32_are_said(tmp_path: Path) -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
            outer = ids.float().unsqueeze(-1)
            return self.fc(x), outer @ outer.mT

    model, tensors = Counted(), (torch.randn(2, 4), torch.tensor([[1, 2, 3], [4, 5, 6]]))
    path = written(model, tensors, TORCH, tmp_path, "bf16")
    session = TORCH.open(path, Opening(("x", "ids"), tensors, "bf16"))
    assert session.in_force().startswith("bfloat16 in 1 of 2 convolutions and matrix products")


def test_integers_stay_integers(tmp_path: Path) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            found = self.embed(ids)
            return found, ids + 1

    model, tensors = Table(), (torch.tensor([[3, 8], [0, 1]]),)
    path = written(model, tensors, TORCH, tmp_path, "fp16")
    values, counted = ran(path, model, tensors, TORCH, "fp16")
    assert values.dtype == torch.float32 and counted.dtype == torch.int64
    assert torch.equal(counted, tensors[0] + 1)
    assert relative_error(values, model.embed(tensors[0]).half().float()) == 0.0


def test_an_operator_without_kernels_says_why(tmp_path: Path) -> None:
    class Factors(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.svd(x)[1]

    tensors = (torch.randn(2, 3, 3),)
    path = written(Factors(), tensors, TORCH, tmp_path, "bf16")
    with pytest.raises(GraphPruneError, match=r"PyTorch cannot run the program in bfloat16: .*svd.*not implemented"):
        ran(path, Factors(), tensors, TORCH, "bf16")


def test_threads_are_those_asked_for(tmp_path: Path) -> None:
    model, tensors = convolutions(), image()
    path = written(model, tensors, TORCH, tmp_path)
    for threads in (2, 1):
        TORCH.open(path, Opening(("input_0",), tensors, "fp32", threads))
        assert torch.get_num_threads() == threads


def test_int8_and_other_files_are_refused(tmp_path: Path) -> None:
    for name in ("torch", "inductor"):
        with pytest.raises(GraphPruneError, match=r"int8.*use onnxruntime or openvino"):
            adapter(name).check_precision("int8")
    path = tmp_path / "network.pt2"
    path.write_bytes(b"no archive")
    with pytest.raises(GraphPruneError, match=r"network\.pt2 is no program"):
        TORCH.open(path, Opening(("x",), image()))


def test_inductor_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert adapter("inductor").unable() is None or shutil.which("g++") is None
    monkeypatch.setenv("PATH", "")
    assert "install g++ or clang++" in (adapter("inductor").unable() or "")


def test_inductor_says_what_it_cannot_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inductor = adapter("inductor")
    model, tensors = convolutions(), image()
    path = written(model, tensors, inductor, tmp_path)

    def fails(module: object, **_: object) -> object:
        def call(*_: object) -> object:
            raise RuntimeError("\n  no lowering for this  \nand more")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(GraphPruneError, match=r"PyTorch \(inductor\) cannot compile .* no lowering for this and more"):
        ran(path, model, tensors, inductor)
