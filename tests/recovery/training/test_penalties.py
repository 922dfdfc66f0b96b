"""Penalties on channels against loops over channels with a mask for each: values, gradients, growth; in a training."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

import graphprune
from graphprune import GraphPruneError, GroupLasso, GrowingPenalty
from graphprune.recovery.training.loop import rate_factor
from tests import reparametrised_networks
from tests.networks import NETWORKS, random_network

# residual, depthwise, grouped, attention, gates, tied, shared, recurrent (rows and columns of one weight in a channel)
KINDS = [
    "attention_talking", "grouped_besides_plain", "bilinear_gating", "lstm_bidirectional_hidden", "cells_gru",
    "recurrent_residual", "convolutional_lstm", "tied_embedding_by_function", "module_called_thrice",
    "unshuffle_shuffle_round_trip",
]  # fmt: skip


class Block(nn.Module):
    """A residual stream with a depthwise and a grouped convolution in it; `conv` makes it and reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 1, groups=2)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = x + self.deep(self.conv(x)).relu()
        out: Tensor = self.head(self.grouped(x).mean((2, 3)))
        return out


X = torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(1))
Y = (X.mean((1, 2, 3)) > 0).long() + 2 * (X[:, 0].mean((1, 2)) > 0).long()


def block() -> Block:
    torch.manual_seed(0)
    return Block()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by each of their names, and the weights that parametrisations compute."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute in getattr(module, "parametrizations", {}):
            found[f"{path}.{attribute}" if path else attribute] = getattr(module, attribute)
        for hook in module._forward_pre_hooks.values():  # weight_norm as a hook leaves the weight of the last run
            if hasattr(hook, "dim"):
                found[f"{path}.{hook.name}"] = getattr(module, hook.name)
    return {name: t for name, t in found.items() if t.is_floating_point() or t.is_complex()}


def channels(graph: graphprune.DependencyGraph, weights: dict[str, Tensor]) -> list[list[tuple[Tensor, int]]]:
    """Of every group for every channel: the square of its norm, and how many numbers it has, one channel at a time."""
    out = []
    for group in graph.groups:
        found = []
        for unit in range(group.size):
            masks: dict[str, Tensor] = {}
            for member in group.members:
                if member.parameter in weights:
                    none = torch.zeros_like(weights[member.parameter], dtype=torch.bool)
                    mask = masks.setdefault(member.parameter, none)
                    for position in member.positions[unit].tolist():
                        mask.select(member.axis, position).fill_(True)
            if masks:
                squares = [weights[name][mask].abs().square().sum() for name, mask in masks.items()]
                found.append((torch.stack(squares).sum(), sum(int(mask.sum()) for mask in masks.values())))
        if found:
            out.append(found)
    return out


def plain_lasso(graph: graphprune.DependencyGraph, weights: dict[str, Tensor], weight: float) -> Tensor:
    return weight * torch.stack([n**0.5 * s.sqrt() for group in channels(graph, weights) for s, n in group]).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(one[n], other[n], rtol=1e-4, atol=1e-5) for n in one)


def agrees(model: nn.Module, example: Any, ignore: Iterable[str] = (), held: Any = None) -> bool:
    """Value and gradients of the lasso are those of the loop; False where there are no channels."""
    graph = graphprune.trace(model, example) if held is None else held
    if not channels(graph, weights_of(model)):
        return False
    lasso = GroupLasso(model, example, 0.1, ignore=list(ignore) or None)
    wanted = plain_lasso(graph, weights_of(model), 0.1)
    torch.testing.assert_close(lasso.penalty(), wanted, rtol=1e-5, atol=1e-6)
    found = []
    for add in (wanted.backward, lasso.penalty().backward, lasso.add_gradients):
        model.zero_grad()
        add()  # type: ignore[operator]
        found.append(gradients(model))
    assert close(found[0], found[1]) and close(found[0], found[2])
    assert any(bool(g.any()) for g in found[0].values())
    return True


@pytest.mark.parametrize("name", KINDS)
def test_lasso_is_that_of_a_loop_over_channels(name: str) -> None:
    assert agrees(*NETWORKS[name]())


def test_lasso_of_a_block() -> None:
    assert agrees(block(), X[:2])


@settings(max_examples=8)
@given(st.integers(0, 500))
def test_lasso_of_random_networks(seed: int) -> None:
    agrees(*random_network(seed))


