"""Free axes: what is asked for is free in the file and right at other sizes, or an error says why not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from graphprune.errors import GraphPruneError
from graphprune.runtimes import ExportReport, export_onnx, freeing
from graphprune.runtimes.arguments import FlatArguments
from graphprune.runtimes.capture import FixedAxesError
from graphprune.runtimes.dynamic import FreeAxes


def run(report: ExportReport, *inputs: Tensor) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(report.inputs, (t.numpy() for t in inputs), strict=True)))  # type: ignore[no-any-return]


class Attending(nn.Module):
    """A step of attention to a past, under a mask over both."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor, mask: Tensor, past: list[Tensor]) -> tuple[Tensor, Tensor]:
        hidden = self.up(self.table(ids))
        known = torch.cat([past[0], hidden], 1)
        scores = (hidden @ known.transpose(1, 2)) * mask[:, None]
        return scores.softmax(-1) @ known, known


def attending(batch: int, length: int, past: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    mask = (torch.rand(batch, length + past) > 0.3).float()
    return torch.randint(0, 9, (batch, length)), mask, [torch.randn(batch, past, 4)]


def test_an_axis_that_torch_finds_to_be_the_sum_of_others(tmp_path: Path) -> None:
    model = Attending()
    free = {"ids": {0: "n", 1: "length"}, "mask": ["n", Dim.AUTO], "past": ({0: "n", -2: "past"},)}
    report = export_onnx(model, attending(2, 3, 4), tmp_path / "net.onnx", dynamic_shapes=free)
    axes = {"ids": {0: "n", 1: "length"}, "mask": {0: "n", 1: "mask_1"}, "past_0": {0: "n", 1: "past"}}
    assert report.dynamic_axes == axes and len(report.checked_sizes) > 2
    for sizes in report.checked_sizes:
        assert sizes["mask_1"] == sizes["length"] + sizes["past"]
    assert any(sizes["past"] == 0 for sizes in report.checked_sizes)
    assert "mask[0: n, 1: mask_1]" in str(report) and "n 2, length 3, " in str(report)
    for sizes in ((5, 2, 7), (1, 1, 1)):
        ids, mask, past = attending(*sizes)
        for found, wanted in zip(run(report, ids, mask, *past), model(ids, mask, past), strict=True):
            np.testing.assert_allclose(found, wanted.detach(), rtol=1e-4, atol=1e-5)


class Images(nn.Module):
    """Down and up again: sizes that 4 divides."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(2, 4, 4, 4), nn.ConvTranspose2d(4, 2, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x).relu())


def test_multiples_and_limits(tmp_path: Path) -> None:
    model, x = Images(), torch.randn(1, 2, 8, 12)
    shapes = {"x": {2: 4 * Dim("h", min=1, max=3), 3: 4 * Dim("w")}}
    report = export_onnx(model, x, tmp_path / "net.onnx", dynamic_shapes=shapes, dynamic_batch=False)
    assert report.dynamic_axes == {"x": {2: "4*h", 3: "4*w"}} and not report.dynamic_batch
    assert all(1 <= sizes["h"] <= 3 for sizes in report.checked_sizes) and len(report.checked_sizes) > 1
    y = torch.randn(1, 2, 12, 20)
    np.testing.assert_allclose(run(report, y)[0], model(y).detach(), rtol=1e-4, atol=1e-5)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.places


class Looping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return sum(x[:, i] * (i + 1) for i in range(x.shape[1]))  # type: ignore[return-value]


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[1] <= 16 else x * 3


def test_axes_that_the_code_fixes(tmp_path: Path) -> None:
    x, path, shapes = torch.randn(2, 6, 3), tmp_path / "net.onnx", {"x": {1: "length"}}
    with pytest.raises(GraphPruneError, match=r"free axis 1 of input 'x' \('length', 6 in .* at 7 .*self.places"):
        export_onnx(Positions(), x, path, dynamic_shapes={"x": {1: Dim("length")}})
    with pytest.raises(GraphPruneError, match=r"axis 1 of 'x' .* another way above 16.*Dim\('length', max="):
        export_onnx(Branching(), x, path, dynamic_shapes=shapes)
    assert not path.exists()
    arguments = FlatArguments.of(x, Looping())
    free = FreeAxes.of(shapes, arguments, dynamic_batch=False)
    told = freeing._fixed(Looping(), arguments, free, [(0, 1)])
    assert "axis 1 of input 'x' ('length', 6 in the example): torch finds that the code makes a number of" in told


def test_an_axis_that_torch_may_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = freeing.capture

    def capture(*args: Any, free: FreeAxes, **kwargs: Any) -> Any:
        if 1 in free.axes[0]:  # as the real one does, which takes its time
            raise FixedAxesError([(0, 1)])
        return original(*args, free=free, **kwargs)

    monkeypatch.setattr(freeing, "capture", capture)
    x, path = torch.randn(2, 6, 3), tmp_path / "net.onnx"
    report = export_onnx(Positions(), x, path, dynamic_shapes={"x": {1: Dim.AUTO}}, check=False)
    assert report.dynamic_axes == {"x": {0: "batch"}}


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 6, 2)


def test_a_size_that_the_model_takes_no_other_of(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match=r"axis 1 of 'x'\) free: it does not run where that is 7 instead of 6"):
        export_onnx(Halves(), torch.randn(2, 6), tmp_path / "net.onnx", dynamic_shapes=({0: None, 1: "n"},))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"idz": {1: "n"}}, "no input 'idz'; did you mean 'ids'"),
        ({"ids": {2: "n"}}, "ids has no axis 2; its 2 axes are 0 to 1"),
        ({"ids": {True: "n"}}, "has no axis True"),
        ({"ids": ["n"]}, "ids has 2 axes, and 1 are given"),
        ({"ids": "n"}, r"ids is a tensor; give \{axis: name\}"),
        ({"ids": {1: 4.5}}, "axis 1 of 'ids' is 4.5; give a name"),
        ({"ids": {1: 7}}, "axis 1 of 'ids' is 3 long in example_input, not 7"),
        ({"ids": {1: "a / b"}}, "called 'a / b'; give a name"),
        ({"ids": {1: "3"}}, "in which there is no name"),
        ({"ids": {1: "n"}, "mask": {1: "n"}}, "'n' is 3 and 7 long in example_input"),
        ({"past": [{1: "p"}, None]}, "past has 1 parts, and 2 are given"),
        ({"past": {"a": {1: "p"}}}, "past has no part 'a'"),
        ({"past": 5}, "past is no tensor but holds some"),
        (({1: "n"},), r"1 entries for 3 arguments \(ids, mask, past\)"),
        ("n", "must be a dict by the names of arguments"),
    ],
)
def test_what_cannot_be_asked_for(shapes: Any, message: str) -> None:
    arguments = FlatArguments.of(attending(2, 3, 4), Attending())
    with pytest.raises(GraphPruneError, match=message):
        FreeAxes.of(shapes, arguments, dynamic_batch=True)


def test_what_is_said_and_what_follows() -> None:
    arguments = FlatArguments.of(attending(2, 3, 4), Attending())
    some = FreeAxes.of({"past_0": {1: "p"}, "ids": (2, None)}, arguments, dynamic_batch=True)
    assert some.names() == (None, None, {1: "p"})  # 2 fixes the batch
    some = FreeAxes.of({"past": {1: Dim.DYNAMIC}}, arguments, dynamic_batch=True)
    assert some.names() == ({0: "batch"}, {0: "batch"}, {0: "batch", 1: "past_0_1"})
    same = FreeAxes.of((None, None, [{1: Dim("p", min=2, max=9)}]), arguments, dynamic_batch=False)
    assert same.names() == (None, None, {1: "p"}) and same.ranges == {"p": (2, 9)}


def test_inputs_of_other_sizes() -> None:
    values, mask, ids = torch.randn(2, 3), torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[4, 7]])
    made = FlatArguments.of((values, mask, ids, torch.ones(1, 0))).shaped([(3, 5), (2, 7), (1, 9), (1, 4)]).tensors
    assert [tuple(t.shape) for t in made] == [(3, 5), (2, 7), (1, 9), (1, 4)]
    assert torch.equal(made[0][:2, :3], values) and made[0].abs().max() <= values.abs().max()
    assert len(made[0].unique()) == 15 and set(made[1].unique().tolist()) == {0, 1}
    assert set(made[2].unique().tolist()) <= {4, 7} and made[3].abs().max() > 0
