"""Pruning networks whose weights are computed: ranked, cut and proven as the weights that they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import graphprune
from graphprune.planning.request import Request
from tests import oracles
from tests.reparametrised_networks import (
    SPECTRAL_NORMS,
    Codec,
    Discriminator,
    Drawn,
    Exponential,
    Gained,
    LowRank,
    Standardised,
    Symmetric,
    Vocoder,
    perceptron,
    settled,
    stirred,
    weight_norms,
)

NORMS = weight_norms()
MEL = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(1))
SOUND = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def permanent(model: nn.Module) -> nn.Module:
    """The same function in ordinary weights, by torch's own functions."""
    result = oracles.copy_of(model)
    oracles.make_permanent(result)
    return result.eval()


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def sound(model: nn.Module, x: Tensor, small: nn.Module, plan: graphprune.Plan, tmp_path: Path) -> None:
    """Everything that is asked of a pruned network."""
    before = copy.deepcopy(model.state_dict())
    assert parameters(small) < parameters(model)
    assert graphprune.verify(model, small, plan, x).passed
    assert [n for n, _ in small.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert list(small.state_dict()) == list(model.state_dict())
    assert {n: type(m) for n, m in small.named_modules()} == {n: type(m) for n, m in model.named_modules()}
    loaded = graphprune.load(graphprune.save(small, tmp_path / "small.safetensors"), lambda: oracles.copy_of(model))
    assert torch.equal(loaded(x), small(x))
    graphprune.export_onnx(small, x, tmp_path / "small.onnx", plan=plan)  # with its parity check
    again = graphprune.prune(small, x, 0.3, round_to=1)
    assert parameters(again) < parameters(small)
    loaded = graphprune.load(graphprune.save(again, tmp_path / "again.safetensors"), lambda: oracles.copy_of(model))
    assert torch.equal(loaded(x), again(x))
    trained, optimizer = loaded.train(), torch.optim.SGD(loaded.parameters(), 1e-3)
    start = {n: p.detach().clone() for n, p in trained.named_parameters()}
    trained(x).square().sum().backward()
    assert all(p.grad is not None for p in trained.parameters())
    optimizer.step()
    assert bool(torch.isfinite(trained(x)).all())
    assert any(not torch.equal(p, start[n]) for n, p in trained.named_parameters())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("network", "how"), [*((Vocoder, how) for how in NORMS), (Codec, "hook, dim 0"), (Codec, "parametrisation, dim 0")]
)
def test_weight_norm_changes_neither_what_goes_nor_what_is_computed(network: Any, how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = stirred(network(NORMS[how])), MEL if network is Vocoder else SOUND
    plain = permanent(model)
    plan, wanted = graphprune.plan(model, x, 0.5), graphprune.plan(plain, x, 0.5)
    assert plan.removed.keys() <= oracles.named_tensors(model).keys()
    computed = oracles.make_permanent(oracles.copy_of(model))
    assert computed.seen(plan.removed, plain) == wanted.removed
    small = plan.apply(model)
    assert oracles.relative_error(small(x), wanted.apply(plain)(x)) < 1e-5
    assert oracles.parameters_match_plan(model, small, plan.removed) == []
    sound(model, x, small, plan, tmp_path)


@pytest.mark.parametrize("how", ["hook, dim 0", "parametrisation, dim None"])
@pytest.mark.parametrize("criterion", ["flow", "l1", "l2", "fpgm", "lamp", "wanda", "activation_mean", "apoz", "taylor",
                                       "taylor_gate", "fisher", "hessian", "hrank", "reconstruction"])  # fmt: skip
def test_every_criterion_ranks_the_weight_that_is_computed(how: str, criterion: str) -> None:
    torch.manual_seed(0)
    model = stirred(Vocoder(NORMS[how]))
    batch = [(torch.cat([MEL, -MEL]), torch.zeros(4, 1, 80))]
    options: dict[str, Any] = {"criterion": criterion, "data": batch, "loss_fn": nn.functional.mse_loss, "round_to": 1}
    plan, wanted = (graphprune.plan(m, MEL, 0.4, **options) for m in (model, permanent(model)))
    assert {g.name: g.kept for g in plan.groups} == {g.name: g.kept for g in wanted.groups}
    assert plan.removed["up.0.bias"] == wanted.removed["up.0.bias"]
    assert plan.removed["before.bias"] == wanted.removed["before.bias"]
    directions = [p for n, p in model.named_parameters() if n.endswith(("_v", "original1"))]
    with torch.no_grad():  # the same function
        for v in directions:
            dim = {"0": 0, "1": 1}.get(how[-1])
            shape = [n if axis == dim else 1 for axis, n in enumerate(v.shape)]
            v.mul_(torch.logspace(-2, 2, max(shape)).reshape(shape) if dim is not None else 7.0)
    assert graphprune.plan(model, MEL, 0.4, **options).removed == plan.removed


@pytest.mark.parametrize("how", NORMS)
def test_what_never_fires_goes_and_the_output_stays(how: str) -> None:
    torch.manual_seed(0)
    norm = NORMS[how]
    model = nn.Sequential(
        norm(nn.Conv1d(8, 16, 3, padding=1)), nn.ReLU(), norm(nn.Conv1d(16, 12, 3, padding=1)), nn.ReLU(),
        norm(nn.ConvTranspose1d(12, 16, 4, 2, 1)), nn.ReLU(), norm(nn.ConvTranspose1d(16, 4, 4, 2, 1)),
    )  # fmt: skip
    model = stirred(model)
    dead = {"0.bias": range(3, 11), "2.bias": range(6), "4.bias": range(1, 16, 2)}
    with torch.no_grad():
        for name, indices in dead.items():
            model.get_parameter(name).fill_(10.0)[list(indices)] = -1e4
    plan = graphprune.plan(model, MEL, 0.5, criterion="activation_mean", data=[MEL], round_to=1)
    assert {name: list(plan.removed[name][0]) for name in dead} == {n: list(i) for n, i in dead.items()}
    assert oracles.relative_error(plan.apply(model)(MEL), model(MEL)) < 1e-5


@pytest.mark.parametrize("api", SPECTRAL_NORMS)
def test_a_discriminator_keeps_its_weights_up_to_one_factor_and_its_norms(api: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = settled(Discriminator(SPECTRAL_NORMS[api]), IMAGES)
    plan = graphprune.plan(model, IMAGES, 0.5)
    small = plan.apply(model)
    assert oracles.parameters_match_plan(model, small, plan.removed) == []  # proportional, and of norm 1
    for layer in (*small.layers, small.score):
        assert abs(float(torch.linalg.matrix_norm(layer.weight.flatten(1), 2)) - 1) < 1e-4
    wanted = small(IMAGES)
    with torch.no_grad():
        for _ in range(50):
            small.train()(IMAGES)
    assert oracles.relative_error(small.eval()(IMAGES), wanted) < 1e-3
    sound(model, IMAGES, plan.apply(model), plan, tmp_path)


@pytest.mark.parametrize("api", SPECTRAL_NORMS)
@pytest.mark.parametrize("bad", ["scale", "value"])
def test_verify_sees_a_weight_that_is_not_the_normalised_one(api: str, bad: str) -> None:
    torch.manual_seed(0)
    model = settled(Discriminator(SPECTRAL_NORMS[api]), IMAGES)
    plan = graphprune.plan(model, IMAGES, 0.5)
    small = plan.apply(model)
    name = next(n for n, _ in small.named_buffers() if n.endswith("_u")) if bad == "scale" else next(
        n for n, _ in small.named_parameters() if n.startswith("layers.1") and "orig" in n)  # fmt: skip
    with torch.no_grad():
        tensor = oracles.named_tensors(small)[name]
        if bad == "scale":
            tensor.mul_(1.05)
        else:
            tensor[0, 0, 0, 0] += 0.2
    assert not graphprune.verify(model, small, plan, IMAGES).passed


@pytest.mark.parametrize("api", SPECTRAL_NORMS)
def test_layers_that_lose_nothing_keep_their_vectors(api: str) -> None:
    torch.manual_seed(0)
    model = Discriminator(SPECTRAL_NORMS[api]).eval()  # no power iteration was ever run
    small = graphprune.prune(model, IMAGES, {"layers.0": 0.5}, round_to=1)
    for name, tensor in oracles.named_tensors(model).items():
        if name.startswith(("layers.2", "score")):
            assert torch.equal(oracles.named_tensors(small)[name], tensor)


FREE = {"exponential": lambda: Exponential(), "low rank": lambda: LowRank(16, 8), "gained": lambda: Gained(16, 8)}


@pytest.mark.parametrize("step", FREE)
def test_any_parametrisation_whose_channels_can_go(step: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = perceptron(FREE[step]())
    plain = permanent(model)
    plan, wanted = graphprune.plan(model, ROWS, 0.5), graphprune.plan(plain, ROWS, 0.5)
    assert [g.kept for g in plan.groups] == [g.kept for g in wanted.groups] == [4, 8, 8]
    assert plan.removed["2.bias"] == wanted.removed["2.bias"] and plan.removed["0.bias"] == wanted.removed["0.bias"]
    small = plan.apply(model)
    assert oracles.relative_error(small(ROWS), wanted.apply(plain)(ROWS)) < 1e-6
    sound(model, ROWS, small, plan, tmp_path)


def test_what_a_parametrisation_needs_stays_and_the_plan_says_why() -> None:
    torch.manual_seed(0)
    model = perceptron(Standardised())
    plan = graphprune.plan(model, ROWS, 0.5)
    assert "0.bias" not in plan.removed and len(plan.removed["2.bias"][0]) == 8
    assert any("2.weight is computed by Standardised: without some of its channels" in line for line in plan.frozen)
    assert graphprune.verify(model, plan.apply(model), plan, ROWS).passed
    model = perceptron(Symmetric(), 8)
    plan = graphprune.plan(model, ROWS, 0.5)
    assert plan.removed.keys() == {"4.weight", "4.bias", "6.weight"}
    assert any("2.weight is computed by Symmetric" in line for line in plan.frozen)
    assert graphprune.verify(model, plan.apply(model), plan, ROWS).passed


def test_a_weight_that_is_drawn_anew_is_no_weight() -> None:
    torch.manual_seed(0)
    model = perceptron(Drawn())
    plan = graphprune.plan(model, ROWS, 0.5)
    assert parametrize.is_parametrized(plan.apply(model)[2])


def test_orthogonal_weights() -> None:
    for options in ({}, {"orthogonal_map": "matrix_exp"}, {"orthogonal_map": "cayley", "use_trivialization": False}):
        torch.manual_seed(0)
        layer = parametrizations.orthogonal(nn.Linear(8, 16), **options)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), layer, nn.ReLU(), nn.Linear(16, 3)).eval()
        plan = graphprune.plan(model, ROWS, 0.5)
        small = plan.apply(model)
        assert graphprune.verify(model, small, plan, ROWS).passed
        assert any("2.weight is computed by _Orthogonal" in line for line in plan.frozen)
        assert bool(torch.isfinite(small.train()(ROWS)).all())


@pytest.mark.parametrize("how", ["hook, dim 0", "parametrisation, dim 0", "parametrisation, dim 1"])
@pytest.mark.parametrize("method", ["mean", "least_squares"])
def test_recovery_reaches_what_it_reaches_with_ordinary_weights(how: str, method: str) -> None:
    torch.manual_seed(0)
    model, data = stirred(Vocoder(NORMS[how])), [torch.randn(4, 8, 20) for _ in range(4)]
    plain = permanent(model)
    plan, wanted = (graphprune.plan(m, MEL, 0.3) for m in (model, plain))
    found = graphprune.recover(model, plan, MEL, data, method).model
    other = graphprune.recover(plain, wanted, MEL, data, method).model
    assert oracles.relative_error(found(MEL), other(MEL)) < 1e-4
    assert [type(m) for m in found.modules()] == [type(m) for m in model.modules()]
    assert graphprune.verify(model, found, plan, MEL).passed


@pytest.mark.parametrize("api", SPECTRAL_NORMS)
def test_recovery_of_spectral_norms_moves_constants_alone(api: str) -> None:
    torch.manual_seed(0)
    model, data = settled(Discriminator(SPECTRAL_NORMS[api]), IMAGES), [torch.randn(8, 3, 16, 16) for _ in range(4)]
    plan = graphprune.plan(model, IMAGES, 0.5)
    found = graphprune.recover(model, plan, IMAGES, data, "least_squares")
    cut = plan.apply(model)
    assert all("spectral_norm" in layer.note and layer.method == "mean" for layer in found.layers)
    for name, tensor in oracles.named_tensors(cut).items():
        same = torch.equal(oracles.named_tensors(found.model)[name], tensor)
        assert same or name.endswith("bias")
    assert graphprune.verify(model, found.model, plan, IMAGES).passed


@pytest.mark.parametrize("norm", [*list(NORMS.values())[::3], *SPECTRAL_NORMS.values()])
def test_batch_norms_stay_behind_computed_weights(norm: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3),
                          nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))  # fmt: skip
    model = settled(model, IMAGES)
    folded = graphprune.fold_conv_bn(model, IMAGES)
    assert isinstance(folded[1], nn.BatchNorm2d) and isinstance(folded[4], nn.Identity)
    assert oracles.relative_error(folded(IMAGES), model(IMAGES)) < 1e-5
    for data in (None, [IMAGES]):
        small = graphprune.prune(model, IMAGES, 0.5, data=data)
        assert small[0].weight.shape[0] == small[1].num_features == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["hook, dim 0", "parametrisation, dim None", "spectral"])
