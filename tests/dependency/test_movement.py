"""Movement rules against brute force: the real ATen call, run on the index of every element along each axis."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphprune.dependency.analysis import Analysis, analyse
from graphprune.tracing.trace import record_run

Move = Callable[[Tensor], Tensor]


class Moved(nn.Module):
    def __init__(self, shape: tuple[int, ...], move: Move) -> None:
        super().__init__()
        self.weight, self.move = nn.Parameter(torch.randn(shape)), move

    def forward(self, x: Tensor) -> Tensor:
        return self.move(self.weight).square().sum() + x


def check(shape: tuple[int, ...], move: Move) -> tuple[Analysis, int]:
    """Every element of the result belongs to the components of the element it came from, and to no others.

    Returns the analysis and how many elements carry something that can be removed.
    """
    analysis = analyse(record_run(Moved(shape, move), torch.zeros(())))
    (node,) = [n for n in analysis.trace.graph.nodes if n.name.startswith(("square", "pow"))]
    state = analysis.state(node)
    expected = _expected(analysis, shape, move)
    assert state.shape == expected.shape
    live = 0
    for place in np.ndindex(*state.shape):
        found = {
            int(analysis.label[analysis.dims.offset[d] + v[place[axis]]])
            for axis, axis_map in state.axes.items()
            for d, v in axis_map.items()
            if v[place[axis]] >= 0
        } - {int(analysis.label[0])}
        if expected[place] is None:
            assert all(_whole_slice(expected, place, component) for component in found), f"padding at {place}"
        else:
            assert found == expected[place], f"at {place}"
        live += bool(found)
    return analysis, live


def _whole_slice(expected: np.ndarray, place: tuple[int, ...], component: int) -> bool:
    """Padding goes where a whole slice goes: along some axis, all that lies beside it belongs to the component."""
    for axis, index in enumerate(place):
        beside = [e for e in np.take(expected, index, axis).reshape(-1) if e is not None]
        if beside and all(component in e for e in beside):
            return True
    return False


def _expected(analysis: Analysis, shape: tuple[int, ...], move: Move) -> np.ndarray:
    """For each element of the result the components that it must belong to: a set of numbers, or None for padding."""
    number = torch.arange(1, 1 + int(np.prod(shape))).reshape(shape)
    moved = move(number.double()).round().long().numpy()  # 0 where nothing came from anywhere
    out = np.empty(moved.shape, object)
    for place in np.ndindex(*moved.shape):
        if moved[place] > 0:
            out[place] = set()
            source = np.unravel_index(moved[place] - 1, shape)
            for axis, index in enumerate(source):
                for d, v in analysis.dims.roots.get(("weight", axis), {}).items():
                    if v[index] >= 0:
                        out[place].add(int(analysis.label[analysis.dims.offset[d] + v[index]]))
            out[place] -= {int(analysis.label[0])}
    return out


MOVES: dict[str, tuple[tuple[int, ...], Move]] = {
    "view apart": ((12, 5), lambda x: x.view(3, 4, 5)),
    "view together": ((3, 4, 5), lambda x: x.reshape(12, 5)),
    "view across": ((4, 6), lambda x: x.view(8, 3)),
    "view apart three ways": ((24, 2), lambda x: x.view(2, 3, 4, 2)),
    "view with ones": ((6, 4), lambda x: x.view(1, 6, 1, 4, 1)),
    "apart and together": ((12, 2), lambda x: x.view(3, 4, 2).permute(1, 0, 2).reshape(12, 2)),
    "permute": ((2, 3, 4), lambda x: x.permute(2, 0, 1)),
    "transpose": ((2, 3, 4), lambda x: x.transpose(0, -1)),
    "t": ((3, 4), lambda x: x.t()),
    "movedim": ((2, 3, 4), lambda x: x.movedim((0, 1), (-1, 0))),
    "unsqueeze": ((3, 4), lambda x: x.unsqueeze(-1).unsqueeze(0)),
    "squeeze": ((3, 1, 4), lambda x: x.squeeze(1)),
    "expand": ((3, 1, 4), lambda x: x.expand(2, 3, 5, 4)),
    "flip": ((3, 4), lambda x: x.flip(0, 1)),
    "roll": ((5, 4), lambda x: torch.roll(x, (2, -1), (0, 1))),
    "roll right round": ((5, 4), lambda x: torch.roll(x, 5, 0)),
    "repeat": ((3, 4), lambda x: x.repeat(2, 1, 3)),
    "tile": ((3, 4), lambda x: x.tile(2)),
    "repeat_interleave": ((3, 4), lambda x: x.repeat_interleave(2, 1)),
    "pad": ((3, 4), lambda x: F.pad(x, (1, 2, 0, 3))),
    "cat with itself": ((3, 4), lambda x: torch.cat([x, x], 1)),
    "cat with itself turned": ((3, 4), lambda x: torch.cat([x.flip(1), x], 1)),
    "stack": ((3, 4), lambda x: torch.stack([x, x], 1)),
    "slice": ((6, 4), lambda x: x[1:5, :3]),
    "slice in steps": ((6, 4), lambda x: x[::2]),
    "select": ((6, 4), lambda x: x[2]),
    "select in front and behind": ((6, 4), lambda x: torch.cat([x[0], x[-1]])),
    "split": ((6, 4), lambda x: x.split([2, 4])[1]),
    "chunk and cat": ((6, 4), lambda x: torch.cat(x.chunk(2)[::-1])),
    "chunk and stack": ((6, 4), lambda x: torch.stack(x.chunk(3, 0), 1)),
    "unbind": ((3, 4), lambda x: torch.cat(x.unbind(0))),
    "index": ((6, 4), lambda x: x[torch.tensor([5, 0, 0, 3])]),
    "index_select": ((6, 4), lambda x: x.index_select(1, torch.tensor([3, 1]))),
    "pixel_shuffle": ((1, 12, 2, 2), lambda x: F.pixel_shuffle(x, 2)),
    "pixel_unshuffle": ((1, 3, 4, 4), lambda x: F.pixel_unshuffle(x, 2)),
    "channel_shuffle": ((1, 12, 2, 2), lambda x: F.channel_shuffle(x, 3)),
    "unfold windows": ((3, 7), lambda x: x.unfold(1, 3, 2)),
    "unfold patches": ((1, 3, 4, 4), lambda x: F.unfold(x, 2, stride=2)),
    "windows": ((1, 4, 4, 3), lambda x: x.view(1, 2, 2, 2, 2, 3).permute(0, 1, 3, 2, 4, 5).reshape(4, 4, 3)),
    "merge patches": ((1, 4, 4, 3), lambda x: torch.cat([x[:, ::2, ::2], x[:, 1::2, ::2]], -1)),
    "clone and contiguous": ((3, 4), lambda x: x.t().contiguous().clone()),
    "diagonal": ((4, 4), lambda x: x.diagonal()),
    "flatten": ((2, 3, 4), lambda x: x.flatten(1)),
    "one index stretched": ((2, 4), lambda x: x.chunk(2)[1].expand(3, 4)),
    "unflatten": ((12, 3), lambda x: x.unflatten(0, (3, 4))),
}


@pytest.mark.parametrize("name", MOVES)
def test_each_move(name: str) -> None:
    check(*MOVES[name])


KEEP_ALL = ("permute", "t", "movedim", "cat", "stack", "channel", "repeat", "expand")


@pytest.mark.parametrize("name", [n for n in MOVES if n.startswith(KEEP_ALL)])
def test_moves_that_cost_nothing_leave_every_element_free(name: str) -> None:
    analysis, live = check(*MOVES[name])
    shape, move = MOVES[name]
    if not analysis.freezes:
        assert live == move(torch.zeros(shape)).numel()


STEPS: list[Move] = [
    lambda x: x.flip(0),
    lambda x: x.transpose(0, -1),
    lambda x: x.reshape(-1),
    lambda x: x.reshape(2, -1),
    lambda x: x.reshape(-1, 3),
    lambda x: x.reshape(2, 3, -1),
    lambda x: x.reshape(-1, 2, 2),
    lambda x: torch.cat([x, x.flip(0)], -1),
    lambda x: x.repeat_interleave(2, 0),
    lambda x: x.unsqueeze(1).expand(*x.shape[:1], 2, *x.shape[1:]),
    lambda x: torch.stack(x.chunk(2, 0), -1),
    lambda x: x[: x.shape[0] // 2],
    lambda x: x.movedim(0, -1),
]


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(
    shape=st.sampled_from([(12,), (6, 4), (2, 6), (4, 3, 2), (12, 2), (2, 2, 6)]),
    steps=st.lists(st.integers(0, len(STEPS) - 1), min_size=1, max_size=4),
)
def test_moves_one_after_the_other(shape: tuple[int, ...], steps: list[int]) -> None:
    def move(x: Tensor) -> Tensor:
        for step in steps:
            x = STEPS[step](x)
            sizes.append(x.shape)
        return x

    sizes: list[torch.Size] = []
    try:
        move(torch.zeros(shape))
    except RuntimeError:
        return  # no such shape
    if sizes[-1].numel() <= 400 and not any(1 in s for s in sizes):  # an axis of one index is never cut
        check(shape, move)
