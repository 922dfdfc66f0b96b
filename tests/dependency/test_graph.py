"""Groups of textbook networks, to the letter; explanations with the line of the source; temperatures."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune
from graphprune import DependencyGraph


def groups_of(graph: DependencyGraph) -> list[tuple[str, int, dict[str, list[list[int]]]]]:
    """Kind, size, and the positions in every member."""
    return [
        (g.kind, g.size, {f"{m.parameter}[{m.axis}]": m.positions.tolist() for m in g.members}) for g in graph.groups
    ]


def each(*indices: int) -> list[list[int]]:
    return [[i] for i in indices]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.inner, self.outer, self.head = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = x + self.outer(torch.relu(self.inner(x)))
        return self.head(x.mean((2, 3)))


def test_residual() -> None:
    n, m = each(0, 1, 2, 3), each(0, 1, 2)
    stream = ["stem.weight[0]", *(f"norm.{p}[0]" for p in ("weight", "bias", "running_mean", "running_var"))]
    stream += ["inner.weight[1]", "outer.weight[0]", "outer.bias[0]", "head.weight[1]"]
    found = groups_of(graphprune.trace(Residual().eval(), torch.randn(1, 3, 4, 4)))
    assert [(kind, size) for kind, size, _ in found] == [("residual channel", 4), ("channel", 3)]
    assert found[0][2] == dict.fromkeys(stream, n)
    assert found[1][2] == dict.fromkeys(["inner.weight[0]", "inner.bias[0]", "outer.weight[1]"], m)


class Joined(nn.Module):
    """A concatenation, flattened: each channel is three columns of the Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv1d(2, 2, 1), nn.Conv1d(2, 3, 1), nn.Linear(15, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.cat([self.a(x), self.b(x)], 1).flatten(1))


def test_concatenated_and_flattened() -> None:
    found = groups_of(graphprune.trace(Joined(), torch.randn(1, 2, 3)))
    assert found == [
        ("channel", 2, {"a.weight[0]": each(0, 1), "a.bias[0]": each(0, 1), "fc.weight[1]": [[0, 1, 2], [3, 4, 5]]}),
        (
            "channel",
            3,
            {
                "b.weight[0]": each(0, 1, 2),
                "b.bias[0]": each(0, 1, 2),
                "fc.weight[1]": [[6, 7, 8], [9, 10, 11], [12, 13, 14]],
            },
        ),
    ]


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        b, c, h, w = y.shape
        return self.c(self.b(y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)))


def test_shuffled_channels_meet_their_depthwise_filters() -> None:
    graph = graphprune.trace(Shuffle(), torch.randn(1, 2, 3, 3))
    assert sum(group.size for group in graph.groups) >= 2
    for group in graph.groups:
        at = {f"{m.parameter}[{m.axis}]": m.positions for m in group.members}
        for unit in range(group.size):
            made, read = set(at["a.weight[0]"][unit].tolist()), set(at["b.weight[0]"][unit].tolist())
            assert read == {[0, 2, 1, 3].index(i) for i in made}
            assert set(at["c.weight[1]"][unit].tolist()) == read


class Attention(nn.Module):
    """Two heads of three features, from one packed projection."""

    def __init__(self, scale: Callable[[Tensor, int], Tensor] | None = None) -> None:
        super().__init__()
        self.heads, self.features, self.scale = 2, 3, scale
        self.qkv, self.out = nn.Linear(4, 18), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.features).permute(2, 0, 3, 1, 4)
        if self.scale is None:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = self.scale(q @ k.transpose(-2, -1), self.features).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, n, self.heads * self.features))


def test_heads_and_their_features_in_a_packed_projection() -> None:
    found = groups_of(graphprune.trace(Attention(), torch.randn(1, 5, 4)))
    by_kind = {kind: (size, members) for kind, size, members in found if "out.weight[1]" in members}
    assert by_kind["head"][0] == 2
    assert by_kind["head"][1]["out.weight[1]"] == [[0, 1, 2], [3, 4, 5]]
    packed = by_kind["head"][1]["qkv.weight[0]"]
    assert [sorted(p) for p in packed] == [[0, 1, 2, 6, 7, 8, 12, 13, 14], [3, 4, 5, 9, 10, 11, 15, 16, 17]]
    assert by_kind["head feature"][0] == 3
    assert by_kind["head feature"][1]["out.weight[1]"] == [[0, 3], [1, 4], [2, 5]]


