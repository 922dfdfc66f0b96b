"""The oracles themselves: they agree with networks cut by hand, and every mistake made on purpose is found."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import oracles

KEPT = [0, 2, 3, 6]
GONE = [1, 4, 5, 7]


class Small(nn.Module):
    """Eight hidden features between two Linear layers, and something in the middle."""

    def __init__(self, width: int, middle: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, width), nn.Linear(width, 3)
        self.middle = middle(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))  # type: ignore[no-any-return]


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


MIDDLES: dict[str, Callable[[int], nn.Module]] = {
    "layer_norm": nn.LayerNorm,
    "rms_norm": nn.RMSNorm,
    "batch_norm": nn.BatchNorm1d,
    "softmax": lambda n: nn.Softmax(-1),
    "log_softmax": lambda n: nn.LogSoftmax(-1),
    "relu6": lambda n: nn.ReLU6(),
    "sign": lambda n: Function(lambda x: torch.sign(x) + x * x.mean(-1, keepdim=True)),
    "mean": lambda n: Function(lambda x: x - x.mean(-1, keepdim=True)),
    "maximum": lambda n: Function(lambda x: x - x.amax(-1, keepdim=True)),
    "max": lambda n: Function(lambda x: x * x.max(-1, keepdim=True).values),
    "min": lambda n: Function(lambda x: x * x.min(dim=-1, keepdim=True)[0]),
    "deviation": lambda n: Function(lambda x: x / x.std(-1, keepdim=True)),
    "variance": lambda n: Function(lambda x: x / x.var(-1, correction=0, keepdim=True)),
    "logsumexp": lambda n: Function(lambda x: x - x.logsumexp(-1, keepdim=True)),
    "product": lambda n: Function(lambda x: x * torch.sigmoid(x).prod(-1, keepdim=True)),
    "normalize": lambda n: Function(lambda x: F.normalize(x, dim=-1)),
    "group_norm": lambda n: nn.GroupNorm(2, n),
}
NO_STATISTIC = {"batch_norm", "relu6", "normalize"}
# A smallest value below zero is the same with zeros beside it: "min" shows nothing about zeroing.


def _pair(name: str) -> tuple[Small, Small, dict[str, dict[int, list[int]]]]:
    """A network, the same one cut by hand, and what was cut. Both groups of the group norm keep two features."""
    kept = KEPT if name != "group_norm" else [0, 2, 5, 6]
    gone = sorted(set(range(8)) - set(kept))
    torch.manual_seed(3)
    model = Small(8, MIDDLES[name]).eval()
    with torch.no_grad():
        for tensor in oracles.named_tensors(model).values():
            if tensor.is_floating_point():
                tensor.uniform_(0.2, 1.0)
        model.first.weight.normal_()
        model.last.weight.normal_()
    small = Small(4, MIDDLES[name]).eval()
    removed: dict[str, dict[int, list[int]]] = {}
    with torch.no_grad():
        for key, tensor in oracles.named_tensors(small).items():
            source = dict(oracles.named_tensors(model))[key]
            for axis in range(source.dim()):
                if source.shape[axis] == 8:
                    source = source.index_select(axis, torch.tensor(kept))
                    removed.setdefault(key, {})[axis] = gone
            tensor.copy_(source)
    return model, small, removed


@pytest.mark.parametrize("name", MIDDLES)
def test_absent_channels_are_those_of_a_network_cut_by_hand(name: str) -> None:
    model, small, removed = _pair(name)
    x = torch.randn(4, 5)
    expected = oracles.call(oracles.double_copy(small), x.double())
    assert oracles.relative_error(oracles.absent_output(model, removed, x), expected) < 1e-12
    zeroed = oracles.relative_error(oracles.call(oracles.zero_reference(model, removed), x.double()), expected)
    assert zeroed < 1e-12 if name in NO_STATISTIC else zeroed > 1e-3 or name == "min"
    assert oracles.parameters_match_plan(model, small, removed) == []


@pytest.mark.parametrize("name", MIDDLES)
def test_another_channel_is_noticed(name: str) -> None:
    model, small, removed = _pair(name)
    x = torch.randn(4, 5)
    wrong = {key: {axis: [1, 2, 5, 7] for axis in axes} for key, axes in removed.items()}
    expected = oracles.call(oracles.double_copy(small), x.double())
    assert oracles.relative_error(oracles.absent_output(model, wrong, x), expected) > 1e-3
    assert oracles.relative_error(oracles.call(oracles.zero_reference(model, wrong), x.double()), expected) > 1e-3
    assert oracles.parameters_match_plan(model, small, wrong)


@pytest.mark.parametrize("name", ["layer_norm", "batch_norm", "rms_norm"])
@pytest.mark.parametrize("forgotten", ["first.weight", "last.weight", "first.bias", "middle.weight"])
def test_a_forgotten_member_is_noticed(name: str, forgotten: str) -> None:
    model, small, removed = _pair(name)
    lacking = {key: axes for key, axes in removed.items() if key != forgotten}
    assert any(forgotten in problem for problem in oracles.parameters_match_plan(model, small, lacking))


def test_channels_that_reach_the_output_are_nan() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU())
    out = oracles.absent_output(model, {"0.weight": {0: GONE}, "0.bias": {0: GONE}}, torch.randn(2, 5))
    assert out.isnan().all(0).nonzero().flatten().tolist() == GONE
    assert oracles.relative_error(out, torch.randn(2, 8)) == float("inf")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_absent_filters_of_convolutions(transposed: bool, groups: int) -> None:
    """Whole groups go where there are several; otherwise four filters of the first and inputs of the second layer."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), kind(8, 8, 3, groups=groups), nn.ReLU(), nn.Conv2d(8, 2, 1))
    gone = {1: [1, 4, 5, 7], 2: [4, 5, 6, 7], 8: [1, 4, 5, 7]}[groups]
    kept = torch.tensor(sorted(set(range(8)) - set(gone)))
    small = copy.deepcopy(model)
    middle = small[2]
    assert isinstance(middle, (nn.Conv2d, nn.ConvTranspose2d))
    removed = {"0.weight": {0: gone}, "0.bias": {0: gone}, "2.weight": {0: gone}, "2.bias": {0: gone},
               "4.weight": {1: gone}}  # fmt: skip
    if groups == 1:
        removed["2.weight"] = {0: gone, 1: gone}
    middle.groups = {1: 1, 2: 1, 8: 4}[groups]
    for name, tensor in small.named_parameters():
        for axis in removed.get(name, {}):
            tensor.data = tensor.data.index_select(axis, kept)
    x = torch.randn(2, 3, 6, 6)
    expected = oracles.call(oracles.double_copy(small), x.double())
    assert oracles.relative_error(oracles.absent_output(model, removed, x), expected) < 1e-12
    assert oracles.relative_error(oracles.call(oracles.zero_reference(model, removed), x.double()), expected) < 1e-12


