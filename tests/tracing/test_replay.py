"""The recorded graph is the network: run by a plain interpreter it gives the model's own outputs."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune import GraphPruneError
from graphprune.tracing.trace import record_run
from tests import oracles
from tests.networks import NETWORKS
from tests.tracing.interpreter import distinct, replay


def assert_replays(model: nn.Module, example: Any, other: Any = None) -> None:
    """The graph recorded on one input gives the model's outputs on that input and on another of the same shapes."""
    model, example = oracles.double_copy(model), oracles.double(example)
    trace = record_run(model, example)
    trace.graph.lint()
    for given in (example, other):
        if given is not None:
            expected = distinct(oracles.call(model, oracles.double(given)))
            actual = replay(trace, model, oracles.double(given))
            assert len(actual) == len(expected)
            assert oracles.relative_error(actual, expected) < 1e-10


def test_small_networks() -> None:
    wrong = []
    for name, network in NETWORKS.items():
        try:
            assert_replays(*network())
        except Exception as error:  # which networks fail is the finding
            wrong.append(f"{name}: {type(error).__name__} {str(error)[:200]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "googlenet"])
def test_torchvision_on_another_input(name: str) -> None:
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, num_classes=5, **options).eval()
    assert_replays(model, torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 64))


class Outputs(nn.Module):
    """Two layers whose results are handed out in whatever form."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.a, self.b, self.form = nn.Linear(4, 3), nn.Linear(4, 2), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.a(x), self.b(x))


@dataclasses.dataclass
class Result:
    logits: Tensor
    loss: Tensor | None
    hidden: dict[str, Any]


Pair = collections.namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    ("form", "count"),
    [
        (lambda a, b: a, 1),
        (lambda a, b: (a, b), 2),
        (lambda a, b: [b, (a, [b])], 2),
        (lambda a, b: {"a": a, "nested": {"b": [b]}}, 2),
        (lambda a, b: Pair(b, a), 2),
        (lambda a, b: Result(b, None, {"a": a}), 2),
        (lambda a, b: (None, a, 3, "text", True), 1),
        (lambda a, b: (a, a), 1),
    ],
    ids=["tensor", "tuple", "nest", "dict", "namedtuple", "dataclass", "none", "twice"],
)
def test_outputs_of_any_form(form: Any, count: int) -> None:
    model, x = Outputs(form), torch.randn(3, 4)
    assert len(record_run(model, x).graph.output_node().args[0]) == count
    assert_replays(model, x, torch.randn(3, 4))


class Arguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 1.0, extra: Any = None, flag: bool = False) -> Tensor:
        y = self.fc(x) * scale
        if extra is not None:
            y = y + extra["add"] + extra["more"][0]
        return -y if flag else y


@pytest.mark.parametrize(
    "example",
    [
        torch.randn(2, 4),
        (torch.randn(2, 4), 3.0),
        [torch.randn(2, 4), 0.5, {"add": torch.randn(2, 4), "more": [torch.randn(4)]}, True],
        {"x": torch.randn(2, 4)},
        {"flag": True, "extra": {"add": torch.randn(4), "more": (torch.randn(2, 1),)}, "x": torch.randn(2, 4)},
    ],
    ids=["tensor", "tuple", "list", "dict", "nested dict"],
)
def test_example_inputs_of_any_form(example: Any) -> None:
    assert_replays(Arguments(), example)


def test_one_tensor_given_twice_and_an_input_that_is_not_used() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, a: Tensor, b: Tensor, unused: Tensor) -> Tensor:
            return self.fc(a * b)

    x = torch.randn(2, 4)
    assert_replays(Three(), (x, x, torch.randn(7)))


def test_an_input_that_is_returned_as_it_is() -> None:
    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x, self.fc(x), self.fc.bias

    assert_replays(Through(), torch.randn(2, 4))


class Shared(nn.Module):
    """A module called three times, a weight used by two modules and by a plain call, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.other.weight = self.block[0].weight
        self.kernel = nn.Parameter(torch.randn(6, 4, 1, 1))
        self.register_buffer("table", torch.tensor([3, 0, 2, 1]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(self.block(x)).relu())
        x = self.other(x) + F.conv2d(x, self.block[0].weight, padding=1)
        return F.conv2d(x[:, self.table], self.kernel)


def test_shared_parameters_are_one_node_each() -> None:
    model, x = Shared().eval(), torch.randn(1, 4, 6, 6)
    trace = record_run(model, x)
    targets = [n.target for n in trace.graph.nodes if n.op == "get_attr"]
    assert sorted(targets) == sorted(
        [
            *("block.0.weight", "block.0.bias", "other.bias", "kernel", "table"),
            *(f"block.1.{p}" for p in ("weight", "bias", "running_mean", "running_var")),
        ]
    )
    assert len(trace.parameters["block.0.weight"].users) == 5
    assert trace.canonical("other.weight") == "block.0.weight"
    assert trace.canonical("kernel") == "kernel"
    assert_replays(model, x, torch.randn(1, 4, 6, 6))


def test_nodes_know_the_line_the_module_and_the_shape() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).relu()  # the line that is looked for

    model = nn.Sequential(collections.OrderedDict(inner=Inner(), flat=nn.Flatten(), fc=nn.Linear(5 * 16, 2)))
    trace = record_run(model, torch.randn(2, 3, 6, 6))
    nodes = {str(n.target).split(".")[1]: n for n in trace.graph.nodes if n.op == "call_function"}
    line = Inner.forward.__code__.co_firstlineno + 1
    for name, module, shape in (
        ("convolution", "inner.conv", (2, 5, 4, 4)),
        ("relu", "inner", (2, 5, 4, 4)),
        ("linear", "fc", (2, 2)),
    ):
        node = nodes[name]
        assert node.meta["module"] == module
        assert node.meta["val"].shape == shape
        assert node.meta["val"].dtype == torch.float32
        if module.startswith("inner"):
            assert str(node.meta["source"]) == f"test_replay.py:{line} in forward"
    assert trace.modules["inner.conv"] == "Conv2d" and trace.modules["fc"] == "Linear"


