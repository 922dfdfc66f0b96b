"""Folding gives the unfolded network's output, wherever it happens; and it does not happen where it would not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import graphprune
from graphprune.plans.surgery import effective_folds
from graphprune.tracing.trace import record_run
from tests import oracles
from tests.networks.registry import settle

EXACT = 1e-12  # in double precision

# (in, out, groups): plain, grouped, depthwise, depthwise with a multiplier
SHAPES = {"plain": (4, 6, 1), "grouped": (4, 6, 2), "depthwise": (6, 6, 6), "multiplier": (3, 6, 3)}


def settled(model: nn.Module) -> nn.Module:
    """Statistics and constant parameters in which a mistake shows, in double precision."""
    settle(model)
    return model.double().eval()


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_every_convolution(dims: int, transposed: bool, shape: str, bias: bool, affine: bool) -> None:
    inputs, outputs, groups = SHAPES[shape]
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    norm = getattr(nn, f"BatchNorm{dims}d")(outputs, affine=affine, eps=0.1)
    model = settled(nn.Sequential(kind(inputs, outputs, 3, stride=2, padding=1, groups=groups, bias=bias), norm))
    x = torch.randn(2, inputs, *[5] * dims, dtype=torch.float64)
    before = oracles.snapshot(model)
    folded = graphprune.fold_conv_bn(model, x)
    assert type(folded[1]) is nn.Identity and folded[0].bias is not None
    assert oracles.relative_error(folded(x), model(x)) < EXACT
    assert not oracles.differences(before, oracles.snapshot(model))


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias: bool) -> None:
    model = settled(nn.Sequential(nn.Linear(5, 7, bias=bias), nn.BatchNorm1d(7)))
    x = torch.randn(3, 5, dtype=torch.float64)
    folded = graphprune.fold_conv_bn(model, x)
    assert type(folded[1]) is nn.Identity
    assert oracles.relative_error(folded(x), model(x)) < EXACT


@pytest.mark.parametrize("options", [{"padding_mode": "circular", "padding": 1}, {"padding": "same"}, {"dilation": 2}])
def test_padding_and_dilation(options: dict[str, Any]) -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3, **options), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    folded = graphprune.fold_conv_bn(model, x)
    assert type(folded[1]) is nn.Identity
    assert oracles.relative_error(folded(x), model(x)) < EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes_are_folded_in_single_precision_and_keep_their_dtype(dtype: torch.dtype) -> None:
    double = settled(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)))
    model = copy.deepcopy(double).to(dtype)
    folded = graphprune.fold_conv_bn(model, torch.randn(2, 3, 6, 6, dtype=dtype))
    conv, norm = model[0].double(), model[1].double()  # the rounded values, exactly
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    for found, exact in (
        (folded[0].weight, conv.weight * scale[:, None, None, None]),
        (folded[0].bias, norm.bias - norm.running_mean * scale),
    ):
        assert found.dtype == dtype
        assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


class Twice(nn.Module):
    """A convolution, a batch norm, and whatever else `forward` makes of them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.function = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class NormAndRelu(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class DeafConv(nn.Conv2d):
    """Would not add a bias if it had one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, None, padding=self.padding)


class DeafConv2(DeafConv):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, None)


def hooked(attach: Callable[[Twice], Any]) -> Twice:
    model = Twice(lambda m, x: m.norm(m.conv(x)))
    attach(model)
    return model


def doubled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


def tied() -> Twice:
    model = Twice(lambda m, x: m.norm(m.conv(x)) + m.other(x), other=nn.Conv2d(4, 4, 3, padding=1, bias=False))
    model.other.weight = model.conv.weight
    return model


def tied_and_unused() -> Twice:
    model = tied()
    model.function = lambda m, x: m.norm(m.conv(x))
    return model


def patched() -> Twice:
    model = Twice(lambda m, x: m.norm(m.conv(x)))
    original = model.norm.forward
    model.norm.forward = lambda x: original(x) + 1
    return model


def spare(**options: Any) -> dict[str, nn.Module]:
    return {"other": nn.BatchNorm2d(4, **options)}


NOT_FOLDED: dict[str, Callable[[], nn.Module]] = {
    "the convolution is read twice": lambda: Twice(lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x))),
    "the convolution is an output too": lambda: Twice(lambda m, x: (lambda y: (m.norm(y), y))(m.conv(x))),
    "the convolution runs twice": lambda: Twice(lambda m, x: m.norm(m.conv(m.conv(x)))),
    "one convolution, two norms": lambda: Twice(lambda m, x: m.norm(m.conv(x)) + m.other(m.conv(x)), **spare()),
    "one norm, two convolutions": lambda: Twice(
        lambda m, x: m.norm(m.conv(x)) + m.norm(m.other(x)), other=nn.Conv2d(4, 4, 3, padding=1)
    ),
    "something in between": lambda: Twice(lambda m, x: m.norm(torch.relu(m.conv(x)))),
    "the norm comes first": lambda: Twice(lambda m, x: m.conv(m.norm(x))),
    "the weight is read elsewhere": lambda: Twice(lambda m, x: m.norm(m.conv(x)) * m.conv.weight.abs().mean()),
    "the norm's scale is read elsewhere": lambda: Twice(lambda m, x: m.norm(m.conv(x)) * m.norm.weight.mean()),
    "the weight is tied": tied,
    "the weight is tied to a layer that does not run": tied_and_unused,
    "the weight is computed": lambda: Twice(
        lambda m, x: m.norm(m.other(x)), other=parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
    ),
    "statistics of the batch": lambda: Twice(lambda m, x: m.other(m.conv(x)), **spare(track_running_stats=False)),
    "no statistics": lambda: Twice(lambda m, x: F.batch_norm(m.conv(x), None, None, training=True)),
    "training is asked for": lambda: Twice(
        lambda m, x: F.batch_norm(m.conv(x), m.norm.running_mean, m.norm.running_var, training=True)
    ),
    "only in training": lambda: Twice(lambda m, x: m.norm(m.conv(x)) if m.training else m.conv(x)),
    "a norm over tokens": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(36, 5), nn.BatchNorm1d(4)),
    "the norm's class adds an activation": lambda: Twice(lambda m, x: m.other(m.conv(x)), other=NormAndRelu(4)),
    "the norm's forward is patched": patched,
    "a hook on the norm": lambda: hooked(lambda m: m.norm.register_forward_hook(doubled)),
    "a hook before the norm": lambda: hooked(lambda m: m.norm.register_forward_pre_hook(lambda m, x: None)),
    "a hook that changes what the convolution gives": lambda: hooked(lambda m: m.conv.register_forward_hook(doubled)),
    "functional norm": lambda: Twice(
        lambda m, x: F.batch_norm(m.conv(x), m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias)
    ),
    "functional convolution": lambda: Twice(lambda m, x: m.norm(F.conv2d(x, m.conv.weight))),
    "a convolution that ignores its bias": lambda: Twice(
        lambda m, x: m.norm(m.other(x)), other=DeafConv(4, 4, 3, padding=1, bias=False)
    ),
    "another that does": lambda: Twice(
        lambda m, x: m.norm(m.other(x)), other=DeafConv2(4, 4, 3, padding=1, bias=False)
    ),
    "a call that leaves the bias out": lambda: Twice(
        lambda m, x: m.norm(F.conv2d(x, m.other.weight)), other=nn.Conv2d(4, 4, 3)
    ),
    "a call with another bias": lambda: Twice(
        lambda m, x: m.norm(F.conv2d(x, m.other.weight, m.more.bias)), other=nn.Conv2d(4, 4, 3), more=nn.Conv2d(4, 4, 3)
    ),
}


@pytest.mark.parametrize("case", NOT_FOLDED)
def test_not_folded_where_it_would_change_something(case: str) -> None:
    model = settled(NOT_FOLDED[case]())
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    folded = graphprune.fold_conv_bn(model, x)
    assert not any(isinstance(m, nn.Identity) for m in folded.modules())
    assert {n: type(m) for n, m in folded.named_modules()} == {n: type(m) for n, m in model.named_modules()}
    assert oracles.relative_error(folded(x), model(x)) == 0
    pruned = graphprune.prune(model, x, 0.5)  # proven on the way
    assert not any(isinstance(m, nn.Identity) for m in pruned.modules())


def test_a_model_in_training_mode_is_folded_by_its_running_statistics_and_stays_in_training_mode() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    folded = graphprune.fold_conv_bn(copy.deepcopy(model).train(), x)
    assert type(folded[1]) is nn.Identity and all(m.training for m in folded.modules())
    assert oracles.relative_error(folded.eval()(x), model(x)) < EXACT


def test_a_norm_registered_under_two_names_is_replaced_under_both() -> None:
    model = settled(Twice(lambda m, x: m.norm(m.conv(x))))
    model.again = model.norm
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    folded = graphprune.fold_conv_bn(model, x)
    assert type(folded.norm) is nn.Identity and folded.again is folded.norm
    assert oracles.relative_error(folded(x), model(x)) < EXACT


@pytest.mark.parametrize("trainable", [False, True])
def test_an_added_bias_is_trained_as_its_weight_is(trainable: bool) -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))).requires_grad_(trainable)
    folded = graphprune.fold_conv_bn(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert isinstance(folded[0].bias, nn.Parameter)
    assert (folded[0].weight.requires_grad, folded[0].bias.requires_grad) == (trainable, trainable)


def test_importance_sees_the_effective_filters_of_a_norm_that_must_stay() -> None:
    conv, norm = nn.Conv2d(3, 8, 3, bias=False), NormAndRelu(8)
    model = settled(nn.Sequential(conv, norm, nn.Conv2d(8, 4, 1)))
    with torch.no_grad():
        # equal filters: only the norm tells them apart
        conv.weight.copy_(torch.randn(1, 3, 3, 3).expand_as(conv.weight))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    ((fold, replaceable),) = effective_folds(model, record_run(model, x))
    assert (fold.layer, fold.batch_norm, replaceable) == ("0", "1", False)
    scale = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).abs()
    weakest = tuple(sorted(scale.argsort()[:4].tolist()))
    assert graphprune.plan(model, x, 0.5, criterion="l2_folded").removed["0.weight"][0] == weakest


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_folded_and_cut_equals_folded_with_those_filters_zeroed(transposed: bool, groups: int, bias: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = settled(
        nn.Sequential(kind(4, 8, 3, groups=groups, bias=bias), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))
    )
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    plan = graphprune.plan(model, x, {"0": 0.5, "1": 0.5})
    gone = list(plan.removed["3.weight"][1])
    assert len(gone) == 4 and plan.folds
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference[3].weight[:, gone] = 0  # what the removed channels carry reaches nothing
    assert oracles.relative_error(plan.apply(model)(x), reference(x)) < EXACT


def test_a_folded_transposed_convolution_that_keeps_everything() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.ConvTranspose2d(4, 10, 2, groups=2, bias=False), nn.BatchNorm2d(10)
    ).eval()
    x = torch.randn(2, 3, 5, 5)
    plan = graphprune.plan(model, x, {"0": 0.5})
    assert [fold.batch_norm for fold in plan.folds] == ["3"] and "2.weight" not in plan.removed
    assert graphprune.verify(model, plan.apply(model), plan, x).passed
