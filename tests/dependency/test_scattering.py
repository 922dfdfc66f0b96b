"""Messages between the nodes of a graph, rows placed where a mask is true: channels beside the index go.

What the pruned network sums up at its nodes is compared with plain loops over edges and channels of the original.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphprune
from tests.examination import Demands, examine

NODES, EDGES, WIDTH = 7, 20, 8
Gather = Callable[["Messages", Tensor, Tensor], Tensor]


class Messages(nn.Module):
    """A layer, something between its rows, and two layers more."""

    places: Tensor

    def __init__(self, between: Gather) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.between, self.width = between, WIDTH
        self.register_buffer("places", torch.tensor([3, 1, 0, 2, 5, 4, 7, 6]))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.last(self.second(self.between(self, self.first(x), edges).relu()).relu())


def build(between: Gather) -> tuple[Messages, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    edges = torch.randint(0, NODES - 1, (2, EDGES))  # the last node gets no message
    edges[1, :3] = torch.tensor([0, 1, 1])
    return Messages(between).eval(), (torch.randn(NODES, 5), edges)


def reduced(how: str, rows: Tensor, targets: Tensor, start: Tensor, include_start: bool = True) -> Tensor:
    """Row by row and channel by channel."""
    out = start.clone()
    for node in range(len(start)):
        for channel in range(start.shape[1]):
            found = [float(r[channel]) for r, t in zip(rows, targets.tolist(), strict=True) if t == node]
            if found:
                found = ([float(start[node, channel])] if include_start else []) + found
                out[node, channel] = _REDUCTIONS[how](found)
    return out


_REDUCTIONS: dict[str, Callable[[list[float]], float]] = {
    "sum": sum, "prod": math.prod, "amax": max, "amin": min, "mean": lambda found: sum(found) / len(found),
    "last": lambda found: found[-1],
}  # fmt: skip


def _column(targets: Tensor, like: Tensor) -> Tensor:
    return targets.view(-1, 1).expand(-1, like.shape[1])


def _scattered(how: str, include: bool) -> tuple[Gather, Gather]:
    def between(model: Messages, h: Tensor, edges: Tensor) -> Tensor:
        rows = h[edges[0]]
        return torch.ones_like(h).scatter_reduce(0, _column(edges[1], h), rows, how, include_self=include)

    def reference(model: Messages, h: Tensor, edges: Tensor) -> Tensor:
        return reduced(how, h[edges[0]], edges[1], torch.ones_like(h), include)

    return between, reference


def _index_reduced(how: str, include: bool) -> tuple[Gather, Gather]:
    def between(model: Messages, h: Tensor, edges: Tensor) -> Tensor:
        return torch.ones_like(h).index_reduce(0, edges[1], h[edges[0]], how, include_self=include)

    def reference(model: Messages, h: Tensor, edges: Tensor) -> Tensor:
        name = {"amax": "amax", "amin": "amin", "prod": "prod", "mean": "mean"}[how]
        return reduced(name, h[edges[0]], edges[1], torch.ones_like(h), include)

    return between, reference


def _adding(between: Gather) -> tuple[Gather, Gather]:
    """Any way to write a sum of messages at nodes, beginning with zeros."""
    return between, lambda model, h, edges: reduced("sum", h[edges[0]], edges[1], torch.zeros_like(h))


def _scatter_like_a_library(source: Tensor, index: Tensor, dim: int, size: int) -> Tensor:
    """As torch_scatter and torch_geometric write it: the index grows to the shape of the source, sizes in a list."""
    dim = dim + source.dim() if dim < 0 else dim
    for _ in range(dim):
        index = index.unsqueeze(0)
    for _ in range(index.dim(), source.dim()):
        index = index.unsqueeze(-1)
    index = index.expand(source.size())
    shape = list(source.size())
    shape[dim] = size
    return torch.zeros(shape, dtype=source.dtype, device=source.device).scatter_add_(dim, index, source)


def _of_a_list(model: Messages, h: Tensor, edges: Tensor) -> Tensor:
    sums = [h.new_zeros(h.shape)]
    for part in edges.split(EDGES // 2, 1):
        sums.append(sums[-1].scatter_add(0, _column(part[1], h), h[part[0]]))
    return sums[-1]


def _segments(model: Messages, h: Tensor, edges: Tensor) -> Tensor:
    order = edges[1].argsort(stable=True)
    lengths = torch.bincount(edges[1], minlength=NODES)
    return torch.segment_reduce(h[edges[0]][order], "sum", lengths=lengths, initial=0)


ADDED: dict[str, Gather] = {
    "scatter_add": lambda m, h, e: torch.zeros_like(h).scatter_add(0, _column(e[1], h), h[e[0]]),
    "in place": lambda m, h, e: h.new_zeros(NODES, h.size(1)).scatter_add_(0, _column(e[1], h), h[e[0]]),
    "counted from the end": lambda m, h, e: torch.zeros_like(h).scatter_add(-2, _column(e[1], h), h[e[0]]),
    "turned": lambda m, h, e: torch.zeros_like(h.t()).scatter_add(-1, e[1].expand(h.shape[1], -1), h[e[0]].t()).t(),
    "expand_as": lambda m, h, e: torch.zeros_like(h).scatter_add(0, e[1][:, None].expand_as(h[e[0]]), h[e[0]]),
    "repeat": lambda m, h, e: torch.zeros_like(h).scatter_add(0, e[1][:, None].repeat(1, h.shape[1]), h[e[0]]),
    "tile": lambda m, h, e: torch.zeros_like(h).scatter_add(0, e[1][:, None].tile(1, h.shape[1]), h[e[0]]),
    "broadcast_to": lambda m, h, e: torch.zeros_like(h).scatter_add(
        0, torch.broadcast_to(e[1][:, None], h[e[0]].shape), h[e[0]]
    ),
    "broadcast_tensors": lambda m, h, e: torch.zeros_like(h).scatter_add(
        0, torch.broadcast_tensors(e[1][:, None], h[e[0]])[0], h[e[0]]
    ),
    "an attribute": lambda m, h, e: h.new_zeros(len(h), m.width).scatter_add(
        0, e[1][:, None].expand(-1, m.width), h[e[0]]
    ),
    "named": lambda m, h, e: torch.scatter_add(torch.zeros_like(h), dim=0, index=_column(e[1], h), src=h[e[0]]),
    "scatter": lambda m, h, e: torch.zeros_like(h).scatter(0, torch.arange(len(h))[:, None].expand_as(h), h).index_add(
        0, e[1], h[e[0]]
    ) - h,
    "index_add": lambda m, h, e: torch.zeros_like(h).index_add_(0, e[1], h[e[0]]),
    "index_put": lambda m, h, e: torch.zeros_like(h).index_put_((e[1],), h[e[0]], accumulate=True),
    "segment_reduce": _segments,
    "like a library": lambda m, h, e: _scatter_like_a_library(h[e[0]], e[1], -2, NODES),
    "heads": lambda m, h, e: _scatter_like_a_library(h.view(NODES, -1, 2)[e[0]], e[1], 0, NODES).flatten(1),
    "out of a list": _of_a_list,
    "gather": lambda m, h, e: torch.zeros_like(h).index_add(0, e[1], h.gather(0, _column(e[0], h))),
    "take_along_dim": lambda m, h, e: torch.zeros_like(h).index_add(0, e[1], h.take_along_dim(e[0][:, None], 0)),
}
"""What the reference says with loops, written in one way after the other."""


def _filled(model: Messages, h: Tensor, edges: Tensor) -> Tensor:
    return h.scatter(0, _column(edges[1], h), 2.0)


def _filled_by_hand(model: Messages, h: Tensor, edges: Tensor) -> Tensor:
    return torch.stack([torch.full_like(row, 2) if i in edges[1].tolist() else row for i, row in enumerate(h)])


def _counted(model: Messages, h: Tensor, edges: Tensor) -> Tensor:
    count = h.new_zeros(len(h)).scatter_add_(0, edges[1], h.new_ones(EDGES)).clamp(min=1)
    ones = torch.zeros_like(h).scatter_add(0, _column(edges[1], h), torch.ones_like(h[edges[0]]))
    return h / count.view(-1, 1).expand_as(h) + ones


def _counted_by_hand(model: Messages, h: Tensor, edges: Tensor) -> Tensor:
    numbers = torch.tensor([edges[1].tolist().count(i) for i in range(len(h))])
    return torch.stack([row / max(1, int(n)) + n for row, n in zip(h, numbers, strict=True)])


def _largest(model: Messages, h: Tensor, edges: Tensor) -> Tensor:
    """An index that differs from channel to channel."""
    return h + torch.zeros_like(h).scatter(0, h.argmax(0, keepdim=True), 1.0)


def _largest_by_hand(model: Messages, h: Tensor, edges: Tensor) -> Tensor:
    out = h.clone()
    for channel in range(h.shape[1]):
        out[max(range(len(h)), key=lambda i: float(h[i, channel])), channel] += 1
    return out


CASES: dict[str, tuple[Gather, Gather]] = {
    **{name: _adding(between) for name, between in ADDED.items()},
    **{f"scatter_reduce {how} {inc}": _scattered(how, inc)
       for how in ("sum", "prod", "mean", "amax", "amin") for inc in (True, False)},
    **{f"index_reduce {how} {inc}": _index_reduced(how, inc)
       for how in ("prod", "mean", "amax", "amin") for inc in (True, False)},
    "one number": (_filled, _filled_by_hand),
    "index_fill": (lambda m, h, e: h.index_fill(0, e[1], 2.0), _filled_by_hand),
    "ones": (_counted, _counted_by_hand),
    "largest": (_largest, _largest_by_hand),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_channels_beside_the_index_go(case: str) -> None:
    between, reference = CASES[case]
    model, (x, edges) = build(between)
    plan = graphprune.plan(model, (x, edges), 0.5)
    small = plan.apply(model)
    kept = [i for i in range(WIDTH) if i not in plan.removed["first.weight"][0]]
    assert len(kept) == WIDTH // 2 == len(small.second.weight)
    full = reference(model, model.first(x), edges)
    torch.testing.assert_close(between(small, small.first(x), edges), full[:, kept])
    outcome = examine(model, (x, edges), Demands(prove=True, statistics=case.startswith("largest")))
    assert not outcome.failed, str(outcome)


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (lambda m, h, e: h.scatter_add(0, _column(e[1], h)[:, :4], h[e[0], :4]), "bound is the literal 4"),
        (lambda m, h, e: h.scatter_add(0, e[1][:, None], m.last(m.second(h))[e[0], :1]), "only a part of the axis"),
        (lambda m, h, e: h.scatter_add(0, e[1][:, None].expand(-1, 8), h[e[0]]), "literal 8"),
        (lambda m, h, e: torch.zeros_like(h).scatter_add(1, m.places.expand_as(h), h), "written to by an index tensor"),
        (lambda m, h, e: h.new_zeros(NODES, 8).scatter_add(0, _column(e[1], h), h[e[0]]), "literal 8"),
        (lambda m, h, e: h.gather(1, m.places.expand_as(h)), "picked by an index tensor"),
        (lambda m, h, e: h.masked_scatter(h > 0, m.second(h)), "picked by a mask"),
        (lambda m, h, e: h.masked_select(h > -9).view(h.shape), "picked by a mask"),
    ],
)  # fmt: skip
def test_what_the_index_reaches_stays(between: Gather, why: str) -> None:
    model, example = build(between)
    plan = graphprune.plan(model, example, 0.5)
    assert 0 not in plan.removed.get("first.weight", {})
    assert why in next(text for text in plan.frozen if text.startswith("first.weight axis 0"))
    outcome = examine(model, example, Demands(prove=True))
    assert not outcome.failed, str(outcome)


def _mask(edges: Tensor) -> Tensor:
    return torch.arange(NODES) % 3 == edges[0, 0] % 3


def _written(mask: Callable[[Tensor, Tensor], Tensor]) -> Gather:
    return lambda m, h, e: h.masked_scatter(mask(_mask(e), h), m.second(h))


PLACED: dict[str, Gather] = {
    "expanded": _written(lambda mask, h: mask[:, None].expand_as(h)),
    "broadcast": _written(lambda mask, h: mask[:, None]),
    "repeated": _written(lambda mask, h: mask[:, None].repeat(1, h.size(-1))),
    "combined": _written(lambda mask, h: mask[:, None].expand_as(h).clone() & ~(mask[:, None] & ~mask[:, None])),
    "in place": lambda m, h, e: h.clone().masked_scatter_(_mask(e).unsqueeze(-1).expand_as(h), m.second(h)),
    "flat source": lambda m, h, e: h.masked_scatter(_mask(e)[:, None].expand_as(h), m.second(h).reshape(-1)),
    "an attribute": lambda m, h, e: h.masked_scatter(_mask(e)[:, None].expand(-1, m.width), m.second(h)),
    "in a batch": lambda m, h, e: h[None].masked_scatter(_mask(e)[None, :, None].expand_as(h[None]), m.second(h))[0],
}  # fmt: skip


@pytest.mark.parametrize("case", PLACED)
def test_rows_placed_where_a_mask_is_true(case: str) -> None:
    between = PLACED[case]
    model, (x, edges) = build(between)
    plan = graphprune.plan(model, (x, edges), 0.5)
    small = plan.apply(model)
    kept = [i for i in range(WIDTH) if i not in plan.removed["first.weight"][0]]
    assert len(kept) == WIDTH // 2
    h = model.first(x)
    zeroed = torch.zeros_like(h)
    zeroed[:, kept] = h[:, kept]
    rows, out = iter(model.second(zeroed)), []
    for row, placed in zip(h, _mask(edges).tolist(), strict=True):
        out.append(next(rows) if placed else row)
    torch.testing.assert_close(between(small, small.first(x), edges), torch.stack(out)[:, kept])
    outcome = examine(model, (x, edges), Demands(prove=True))
    assert not outcome.failed, str(outcome)


@pytest.mark.parametrize(
    "between",
    [
        lambda m, h, e: h.view(1, NODES, -1)[_mask(e)[None]],
        lambda m, h, e: h.masked_select(_mask(e)[:, None]).view(-1, h.shape[1]),
        lambda m, h, e: h.view(1, NODES, -1)[0, _mask(e)],
    ],
)
def test_rows_picked_by_a_mask(between: Gather) -> None:
    model, (x, edges) = build(between)
    small = graphprune.prune(model, (x, edges), 0.5)
    assert len(small.first.weight) == WIDTH // 2
    kept = [i for i in range(WIDTH) if i not in graphprune.plan(model, (x, edges), 0.5).removed["first.weight"][0]]
    rows = [row for row, picked in zip(model.first(x), _mask(edges).tolist(), strict=True) if picked]
    torch.testing.assert_close(between(small, small.first(x), edges), torch.stack(rows)[:, kept])


def test_a_mask_over_two_axes_is_written_to() -> None:
    def between(m: Messages, h: Tensor, e: Tensor) -> Tensor:
        out = h.view(1, NODES, -1).clone()
        out[_mask(e)[None]] = m.second(h)[_mask(e)]
        return out[0]

    model, example = build(between)
    small = graphprune.prune(model, example, 0.5)
    assert len(small.first.weight) == len(small.second.weight) == WIDTH // 2
    outcome = examine(model, example, Demands(prove=True))
    assert not outcome.failed, str(outcome)


def test_a_mask_that_is_changed_through_a_view_is_not_the_same_everywhere() -> None:
    def between(m: Messages, h: Tensor, e: Tensor) -> Tensor:
        mask = _mask(e)[:, None].expand_as(h).clone()
        mask[:, ::2].logical_not_()
        return h.masked_scatter(mask, m.second(h))

    model, example = build(between)
    plan = graphprune.plan(model, example, 0.5)
    assert 0 not in plan.removed.get("first.weight", {})
    outcome = examine(model, example, Demands(prove=True))
    assert not outcome.failed, str(outcome)


def _among_the_chosen(model: Messages, h: Tensor, edges: Tensor) -> Tensor:
    """Nodes are chosen by the sum of their channels; how many edges lie between them, nobody knows before."""
    h = h.relu()
    chosen = torch.zeros(NODES, dtype=torch.bool).scatter(0, h.sum(-1).topk(4).indices, True)
    inside = edges[:, chosen[edges[0]] & chosen[edges[1]]]
    rows = h[inside[0]]
    return torch.zeros_like(h).scatter_add(0, inside[1].reshape(-1, 1).expand_as(rows), rows.reshape(-1, h.shape[1]))


@pytest.mark.parametrize("seed", range(4))
def test_lengths_that_follow_from_values(seed: int) -> None:
    """The smaller network may choose other nodes than the recorded run did: zeros prove it then."""
    example = build(_among_the_chosen)[1]
    torch.manual_seed(seed)
    model = Messages(_among_the_chosen).eval()
    plan = graphprune.plan(model, example, 0.5)
    small = plan.apply(model)
    assert len(small.first.weight) == WIDTH // 2
    found = graphprune.verify(model, small, plan, example)
    assert found.passed and ("lengths depend on values" in str(found)) == (seed > 0), str(found)
    with torch.no_grad():
        small.last.weight *= 1.1
    assert not graphprune.verify(model, small, plan, example).passed


class Placeholders(nn.Module):
    """Image features take the places that the text keeps for them, after a check that they are as many."""

    def __init__(self, check: str) -> None:
        super().__init__()
        self.words, self.image, self.last = nn.Embedding(9, WIDTH), nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.check = check

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        text, image = self.words(ids), self.image(pixels)
        places = ids == 8
        count = places.sum()
        if self.check == "equal" and not count * text.shape[-1] == image.numel():
            raise ValueError("not as many")
        if self.check == "different" and image.shape[1] * count != image.numel():
            raise ValueError("not as many")
        if self.check == "enough" and not 2 * text.shape[-1] <= count * text.shape[-1]:
            raise ValueError("too few")
        if self.check == "literal" and count * text.shape[-1] != 3 * 8:
            raise ValueError("not 24")
        if self.check == "kept":
            text = text * (count * text.shape[-1])
        return self.last(text.masked_scatter(places.unsqueeze(-1).expand_as(text), image).relu())


@pytest.mark.parametrize("check", ["equal", "different", "enough", "literal", "kept"])
def test_as_many_features_as_places(check: str) -> None:
    """A number of elements, counted in the input times a size, is compared with that of another tensor."""
    torch.manual_seed(0)
    model = Placeholders(check).eval()
    example = torch.tensor([[1, 8, 8, 3, 8, 0]]), torch.randn(3, 5)
    plan = graphprune.plan(model, example, 0.5)
    goes = check in ("equal", "different", "enough")
    assert (len(plan.removed.get("words.weight", {}).get(1, ())) == WIDTH // 2) == goes
    if goes:
        small, more = plan.apply(model), (torch.tensor([[8, 8, 1, 8, 2], [0, 8, 3, 8, 4]]), torch.randn(5, 5))
        assert small(*more).shape == (2, 5, 3)
        with pytest.raises(RuntimeError if check == "enough" else ValueError):
            small(more[0], more[1][:4])
    outcome = examine(model, example, Demands(prove=True))
    assert not outcome.failed, str(outcome)


class Stretched(nn.Module):
    """A map with one channel is repeated for all channels, as often as a tensor has some."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 1, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y * self.gate(x).sigmoid().repeat(1, y.shape[1], 1, 1))


@pytest.mark.parametrize("output", ["module", "graph"])
def test_repeated_for_all_channels(output: str) -> None:
    torch.manual_seed(0)
    model, example = Stretched().eval(), torch.randn(2, 3, 4, 4)
    assert graphprune.plan(model, example, 0.5, output=output).removed["last.weight"][1]
    outcome = examine(model, example, Demands(prove=True, output=output, larger=torch.randn(3, 3, 6, 4)))
    assert not outcome.failed, str(outcome)
