"""Curves as data: marginal errors against a slow reference, files, plots, and the criterion made of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune import Curve, GraphPruneError, Sensitivity
from tests.sealing import sealed_json


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    size = draw(st.integers(2, 12))
    removed = sorted(draw(st.sets(st.integers(1, size - 1), min_size=1)))
    errors = [draw(st.floats(-1, 10)) for _ in removed]
    return Curve("net.weight", "channel", size, tuple(removed), tuple(errors))


@given(curves())
def test_marginals_are_the_slopes_of_the_greatest_convex_function_below(curve: Curve) -> None:
    x = [0, *curve.removed]
    y = np.maximum.accumulate([0.0, *curve.errors])
    slopes = curve.marginal()
    assert slopes.shape == (curve.size,) and (slopes >= 0).all() and (np.diff(slopes) >= -1e-12).all()
    below = np.concatenate([[0.0], np.cumsum(slopes)])
    for k in range(x[-1] + 1):
        # the lowest chord over k, by trying all pairs of measured points
        chords = [
            y[i] if x[i] == x[j] else y[i] + (y[j] - y[i]) * (k - x[i]) / (x[j] - x[i])
            for i in range(len(x))
            for j in range(i, len(x))
            if x[i] <= k <= x[j]
        ]
        assert below[k] == pytest.approx(min(chords), abs=1e-9)
    assert np.allclose(slopes[x[-1] :], slopes[x[-1] - 1])


KNOWN = Sensitivity("error", "l2", "abc", (Curve("0.weight[0]", "channel", 8, (2, 4), (0.25, 1.0)),))


def test_a_file_gives_the_same_curves_back(tmp_path: Path) -> None:
    path = KNOWN.save(tmp_path / "curves.json")
    assert Sensitivity.load(path) == KNOWN
    assert [p.name for p in tmp_path.iterdir()] == ["curves.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("format"),
        lambda d: d.pop("curves"),
        lambda d: d["curves"][0].pop("size"),
        lambda d: d["curves"][0].update(removed=[4, 2]),
        lambda d: d["curves"][0].update(removed=[2, 8]),
        lambda d: d["curves"][0].update(errors=[0.5]),
        lambda d: d["curves"][0].update(errors=[0.5, "1"]),
        lambda d: d["curves"][0].update(size=8.0),
        lambda d: d["curves"][0].update(kind=None),
        lambda d: d.update(measure="beauty"),
        lambda d: d.update(order=3),
        lambda d: d.update(curves=3),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: object) -> None:
    path = KNOWN.save(tmp_path / "curves.json")
    data = json.loads(path.read_text())
    damage(data)  # type: ignore[operator]
    path.write_text(sealed_json(data))
    with pytest.raises(GraphPruneError, match="is no sensitivity file"):
        Sensitivity.load(path)
    with pytest.raises(GraphPruneError, match="cannot read"):
        Sensitivity.load(tmp_path / "absent.json")


def test_a_curve_that_claims_much_takes_no_memory(tmp_path: Path) -> None:
    large = Sensitivity("error", "l2", "abc", (Curve("0.weight[0]", "channel", 10**15, (2, 4), (0.25, 1.0)),))
    criterion = Sensitivity.load(large.save(tmp_path / "curves.json")).criterion
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    assert graphprune.plan(model, torch.randn(1, 3), 0.5, criterion=criterion).removed


def test_curves_that_were_changed_or_have_no_digest(tmp_path: Path) -> None:
    path = KNOWN.save(tmp_path / "curves.json")
    text = path.read_text()
    assert sealed_json(json.loads(text)) == json.dumps(json.loads(text))
    path.write_text(text.replace("0.25", "0.75"))
    with pytest.raises(GraphPruneError, match="changed since it was written"):
        Sensitivity.load(path)
    path.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "digest"}))
    with pytest.raises(GraphPruneError, match="has no digest"):
        Sensitivity.load(path)


def test_plot_writes_a_picture_and_needs_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert KNOWN.plot(tmp_path / "curves.svg").read_text().count("0.weight[0] (8)") >= 1
    with pytest.raises(GraphPruneError, match="no group has a curve"):
        Sensitivity("error", "l2", "", ()).plot(tmp_path / "none.svg")


def test_the_criterion_ranks_as_its_order_and_weighs_by_the_curves() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(1, 3)
    first, second = graphprune.trace(net, x).groups
    flat = Curve(first.name, first.kind, 8, (4, 7), (1e-6, 2e-6))
    steep = Curve(second.name, second.kind, 8, (4, 7), (1.0, 2.0))
    known = Sensitivity("error", "l2", "", (flat, steep))
    by_curves = graphprune.plan(net, x, 0.25, scope="global", criterion=known.criterion)
    assert [g.kept for g in by_curves.groups] == [4, 8]
    by_norm = graphprune.plan(net, x, {"0": 0.5}, criterion="l2")
    assert by_curves.removed == by_norm.removed
    # a group without a curve is worth as much as the worst
    unknown = Sensitivity("error", "l1", "", (flat,)).ordered_by("l2")
    assert [g.kept for g in graphprune.plan(net, x, 0.25, scope="global", criterion=unknown).groups] == [4, 8]
