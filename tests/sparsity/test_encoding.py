from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune import GraphPruneError
from graphprune.sparsity.encoding import DTYPES, DamagedError, decode, encode, entry_from_list, entry_to_list, inflate


def through(tensor: torch.Tensor, mask: torch.Tensor | None = None, half: bool = False):
    entry, places, values = encode("w", tensor, mask, half)
    read = entry_from_list(json.loads(json.dumps(entry_to_list(entry))))
    assert read == entry
    return entry, *decode(read, places, values)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return not a.numel() or bool((a.reshape(-1).view(torch.uint8) == b.reshape(-1).view(torch.uint8)).all())


@settings(max_examples=80)
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    shape=st.lists(st.integers(0, 9), max_size=4),
    density=st.sampled_from([0, 0.003, 0.05, 0.3, 0.9, 1]),
    seed=st.integers(0, 10**6),
)
def test_every_type_shape_and_density_comes_back(dtype: str, shape: list[int], density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kind = DTYPES[dtype]
    bits = torch.randint(1, 2 if kind == torch.bool else 255, (*shape, kind.itemsize), generator=generator)
    tensor = bits.to(torch.uint8).view(kind).reshape(shape) if bits.numel() else torch.zeros(shape, dtype=kind)
    mask = torch.rand(tensor.shape, generator=generator) < density
    # zeros of either sign are not stored, so none with a sign is made: see the test of these below
    tensor = torch.where(mask & (tensor != 0), tensor, torch.zeros((), dtype=kind)) if tensor.numel() else tensor
    _, found, held = through(tensor)
    assert same_bits(found, tensor) and held is None
    entry, found, held = through(tensor, mask)
    assert same_bits(found, tensor)
    assert held is None if entry.layout == "dense" else torch.equal(held, mask)


@settings(max_examples=40)
@given(places=st.lists(st.integers(0, 4999), max_size=40, unique=True))
def test_long_gaps(places: list[int]) -> None:
    tensor = torch.zeros(5000)
    tensor[places] = torch.arange(1.0, 1 + len(places))
    entry, found, _ = through(tensor)
    assert torch.equal(found, tensor) and entry.layout != "dense"


@pytest.mark.parametrize(("density", "layout"), [(0.5, "bitmap"), (0.2, "bitmap"), (0.05, "gaps"), (0.01, "gaps")])
def test_the_shorter_layout_is_near_the_entropy(density: float, layout: str) -> None:
    keep = torch.rand(400_000) < density
    entry, places, _ = encode("w", keep.float(), None, False)
    entropy = -(density * np.log2(density) + (1 - density) * np.log2(1 - density)) * 400_000 / 8
    assert len(places) < 1.15 * entropy and entry.layout == layout


def test_zeros_of_either_sign_are_not_stored_and_masked_zeros_are() -> None:
    values = torch.tensor([-0.0] * 1000 + [1.0, -0.0])
    entry, found, _ = through(values)
    assert entry.count == 1 and torch.equal(found, values)
    mask = torch.zeros(1002, dtype=torch.bool)
    mask[[5, 1000]] = True
    entry, found, held = through(values, mask)
    assert entry.count == 2 and torch.equal(held, mask) and torch.equal(found, values)


def test_strange_values_and_layouts() -> None:
    values = torch.tensor([[torch.nan, torch.inf], [-torch.inf, 1e-45]])
    assert same_bits(through(values)[1], values)
    turned = torch.randn(4, 6)[:, ::2].T
    assert torch.equal(through(turned)[1], turned)
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert torch.equal(through(image)[1], image)


def test_half_values_come_back_in_their_type_or_are_refused() -> None:
    values = torch.randn(50, 20) * (torch.rand(50, 20) < 0.1)
    entry, found, _ = through(values, half=True)
    assert entry.stored == "float16" and torch.equal(found, values.half().float())
    values[0, 0] = 70_000
    with pytest.raises(GraphPruneError, match="w: a value of 70000 does not fit float16"):
        encode("w", values, None, True)
    with pytest.raises(GraphPruneError, match=r"w: tensors of type torch.uint16 cannot be stored"):
        encode("w", torch.zeros(2, dtype=torch.uint16), None, False)


def test_inflating_stops_at_what_was_declared() -> None:
    bomb = zlib.compress(bytes(10**7))
    with pytest.raises(DamagedError, match="another length"):
        inflate(bomb, 10, 10, "w")
    assert inflate(zlib.compress(b"abc"), 3, 3, "w") == b"abc" and inflate(b"", 0, 0, "w") == b""
    for wrong in (b"", b"no", zlib.compress(b"abc")[:-1], zlib.compress(b"abc") + b"x", zlib.compress(b"ab")):
        with pytest.raises(DamagedError, match="w: the file is damaged"):
            inflate(wrong, 3, 3, "w")


GOOD = ["w", "float32", "float32", [10, 10], "bitmap", 5, 13, 20, 30, False]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, 1), (1, "float33"), (1, None), (1, ["float32"]), (2, "float64"), (2, "int8"), (3, [10, -1]), (3, 100),
        (3, [10.0, 10]), (3, [True, 100]), (3, [2**40, 2**40]), (3, [1] * 65), (4, "zip"), (4, {}), (5, 101), (5, -1),
        (5, True), (5, 5.0), (6, 14), (6, "13"), (7, -1), (7, 2**63), (8, None), (9, 1),
    ],
)  # fmt: skip
def test_every_field_of_the_header_is_checked(place: int, value: object) -> None:
    assert entry_from_list(GOOD).shape == (10, 10)
    with pytest.raises(DamagedError):
        entry_from_list([*GOOD[:place], value, *GOOD[place + 1 :]])
    for wrong in (GOOD[:-1], [*GOOD, 0], {}, None, "entry"):
        with pytest.raises(DamagedError):
            entry_from_list(wrong)
