"""An optimizer over a pruning step, against one that trains the untouched network with the same slices held at zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune
from graphprune import GraphPruneError, Plan

MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "plain sgd": lambda p: torch.optim.SGD(p, 0.05),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip
    return made.double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model.eval()  # so that nothing but the weights moves
    for _ in range(steps):
        x = torch.randn(8, 2, 6, 6, generator=generator).double()
        y = torch.randint(0, 3, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def example() -> Tensor:
    return torch.randn(2, 2, 6, 6).double()


def kept(tensor: Tensor, plan: Plan, name: str) -> Tensor:
    """The slices that the plan leaves, one index at a time."""
    for axis, gone in plan.removed.get(name, {}).items():
        tensor = torch.stack([tensor.select(axis, i) for i in range(tensor.shape[axis]) if i not in gone], axis)
    return tensor


@pytest.mark.parametrize("kind", MAKERS)
def test_state_is_cut_as_the_parameters_are(kind: str) -> None:
    model = net()
    optimizer = MAKERS[kind](model.parameters())
    train(model, optimizer, 5, 0)
    plan = graphprune.plan(model, example(), 0.5, fold_bn=False)
    before = {n: dict(optimizer.state[p]) for n, p in model.named_parameters()}
    small = plan.apply(model)
    assert graphprune.carry_optimizer(optimizer, model, small, plan) == ()
    assert plan.removed and set(map(id, optimizer.param_groups[0]["params"])) == set(map(id, small.parameters()))
    for name, parameter in small.named_parameters():
        now = optimizer.state[parameter]
        assert now.keys() == before[name].keys()
        for key, value in now.items():
            old = before[name][key]
            if isinstance(value, Tensor):
                assert torch.equal(value, kept(old, plan, name) if old.dim() else old)
                assert value.data_ptr() != old.data_ptr()
            else:
                assert value == old
    train(small, optimizer, 3, 1)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "adagrad"])
def test_goes_on_as_the_network_whose_slices_are_held_at_zero(kind: str) -> None:
    model, twin = net(), net()
    optimizer, other = MAKERS[kind](model.parameters()), MAKERS[kind](twin.parameters())
    train(model, optimizer, 5, 0), train(twin, other, 5, 0)
    plan = graphprune.plan(model, example(), 0.5, fold_bn=False)
    small = plan.apply(model)
    graphprune.carry_optimizer(optimizer, model, small, plan)

    def hold() -> None:
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                for axis, gone in plan.removed.get(name, {}).items():
                    parameter.index_fill_(axis, torch.tensor(gone), 0.0)

    hold()
    for step in range(4):
        train(small, optimizer, 1, 9 + step), train(twin, other, 1, 9 + step)
        hold()
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(parameter.data, kept(dict(twin.named_parameters())[name].data, plan, name))


def test_groups_keep_their_options_and_schedulers_their_optimizer() -> None:
    model = net()
    first = [*model[0].parameters(), *model[1].parameters()]
    groups = [{"params": model[6].parameters(), "lr": 0.5}, {"params": first}]
    optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(model, optimizer, 2, 0)
    plan = graphprune.plan(model, example(), 0.5, fold_bn=False)
    small = plan.apply(model)
    graphprune.carry_optimizer(optimizer, model, small, plan)
    wanted = [[*small[6].parameters()], [*small[0].parameters(), *small[1].parameters()]]  # type: ignore[index]
    assert [list(map(id, g["params"])) for g in optimizer.param_groups] == [list(map(id, g)) for g in wanted]
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.05]
    frozen = small[3].weight.clone()  # type: ignore[index, union-attr, operator]
    train(small, optimizer, 2, 1)
    assert torch.equal(frozen, small[3].weight)  # type: ignore[index, union-attr, arg-type]


def test_folded_layers_start_anew_and_are_named() -> None:
    model = net()
    model[0].bias = None
    optimizer = MAKERS["adam"](model.parameters())
    train(model, optimizer, 3, 0)
    plan = graphprune.plan(model, example(), 0.5)
    small = plan.apply(model)
    assert plan.folds and graphprune.carry_optimizer(optimizer, model, small, plan) == ("0.weight",)
    assert set(map(id, optimizer.param_groups[0]["params"])) == set(map(id, small.parameters()))
    assert small[0].weight not in optimizer.state and small[3].weight in optimizer.state  # type: ignore[index, union-attr]
    train(small, optimizer, 2, 1)
    assert small[0].bias in optimizer.state  # type: ignore[index, union-attr]


def test_shared_parameters_stay_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.c(self.b(self.a(x).relu()).relu())
            return out

    model = Tied()
    optimizer = MAKERS["adam"](model.parameters())
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    plan = graphprune.plan(model, torch.randn(3, 4), 0.5)
    small = plan.apply(model)
    graphprune.carry_optimizer(optimizer, model, small, plan)
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, small.parameters()))


def test_rows_that_are_rescaled_take_their_averages_along() -> None:
    """Attention whose head features go: queries are multiplied by a factor, so their gradients are divided by it."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
            self.heads, self.features = 2, 4

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                f(x).reshape(x.shape[0], x.shape[1], self.heads, self.features).transpose(1, 2)
                for f in (self.q, self.k, self.v)
            )
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)
            out: Tensor = self.out(mixed)
            return out

    model, x = Attention(), torch.randn(2, 3, 8)
    optimizer = MAKERS["adam"](model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    plan = graphprune.plan(model, x, 0.5, granularity="head features")
    assert plan.rescales
    before = {n: dict(optimizer.state[p]) for n, p in model.named_parameters()}
    small = plan.apply(model)
    assert graphprune.carry_optimizer(optimizer, model, small, plan) == ()
    parameters = dict(small.named_parameters())
    for scale in plan.rescales:
        for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            old = before[scale.parameter][key].clone()
            for i in scale.indices:
                old.select(scale.axis, i).div_(scale.factor**power)
            torch.testing.assert_close(
                optimizer.state[parameters[scale.parameter]][key], kept(old, plan, scale.parameter)
            )


def test_what_does_not_belong_is_refused_and_nothing_changed() -> None:
    model, other = net(), net()
    plan = graphprune.plan(model, example(), 0.5, fold_bn=False)
    optimizer = MAKERS["sgd"](other.parameters())
    members = list(optimizer.param_groups[0]["params"])
    with pytest.raises(GraphPruneError, match="trains no parameter that is in the model"):
        graphprune.carry_optimizer(optimizer, model, plan.apply(model), plan)
    train(other, optimizer, 1, 0)
    with pytest.raises(GraphPruneError, match=r"plan\.apply"):
        graphprune.carry_optimizer(optimizer, other, other, plan)
    with pytest.raises(GraphPruneError, match="another model"):
        graphprune.carry_optimizer(optimizer, plan.apply(model), model, plan)
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], members, strict=True))
    assert len(optimizer.state) == len(members)


