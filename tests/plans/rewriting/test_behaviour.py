"""What replaces a module behaves like a module: names, ties, training, hooks, copies, files, export, other calls."""

from __future__ import annotations

import copy
import gc
import io
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune
from tests import oracles
from tests.plans.rewriting.literal_nets import NETS, Block, Images, Outer, Report


def hybrid(model: nn.Module, example: Any, **options: Any) -> nn.Module:
    return graphprune.prune(model, example, 0.5, output="hybrid", **options)


@pytest.mark.parametrize("output", ["hybrid", "graph"])
def test_names_and_ties_stay(output: str) -> None:
    model, example, _ = NETS["nested_and_shared"]()
    model.block.b.weight = nn.Parameter(model.block.a.weight.detach().t().clone())
    model.other.a.weight = model.block.a.weight  # tied across two replaced modules
    small = graphprune.prune(model, example, 0.5, output=output)
    assert list(small.state_dict()) == list(model.state_dict())
    assert small.other.a.weight is small.block.a.weight
    assert small.get_parameter("other.a.weight").shape[0] < 12


@pytest.mark.parametrize("output", ["hybrid", "graph"])
def test_output_structure_and_signature(output: str) -> None:
    model, example, larger = NETS["nested_and_shared"]()
    small = graphprune.prune(model, example, 0.5, output=output)
    found = small(x=larger)
    assert type(found) is Report
    assert type(found.answer).__name__ == "Answer"
    assert found.answer.first.shape == (5, 3)
    assert list(found.named) == ["z"]


@pytest.mark.parametrize("output", ["hybrid", "graph"])
def test_dropout_follows_the_flag(output: str) -> None:
    model, example = Outer(dropout=0.4).train(), torch.randn(64, 4)
    small = graphprune.prune(model, example, 0.5, output=output)
    assert small.training
    assert all(m.training for m in small.modules())
    again, other = small(example).named["z"], small(example).named["z"]
    assert not torch.equal(again, other)
    torch.manual_seed(3)
    found = small(example).named["z"]
    torch.manual_seed(3)
    assert torch.equal(found, copy.deepcopy(small)(example).named["z"])
    small.eval()
    assert torch.equal(small(example).named["z"], small(example).named["z"])
    with_flags = small.train().eval()
    assert not any(m.training for m in with_flags.modules())


