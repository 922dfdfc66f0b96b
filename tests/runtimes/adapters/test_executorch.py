"""ExecuTorch: what XNNPACK runs, float16 with norms that are right, int8 after it, and what is not taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphprune.errors import GraphPruneError
from graphprune.runtimes.adapters import Opening, adapter
from tests.runtimes.adapters.cases import Depthwise, expected, l2, open_file, outputs, source
from tests.runtimes.adapters.making import error, ran, written
from tests.runtimes.nets import lively_statistics

EXECUTORCH = adapter("executorch")
pytestmark = pytest.mark.skipif(EXECUTORCH.missing is not None, reason=str(EXECUTORCH.missing))


class Norms(nn.Module):
    """Two kinds of norms, one over more values than ExecuTorch's kernel for float16 gets right."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.GroupNorm(2, 8)
        self.mix = nn.Conv2d(8, 384, 1)
        self.layer = nn.LayerNorm(384)
        self.head = nn.Linear(384, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.mix(self.groups(x)).flatten(2).transpose(1, 2)))


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.det(x)


class Unsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.fc(x))


class Same(nn.Module):
    """A result that is another one, and an input that is a result."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.fc(x)
        return y, y.clone(), x


def test_norms_are_right_in_float16(tmp_path: Path) -> None:
    model, inputs = Norms().eval(), (torch.randn(2, 8, 4, 4),)
    path = written(model, inputs, EXECUTORCH, tmp_path, "fp16")
    assert error(ran(path, model, inputs, EXECUTORCH, "fp16"), model, inputs) < EXECUTORCH.tolerances["fp16"]
    said = EXECUTORCH.open(path, Opening(("x",), inputs, "fp16")).in_force()
    assert said == "float16, 1 layer norm in float32"


def test_every_precision_from_one_source(tmp_path: Path) -> None:
    """What is written first, here float16, does not change what is written after it."""
    torch.manual_seed(0)
    model = lively_statistics(Depthwise().eval())
    generator = torch.Generator().manual_seed(5)
    batches = [(torch.randn(2, 3, 12, 12, generator=generator),) for _ in range(5)]
    one = source(model, batches[0], tmp_path, calibration=batches[1:], form="program", any_batch=False)
    wanted = expected(model, batches[0])[0]
    bounds = {"fp16": (1e-6, 5e-3), "int8": (1e-4, 4e-2), "fp32": (0, 1e-5)}
    said = {}
    for precision, (least, most) in bounds.items():
        path = tmp_path / f"{precision}.pte"
        notes = EXECUTORCH.write(one, precision, path)
        assert len(notes) == 1 and notes[0].startswith("XNNPACK runs ") and "1 piece" in notes[0]
        session = open_file(EXECUTORCH, path, one, batches[0], precision)
        assert least <= l2(outputs(session)[0], wanted) < most
        said[precision] = session.in_force()
    assert said == {"fp16": "float16", "int8": "int8 in 4 of 4 layers that multiply", "fp32": "float32"}


def test_results_that_are_the_same_value(tmp_path: Path) -> None:
    model, inputs = Same().eval(), (torch.randn(2, 4),)
    path = written(model, inputs, EXECUTORCH, tmp_path)
    assert error(ran(path, model, inputs, EXECUTORCH), model, inputs) < 1e-6


def test_an_operator_that_it_lacks_is_named_with_its_layer(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match=r"ExecuTorch does not take this network: .*_linalg_det.*\(in inner\)"):
        written(Unsupported(), (torch.randn(1, 4, 4),), EXECUTORCH, tmp_path)
    assert list((tmp_path / "made-fp32").iterdir()) == []


def test_inputs_that_a_file_does_not_take(tmp_path: Path) -> None:
    model, inputs = Same().eval(), (torch.randn(2, 4),)
    path = written(model, inputs, EXECUTORCH, tmp_path)
    for tensors, said in (
        ((torch.randn(3, 4),), r"takes input 'x' of shape \(2, 4\) only, got \(3, 4\)"),
        ((torch.ones(2, 4, dtype=torch.int64),), "input 'x' has another type than torch.int64"),
        ((*inputs, *inputs), "takes 1 inputs, given are 2"),
    ):
        with pytest.raises(GraphPruneError, match=said):
            EXECUTORCH.open(path, Opening(tuple("xy"[: len(tensors)]), tensors))
