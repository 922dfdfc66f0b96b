"""The table of operators: its lines, the products it reads off calls, and one more line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

import graphprune
from graphprune.errors import GraphPruneError
from graphprune.importance.calibration import find_readers
from graphprune.tracing.example import ExampleInput
from graphprune.tracing.operators import (
    OPERATORS,
    Kind,
    Layer,
    Move,
    Operator,
    Sliding,
    add_operator,
    given,
    operator_of,
    products_of,
    remove_operator,
)
from graphprune.tracing.operators.table import _ENTRIES
from graphprune.tracing.operators.work import work_of_product
from graphprune.tracing.trace import record_run
from graphprune.tracing.work import macs_of, term_macs


def test_every_line_is_of_an_operator_of_torch_and_none_stands_twice() -> None:
    counted = Counter(name for _, names in _ENTRIES for name in names.split())
    assert max(counted.values()) == 1 and set(counted) == set(OPERATORS)
    missing = {n for n in counted if not hasattr(torch.ops.aten, n) and not hasattr(torch.ops.torchvision, n)}
    assert not {n for n in missing if not n.startswith(("mkldnn_", "cudnn_", "miopen_"))}  # parts of other builds


class Calls(nn.Module):
    """One function of an input and of parameters."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        drawn = (nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes)
        self.function, self.tensors = function, nn.ParameterList(drawn)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.tensors)


CALLS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], list[tuple[int, ...]]]] = {
    "linear": (F.linear, (5, 4, 3), [(6, 3), (6,)]),
    "mm": (lambda x, w: x @ w, (5, 3), [(3, 6)]),
    "mm, left": (lambda x, w: w @ x, (3, 5), [(6, 3)]),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), (5, 3), [(3, 6), (6,)]),
    "bmm": (torch.bmm, (2, 5, 3), [(2, 3, 6)]),
    "baddbmm, left": (lambda x, w, b: torch.baddbmm(b, w, x), (2, 3, 5), [(2, 6, 3), (2, 6, 5)]),
    "conv1d": (F.conv1d, (5, 3, 7), [(6, 3, 2), (6,)]),
    "conv2d, groups": (lambda x, w: F.conv2d(x, w, groups=2), (5, 4, 4, 4), [(6, 2, 2, 2)]),
    "conv2d, single": (F.conv2d, (3, 4, 4), [(6, 3, 2, 2)]),
    "conv_transpose2d": (lambda x, w: F.conv_transpose2d(x, w, stride=2), (5, 3, 4, 4), [(3, 6, 2, 2)]),
    "conv_tbc": (torch.conv_tbc, (7, 2, 3), [(2, 3, 6), (6,)]),
    "deform_conv2d": (
        lambda x, w: torchvision.ops.deform_conv2d(x, x.new_full((5, 8, 3, 3), 0.2), w), (5, 3, 4, 4), [(6, 3, 2, 2)],
    ),
    "embedding": (lambda x, w: F.embedding((x.abs() * 3).long() % 4, w), (5, 2), [(4, 6)]),
    "_trilinear": (lambda x, w: F.bilinear(x, x, w), (5, 3), [(6, 3, 3)]),
}  # fmt: skip


def _at(tensor: Tensor, axis: int, index: int) -> Tensor:
    """The tensor with zeros everywhere but at one index of an axis."""
    mask = torch.zeros(tensor.shape[axis]).index_fill(0, torch.tensor(index), 1.0)
    return tensor * mask.reshape([-1 if a == axis else 1 for a in range(tensor.dim())])