@pytest.mark.parametrize("kind", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("named", [False, True])
def test_what_is_trained_beside_the_model_goes_on_as_it_was(kind: str, named: bool) -> None:
    """A backbone is pruned, and one optimizer trains it together with a head, in groups of both."""
    model, head = net(), nn.Linear(3, 4).double()
    whole = nn.ModuleDict({"backbone": model, "head": head})

    def pairs(*keys: str) -> Any:
        found = [(n, p) for n, p in whole.named_parameters() if n.endswith(keys)]
        return found if named else [p for _, p in found]

    optimizer = MAKERS[kind]([{"params": pairs("weight")}, {"params": pairs("bias"), "weight_decay": 0.5}])

    def step(backbone: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        optimizer.zero_grad()
        F.cross_entropy(head(backbone(torch.randn(8, 2, 6, 6).double())), torch.arange(8) % 4).backward()
        optimizer.step()

    model.eval()
    for seed in range(3):
        step(model, optimizer, seed)
    plan = graphprune.plan(model, example(), 0.5, fold_bn=False)
    small = plan.apply(model)
    before = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in head.parameters()}
    assert all(before.values())
    assert graphprune.carry_optimizer(optimizer, model, small, plan) == ()
    for ending, group in zip(("weight", "bias"), optimizer.param_groups, strict=True):
        wanted = [p for n, p in [*small.named_parameters(), *head.named_parameters()] if n.endswith(ending)]
        assert list(map(id, group["params"])) == list(map(id, wanted))
        if named:
            assert group["param_names"] == [n for n, _ in whole.named_parameters() if n.endswith(ending)]
    for parameter, state in before.items():
        now = optimizer.state[parameter]
        assert now.keys() == state.keys() and all(torch.equal(now[k], v) for k, v in state.items())
    weight = head.weight.clone()
    step(small.eval(), optimizer, 9)
    assert not torch.equal(head.weight, weight)


@pytest.mark.parametrize("container", [nn.Sequential, nn.ModuleList])
def test_layers_that_move_up_keep_their_own_state(container: type[nn.Module]) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.inner(x)
            return out

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [Layer() for _ in range(6)]
            self.layers = nn.Sequential(*layers) if container is nn.Sequential else nn.ModuleList(layers)
            self.head = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            out: Tensor = self.head(x)
            return out

    model, x = Stack(), torch.randn(6, 5)
    optimizer = MAKERS["adam"](model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    plan = graphprune.plan(model, x, 0.5, granularity="layer")
    assert len(plan.layers) == 3
    before = {p: dict(optimizer.state[p]) for p in model.parameters()}
    small = plan.apply(model)
    assert graphprune.carry_optimizer(optimizer, model, small, plan) == ()
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, small.parameters()))
    for parameter in small.parameters():
        (own,) = [p for p in before if p.shape == parameter.shape and torch.equal(p, parameter)]
        now = optimizer.state[parameter]
        assert now.keys() == before[own].keys() and all(torch.equal(now[k], v) for k, v in before[own].items())
    model(x)
    optimizer.step()
    with pytest.raises(GraphPruneError, match=r"plan\.apply"):
        fresh = MAKERS["adam"](model.parameters())
        graphprune.carry_optimizer(fresh, model, nn.Linear(2, 2), plan)


def test_lbfgs_trains_the_small_network_from_a_fresh_start() -> None:
    """Its list of parameters and its state, one vector for all, are of the network before."""
    model = net().eval()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)

    def closure_of(trained: nn.Module) -> Callable[[], Tensor]:
        x = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(1)).double()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(trained(x), torch.arange(8) % 3)
            loss.backward()
            return loss

        return closure

    optimizer.step(closure_of(model))
    plan = graphprune.plan(model, example(), 0.5, fold_bn=False)
    small = plan.apply(model)
    fresh, before = plan.apply(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    assert graphprune.carry_optimizer(optimizer, model, small, plan) == ("0.weight",)
    optimizer.step(closure_of(small))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    optimizer = torch.optim.LBFGS(fresh.parameters(), 0.1, max_iter=3)
    optimizer.step(closure_of(fresh))
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), fresh.parameters(), strict=True))