class InPlace(nn.Module):
    """Writes into its input, into results, through views and into a buffer that it reads before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.register_buffer("state", torch.linspace(0, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        x[:, ::2] = 0.5
        y = self.fc(x)
        y[:, 1:3].mul_(2)
        before = y + self.state
        self.state.add_(1)
        self.state[0] = 7.0
        y.t()[0] = before.t()[1]
        return y + self.state + before


def test_writes_are_recorded_in_order() -> None:
    model, x = InPlace(), torch.randn(3, 6)
    model, x = model.double(), x.double()
    trace = record_run(model, x.clone())
    with torch.no_grad():
        expected = oracles.copy_of(model)(x.clone())
    (actual,) = replay(trace, model, x)
    assert torch.allclose(actual, expected, atol=1e-12)


def test_random_operators_are_calls_not_constants() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x + torch.rand(4) * F.dropout(x, 0.5, training=True))

    model, x = Noisy().double(), torch.randn(2, 4).double()
    trace = record_run(model, x)
    torch.manual_seed(3)
    with torch.no_grad():
        expected = model(x)
    torch.manual_seed(3)
    (actual,) = replay(trace, model, x)
    assert torch.allclose(actual, expected)


def test_constants_and_plain_tensor_attributes() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.plain = nn.Linear(4, 4), torch.tensor([1.0, 2.0, 3.0, 4.0])

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.plain + torch.arange(4) + torch.tensor([0.0, 1.0, 0.0, 2.0])

    model, x = Constant(), torch.randn(2, 4)
    trace = record_run(model, x)
    assert any(torch.equal(c, model.plain) for c in trace.constants.values())
    assert list(trace.parameters) == ["fc.weight", "fc.bias"]
    with torch.no_grad():
        assert torch.allclose(replay(trace, model, x)[0], model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(64, 3))
    model, x = model.to(dtype).eval(), torch.randn(2, 3, 6, 6).to(dtype)
    trace = record_run(model, x)
    assert trace.parameters["0.weight"].meta["val"].dtype == dtype
    with torch.no_grad():
        assert torch.equal(replay(trace, model, x)[0], model(x))


def test_meta_models_need_no_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(30_000, 100_000), nn.ReLU(), nn.Linear(100_000, 30_000))
        trace = record_run(model, torch.empty(2, 30_000))
    last = trace.graph.output_node().args[0][0]
    assert last.meta["val"].shape == (2, 30_000)
    assert [n.meta["val"].shape for n in trace.parameters.values()] == [
        (100_000, 30_000), (100_000,), (30_000, 100_000), (30_000,)
    ]  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_models() -> None:
    model, x = Shared().cuda().double().eval(), torch.randn(1, 4, 6, 6, device="cuda", dtype=torch.float64)
    trace = record_run(model, x)
    with torch.no_grad():
        assert torch.allclose(replay(trace, model, x)[0], model(x))


def test_attention_and_recurrent_modules_show_what_they_are_made_of() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    trace = record_run(layer, torch.randn(2, 5, 8))
    names = [str(n.target) for n in trace.graph.nodes if n.op == "call_function"]
    assert not [n for n in names if "fast" in n or "encoder_layer" in n or "multi_head" in n]
    assert sum("linear" in n for n in names) == 4  # qkv, output, two of the feed-forward
    assert_replays(layer, torch.randn(2, 5, 8), torch.randn(2, 5, 8))
    lstm = nn.LSTM(4, 3, 2, bidirectional=True)
    assert [str(n.target) for n in record_run(lstm, torch.randn(5, 2, 4)).graph.nodes].count("aten.lstm.input") == 1
    assert_replays(lstm, torch.randn(5, 2, 4), torch.randn(5, 2, 4))


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_packed_sequences(kind: str) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind](4, 3)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
            return nn.utils.rnn.pad_packed_sequence(self.net(packed)[0])[0]

    assert_replays(Packed(), torch.randn(5, 2, 4))


def test_not_a_module() -> None:
    with pytest.raises(GraphPruneError, match=r"expected a torch\.nn\.Module, got function"):
        record_run(lambda x: x, torch.randn(1))  # type: ignore[arg-type]
