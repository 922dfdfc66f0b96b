from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from graphprune.errors import GraphPruneError
from graphprune.support import plots
from graphprune.support.plots import grouped_bars


def test_bars(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    series = {"a": [1.0, 2.0], "b": [3.0, 4.0]}
    low = {name: [value - 0.5 for value in values] for name, values in series.items()}
    high = {name: [value + 1 for value in values] for name, values in series.items()}
    labels = {"a": ["label one", "label two"], "b": ["x", "y"]}
    path = grouped_bars(
        tmp_path / "plot.svg", ["g 1", "g 2"], series, lower=low, upper=high, labels=labels, title="T", ylabel="ms"
    )
    assert path == tmp_path / "plot.svg" and os.listdir(tmp_path) == ["plot.svg"]
    assert path.read_text().lstrip().startswith("<?xml")
    assert grouped_bars(tmp_path / "plot.png", ["g"], {"a": [1.0]}).read_bytes().startswith(b"\x89PNG")


def test_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    series = {"a": [1.0, 2.0], "b": [3.0, 4.0]}
    labels = {"a": ["p", "q"], "b": ["r", "s"]}
    grouped_bars(tmp_path / "x.png", ["g", "h"], series, labels=labels, title="T", ylabel="ms")
    axes = drawn[0].axes[0]
    assert sorted(bar.get_height() for bar in axes.patches) == [1, 2, 3, 4]
    # Bars of a group stand side by side around its tick.
    centres = sorted(bar.get_x() + bar.get_width() / 2 for bar in axes.patches)
    assert centres == pytest.approx([-0.2, 0.2, 0.8, 1.2])
    assert [text.get_text() for text in axes.texts] == ["p", "q", "r", "s"]
    assert axes.get_ylabel() == "ms" and axes.get_title() == "T" and axes.get_ylim()[0] == 0
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_errors(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(GraphPruneError, match="nothing to draw"):
        grouped_bars(tmp_path / "x.png", [], {})
    with pytest.raises(GraphPruneError, match="series 'a' has 2 entries for 1 groups"):
        grouped_bars(tmp_path / "x.png", ["g"], {"a": [1.0, 2.0]})
    with pytest.raises(GraphPruneError, match=r"must end in one of .*\.png"):
        grouped_bars(tmp_path / "x.xyz", ["g"], {"a": [1.0]})
    with pytest.raises(GraphPruneError, match="does not exist"):
        grouped_bars(tmp_path / "no" / "x.png", ["g"], {"a": [1.0]})
    assert os.listdir(tmp_path) == []


def test_without_matplotlib(tmp_path: Path, without_matplotlib: None) -> None:
    with pytest.raises(GraphPruneError, match=r"pip install 'graphprune\[bench\]'"):
        grouped_bars(tmp_path / "x.png", ["g"], {"a": [1.0]})
