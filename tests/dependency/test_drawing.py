"""Pictures of dependency graphs: what they show, that it fits on the page, and how files are written."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import DependencyGraph, GraphPruneError
from graphprune.dependency import drawing


class Joined(nn.Module):
    """A residual, a concatenation and a head: groups that share an axis, and axes that stay."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 1)
        self.norm, self.head = nn.BatchNorm2d(14), nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x + self.left(x), self.right(x)], 1)
        out: Tensor = self.head(self.norm(x).mean((2, 3)))
        return out


@pytest.fixture(scope="module")
def graph() -> DependencyGraph:
    return graphprune.trace(Joined(), torch.randn(2, 3, 8, 8))


def texts(path: Path) -> list[str]:
    """Text elements of an SVG file, in order."""
    found = re.findall(r"<text[^>]*>(.*?)</text>", path.read_text(encoding="utf-8"), flags=re.S)
    return [" ".join(text.split()) for text in found]


def test_svg_names_every_group_and_member(graph: DependencyGraph, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = graph.draw(tmp_path / "graph.svg")
    assert path == tmp_path / "graph.svg" and os.listdir(tmp_path) == ["graph.svg"]
    found = texts(path)
    for group in graph.groups:
        assert f"group {group.index}: {group.size} {group.kind}s" in found
        for member in group.members:
            assert any(text.startswith(f"{member.parameter}[{member.axis}] ") for text in found)
    # An axis that two groups share stands in both panels.
    assert sum(text == "norm.weight[0] 14" for text in found) == 2
    stuck = found.index("not removable")
    assert {"stem.weight[1] 3", "head.weight[0] 5", "head.bias[0] 5"} <= set(found[stuck:])
    assert {"tied by convolution", "tied by add", "tied by linear", "produces channels", "reads channels"} <= set(found)


def test_panels_hold_the_ties_of_the_graph(graph: DependencyGraph) -> None:
    ties = graph.to_networkx()
    panels = drawing._panels(graph.groups, graph.to_networkx())
    assert len(panels) == len(graph.groups) + 1 and panels[-1].frozen
    drawn = set()
    for panel in panels:
        names = [row.text.split()[0] for row in panel.rows]
        assert len(set(names)) == len(names)
        drawn |= {(frozenset((names[a], names[b])), operation) for a, b, operation in panel.arcs}
        assert all(0 <= a < b < len(names) for a, b, _ in panel.arcs)
    wanted = {(frozenset((a, b)), data["operation"].rstrip("_")) for a, b, data in ties.edges(data=True)}
    assert drawn == wanted


def test_everything_lies_on_the_page_and_nothing_overlaps(graph: DependencyGraph) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    blocks = [nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(9)]
    deep = nn.Sequential(*blocks, nn.Conv2d(8, 2, 1))
    for drawn in (graph, graphprune.trace(deep, torch.randn(1, 8, 4, 4))):
        figure = drawing._figure(Figure, drawing._panels(drawn.groups, drawn.to_networkx()))
        renderer = FigureCanvasAgg(figure).get_renderer()
        page = figure.bbox
        (axes,) = figure.axes
        boxes = [p.get_window_extent(renderer) for p in axes.patches if isinstance(p, FancyBboxPatch)]
        assert len(boxes) == len(drawn.groups) + 1
        labels = [text.get_window_extent(renderer) for text in axes.texts]
        for box in [*boxes, *labels]:
            assert page.x0 <= box.x0 < box.x1 <= page.x1 and page.y0 <= box.y0 < box.y1 <= page.y1
        for some in (boxes, labels):
            for i, one in enumerate(some):
                for other in some[:i]:
                    apart = one.x1 <= other.x0 or other.x1 <= one.x0 or one.y1 <= other.y0 or other.y1 <= one.y0
                    assert apart
        inside = sum(any(b.x0 <= t.x0 and t.x1 <= b.x1 and b.y0 <= t.y0 for b in boxes) for t in labels)
        assert inside == sum(len(panel.rows) + 1 for panel in drawing._panels(drawn.groups, drawn.to_networkx()))


def test_all_formats(graph: DependencyGraph, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert graph.draw(str(tmp_path / "a.png")).read_bytes().startswith(b"\x89PNG")
    assert graph.draw(tmp_path / "a.PDF").read_bytes().startswith(b"%PDF")
    assert graph.draw(tmp_path / "a.svg").read_text().lstrip().startswith("<?xml")
    dot = graph.draw(tmp_path / "a.dot").read_text()
    assert dot == graph.to_dot() + "\n" and dot.startswith("graph graphprune {")
    assert sorted(os.listdir(tmp_path)) == ["a.PDF", "a.dot", "a.png", "a.svg"]


def test_huge_pictures_stay_within_what_can_be_written(
    graph: DependencyGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(drawing, "_MOST_PIXELS", 200)
    path = graph.draw(tmp_path / "a.png")
    width, height = (int.from_bytes(path.read_bytes()[i : i + 4], "big") for i in (16, 20))
    assert 190 <= max(width, height) <= 201


def test_network_without_groups(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    frozen = graphprune.trace(nn.Linear(3, 4), torch.randn(2, 3))
    assert "not removable" in texts(frozen.draw(tmp_path / "frozen.svg"))
    empty = graphprune.trace(nn.PReLU(), torch.randn(2, 3))
    assert texts(empty.draw(tmp_path / "empty.svg")) == ["no parameter has an axis longer than 1"]


def test_errors_leave_nothing_behind(graph: DependencyGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jpg", "a", "dot"):
        with pytest.raises(GraphPruneError, match=r"must end in one of \.dot, \.svg, \.png, \.pdf"):
            graph.draw(tmp_path / name)
    for name in ("no/a.dot", "no/a.svg"):
        with pytest.raises(GraphPruneError, match="does not exist"):
            graph.draw(tmp_path / name)
    (tmp_path / "old.dot").write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(GraphPruneError, match="disk full"):
            graph.draw(tmp_path / "old.dot")
    assert (tmp_path / "old.dot").read_text() == "old" and os.listdir(tmp_path) == ["old.dot"]


def test_without_matplotlib(graph: DependencyGraph, tmp_path: Path, without_matplotlib: None) -> None:
    with pytest.raises(GraphPruneError, match=r"pip install 'graphprune\[bench\]'"):
        graph.draw(tmp_path / "a.svg")
    assert graph.draw(tmp_path / "a.dot").exists()