@pytest.mark.parametrize("norm", ["hook, dim 0", "parametrisation, dim 1", "spectral"])
def test_computed_weights_count_as_weights(norm: str) -> None:
    made = {**reparametrised_networks.weight_norms(), "spectral": parametrizations.spectral_norm}[norm]
    torch.manual_seed(0)
    model = reparametrised_networks.stirred(
        nn.Sequential(made(nn.Conv1d(4, 6, 3)), nn.ReLU(), made(nn.Conv1d(6, 8, 3)), nn.ReLU(), nn.Conv1d(8, 2, 3))
    )
    example = torch.randn(2, 4, 12)
    model(example)
    before = copy.deepcopy(model.state_dict())
    assert agrees(model, example)
    lasso = GroupLasso(model.train(), example)
    lasso.add_gradients()
    assert all(m.training for m in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())  # no power iteration


def test_what_is_ignored_is_left_alone() -> None:
    model = block()
    every, without = ([group for group, _ in GroupLasso(model, X[:2], ignore=i).norms()] for i in (None, [model.conv]))
    assert [g.kind for g in every if g.name == "first.weight[0]"] == ["conv group", "group channel"]
    assert [g.name for g in without] == [g.name for g in every if g.name != "first.weight[0]"] != []
    rest = [g for g in every if g.name == "first.weight[0]" and g.kind == "group channel"]  # a conv group makes outputs
    assert agrees(model, X[:2], ["grouped"], held=SimpleNamespace(groups=rest))
    with pytest.raises(GraphPruneError, match="ignore: no module or parameter matches 'conf'"):
        GroupLasso(model, X[:2], ignore="conf")
    with pytest.raises(GraphPruneError, match="no channels that could be pruned beside what is ignored"):
        GroupLasso(model, X[:2], ignore="*")


def test_norms_are_those_of_the_channels() -> None:
    model = block()
    wanted = channels(graphprune.trace(model, X[:2]), weights_of(model))
    found = GroupLasso(model, X[:2]).norms()
    assert [group.name for group, _ in found] == [group.name for group in graphprune.trace(model, X[:2]).groups]
    for (_, norms), group in zip(found, wanted, strict=True):
        torch.testing.assert_close(norms, torch.stack([s for s, _ in group]).sqrt().detach())


def test_a_channel_of_zeros_stays_there() -> None:
    model = block()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    lasso = GroupLasso(model, X[:2], 0.1)
    lasso.add_gradients()
    lasso.penalty().backward()
    assert lasso.penalty().item() == 0 and not any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)


def test_gradients_are_added_to_those_that_want_one() -> None:
    model = block()
    model.conv.weight.requires_grad_(False)
    lasso = GroupLasso(model, X[:2], 0.1)
    loss = functools.partial(nn.functional.cross_entropy, target=Y)
    (loss(model(X)) + lasso.penalty()).backward()
    wanted = gradients(model)
    model.zero_grad()
    loss(model(X)).backward()
    model.first.bias.grad = None  # none yet
    without = loss(model(X))
    lasso.add_gradients()
    assert model.conv.weight.grad is None and model.first.bias.grad is not None
    del wanted["first.bias"]
    assert close(wanted, {n: g for n, g in gradients(model).items() if n in wanted})
    assert without.requires_grad


def test_scaled_gradients_get_a_scaled_penalty() -> None:
    model, scaler = block(), torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lasso = GroupLasso(model, X[:2], 0.1)
    found = []
    for scaled in (True, False):
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(model(X).square().mean()).backward()
        if scaled:
            lasso.add_gradients(scaler)
        scaler.unscale_(optimizer)
        if not scaled:
            lasso.add_gradients()
        found.append(gradients(model))
    assert close(*found)


def test_other_precisions() -> None:
    model = block()
    wanted = GroupLasso(model, X[:2]).penalty()
    double = GroupLasso(copy.deepcopy(model).double(), X[:2].double()).penalty()
    torch.testing.assert_close(double.float(), wanted)
    half = copy.deepcopy(model).bfloat16()
    lasso = GroupLasso(half, X[:2].bfloat16())
    torch.testing.assert_close(lasso.penalty(), wanted, rtol=1e-2, atol=0)
    lasso.add_gradients()
    assert half.first.weight.grad is not None and half.first.weight.grad.dtype == torch.bfloat16