# -- explanations


class Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.never = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).view(-1, 4, 1).flatten(1)  # the literal
        return self.c(torch.relu(self.b(x)))


def line_of(kind: type, text: str) -> int:
    lines, start = inspect.getsourcelines(kind)
    return start + next(i for i, line in enumerate(lines) if text in line)


def test_explanations() -> None:
    graph = graphprune.trace(Stubborn(), torch.randn(2, 3))
    text = graph.explain("a.weight")
    assert text.startswith("a.weight (4, 3)") and "literal 4" in text
    assert f"test_graph.py:{line_of(Stubborn, '# the literal')}" in text
    assert "axis 1 (3): frozen" in text and "input" in text
    assert "axis 0 (4): group 0, 4 mlp channels; tied to b.bias[0], c.weight[1]" in graph.explain("b.weight")
    assert "axis 1 (4): frozen" in graph.explain("b.weight")
    assert "output" in graph.explain("c.bias")
    assert "not used in the recorded run" in graph.explain("never.weight")
    frozen = {(f.parameter, f.axis): f for f in graph.frozen}
    assert frozen[("a.weight", 0)].count == frozen[("a.weight", 0)].length == 4
    assert ("b.weight", 0) not in frozen and str(frozen[("c.weight", 0)]).startswith("c.weight axis 0: all frozen")


def test_the_networkx_graph_has_the_groups_as_its_connected_parts() -> None:
    graph = graphprune.trace(Residual().eval(), torch.randn(1, 3, 4, 4))
    ties = graph.to_networkx()
    for group in graph.groups:
        names = {f"{m.parameter}[{m.axis}]" for m in group.members}
        (part,) = [c for c in nx.connected_components(ties) if names & c]
        assert names == part
    edges = {(d["operation"], d["source"].partition(":")[2].partition(" ")[0]) for _, _, d in ties.edges(data=True)}
    assert ("add", str(line_of(Residual, "x + self.outer"))) in edges
    for name, data in ties.nodes(data=True):
        assert data["length"] == graph.trace.parameters[data["parameter"]].meta["val"].shape[data["axis"]], name


def test_freezing_one_more_position_takes_its_unit_and_nothing_else() -> None:
    import numpy as np

    from graphprune.dependency import Reason

    graph = graphprune.trace(Residual().eval(), torch.randn(1, 3, 4, 4))
    before = groups_of(graph)
    ((dim, _),) = graph.analysis.dims.roots[("inner.weight", 0)].items()
    held = graph.freezing([(graph.analysis.dims.positions(dim, np.array([1])), Reason("test", "held here"))])
    after = groups_of(held)
    assert groups_of(graph) == before
    assert held.groups[0] is graph.groups[0]
    assert after[0] == before[0]
    assert after[1][2] == dict.fromkeys(before[1][2], each(0, 2))
    assert "held here" in held.explain("outer.weight") and "held here" not in graph.explain("outer.weight")


# -- temperature

SCALES: dict[str, Callable[[Tensor, int], Tensor] | None] = {
    "power": lambda s, d: s * d**-0.5,
    "root": lambda s, d: s / math.sqrt(d),
    "reciprocal": lambda s, d: s * (1 / d),
    "fused": None,
}


@pytest.mark.parametrize("name", SCALES)
def test_the_query_rows_take_the_changed_temperature(name: str) -> None:
    model, x = Attention(SCALES[name]), torch.randn(2, 5, 4)
    plan = graphprune.plan(model, x, 0.34, granularity="head features")
    small = plan.apply(model)
    assert small.features == 2
    power = 1.0 if name == "reciprocal" else 0.5
    parameters = {r.parameter: r for r in plan.rescales}
    assert parameters.keys() == {"qkv.weight", "qkv.bias"}
    for rescale in parameters.values():
        assert rescale.factor == pytest.approx((2 / 3) ** power)
        assert rescale.axis == 0 and set(rescale.indices) in (set(range(6)), set(range(6, 12)))  # query or key
    assert graphprune.verify(model, small, plan, x).passed


def test_heads_that_go_change_no_temperature() -> None:
    plan = graphprune.plan(Attention(SCALES["power"]), torch.randn(2, 5, 4), 0.5, granularity="heads")
    assert plan.removed and not plan.rescales