def test_training_mode_equals_the_reference() -> None:
    """With batch statistics and dropout, against the untouched network whose removed channels are zero."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.stem(x)).relu()
            y = F.dropout(y[:, :8] * y[:, 8:], 0.3, training=self.training)
            return self.head(y)

    torch.manual_seed(0)
    model, example = Net().double(), torch.randn(4, 3, 8, 8).double()
    plan = graphprune.plan(model, example, 0.5, output="hybrid", fold_bn=False)
    small = plan.apply(model).train()
    reference = oracles.zero_reference(model, plan.removed).train()
    kept = [i for i in range(8) if i not in plan.removed["head.weight"][1]]

    def masked(x: Tensor, p: float, training: bool) -> Tensor:  # the same dropout mask for the same channels
        if not training:
            return x
        mask = torch.rand(4, 8, 6, 6, generator=torch.Generator().manual_seed(0)).double() > p
        return x * (mask if x.shape[1] == 8 else mask[:, kept]) / (1 - p)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "dropout", masked)
        patch.setattr(F, "dropout", lambda x, p, training: masked(x, p, training))
        found, want = small(example), reference(example)
    assert oracles.relative_error(found, want) < 1e-9
    found.sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    kept_stem = [i for i in range(16) if i not in plan.removed["stem.weight"][0]]
    error = oracles.relative_error(small.norm.running_mean, reference.norm.running_mean[kept_stem])
    assert error < 1e-9


def test_one_training_step() -> None:
    model, example, _ = NETS["split_list"]()
    small = hybrid(model, example).train()
    optimiser = torch.optim.SGD(small.parameters(), 0.05)
    losses = []
    for _ in range(5):
        loss = small(example).pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("output", ["hybrid", "graph"])
def test_copies_and_files(output: str, tmp_path: Path) -> None:
    model, example, _ = NETS["nested_and_shared"]()
    plan = graphprune.plan(model, example, 0.5, output=output)
    small = plan.apply(model)
    want = small(example)
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    again = graphprune.Plan.load(plan.save(tmp_path / "plan.json")).apply(model)
    for other in (copy.deepcopy(small), copy.copy(small), again, torch.load(buffer, weights_only=False)):
        assert list(other.state_dict()) == list(small.state_dict())
        assert oracles.relative_error(other(example), want) == 0
    copied = copy.deepcopy(small)
    copied.head.weight.data.zero_()
    assert oracles.relative_error(small(example), want) == 0
    again.load_state_dict(small.state_dict())


def test_hooks_stay() -> None:
    model, example, _ = NETS["nested_and_shared"]()
    seen: list[str] = []
    model.block.register_forward_hook(lambda *_: seen.append("block"))
    model.block.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))
    model.block.a.register_forward_hook(lambda *_: seen.append("a"))
    plan = graphprune.plan(model, example, 0.5, output="hybrid")
    small = plan.apply(model)
    seen.clear()
    found = small(example)
    assert seen == ["a", "block"] * 3
    assert oracles.relative_error(found, oracles.zero_reference(model, plan.removed).float()(example)) < 1e-5


def test_exported(tmp_path: Path) -> None:
    for name, output in (("view", "hybrid"), ("split_list", "graph"), ("fused_attention", "hybrid")):
        model, example, _ = NETS[name]()
        small = graphprune.prune(model.eval(), example, 0.5, output=output)
        report = graphprune.export_onnx(small, example, tmp_path / f"{name}.onnx")
        assert report.max_relative_error is not None
        assert report.max_relative_error < 1e-4


def test_an_argument_of_another_value_is_refused() -> None:
    model, example, _ = NETS["nested_and_shared"]()
    small = hybrid(model, example)
    y = torch.randn(2, small.block.a.in_features)
    small.block(y, 0.5)
    with pytest.raises(graphprune.GraphPruneError, match=r"scale=0\.5 and got 2\.0"):
        small.block(y, 2.0)
    with pytest.raises(graphprune.GraphPruneError, match="shift=None and got a Tensor"):
        small.block(y, 0.5, shift=y)


def test_another_branch_is_refused() -> None:
    def middle(m: nn.Module, y: Tensor) -> Tensor:
        y = y[:, :8] + y[:, 8:]
        return y.flip(2) if y.shape[2] > 10 else y

    model = Images(middle, 8)
    small = hybrid(model, torch.randn(2, 3, 8, 8))
    assert small(torch.randn(4, 3, 10, 9)).shape == (4, 4, 10, 9)
    with pytest.raises(graphprune.GraphPruneError, match=r"x\.shape\[2\] > 10 .*was False.* is True"):
        small(torch.randn(2, 3, 12, 12))


def test_nothing_recorded_is_kept() -> None:
    made: list[weakref.ref[Tensor]] = []

    def middle(m: nn.Module, y: Tensor) -> Tensor:
        if bool(y.device.type != "meta"):
            made.append(weakref.ref(y))
        return y[:, :8] + y[:, 8:]

    small = hybrid(Images(middle, 8), torch.randn(2, 3, 8, 8))
    gc.collect()
    assert made
    assert not any(reference() is not None for reference in made)
    assert not [v for n in small.graph.nodes for v in n.meta.values() if isinstance(v, Tensor)]


def test_the_original_is_left_alone() -> None:
    model, example, _ = NETS["nested_and_shared"]()
    before, call, length = oracles.snapshot(model), nn.Module.__call__, Tensor.__len__
    hybrid(model, example)
    assert not oracles.differences(before, oracles.snapshot(model))
    assert "forward" not in vars(model)
    assert (nn.Module.__call__, Tensor.__len__) == (call, length)


def _blocked(forward: Any, **attributes: Any) -> str:
    """The reason why the literal in `forward` stays, as the plan gives it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 4, 1)
            for name, value in attributes.items():
                setattr(self, name, value)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            y = forward(self, y)
            return self.head(y[:, :8] + y[:, 8:])

    model = Net()
    plan = graphprune.plan(model, torch.randn(2, 3, 8, 8), 0.5, output="hybrid", fold_bn=False)
    assert not plan.rewrites
    with pytest.raises(graphprune.GraphPruneError, match="output='graph': the model cannot become one graph"):
        graphprune.plan(model, torch.randn(2, 3, 8, 8), 0.5, output="graph")
    return "\n".join(plan.frozen)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def _without_gradient(m: nn.Module, y: Tensor) -> Tensor:
    with torch.no_grad():
        return y * 2