def test_distributed(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = block()
        wrapped = DistributedDataParallel(model)
        lasso = GroupLasso(wrapped, X[:2], 0.1)
        found = []
        for inside in (True, False):
            model.zero_grad()
            loss = wrapped(X).square().mean()
            (loss + lasso.penalty() if inside else loss).backward()
            if not inside:
                lasso.add_gradients()
            found.append(gradients(model))
        assert close(*found)
        wrapped(X).sum().backward()  # the wrapper is still fit for use
    finally:
        dist.destroy_process_group()


def test_what_cannot_be() -> None:
    model = block()
    lasso = GroupLasso(model, X[:2])
    with pytest.raises(GraphPruneError, match=r"GroupLasso: first\.weight has shape .4, 3, 3, 3., and was of shape .8"):
        lasso.on(graphprune.prune(model.eval(), X[:2], 0.5))
    model.first = nn.Conv2d(3, 4, 3, padding=1)
    with pytest.raises(GraphPruneError, match="make another for this network"):
        lasso.penalty()
    for weight in (-1.0, float("nan"), "a", True):
        with pytest.raises(GraphPruneError, match="GroupLasso: weight: expected a number of at least 0, got"):
            GroupLasso(block(), X[:2], weight)  # type: ignore[arg-type]
    with pytest.raises(GraphPruneError, match="GroupLasso: the network has no channels that could be pruned, so"):
        GroupLasso(nn.Linear(3, 2), torch.randn(1, 3))
    with pytest.raises(GraphPruneError, match="GrowingPenalty: steps: expected an integer of at least 1, got 0"):
        GrowingPenalty(block(), X[:2], steps=0)
    with pytest.raises(GraphPruneError, match=r"GrowingPenalty: plan: expected a graphprune\.Plan, got float"):
        GrowingPenalty(block(), X[:2], plan=0.5)  # type: ignore[arg-type]
    with pytest.raises(GraphPruneError, match="plan: it removes none"):
        GrowingPenalty(block(), X[:2], plan=graphprune.plan(block(), X[:2], 0.0))


def test_sparse_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 8, sparse=True), nn.ReLU(), nn.Linear(8, 2))
    words = torch.tensor([[1, 2]])
    lasso = GroupLasso(model, words)
    model(words).sum().backward()
    before = gradients(model)
    with pytest.raises(GraphPruneError, match=r"the gradient of 0\.weight is sparse"):
        lasso.add_gradients()
    assert torch.equal(before["2.weight"], gradients(model)["2.weight"])


# -- growing


def plain_growth(factors: list[Tensor], norms: list[Tensor], weight: float, steps: int) -> list[Tensor]:
    out = []
    for old, group in zip(factors, norms, strict=True):
        most, least = max(group.tolist()), min(group.tolist())
        pairs = zip(old.tolist(), group.tolist(), strict=True)
        grown = [f + weight / steps * ((most - n) / (most - least)) for f, n in pairs]
        out.append(torch.tensor([min(weight, f) for f in grown]))
    return out


def test_growing_is_that_of_a_loop() -> None:
    model = block()
    graph = graphprune.trace(model, X[:2])
    growing = GrowingPenalty(model, X[:2], weight=0.5, steps=3)
    assert growing.penalty().item() == 0
    factors = [torch.zeros(group.size) for group in graph.groups]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(5):  # some reach the end, others do not
        found = channels(graph, weights_of(model))
        optimizer.zero_grad()
        wanted = 0.5 * sum((f * torch.stack([s for s, _ in g])).sum() for f, g in zip(factors, found, strict=True))
        torch.testing.assert_close(growing.penalty(), wanted, rtol=1e-5, atol=1e-6)
        model.zero_grad()
        wanted.backward()
        loop = gradients(model)
        model.zero_grad()
        growing.add_gradients()
        assert close(loop, gradients(model))
        factors = plain_growth(factors, [torch.stack([s for s, _ in g]).sqrt().detach() for g in found], 0.5, 3)
        optimizer.step()
        growing.step()
        torch.testing.assert_close(growing.state_dict()["factors"], torch.cat(factors), rtol=1e-4, atol=1e-6)
    assert 0.5 in torch.cat(factors).tolist() and min(torch.cat(factors).tolist()) < 0.5


@pytest.mark.parametrize("normed", [False, True])
def test_a_plan_says_what_fades(normed: bool) -> None:
    torch.manual_seed(0)
    norm = parametrizations.weight_norm if normed else lambda layer: layer
    layers = norm(nn.Conv2d(3, 8, 3, bias=False)), nn.ReLU(), norm(nn.Conv2d(8, 6, 3, bias=False)), nn.ReLU()
    model = nn.Sequential(*layers, nn.Conv2d(6, 2, 1)).eval()
    plan = graphprune.plan(model, X[:2], 0.5, fold_bn=False)
    fading = GrowingPenalty(model, X[:2], steps=4, plan=plan)
    assert fading.weight == 1.0 and GrowingPenalty(model, X[:2]).weight == 0.01
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    before = fading.norms()
    for _ in range(60):
        optimizer.zero_grad()
        fading.add_gradients()
        optimizer.step()
        fading.step()
    whole = 0
    for (found, norms), (_, old), group in zip(fading.norms(), before, plan.groups, strict=True):
        source = ".parametrizations.weight.original1" if normed else ".weight"
        parameter = found.name.replace(".weight[0]", source)
        gone = torch.zeros(group.size, dtype=torch.bool)
        gone[list(plan.removed[parameter][0])] = True
        whole += int(gone.sum())
        assert float((norms[gone] / old[gone]).max()) < (0.2 if normed else 0.01)
        assert float((norms[~gone] / old[~gone]).min()) > 0.2  # they lose what they read of the others
    assert whole == sum(group.size - group.kept for group in plan.groups) > 0
    with torch.no_grad():
        assert normed or torch.allclose(plan.apply(model)(X), model(X), atol=1e-4)