def test_other_precisions(dtype: torch.dtype, norm: str) -> None:
    torch.manual_seed(0)
    if norm == "spectral":
        model, x = settled(Discriminator(SPECTRAL_NORMS["parametrisation"]), IMAGES), IMAGES
    else:
        model, x = stirred(Vocoder(NORMS[norm])), MEL
    model, x = model.to(dtype), x.to(dtype)
    plan = graphprune.plan(model, x, 0.5)
    small = plan.apply(model)
    assert all(p.dtype == dtype for p in small.parameters())
    assert graphprune.verify(model, small, plan, x).passed
    if dtype == torch.float64:
        assert oracles.parameters_match_plan(model, small, plan.removed) == []


@pytest.mark.parametrize("ignored", ["name", "module", "tensor", "name of a tensor"])
def test_names_and_objects_of_the_users_model_are_understood(ignored: str) -> None:
    torch.manual_seed(0)
    model = stirred(Vocoder(NORMS["parametrisation, dim 0"]))
    source = "up.0.parametrizations.weight.original1"
    items = {"name": "up.0", "module": model.up[0], "tensor": model.get_parameter(source), "name of a tensor": source}
    plan = graphprune.plan(model, MEL, 0.5, ignore=[items[ignored]])
    assert source not in plan.removed or 1 not in plan.removed[source]
    assert "before.bias" in plan.removed
    text = graphprune.trace(model, MEL).explain(source)
    assert text.startswith(f"{source} (32, 16, 4) (up.0.weight, computed from it)") and "axis 1 (16): group" in text
    only = graphprune.plan(model, MEL, {source: 0.5})
    assert "up.0.bias" in only.removed and "before.bias" not in only.removed