def _counted(m: Any, y: Tensor) -> Tensor:
    m.calls = m.calls + 1
    return y


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, y: y * 2 if float(y.mean()) > 1e9 else y, "turns tensor values into plain numbers"),
        (lambda m, y: Double.apply(y), "custom autograd function"),
        (_without_gradient, "switches gradients on or off"),
        (lambda m, y: y.tanh().sin() if m.training else y, "does something else in training mode"),
        (lambda m, y: y * float(len(y)), "length of a tensor as a plain number"),
        (lambda m, y: y / int(y.shape[0] * 0.5), "as a plain number"),
        (_counted, "changes self.calls"),
    ],
)
def test_refused_with_the_true_reason(forward: Any, reason: str) -> None:
    text = _blocked(forward, calls=0)
    assert "is the literal 8" in text
    assert reason in text


def test_calls_that_differ_are_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Linear(4, 8), Block(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return self.head(self.block(self.block(y, 0.5), 0.25))

    model = Twice()
    plan = graphprune.plan(model, torch.randn(2, 4), 0.5, output="hybrid")
    assert not plan.rewrites
    assert "does not do the same in each of its calls" in "\n".join(plan.frozen)


@pytest.mark.parametrize(
    "step",
    [
        ["call_function", "os.system", ["true"], {}],
        ["call_function", "torch.load", ["x"], {}],
        ["call_function", "torch.from_file", ["x"], {}],
        ["call_function", "torch.ops.load_library", ["x"], {}],
        ["call_method", "no_such_method", [{"ref": 0}], {}],
        ["build", "subprocess:Popen", [], {}],
        ["shell", "ls", [], {}],
        ["call_function", "torch.relu", [{"ref": 99}], {}],
        ["call_function", "torch.relu", [{"torch": "load"}], {}],
    ],
)
def test_a_plan_calls_nothing_but_operators(step: list[Any]) -> None:
    model, example, _ = NETS["slices"]()
    data = json.loads(json.dumps(graphprune.plan(model, example, 0.5, output="hybrid").to_dict()))
    data["rewrites"][0]["steps"].insert(1, step)
    with pytest.raises(graphprune.GraphPruneError):
        graphprune.Plan.from_dict(data).apply(model)


def test_unknown_output() -> None:
    model, example, _ = NETS["slices"]()
    with pytest.raises(graphprune.GraphPruneError, match=r"output: expected one of 'module', .*, got 'fx'"):
        graphprune.plan(model, example, output="fx")


def test_a_module_that_no_graph_can_follow_stays_one_in_graph_mode() -> None:
    class Deep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh().sin() if self.training else x

    def middle(m: Any, y: Tensor) -> Tensor:
        y = m.deep(y)
        return y[:, :8] + y[:, 8:]

    model, example = Images(middle, 8, deep=Deep()), torch.randn(2, 3, 8, 8)
    small = graphprune.prune(model, example, 0.5, output="graph")
    assert isinstance(small, torch.fx.GraphModule)
    assert type(small.deep) is Deep
    small.head.weight.data.fill_(1)
    small.eval()
    quiet = small(example)
    assert not torch.equal(small.train()(example), quiet)
