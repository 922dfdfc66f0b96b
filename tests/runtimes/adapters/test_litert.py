"""LiteRT: what XNNPACK runs, files of every precision and their sizes, inputs by name, and what is not taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphprune.errors import GraphPruneError
from graphprune.runtimes.adapters import Opening, adapter
from tests.runtimes.adapters.cases import expected, l2, open_file, outputs, source
from tests.runtimes.adapters.making import error, ran, written
from tests.runtimes.nets import lively_statistics

LITERT = adapter("litert")
pytestmark = pytest.mark.skipif(LITERT.missing is not None, reason=str(LITERT.missing))


class Wide(nn.Module):
    """Weights enough that their type shows in the size of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()
        )
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))


class Inner(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x)


class Unsupported(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.inner = Inner(function)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.fc(x))


class Labels(nn.Module):
    """Eleven inputs, the last of integers: their order by name is not their order."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)

    def forward(self, *tensors: Tensor) -> Tensor:
        *floats, ids = tensors
        return sum((i + 1) * t for i, t in enumerate(floats)) + self.embed(ids)


def test_every_precision_from_one_source(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lively_statistics(Wide().eval())
    generator = torch.Generator().manual_seed(5)
    batches = [(torch.randn(2, 3, 12, 12, generator=generator),) for _ in range(5)]
    one = source(model, batches[0], tmp_path, calibration=batches[1:], form="program", any_batch=False)
    wanted = expected(model, batches[0])[0]
    bounds = {"fp16": (1e-6, 5e-3), "int8": (1e-4, 4e-2), "fp32": (0, 1e-5)}
    said, sizes = {}, {}
    for precision, (least, most) in bounds.items():
        path = tmp_path / f"{precision}.tflite"
        notes = LITERT.write(one, precision, path)
        assert len(notes) == 1 and notes[0].startswith("XNNPACK runs ") and notes[0].endswith("in 1 piece")
        session = open_file(LITERT, path, one, batches[0], precision)
        assert least <= l2(outputs(session)[0], wanted) < most
        said[precision], sizes[precision] = session.in_force(), path.stat().st_size
    assert said == {
        "fp16": "float32, weights kept in float16", "int8": "int8 in 3 of 3 layers that multiply", "fp32": "float32",
    }  # fmt: skip
    assert sizes["fp16"] < 0.6 * sizes["fp32"] and sizes["int8"] < 0.4 * sizes["fp32"]


def test_many_inputs_and_integers(tmp_path: Path) -> None:
    model = Labels().eval()
    inputs = (*torch.randn(10, 2, 3, 4).unbind(0), torch.tensor([[3, 8, 0], [1, 1, 2]]))
    path = written(model, inputs, LITERT, tmp_path)
    assert error(ran(path, model, inputs, LITERT), model, inputs) < 1e-6


@pytest.mark.parametrize(("function", "said"), [
    (torch.linalg.det, r"_linalg_det.*\(in inner\)"),
    # Converted, but not known to the interpreter of the same maker.
    (lambda x: x.sort(-1)[0], r"STABLEHLO_SORT.*\(in inner\)"),
])  # fmt: skip
def test_an_operator_that_it_lacks_is_named_with_its_layer(
    function: Callable[[Tensor], Tensor], said: str, tmp_path: Path
) -> None:
    with pytest.raises(GraphPruneError, match=f"LiteRT does not take this network: .*{said}"):
        written(Unsupported(function), (torch.randn(1, 4, 4),), LITERT, tmp_path)


def test_inputs_that_a_file_does_not_take(tmp_path: Path) -> None:
    model, inputs = nn.Linear(4, 3).eval(), (torch.randn(2, 4),)
    path = written(model, inputs, LITERT, tmp_path)
    for tensors, said in (
        ((torch.randn(3, 4),), r"takes input 'input' of shape \(2, 4\) only, got \(3, 4\)"),
        ((torch.ones(2, 4, dtype=torch.int64),), "takes input 'input' as float32, got torch.int64"),
        ((*inputs, *inputs), "takes 1 inputs, given are 2"),
    ):
        with pytest.raises(GraphPruneError, match=said):
            LITERT.open(path, Opening(("input", "b")[: len(tensors)], tensors))