@dataclasses.dataclass
class Axis:
    parameter: str
    axis: int
    positions: np.ndarray


def test_permutations_notice_a_missing_member() -> None:
    model, _, removed = _pair("layer_norm")
    units = np.arange(8)[:, None]
    members = [Axis(name, axis, units) for name, axes in removed.items() for axis in axes]
    x, rng = torch.randn(4, 5), np.random.default_rng(0)
    error = oracles.permute_check(model, members, x, rng)
    assert error is not None and error < 1e-12
    for left_out in range(len(members)):
        error = oracles.permute_check(model, members[:left_out] + members[left_out + 1 :], x, rng)
        assert error is not None and error > 1e-3


def test_relative_error_of_nests() -> None:
    a = {"x": [torch.ones(2), None], "y": (torch.arange(3), "text")}
    assert oracles.relative_error(a, copy.deepcopy(a)) == 0
    assert oracles.relative_error([torch.tensor([1.0, 4.5])], [torch.tensor([1.0, 5.0])]) == pytest.approx(0.1)
    for wrong in (
        {"x": [torch.ones(2), None], "y": (torch.tensor([0, 1, 3]), "text")},
        {"x": [torch.ones(3), None], "y": (torch.arange(3), "text")},
        {"x": [torch.tensor([1.0, float("nan")]), None], "y": (torch.arange(3), "text")},
        {"x": [torch.ones(2)]},
    ):
        assert oracles.relative_error(wrong, a) == float("inf")


def test_snapshots_notice_changes() -> None:
    changes: list[Callable[[nn.Module], object]] = [
        lambda m: m.get_submodule("first").weight.data.add_(1),  # type: ignore[union-attr, operator]
        lambda m: m.train(),
        lambda m: m.get_submodule("first").requires_grad_(False),
        lambda m: setattr(m.get_submodule("last"), "in_features", 4),
        lambda m: setattr(m.get_submodule("last"), "weight", nn.Parameter(m.get_submodule("last").weight.detach())),  # type: ignore[union-attr, operator]
        lambda m: m.register_forward_hook(lambda *_: None),
    ]
    for change in changes:
        model = Small(8, nn.LayerNorm).eval()
        before = oracles.snapshot(model)
        assert oracles.differences(before, oracles.snapshot(model)) == []
        change(model)
        assert oracles.differences(before, oracles.snapshot(model))


def test_one_common_factor_is_told_from_other_changes() -> None:
    model, small, removed = _pair("relu6")
    small.first.weight.data[:2] *= 2**0.5
    assert oracles.parameters_match_plan(model, small, removed) != []
    assert oracles.parameters_match_plan(model, small, removed, temperature=True) == []
    small.first.weight.data[2] *= 1.1
    assert oracles.parameters_match_plan(model, small, removed, temperature=True) != []
