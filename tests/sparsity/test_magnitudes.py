from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphprune import GraphPruneError, sparsity

from .networks import example, mlp


def zeros(model: nn.Module, *names: str) -> list[int]:
    modules = dict(model.named_modules())
    return [int((modules[n].weight == 0).sum()) for n in names]


def reference(weights: list[torch.Tensor], fraction: float) -> list[torch.Tensor]:
    """Sort everything, one by one: the smallest go, of equal ones the later."""
    flat = [(abs(float(v)), -i, (k, j)) for i, (k, j, v) in enumerate(
        (k, j, v) for k, w in enumerate(weights) for j, v in enumerate(w.flatten())
    )]  # fmt: skip
    count = min(math.floor(fraction * len(flat) + 0.5), len(flat) - 1)
    gone = {place for _, _, place in sorted(flat)[:count]}
    return [
        torch.tensor([(k, j) not in gone for j in range(w.numel())]).reshape(w.shape) for k, w in enumerate(weights)
    ]


@settings(max_examples=60)
@given(
    fraction=st.floats(0, 1, exclude_max=True),
    levels=st.integers(1, 6),
    scope=st.sampled_from(["global", "layer"]),
    seed=st.integers(0, 10**6),
)
def test_masks_equal_a_slow_reference_with_ties(fraction: float, levels: int, scope: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 2))
    for layer in model:
        layer.weight.data = torch.randint(-levels, levels, layer.weight.shape, generator=generator) / 2
    weights = [layer.weight.detach().clone() for layer in model]
    if scope == "global":
        expected = reference(weights, fraction)
    else:
        expected = [reference([w], fraction)[0] for w in weights]
    sparsity.magnitude(model, fraction, scope)  # type: ignore[arg-type]
    for found, mask in zip(sparsity.masks(model).values(), expected, strict=True):
        assert torch.equal(found, mask)


def test_only_weights_are_pruned_unless_asked() -> None:
    model, _ = example("cnn")
    sparsity.magnitude(model, 0.9)
    assert set(sparsity.masks(model)) == {"0.weight", "3.weight", "5.weight"}
    model, _ = example("attention")
    sparsity.magnitude(model, 0.5)
    assert set(sparsity.masks(model)) == {
        "layer.self_attn.in_proj_weight", "layer.self_attn.out_proj.weight", "layer.linear1.weight",
        "layer.linear2.weight", "out.weight",
    }  # fmt: skip
    model = mlp()
    sparsity.magnitude(model, 0.5, parameters="all")
    assert set(sparsity.masks(model)) == {n for n, _ in mlp().named_parameters()}


def test_norms_over_two_axes_and_lengths_of_weight_norm_are_no_weights() -> None:
    old = nn.utils.weight_norm(nn.Linear(6, 4))
    model = nn.Sequential(nn.LayerNorm((4, 6)), old, nn.Bilinear(4, 4, 2))
    sparsity.magnitude(model, 0.5)
    assert set(sparsity.masks(model)) == {"1.weight_v", "2.weight"}


def test_names_patterns_and_ignore() -> None:
    model = mlp()
    sparsity.magnitude(model, 0.5, parameters=["0", "5.bias"], ignore="0.bias")
    assert set(sparsity.masks(model)) == {"0.weight", "5.bias"}
    model = mlp()
    sparsity.magnitude(model, 0.5, ignore=["5"])
    assert set(sparsity.masks(model)) == {"0.weight", "3.weight"}


def test_more_than_16_million_elements() -> None:
    layer = nn.Linear(4_200_000, 4, bias=False)
    assert layer.weight.numel() > 2**24
    sparsity.magnitude(layer, 0.75)
    assert int((layer.weight == 0).sum()) == 12_600_000
    kept = layer.weight[sparsity.masks(layer)["weight"]].abs().min()
    assert kept >= layer.parametrizations.weight.original[layer.weight == 0].abs().max()  # type: ignore[union-attr]


def test_masks_grow_and_what_is_pruned_stays_pruned() -> None:
    model = mlp()
    sparsity.magnitude(model, 0.3)
    first = sparsity.masks(model)
    with torch.no_grad():  # what lies behind pruned weights becomes large
        for layer in (model[0], model[3], model[5]):
            layer.parametrizations.weight.original.add_(~layer.parametrizations.weight[0].mask * 100.0)
    sparsity.magnitude(model, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(first.values(), sparsity.masks(model).values(), strict=True))
    sparsity.magnitude(model, 0.6)
    second = sparsity.masks(model)
    assert sum(int((~m).sum()) for m in second.values()) == math.floor(0.6 * 608 + 0.5)
    assert not any((second[k] & ~first[k]).any() for k in first)
    with pytest.raises(GraphPruneError, match=r"masked already, more than the 61 of a sparsity of 0.1"):
        sparsity.magnitude(model, 0.1)


def test_something_always_stays() -> None:
    layer = nn.Linear(3, 1, bias=False)
    sparsity.magnitude(layer, 0.999)
    assert zeros(nn.Sequential(layer), "0") == [2]
    sparsity.magnitude(nn.Linear(1, 1), 0.9)


def test_half_precision_and_mixed_types() -> None:
    model = nn.Sequential(nn.Linear(64, 64, dtype=torch.float16), nn.Linear(64, 64, dtype=torch.float64))
    sparsity.magnitude(model, 0.5)
    assert sum(zeros(model, "0", "1")) == 4096
    model = nn.Linear(64, 64, dtype=torch.bfloat16)  # few different values: many ties
    sparsity.magnitude(model, 0.37)
    assert int((model.weight == 0).sum()) == math.floor(0.37 * 4096 + 0.5)


def test_errors_change_nothing() -> None:
    model = mlp()
    with torch.no_grad():
        model[5].weight[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    for arguments, message in (
        ((1.0,), r"sparsity: expected a number in \[0, 1\)"),
        ((-0.1,), r"got -0.1"),
        ((True,), "got True"),
        ((float("nan"),), "got nan"),
        (("0.5",), "got '0.5'"),
        ((0.5, "sideways"), "scope: expected 'global' or 'layer', got 'sideways'"),
        ((0.5,), "5.weight: NaN or infinite"),
    ):
        with pytest.raises(GraphPruneError, match=message):
            sparsity.magnitude(model, *arguments)  # type: ignore[arg-type]
    message = r"parameters: no module or parameter matches '3.wieght'; did you mean '3.weight'\?"
    with pytest.raises(GraphPruneError, match=message):
        sparsity.magnitude(model, 0.5, parameters=["3.wieght"])
    with pytest.raises(GraphPruneError, match="ignore: no module or parameter matches 'layer9'"):
        sparsity.magnitude(model, 0.5, ignore="layer9")
    with pytest.raises(GraphPruneError, match="no weight to prune"):
        sparsity.magnitude(nn.ReLU(), 0.5)
    with pytest.raises(GraphPruneError, match="has no shape yet"):
        sparsity.magnitude(nn.LazyLinear(3), 0.5)
    with pytest.raises(GraphPruneError, match="meta device"):
        sparsity.magnitude(nn.Linear(2, 2, device="meta"), 0.5)
    with pytest.raises(GraphPruneError, match=r"expected a torch.nn.Module, got a dict"):
        sparsity.magnitude({}, 0.5)  # type: ignore[arg-type]
    after = model.state_dict()
    assert all(torch.equal(after[k].nan_to_num(7), v.nan_to_num(7)) for k, v in before.items())


def test_global_prunes_the_small_layer_more() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    sparsity.magnitude(model, 0.5)
    assert zeros(model, "0", "1") == [100, 0]
