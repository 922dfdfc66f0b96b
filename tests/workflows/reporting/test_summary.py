"""A report's numbers counted again by loops, and its files read back."""

from __future__ import annotations

import copy
import csv
import html.parser
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError, Point, sparsity
from graphprune.workflows.reporting.documents import as_csv, as_html, as_markdown


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.up, self.fc = nn.ConvTranspose2d(8, 6, 2, groups=2), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.up(self.norm(self.conv(x)).relu()).relu().mean((2, 3)))
        return out


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def nets() -> tuple[Net, nn.Module]:
    net = Net().eval()
    return net, sparsity.magnitude(graphprune.prune(net, X, 0.5), 0.75)


def test_numbers_are_those_of_slow_counts(tmp_path: Path) -> None:
    net, small = nets()
    found = graphprune.report(net, small, X, scores={"before": 0.9, "after pruning": 0.2, "after recovery": 0.85})
    plain = sparsity.make_permanent(copy.deepcopy(small))
    for model, size in ((net, found.before), (plain, found.after)):
        parameters = list(model.parameters())
        values = [v for p in parameters for v in p.flatten().tolist()]
        assert size.parameters == len(values) and size.nonzero == sum(v != 0 for v in values)
        assert size.sparsity == pytest.approx(sum(v == 0 for v in values) / len(values))
        assert size.bytes == sum(t.numel() * t.element_size() for t in [*parameters, *model.buffers()])
        assert size.macs == graphprune.count(model, X).macs
        stored = net if model is net else small  # masks are marked in the file
        assert size.sparse_bytes == sparsity.save(stored, tmp_path / "x").stat().st_size
    assert found.compression == found.before.parameters / found.after.parameters > 2
    assert found.nonzero_compression == found.before.parameters / found.after.nonzero > found.compression
    assert found.byte_compression == found.before.bytes / min(found.after.bytes, found.after.sparse_bytes)
    assert found.mac_reduction == found.before.macs / found.after.macs and found.speedup is None
    layers = {layer.name: layer for layer in found.layers}
    assert [(x.name, x.kind, x.width_before) for x in found.layers] == [
        ("conv", "Conv2d", 8), ("norm", "BatchNorm2d", None), ("up", "ConvTranspose2d", 6), ("fc", "Linear", 4)
    ]  # fmt: skip
    widths = [plain.conv.out_channels, plain.up.out_channels, plain.fc.out_features]  # type: ignore[union-attr]
    assert [x.width_after for x in found.layers if x.name != "norm"] == widths and widths[0] < 8
    for name, layer in layers.items():
        own, left = net.get_submodule(name), plain.get_submodule(name)
        assert layer.parameters_before == sum(p.numel() for p in own.parameters())
        assert layer.parameters_after == sum(p.numel() for p in left.parameters())
        weight = left.weight if name != "norm" else torch.ones(1)  # folded
        assert isinstance(weight, Tensor)
        assert layer.sparsity == pytest.approx(float((weight == 0).float().mean()))
    for what in ("parameters", "macs"):
        assert sum(getattr(x, f"{what}_before") for x in found.layers) == getattr(found.before, what)
        assert sum(getattr(x, f"{what}_after") for x in found.layers) == getattr(found.after, what)
    assert [(p.name, p.score, p.macs) for p in found.points] == [
        ("before", 0.9, found.before.macs), ("after", 0.85, found.after.macs)
    ]  # fmt: skip


def test_macs_are_said_to_be_of_a_call_and_per_sample(tmp_path: Path) -> None:
    net, small = nets()
    found = graphprune.report(net, small, X)
    alone = graphprune.count(net, X[:1]).macs, graphprune.count(small, X[:1]).macs
    rows = {row[0]: row[1:3] for row in found.rows()}
    assert rows["MACs of one call at batch size 2"] == tuple(f"{2 * macs:,}" for macs in alone)
    assert rows["MACs per sample"] == tuple(f"{macs:,}" for macs in alone)
    for end in (".md", ".txt", ".html"):
        text = found.save(tmp_path / f"r{end}").read_text(encoding="utf-8")
        assert "Layers (MACs of one call at batch size 2)" in text
    assert "MACs of one call at batch size 2 lie on" in str(graphprune.doctor(net, X))
    assert "MACs of one call at batch size 2, " in graphprune.advise(net, X).facts[0]
    assert json.loads(found.save(tmp_path / "r.json").read_text())["batch_size"] == 2