@pytest.mark.parametrize("name", CALLS)
def test_products_against_zeroing_by_hand(name: str) -> None:
    function, shape, shapes = CALLS[name]
    model, x = Calls(function, *shapes).eval(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    trace = record_run(model, ExampleInput.of(x))
    weight = trace.parameters["tensors.0"]
    found = [(n, p) for n in trace.graph.nodes for p in products_of(n) if p.weight is weight]
    assert len(found) == 1
    node, product = found[0]
    tensors = [t.detach() for t in model.tensors]
    if len(shapes) > 1:
        assert product.bias is trace.parameters["tensors.1"]
        tensors[1] = torch.zeros_like(tensors[1])
    plain = function(x, *tensors)
    # the sums over single indices of an axis that reads make up the whole; so they do over those of a kernel
    for axis in (*product.reads, *product.slides):
        parts = [function(x, _at(tensors[0], axis, i), *tensors[1:]) for i in range(tensors[0].shape[axis])]
        torch.testing.assert_close(sum(parts), plain)
    # reading one channel of the data, or one index of the weight, is the same
    if product.data_axis is not None and product.groups == 1 and product.data.op == "placeholder" and product.reads:
        (axis,) = product.reads
        for i in range(tensors[0].shape[axis]):
            mine = function(x, _at(tensors[0], axis, i), *tensors[1:])
            torch.testing.assert_close(mine, function(_at(x, product.data_axis, i), *tensors))
    # each index that is produced makes channels of its own
    at = -1 if product.result_axis is None else product.result_axis - len(node.meta["val"].shape)  # from the end
    seen: set[int] = set()
    (makes,) = product.produces
    for i in range(tensors[0].shape[makes]):
        made = function(x, _at(tensors[0], makes, i), *tensors[1:]).movedim(at, 0).flatten(1).abs().sum(1)
        channels = set(made.nonzero().flatten().tolist())
        assert channels and not channels & seen
        seen |= channels
    assert len(seen) == plain.shape[at]


def test_work_of_products_is_that_of_the_table() -> None:
    for name, (function, shape, shapes) in CALLS.items():
        if name.partition(",")[0] in ("linear", "mm", "addmm", "conv1d", "conv2d", "conv_transpose2d"):
            model, x = Calls(function, *shapes).eval(), torch.randn(shape)
            nodes = [n for n in record_run(model, ExampleInput.of(x)).graph.nodes if products_of(n)]
            ours = [term_macs(work_of_product(n, p)) for n in nodes for p in products_of(n) if p.fixed]
            assert ours == [macs_of(n) for n in nodes], name


# -- one more line


@torch.library.custom_op("graphprune_table::rows", mutates_args=())
def rows(weight: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


@torch.library.custom_op("graphprune_table::kernel", mutates_args=())
def kernel(x: Tensor, weight: Tensor, bias: Tensor, padding: int, stride: int, dilation: int, groups: int) -> Tensor:
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


@torch.library.custom_op("graphprune_table::kept", mutates_args=())
def kept(x: Tensor) -> Tensor:
    return x.clone()


@rows.register_fake
def _(weight: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@kernel.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, padding: int, stride: int, dilation: int, groups: int) -> Tensor:
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


@kept.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


LINES = {
    "graphprune_table::rows": Operator(Kind.CONTRACTION, Layer(data=1, weight=0)),
    "graphprune_table::kernel": Operator(
        Kind.CONVOLUTION, Sliding(padding=3, stride=4, dilation=5, groups=6, transposed=False, output_padding=None)
    ),
    "graphprune_table::kept": Operator(Kind.MOVEMENT, move=Move.STAYS),
}


class Rows(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = rows(self.weight, x, self.bias)
        return out


class Kernel(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = kernel(x, self.weight, self.bias, self.padding[0], self.stride[0], 1, self.groups)
        return out


class Kept(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = kept(x)
        return out


def _network(convolution: Any, linear: Any, between: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        convolution(3, 8, 3, padding=1), nn.ReLU(), convolution(8, 6, 3, stride=2, padding=1), between(),
        nn.Flatten(), linear(6 * 16, 9), between(), linear(9, 4),
    ).eval()  # fmt: skip


@pytest.fixture
def lines() -> Iterator[None]:
    for name, line in LINES.items():
        add_operator(name, line)
    yield
    for name in LINES:
        remove_operator(name)


def _image(seed: int = 0, samples: int = 2) -> Tensor:
    return torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_one_line_is_all_that_an_operator_of_a_known_kind_takes(lines: None) -> None:
    own, twin, x = _network(Kernel, Rows, Kept), _network(nn.Conv2d, nn.Linear, nn.Identity), _image()
    for request in ({"ratio": 0.5}, {"budget": graphprune.Budget(macs=0.5)}):
        plan, wanted = graphprune.plan(own, x, **request), graphprune.plan(twin, x, **request)  # type: ignore[arg-type]
        assert plan.removed == wanted.removed and [g.kind for g in plan.groups] == [g.kind for g in wanted.groups]
    assert graphprune.count(own, x).macs == graphprune.count(twin, x).macs
    assert [r.weight for r in find_readers(record_run(own, ExampleInput.of(x)))] == [
        f"{i}.weight" for i in (0, 2, 5, 7)
    ]
    data = [_image(seed, 40) for seed in (1, 2)]
    ours, theirs = (graphprune.recover(n, plan, x, data, "least_squares").model for n in (own, twin))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-3, atol=1e-3)
    assert graphprune.verify(own, plan.apply(own), plan, x).passed


def test_without_its_line_an_operator_is_unknown() -> None:
    own, x = _network(Kernel, Rows, Kept), _image()
    assert graphprune.trace(own, x).groups == ()
    assert graphprune.count(own, x).macs == 0
    nodes = [n for n in graphprune.trace(own, x).trace.graph.nodes if n.op == "call_function"]
    assert any(operator_of(node) is None for node in nodes)


def test_a_line_is_not_replaced_unawares(lines: None) -> None:
    for name in ("linear", "graphprune_table::rows"):
        with pytest.raises(GraphPruneError, match=f"operator '{name}' is in the table already"):
            add_operator(name, Operator(Kind.POINTWISE))


def test_arguments_are_found_however_they_are_passed() -> None:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    node = graph.call_function(torch.ops.aten.linear.default, (x,), {"weight": w})
    assert given(node, 0) is x and given(node, 1) is w and given(node, 2) is None and given(node, None) is None
    node = graph.call_function(torch.ops.aten.mm.default, (), {"input": x, "mat2": w})
    assert given(node, 0) is x and given(node, 1) is w