@pytest.mark.parametrize("options", [{"granularity": "layer"}, {"granularity": "branch"}, {"output": "hybrid"},
                                     {"output": "graph"}, {"budget": graphprune.Budget(macs=0.6)}])  # fmt: skip
@pytest.mark.parametrize("how", ["hook, dim 0", "parametrisation, dim None"])
def test_other_requests(options: dict[str, Any], how: str) -> None:
    torch.manual_seed(0)
    model = stirred(Vocoder(NORMS[how]))
    small = graphprune.prune(model, MEL, None if "budget" in options else 0.5, **options)
    plain = graphprune.prune(permanent(model), MEL, None if "budget" in options else 0.5, **options)
    assert oracles.relative_error(small(MEL), plain(MEL)) < 1e-5


def test_in_steps_with_training_between(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = stirred(Vocoder(NORMS["parametrisation, dim 0"]))

    def train(small: nn.Module, step: int) -> None:
        optimizer = torch.optim.SGD(small.parameters(), 1e-3)
        small(MEL).square().mean().backward()
        optimizer.step()

    small = graphprune.prune_gradually(model, MEL, 0.5, steps=2, train=train, recover="mean", data=[MEL])
    assert parametrize.is_parametrized(small.before) and small.before.weight.shape[0] == 16
    loaded = graphprune.load(graphprune.save(small, tmp_path / "small.safetensors"), lambda: oracles.copy_of(model))
    assert torch.equal(loaded(MEL), small(MEL))


def test_an_optimizer_goes_on() -> None:
    torch.manual_seed(0)
    model = stirred(Vocoder(NORMS["hook, dim 0"]))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model(MEL).square().mean().backward()
    optimizer.step()
    plan = graphprune.plan(model, MEL, 0.5)
    small = plan.apply(model)
    average = optimizer.state[model.before.weight_v]["exp_avg"].clone()
    assert graphprune.carry_optimizer(optimizer, model, small, plan) == ()
    kept = [i for i in range(32) if i not in plan.removed["before.weight_v"][0]]
    assert torch.equal(optimizer.state[small.before.weight_v]["exp_avg"], average[kept])
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in small.parameters()}


def test_doctor_and_sensitivity_and_the_plan_agree() -> None:
    torch.manual_seed(0)
    model = stirred(Vocoder(NORMS["parametrisation, dim 0"]))
    names = {g.name for g in graphprune.plan(model, MEL, 0.5).groups}
    assert {p.name for p in graphprune.doctor(model, MEL).prunable} <= names
    assert {c.name for c in graphprune.sensitivity(model, MEL, ratios=[0.5]).curves} <= names
    assert Request(0.5).decide(model, MEL).plan == graphprune.plan(model, MEL, 0.5)