class ZeroInitialised(nn.Module):
    """Residual branches that begin as nothing, as ResNets may be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 2)
        self.branch = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.other = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        y = (y + self.branch(y) + self.other(y)).relu()
        out: Tensor = self.last(y.mean((2, 3)))
        return out


def test_zeros_of_a_folded_norm_are_explained() -> None:
    torch.manual_seed(0)
    net = ZeroInitialised().eval()
    nn.init.zeros_(net.branch[1].weight)  # type: ignore[arg-type]
    with torch.no_grad():
        net.other[1].weight[0] = 0  # type: ignore[index, operator]
    small = graphprune.fold_conv_bn(net, X)
    found = graphprune.report(net, small, X, notes=["mine"])
    assert found.notes == (
        "mine",
        "100.0% of the weights of branch.0 are zero because the batch norm branch.1, folded into it, multiplies its "
        "channels by 0",
        "16.7% of the weights of other.0 are zero because the batch norm other.1, folded into it, multiplies some of "
        "its channels by 0",
    )
    assert {x.name: (x.kind, x.parameters_after) for x in found.layers}["branch.1"] == ("BatchNorm2d", 0)
    sparse = sparsity.magnitude(ZeroInitialised().eval(), 0.5)
    assert graphprune.report(net, sparse, X).notes == ()  # masks need no explanation


def test_scores_are_asked_for_where_they_are_missing() -> None:
    net, small = nets()
    asked: list[nn.Module] = []

    def score(model: nn.Module) -> float:
        asked.append(model)
        return len(asked) / 10

    found = graphprune.report(net, small, X, evaluate=score)
    assert found.scores == {"before": 0.1, "after pruning": 0.2} and asked == [net, small]
    asked.clear()
    middle = nn.Flatten()
    found = graphprune.report(net, small, X, evaluate=score, unrecovered=middle, scores={"before": 0.7})
    assert found.scores == {"before": 0.7, "after pruning": 0.1, "after recovery": 0.2} and asked == [middle, small]
    assert found.metric == "score"
    data = [(X, torch.tensor([0, 1]))]
    guesses = [[int(row.argmax()) for row in model(X)] for model in (net, small)]
    found = graphprune.report(net, small, X, evaluate=data)
    wanted = [sum(g == t for g, t in zip(rows, (0, 1), strict=True)) / 2 for rows in guesses]
    assert list(found.scores.values()) == wanted and found.metric == "top-1 accuracy"


def test_speed_is_measured_on_request_or_taken(tmp_path: Path) -> None:
    net, small = nets()
    measured = graphprune.report(net, small, X, speed={"rounds": 3, "warmup": 1, "min_time": 0.0})
    assert measured.benchmark is not None and measured.speedup == measured.benchmark.row("after").speedup
    assert {row.model for row in measured.benchmark.rows} == {"before", "after"}
    taken = graphprune.report(net, small, X, speed=measured.benchmark)
    assert taken.benchmark is measured.benchmark and "faster" in str(taken)
    page = as_html(taken)
    assert page.count("<img") == 3 and "Latency" in page
    other = graphprune.benchmark({"a": net}, X, rounds=2, warmup=0, min_time=0.0)
    with pytest.raises(GraphPruneError, match="'before'"):
        graphprune.report(net, small, X, speed=other)


class Page(html.parser.HTMLParser):
    """Tags that are open or load something, and the text of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def test_files_say_what_the_report_says(tmp_path: Path) -> None:
    net, small = nets()
    curve = {"half": (small, 0.5)}
    nasty = "<script>alert('x')</script> | *a* `b` $c"
    found = graphprune.report(
        net, small, X, scores={"before": 0.9, "after pruning": 0.2}, curve=curve, title=nasty, notes=[nasty],
        sensitivity={nasty: {0.5: 0.4, 0.1: 0.8}}, metric=nasty,
    )  # fmt: skip
    assert found.points[-1] == Point("half", 0.5, found.after.macs, found.after.parameters)
    paths = {end: found.save(tmp_path / f"r{end}") for end in (".json", ".csv", ".md", ".html", ".txt")}
    data = json.loads(paths[".json"].read_text(encoding="utf-8"))
    assert data["compression"] == found.compression and data["after"]["macs"] == found.after.macs
    assert data["sensitivity"] == {nasty: {"0.1": 0.8, "0.5": 0.4}} and len(data["layers"]) == len(found.layers)
    with paths[".csv"].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["name"], int(r["macs_after"]), float(r["sparsity"])) for r in rows] == [
        (x.name, x.macs_after, x.sparsity) for x in found.layers
    ]
    page = Page(paths[".html"].read_text(encoding="utf-8"))
    assert not page.open and not page.tags & {"script", "link", "iframe"}
    assert len(page.sources) == 4 and all(s.startswith("data:image/svg+xml;base64,") for s in page.sources)
    for row in found.rows():
        for cell in row:
            assert cell in page.cells
    markdown = paths[".md"].read_text(encoding="utf-8")
    assert "<script>" not in markdown.replace("\\<", "")
    lines = [line.replace("\\|", "").strip("|").split("|") for line in markdown.splitlines() if line.startswith("|")]
    assert {len(line) for line in lines} == {4, 9}
    assert as_csv(found) == paths[".csv"].read_text(encoding="utf-8") and as_markdown(found) == markdown
    assert as_html(found) == paths[".html"].read_text(encoding="utf-8")  # the same bytes every time
    assert "conv" in paths[".txt"].read_text(encoding="utf-8")


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, small = nets()
    found = graphprune.report(net, small, X)
    path = found.save(tmp_path / "r.csv")
    before = path.read_bytes()
    with pytest.raises(GraphPruneError, match=r"\.html"):
        found.save(tmp_path / "r.xls")
    with pytest.raises(GraphPruneError, match="folder"):
        found.save(tmp_path / "none" / "r.csv")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["r.csv"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scores": {"afterwards": 0.1}}, "scores: expected one of"),
        ({"scores": {"before": float("nan")}}, "finite"),
        ({"speed": 3}, "speed"),
        ({"curve": [3]}, "curve"),
        ({"sensitivity": {"a": {}}}, "sensitivity"),
        ({"evaluate": lambda m: "good"}, "evaluate"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], text: str) -> None:
    net, small = nets()
    with pytest.raises(GraphPruneError, match=text):
        graphprune.report(net, small, X, **options)


def test_sensitivity_curves_as_they_are_measured() -> None:
    net, small = nets()
    curves = graphprune.sensitivity(net, X, ratios=[0.25, 0.5])
    found = graphprune.report(net, small, X, sensitivity=curves).sensitivity
    assert found == {
        c.name: {gone / c.size: error for gone, error in zip(c.removed, c.errors, strict=True)} for c in curves.curves
    }
    assert found