def test_state() -> None:
    model = block()
    growing = GrowingPenalty(model, X[:2], steps=10)
    growing.step()
    state = growing.state_dict()
    growing.step()
    other = GrowingPenalty(copy.deepcopy(model), X[:2], steps=10)
    other.load_state_dict(state)
    assert torch.equal(other.state_dict()["factors"], state["factors"]) and bool(state["factors"].any())
    other.step()
    assert torch.equal(other.state_dict()["factors"], growing.state_dict()["factors"])
    apart = growing.on(copy.deepcopy(model))
    apart.step()
    assert not torch.equal(apart.state_dict()["factors"], growing.state_dict()["factors"])
    for wrong in ({}, {"factors": state["factors"][1:]}, {"factors": state["factors"] + 2}, None, {"a": 1}):
        with pytest.raises(GraphPruneError, match=r"GrowingPenalty: (expected the state|the state has factors)"):
            growing.load_state_dict(wrong)  # type: ignore[arg-type]
    lasso = GroupLasso(model, X[:2])
    lasso.load_state_dict(lasso.state_dict())
    with pytest.raises(GraphPruneError, match="GroupLasso: expected the state of a GroupLasso"):
        lasso.load_state_dict(state)


def test_lasso_empties_channels() -> None:
    """Of 16 channels this function of two features needs two; all others are emptied, and pruned for free."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 6, generator=generator)
    y = torch.stack([x[:, 0].relu() + x[:, 1].relu(), x[:, 0].relu()], 1)

    def trained(weight: float) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
        lasso = GroupLasso(model, x[:2], weight)
        optimizer = torch.optim.SGD(model.parameters(), 0.3)
        for _ in range(200):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            lasso.add_gradients()
            optimizer.step()
        ((_, norms),) = lasso.norms()
        return model, norms / norms.max()

    def error(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(x) - y).square().mean())

    (plain, dense), (model, sparse) = trained(0.0), trained(0.01)
    assert int((dense > 0.01).sum()) == 16 and int((sparse > 0.01).sum()) == 2
    lost = [error(graphprune.prune(n, x[:2], 0.625, criterion="l2", recover=None)) - error(n) for n in (plain, model)]
    assert abs(lost[1]) < 0.02 * lost[0]


# -- in a training


def plain_training(model: nn.Module, penalty: Any, clip: float | None) -> nn.Module:
    """Two epochs of `finetune` without a warm-up, by hand."""
    trained = copy.deepcopy(model).train()
    penalty = penalty.on(trained)
    optimizer = torch.optim.SGD(trained.parameters(), 0.05, 0.9, weight_decay=0.0, nesterov=True)
    for step, (x, y) in enumerate([*zip(X.split(8), Y.split(8), strict=True)] * 2):
        optimizer.param_groups[0]["lr"] = 0.05 * rate_factor(step, 6, 0.0)
        optimizer.zero_grad()
        nn.functional.cross_entropy(trained(x), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(trained.parameters(), clip)
        penalty.add_gradients()
        optimizer.step()
        penalty.step()
    return trained


BATCHES = list(zip(X.split(8), Y.split(8), strict=True))
PLAIN = {"epochs": 2, "lr": 0.05, "weight_decay": 0.0, "warmup": 0.0, "progress": False}


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("kind", ["lasso", "growing"])
def test_finetune_is_the_plain_loop(kind: str, clip: float | None) -> None:
    model = block()
    before = copy.deepcopy(model.state_dict())
    made = GroupLasso(model, X[:2], 0.05) if kind == "lasso" else GrowingPenalty(model, X[:2], 1.0, steps=3)
    state = copy.deepcopy(made.state_dict())
    done = graphprune.finetune(model, BATCHES, regularize=made, clip=clip, **PLAIN).model
    wanted = plain_training(model, made, clip)
    assert all(torch.equal(a, b) for a, b in zip(done.parameters(), wanted.parameters(), strict=True))
    without = graphprune.finetune(model, BATCHES, clip=clip, **PLAIN).model
    assert not torch.equal(without.get_parameter("conv.weight"), done.get_parameter("conv.weight"))
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert all(torch.equal(state[n], v) for n, v in made.state_dict().items())


def test_finetune_by_name() -> None:
    model = block()
    for kind, made in (
        ("lasso", GroupLasso(model, X[:2])), ("growing", GrowingPenalty(model, X[:2], steps=3)),
    ):  # fmt: skip
        one, other = (graphprune.finetune(model, BATCHES, regularize=r, **PLAIN).model for r in (kind, made))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with pytest.raises(GraphPruneError, match=r"regularize: expected 'lasso' or 'growing', or .* got 'laso'"):
        graphprune.finetune(model, BATCHES, regularize="laso", **PLAIN)
    with pytest.raises(GraphPruneError, match=r"regularize: GrowingPenalty: first\.weight has shape"):
        graphprune.finetune(graphprune.prune(model.eval(), X[:2], 0.5), BATCHES, regularize=made, **PLAIN)


def test_optimizers_that_ask_for_the_loss() -> None:
    """Of the loss with the penalty: LBFGS gets as far as with both in one loss function."""
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    data = [(x, x.sum(1, keepdim=True))]
    lasso = GroupLasso(model, x[:2], 0.01)

    def train(regularize: Any) -> nn.Module:
        return graphprune.finetune(
            model, data, epochs=3, loss_fn=nn.functional.mse_loss, clip=None, regularize=regularize, progress=False,
            optimizer=lambda net: torch.optim.LBFGS(net.parameters(), 1.0, line_search_fn="strong_wolfe"),
        ).model  # fmt: skip

    def total(net: nn.Module) -> float:
        return float((nn.functional.mse_loss(net(x), data[0][1]) + lasso.on(net).penalty()).detach())

    assert total(train(lasso)) < 0.8 * total(train(None))


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_stopped_training_goes_on(tmp_path: Path, epochs: int) -> None:
    model = block()
    options = {**PLAIN, "epochs": 3, "regularize": GrowingPenalty(model, X[:2], 2.0, steps=12)}
    whole = graphprune.finetune(model, BATCHES, **options).model

    class Stopped(BaseException):
        pass

    def stop(epoch: Any, _: nn.Module) -> None:
        if epoch.number == epochs:
            raise Stopped

    file = tmp_path / "run.safetensors"
    with pytest.raises(Stopped):
        graphprune.finetune(model, BATCHES, checkpoint=file, on_epoch=stop, **options)
    for other in (None, "lasso", GrowingPenalty(model, X[:2], 2.0, steps=13)):
        with pytest.raises(GraphPruneError, match="is of another run, with regularize"):
            graphprune.finetune(model, BATCHES, checkpoint=file, **{**options, "regularize": other})
    resumed = graphprune.finetune(model, BATCHES, checkpoint=file, **options).model
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_pipeline_trains_with_it_before_it_prunes(tmp_path: Path) -> None:
    model = block().eval()
    lasso = GroupLasso(model, X[:2], 0.05)
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.0, "warmup": 0.0, "progress": False, "finetune_epochs": 1}
    options["train_lr"] = 0.05
    done = graphprune.pipeline(
        model, X[:2], BATCHES, 0.5, train_epochs=2, regularize=lasso, checkpoint=tmp_path / "a", **options
    )
    first = graphprune.finetune(model, BATCHES, regularize=lasso, **PLAIN).model
    assert all(torch.equal(a, b) for a, b in zip(done.dense.parameters(), first.parameters(), strict=True))
    assert graphprune.count(done.model, X[:2]).macs < graphprune.count(model, X[:2]).macs
    again = graphprune.pipeline(
        model, X[:2], BATCHES, 0.5, train_epochs=2, regularize=lasso, checkpoint=tmp_path / "a", **options
    )
    assert all(torch.equal(a, b) for a, b in zip(done.model.parameters(), again.model.parameters(), strict=True))
    with pytest.raises(GraphPruneError, match="regularize: acts in the training before pruning; pass train_epochs"):
        graphprune.pipeline(model, X[:2], BATCHES, 0.5, regularize="lasso", **options)
    with pytest.raises(GraphPruneError, match="regularize: expected 'lasso' or 'growing'"):
        graphprune.pipeline(model, X[:2], BATCHES, 0.5, train_epochs=1, regularize=0.5, **options)
