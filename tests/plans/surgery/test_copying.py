"""What a copy with other parameters inherits, and what it must not."""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import sparsity
from graphprune.plans.surgery import clone_with
from graphprune.support.reach import reachable
from tests.layered_networks import networks


class RemembersItsBias(nn.Module):
    """Eval mode computes the attention bias once for each device and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.qkv = nn.Linear(8, 3 * 4 * 5)
        self.bias = nn.Parameter(torch.randn(4, 7))
        self.out = nn.Linear(20, 3)
        self.register_buffer("offsets", (torch.arange(5)[:, None] - torch.arange(5)[None]).abs(), persistent=False)
        self.offsets: Tensor
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        key = str(x.device)
        if key not in self.kept:
            self.kept[key] = self.bias[:, self.offsets]
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1) + self.kept[key]).softmax(-1)
        answer: Tensor = self.out((scores @ v).transpose(1, 2).flatten(2))
        return answer


def test_values_computed_from_old_parameters_are_left_behind() -> None:
    torch.manual_seed(0)
    model, x = RemembersItsBias().eval(), torch.randn(2, 5, 8)
    model.requires_grad_(False)
    fresh = graphprune.plan(model, x, {"*": 0.5}, granularity="heads")
    assert fresh.caches == (("", "kept"),)
    expected = fresh.apply(model)(x)

    before = model(x)  # now there is something to inherit
    assert list(model.kept) == ["cpu"]
    small = graphprune.prune(model, x, 0.5, granularity="heads")  # verified, too
    assert small.bias.shape == (2, 7)
    torch.testing.assert_close(small(x), expected)
    torch.testing.assert_close(model(x), before)
    assert model.kept["cpu"].shape == (4, 5, 5)


def test_what_else_lies_beside_them_stays() -> None:
    model, x = RemembersItsBias().eval(), torch.randn(2, 5, 8)
    model.kept["names"] = ["a", "b"]  # type: ignore[assignment]
    small = graphprune.plan(model, x, {"*": 0.5}, granularity="heads").apply(model)
    assert small.kept == {"names": ["a", "b"]} and small.kept["names"] is not model.kept["names"]


def test_the_file_of_a_plan_names_them() -> None:
    model, x = RemembersItsBias().eval(), torch.randn(2, 5, 8)
    plan = graphprune.plan(model, x, 0.5)
    assert graphprune.Plan.from_dict(plan.to_dict()).caches == plan.caches == (("", "kept"),)


# -- features that a step of training has left behind


@dataclasses.dataclass
class Record:
    feature: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    feature: Any


class Slotted:
    __slots__ = ("feature",)

    def __init__(self, feature: Any) -> None:
        self.feature = feature


class Listener:
    def __init__(self, feature: Any) -> None:
        self.feature = [feature]

    def hear(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """A hook whose owner holds a feature."""


Pair = collections.namedtuple("Pair", "feature other")

HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "attribute": lambda h: h,
    "list": lambda h: [None, h],
    "tuple": lambda h: (h, (h,)),
    "named tuple": lambda h: Pair(h, 1),
    "dict": lambda h: {"h": h},
    "keys": lambda h: {h: 1},
    "set": lambda h: {h},
    "deque": lambda h: collections.deque([h], maxlen=2),
    "ordered": lambda h: collections.OrderedDict(h=h),
    "default": lambda h: collections.defaultdict(list, h=[h]),
    "user dict": lambda h: collections.UserDict(h=h),
    "nested": lambda h: {"a": [({"b": [h]},)]},
    "dataclass": Record,
    "frozen": Frozen,
    "slots": Slotted,
    "object": Listener,
    "namespace": lambda h: types.SimpleNamespace(h=h),
    "method": lambda h: Listener(h).hear,
    "partial": lambda h: functools.partial(print, h),
}


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in reachable(value) if isinstance(t, Tensor)]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.second(self.first(x).relu())
        return answer


@pytest.mark.parametrize("holder", HOLDERS)
def test_features_with_a_history_are_copied_wherever_they_lie(holder: str) -> None:
    model, x = Plain().eval(), torch.randn(2, 6)
    feature = model.first(x).relu()
    model.kept = model.second.kept = HOLDERS[holder](feature)
    copied = clone_with(model, {})
    assert copied.kept is copied.second.kept and copied.kept is not model.kept
    (value,) = _tensors(copied.kept)
    assert value is not feature and value.grad_fn is None
    torch.testing.assert_close(value, feature.detach())
    assert _tensors(model.kept)[0] is feature and feature.grad_fn is not None

    for output in ("module", "hybrid", "graph"):
        assert graphprune.prune(model, x, 0.5, output=output).first.weight.shape == (4, 6)


def test_features_of_parameters_and_of_hooks_are_copied() -> None:
    model, x = Plain().eval(), torch.randn(2, 6)
    listener = Listener(model(x))
    model.first.register_forward_hook(listener.hear)
    model.first.weight.note = {"feature": model(x)}  # type: ignore[attr-defined]
    model.first.weight.kind = "first"  # type: ignore[attr-defined]
    model.half = model.first.weight[:3]
    model(x).square().sum().backward(create_graph=True)  # gradients with a history of their own
    small = graphprune.prune(model, x, 0.5)
    (hook,) = small.first._forward_hooks.values()
    assert hook.__self__ is not listener
    assert small.first.weight.kind == "first"
    assert small.first.weight.note["feature"].grad_fn is None
    assert small.half.shape == (3, 6)


def test_layers_and_reconstruction_copy_the_same_way() -> None:
    model, x, _ = networks()["stages"]
    model.kept = [model(x)]
    plan = graphprune.plan(model, x, 0.5, granularity="layer")
    assert plan.layers
    (value,) = _tensors(plan.apply(model).kept)
    torch.testing.assert_close(value, model.kept[0].detach())

    masked = Plain()
    dense = clone_with(masked, {})
    x = torch.randn(4, 6)
    masked.kept = [masked(x)]
    sparsity.magnitude(masked, 0.5)
    assert sparsity.reconstruct(masked, dense, x, [x]) is masked


def test_functions_that_remember_the_model_remember_the_copy() -> None:
    model, x = Plain().eval(), torch.randn(2, 6)
    before = model.first.forward
    model.first.forward = lambda inputs: before(inputs) * 3  # type: ignore[method-assign]
    model.twice = lambda y: model.second(y) * 2
    model.tools = {"twice": model.twice}
    model.second.register_forward_pre_hook(lambda _, inputs: (inputs[0] + model.first.bias,))
    expected = model(x)

    copied = clone_with(model, {})
    torch.testing.assert_close(copied(x), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(copied(x), expected)
    assert copied.tools["twice"] is copied.twice
    assert bool((copied.twice(torch.ones(8)) != 0).all())

    small = graphprune.prune(copied, x, 0.5)
    assert small.first.weight.shape == (4, 6)
    torch.testing.assert_close(copied(x), expected)


@pytest.mark.parametrize("what", [threading.Lock(), (i for i in ()), io.StringIO()], ids=["lock", "generator", "file"])
def test_the_attribute_that_cannot_be_copied_is_named(what: Any, tmp_path: Path) -> None:
    what = (tmp_path / "log").open("w") if isinstance(what, io.StringIO) else what
    x = torch.randn(2, 6)
    for place in ("second.log", "second.logs", "second.weight.log", "second"):
        model = Plain()
        if place == "second.log":
            model.second.log = what
        elif place == "second.logs":
            model.second.logs = {"all": [Record(what)]}
        elif place == "second.weight.log":
            model.second.weight.log = what
        else:
            model.second = nn.Sequential(model.second)
            model.second.hook = functools.partial(print, what)
        kind = type(what).__name__
        with pytest.raises(graphprune.GraphPruneError, match=rf"cannot be copied .*: {place}[.\w]* holds a {kind}"):
            graphprune.prune(model, x, 0.5)


def test_tensors_without_an_ordinary_memory_are_copied() -> None:
    model = Plain()
    model.lazy = nn.LazyLinear(3)
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("expanded", torch.ones(1).expand(4))
    copied = clone_with(model, {})
    assert type(copied.lazy) is nn.LazyLinear and copied.lazy.has_uninitialized_params()
    torch.testing.assert_close(copied.sparse.to_dense(), torch.eye(3))
    assert copied.expanded.tolist() == [1.0] * 4


def test_a_buffer_that_the_forward_replaces_is_copied() -> None:
    class Counts(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + 1
            return super().forward(x) * self.seen

        def __getstate__(self) -> dict[str, Any]:
            return dict(self.__dict__)

    model, x = Counts().eval(), torch.randn(2, 6)
    small = graphprune.plan(model, x, 0.5).apply(model)
    assert small.seen.tolist() == [0.0]
    small(x)
    assert small.seen.tolist() == [1.0] and model.seen.tolist() == [0.0]
