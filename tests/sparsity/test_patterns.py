from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphprune import GraphPruneError, sparsity

from .networks import Attending, Tied, mlp


def slow_n_m(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    """Group by group, with sorting by (size, position)."""
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    others = [range(k) for i, k in enumerate(weight.shape) if i != axis]
    for rest in itertools.product(*others):
        for start in range(0, weight.shape[axis], m):
            places = [(*rest[:axis], start + j, *rest[axis:]) for j in range(m)]
            for place in sorted(places, key=lambda p: (-abs(float(weight[p])), p[axis]))[:n]:
                mask[place] = True
    return mask


@settings(max_examples=40)
@given(case=st.integers(0, 5), pair=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8)]), seed=st.integers(0, 999))
def test_n_of_m_equals_a_slow_reference(case: int, pair: tuple[int, int], seed: int) -> None:
    layer: nn.Module = [
        lambda: nn.Linear(16, 5), lambda: nn.Conv2d(8, 3, 3), lambda: nn.Conv1d(16, 4, 2, groups=2),
        lambda: nn.ConvTranspose2d(8, 3, 2), lambda: nn.Conv3d(8, 2, 2), lambda: nn.Linear(8, 8).to(torch.float16),
    ][case]()  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    layer.weight.data = (torch.randint(-3, 4, layer.weight.shape, generator=generator) / 2).to(layer.weight.dtype)
    expected = slow_n_m(layer.weight.detach(), *pair, axis=0 if case == 3 else 1)
    sparsity.n_m(layer, *pair)
    assert torch.equal(sparsity.masks(layer)["weight"], expected)


def test_what_does_not_fit_stays_dense_and_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1))
    with pytest.warns(UserWarning, match=r"input axis of 0.weight, 1.weight is no multiple of 4; left dense"):
        sparsity.n_m(model)
    assert set(sparsity.masks(model)) == {"2.weight"}
    with pytest.raises(GraphPruneError, match=r"input axis of 0.weight is no multiple of 4"):
        sparsity.n_m(model, parameters=["0.weight", "2.weight"])


def test_attention_is_covered_and_embeddings_are_not() -> None:
    sparsity.n_m(model := Attending())
    assert sparsity.report(model).weight_sparsity == 0.5
    tied = Tied()
    tied.head.weight = nn.Parameter(tied.head.weight.detach().clone())
    sparsity.n_m(tied)
    assert set(sparsity.masks(tied)) == {"middle.weight", "head.weight"}


def test_n_of_m_on_masks_only_adds() -> None:
    layer = sparsity.magnitude(nn.Linear(8, 8), 0.6)
    before = sparsity.masks(layer)["weight"]
    sparsity.n_m(layer)
    after = sparsity.masks(layer)["weight"]
    assert not (after & ~before).any()
    assert (after.unflatten(1, (-1, 4)).sum(-1) == before.unflatten(1, (-1, 4)).sum(-1).clamp(max=2)).all()


@settings(max_examples=40)
@given(
    rows=st.integers(1, 4), columns=st.integers(1, 5), fraction=st.floats(0, 1, exclude_max=True),
    scope=st.sampled_from(["global", "layer"]), seed=st.integers(0, 999),
)  # fmt: skip
def test_blocks_equal_a_slow_reference(rows: int, columns: int, fraction: float, scope: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 6), nn.Conv2d(2, 5, 2))
    scores: list[tuple[float, int, int, tuple[slice, slice]]] = []
    for k, layer in enumerate(model):
        matrix = layer.weight.detach().flatten(1)
        for i in range(0, matrix.shape[0], rows):
            for j in range(0, matrix.shape[1], columns):
                place = (slice(i, i + rows), slice(j, j + columns))
                scores.append((float(matrix[place].square().mean()), -len(scores), k, place))
    expected = [torch.ones_like(layer.weight.flatten(1), dtype=torch.bool) for layer in model]
    for pool in [scores] if scope == "global" else [[s for s in scores if s[2] == k] for k in (0, 1)]:
        count = min(math.floor(fraction * len(pool) + 0.5), len(pool) - 1)
        for _, _, k, place in sorted(pool)[:count]:
            expected[k][place] = False
    sparsity.blocks(model, fraction, (rows, columns), scope)  # type: ignore[arg-type]
    for mask, wanted in zip(sparsity.masks(model).values(), expected, strict=True):
        assert torch.equal(mask.flatten(1), wanted)


def test_blocks_grow() -> None:
    layer = nn.Linear(16, 16)
    sparsity.blocks(layer, 0.25)
    first = sparsity.masks(layer)["weight"]
    sparsity.blocks(layer, 0.5)
    second = sparsity.masks(layer)["weight"]
    assert int((~second).sum()) == 128 and not (second & ~first).any()
    with pytest.raises(GraphPruneError, match="8 of 16 are masked already, more than the 4"):
        sparsity.blocks(layer, 0.25)


def test_errors_change_nothing() -> None:
    model = mlp()
    for arguments, message in (
        ((4, 4), "expected n < m, got 4:4"),
        ((0, 4), "n: expected an integer of at least 1, got 0"),
        ((1, 2.0), "m: expected an integer"),
        ((2, 7), "no weight has an input axis that is a multiple of 7"),
    ):
        with pytest.raises(GraphPruneError, match=message):
            sparsity.n_m(model, *arguments)  # type: ignore[arg-type]
    for shape in ((4,), (0, 4), (2.0, 2), 4):
        with pytest.raises(GraphPruneError, match=r"shape: expected \(rows, columns\)"):
            sparsity.blocks(model, 0.5, shape)  # type: ignore[arg-type]
    with pytest.raises(GraphPruneError, match="vectors have no blocks"):
        sparsity.blocks(model, 0.5, parameters=["0.bias"])
    model[0].weight.data[0, 0] = torch.inf
    for call in (lambda: sparsity.n_m(model), lambda: sparsity.blocks(model, 0.5)):
        with pytest.raises(GraphPruneError, match=r"0.weight: NaN or infinite"):
            call()
    assert not sparsity.masks(model)
