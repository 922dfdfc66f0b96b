"""What a graph of recorded calls could forget of a forward: it computes the same, or the module is refused."""

from __future__ import annotations

import random
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, stateless

import graphprune


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.randn(8))
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.one(x)) * self.scale + self.shift


class Net(nn.Module):
    """Runs `body`; with `literal` its code blocks pruning, so that output="hybrid" replaces it."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], literal: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm, self.scaled = nn.BatchNorm1d(8), Scaled()
        self.pair = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(8))
        self.listed: list[Any] = [None]
        self.named: dict[str, Any] = {}
        self.last: deque[Any] = deque(maxlen=2)
        self.held = types.SimpleNamespace(h=None)
        self.body, self.literal = body, literal

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self, self.first(x)).relu()
        return self.head(y.view(-1, 2, 4).flatten(1) if self.literal else y)


# -- other weights


def doubled(m: nn.Module) -> dict[str, Tensor]:
    return {name: value * 2 for name, value in m.named_parameters()}


def deleted_and_set(m: Any, x: Tensor) -> Tensor:
    weight = m.inner.weight
    del m.inner.weight
    m.inner.weight = weight * 2
    try:
        return m.inner(x)
    finally:
        del m.inner.weight
        m.inner.weight = weight


def another_parameter(m: Any, x: Tensor) -> Tensor:
    weight = m.inner.weight
    m.inner.weight = nn.Parameter(weight.detach() * 2)
    try:
        return m.inner(x)
    finally:
        m.inner.weight = weight


def other_data(m: Any, x: Tensor) -> Tensor:
    before = m.inner.weight.data
    m.inner.weight.data = before * 2
    y = m.inner(x)
    m.inner.weight.data = before
    return y


def written_and_undone(m: Any, x: Tensor) -> Tensor:
    m.inner.weight.detach().mul_(2)
    y = m.inner(x).clone()
    m.inner.weight.detach().div_(2)
    return y


def another_module(m: Any, x: Tensor) -> Tensor:
    inner = m.inner
    m.inner = m.scaled.one
    try:
        return m.inner(x)
    finally:
        m.inner = inner


def another_in_a_list(m: Any, x: Tensor) -> Tensor:
    before = m.pair[0]
    m.pair[0] = m.inner
    try:
        return m.pair(x)
    finally:
        m.pair[0] = before


def hyper(m: Any, x: Tensor) -> Tensor:
    return functional_call(m.inner, {"weight": torch.outer(x.mean(0), x.mean(0))}, (x,))


def mapped(m: Any, x: Tensor) -> Tensor:
    weights = torch.stack([m.inner.weight, m.inner.weight * 2])
    return torch.vmap(lambda w: functional_call(m.inner, {"weight": w}, (x,)))(weights).sum(0)


WEIGHTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "parameters": lambda m, x: functional_call(m.inner, doubled(m.inner), (x,)),
    "stateless": lambda m, x: stateless.functional_call(m.inner, doubled(m.inner), (x,)),
    "buffers": lambda m, x: functional_call(m.norm, {"running_mean": m.norm.running_mean + 1}, (x,)),
    "of the user's module": lambda m, x: functional_call(m.scaled, doubled(m.scaled), (x,)),
    "a buffer of it": lambda m, x: functional_call(m.scaled, {"shift": m.scaled.shift * 3}, (x,)),
    "of a module inside": lambda m, x: functional_call(m.scaled, {"one.weight": m.inner.weight + 1}, (x,)),
    "of a sequence": lambda m, x: functional_call(m.pair, {"0.weight": m.inner.weight * 2}, (x,)),
    "from the input": hyper,
    "in the second call": lambda m, x: functional_call(m.inner, doubled(m.inner), (m.inner(x),)),
    "in the first call": lambda m, x: m.inner(functional_call(m.inner, doubled(m.inner), (x,))),
    "one for each": mapped,
    "deleted and set": deleted_and_set,
    "another parameter": another_parameter,
    "other data": other_data,
    "written and undone": written_and_undone,
    "another module": another_module,
    "another in a list": another_in_a_list,
}

# -- what is kept from one call to the next, and what is switched


def kept(name: str) -> Callable[[Any, Tensor], Tensor]:
    def body(m: Any, x: Tensor) -> Tensor:
        if name == "attribute":
            m.feature = x
        elif name == "list":
            m.listed[0] = x
        elif name == "dict":
            m.named["x"] = x
        elif name == "object":
            m.held.h = x
        else:
            m.last.append(x)
        stored = {"list": m.listed, "dict": [*m.named.values()], "object": [m.held.h], "deque": m.last}
        return m.inner(sum(stored.get(name, [x])))

    return body


def counted(m: Any, x: Tensor) -> Tensor:
    m.seen.add_(1)
    return m.inner(x) * m.seen


def replaced_buffer(m: Any, x: Tensor) -> Tensor:
    m.seen = m.seen + 1
    return m.inner(x) * m.seen


def running_mean(m: Any, x: Tensor) -> Tensor:
    m.mean.mul_(0.9).add_(x.detach().mean(0) * 0.1)
    return m.inner(x) + m.mean


def filled(m: Any, x: Tensor) -> Tensor:
    m.mean[:] = x.detach().mean(0)
    return m.inner(x) + m.mean


def within(context: Callable[[], Any], call_only: bool = True) -> Callable[[Any, Tensor], Tensor]:
    def body(m: Any, x: Tensor) -> Tensor:
        with context():
            y = m.inner(x) if call_only else m.inner(x) * 2
        return y.float() + x

    return body


def seeded(m: Any, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return m.inner(x) + torch.rand(8)


def forked(m: Any, x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        noise = torch.rand(8)
    return m.inner(x) + noise


def replayed(m: Any, x: Tensor) -> Tensor:
    state = torch.get_rng_state()
    noise = torch.rand(8)
    torch.set_rng_state(state)
    return m.inner(x) + noise * torch.rand(8)


def frozen_norm(m: Any, x: Tensor) -> Tensor:
    m.norm.eval()
    return m.norm(m.inner(x).relu())


def flag(m: Any, x: Tensor) -> Tensor:
    m.norm.training = False
    return m.norm(m.inner(x).relu())


def layer_drop(m: Any, x: Tensor) -> Tensor:
    return x if m.training and random.random() < 0.5 else m.inner(x)


STATE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    **{name: kept(name) for name in ("attribute", "list", "dict", "object", "deque")},
    "counted": counted,
    "replaced buffer": replaced_buffer,
    "running mean": running_mean,
    "filled": filled,
    "no_grad": within(torch.no_grad),
    "inference mode": within(torch.inference_mode),
    "inference mode, calculation": within(torch.inference_mode, call_only=False),
    "autocast": within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "autocast, calculation": within(lambda: torch.autocast("cpu", torch.bfloat16), call_only=False),
    "seeded": seeded,
    "forked": forked,
    "replayed": replayed,
    "a generator": lambda m, x: m.inner(x) + torch.rand(8, generator=torch.Generator().manual_seed(3)),
    "random": lambda m, x: m.inner(x) * random.random(),
    "numpy.random": lambda m, x: m.inner(x) * float(np.random.rand()),
    "layer drop": layer_drop,
    "eval": frozen_norm,
    "flag": flag,
}


def _seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def _outputs(net: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    """Of three calls in a row, and the gradients of the parameters after them."""
    net.train(training).zero_grad()
    found: list[Tensor] = []
    for number in range(3):
        _seed(number)
        found.append(net(x))
    found[-1].sum().backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return [*(t.detach() for t in found), grads["head.weight"], grads.get("first.weight", torch.zeros(8, 6))]


# An in-place write between two uses is an error of autograd's own, whoever makes it.
NO_BACKWARD = ("written and undone",)
# Weights in which nothing can be removed, so that no code has to be replaced.
ALL_FROZEN = ("one for each", "another parameter")


def _same(net: nn.Module, made: nn.Module, x: Tensor, name: str) -> None:
    if name in NO_BACKWARD:
        with torch.no_grad():
            torch.testing.assert_close(made(x), net(x))
        return
    for training in (False, True):
        for mine, theirs in zip(_outputs(made, x, training), _outputs(net, x, training), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


BODIES = {**WEIGHTS, **STATE}


@pytest.mark.parametrize("output", ["module", "hybrid", "graph"])
@pytest.mark.parametrize("name", BODIES)
def test_nothing_removed_is_the_same_network(name: str, output: str) -> None:
    x = torch.randn(5, 6)
    net = Net(BODIES[name], literal=False).eval()
    try:
        made = graphprune.plan(net, x, 0.0, output=output, fold_bn=False).apply(net)
    except graphprune.GraphPruneError as error:
        assert output == "graph" and "cannot become one graph: its forward" in str(error)
        return
    _same(net, made, x, name)


@pytest.mark.parametrize("output", ["hybrid", "graph"])
@pytest.mark.parametrize("name", BODIES)
def test_half_of_it_computes_what_zeros_in_the_original_do(name: str, output: str) -> None:
    x = torch.randn(5, 6)
    net = Net(BODIES[name], literal=True).eval()
    try:
        plan = graphprune.plan(net, x, 0.5, output=output)
    except graphprune.GraphPruneError as error:
        assert output == "graph" and "cannot become one graph: its forward" in str(error)
        return
    assert graphprune.verify(net, plan.apply(net), plan, x).passed
    if not plan.rewrites and name not in ALL_FROZEN:
        assert any("no graph can stand for its module, whose forward" in line for line in plan.frozen), plan.frozen


@pytest.mark.parametrize("name", ["parameters", "of a sequence", "in the second call", "buffers"])
def test_the_refusal_names_the_module(name: str) -> None:
    path = {"of a sequence": "pair.0", "buffers": "norm"}.get(name, "inner")
    tensor = "running_mean" if name == "buffers" else "weight"
    with pytest.raises(graphprune.GraphPruneError, match=f"calls {path} with {path}.{tensor} replaced"):
        graphprune.plan(Net(WEIGHTS[name], literal=False).eval(), torch.randn(5, 6), 0.0, output="graph")


class Writer(nn.Module):
    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.layer, self.kept = nn.Linear(8, 8), kept

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).view(-1, 2, 4).flatten(1)
        self.kept[0] = y
        return y


class Reader(nn.Module):
    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.layer, self.kept = nn.Linear(8, 8), kept

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.kept[0]


@pytest.mark.parametrize("output", ["module", "hybrid", "graph"])
def test_a_list_through_which_modules_speak(output: str) -> None:
    torch.manual_seed(0)
    shared: list[Any] = [None]
    net = nn.Sequential(nn.Linear(6, 8), Writer(shared), Reader(shared), nn.Linear(8, 3)).eval()
    x = torch.randn(5, 6)
    for ratio in (0.0, 0.5):
        plan = graphprune.plan(net, x, ratio, output=output)
        small = plan.apply(net)
        assert small[1].kept is small[2].kept
        small(torch.randn(5, 6))
        if not ratio:
            torch.testing.assert_close(small(x), net(x))
        assert graphprune.verify(net, small, plan, x).passed


@pytest.mark.parametrize("output", ["module", "hybrid", "graph"])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_what_is_the_modules_own_doing_is_followed(output: str, ratio: float) -> None:
    """Hooks, patched forwards and parametrisations change weights and results in every call of the module."""

    def body(m: Any, x: Tensor) -> Tensor:
        with parametrize.cached():
            return m.pair(m.scaled(m.inner(m.inner(x))))

    net = Net(body, literal=True)
    parametrizations.weight_norm(net.inner)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(net.pair[2])
    net.scaled.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 3,))
    before = net.scaled.forward
    net.scaled.forward = lambda x: before(x) * 5  # type: ignore[method-assign]
    net.pair[0].forward = types.MethodType(lambda m, x: F.linear(x, m.weight) * 2, net.pair[0])  # type: ignore[assignment]
    net.eval()
    x = torch.randn(5, 6)
    plan = graphprune.plan(net, x, ratio, output=output)
    small = plan.apply(net)
    assert graphprune.verify(net, small, plan, x).passed
    if not ratio:
        torch.testing.assert_close(small(x), net(x))


def test_hooks_on_all_modules_run() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 3)).eval(), torch.randn(5, 6)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, out: out * 2 if isinstance(module, nn.Sequential) else out
    )
    try:
        made = graphprune.plan(net, x, 0.0, output="graph").apply(net)
        torch.testing.assert_close(made(x), net(x))
    finally:
        handle.remove()
