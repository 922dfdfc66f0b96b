"""The plots of a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ...support.plots import new_figure
from ...tracing.counting import at_batch_size
from .summary import Report

_BEFORE, _AFTER = "#b8c4d0", "#0072b2"
_MOST_LABELS = 60


def figures(report: Report) -> Iterator[tuple[str, Any]]:
    """Captions and matplotlib figures, of what there is something to draw of."""
    layers = [layer for layer in report.layers if layer.width_before is not None or layer.width_after is not None]
    if layers:
        yield "Widths before and after, layer by layer", _widths(layers)
        yield "Sparsity, layer by layer", _sparsity(layers)
    if report.points:
        yield f"{report.metric} against MACs", _accuracy(report)
    if report.sensitivity:
        yield "Sensitivity", _sensitivity(report)
    if report.benchmark is not None:
        yield "Latency, sample by sample", _latency(report)


def _by_layer(names: Sequence[str]) -> tuple[Any, Any]:
    figure, axes = new_figure(min(24.0, max(7.0, 1.5 + 0.22 * len(names))), 4.2)
    every = -(-len(names) // _MOST_LABELS)
    axes.set_xticks(range(0, len(names), every), [_text(name) for name in names[::every]], rotation=90, fontsize=7)
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _text(name: str) -> str:
    """Without the sign that matplotlib takes for the beginning of a formula."""
    return name.replace("$", r"\$")


def _widths(layers: Sequence[Any]) -> Any:
    figure, axes = _by_layer([layer.name for layer in layers])
    places = range(len(layers))
    axes.bar(places, [layer.width_before or 0 for layer in layers], 0.8, color=_BEFORE, label="before")
    axes.bar(places, [layer.width_after or 0 for layer in layers], 0.5, color=_AFTER, label="after")
    axes.set_ylabel("output channels or features")
    axes.legend(frameon=False)
    return figure


def _sparsity(layers: Sequence[Any]) -> Any:
    figure, axes = _by_layer([layer.name for layer in layers])
    gone = [1 - layer.parameters_after / max(1, layer.parameters_before) for layer in layers]
    places = range(len(layers))
    axes.bar(places, [100 * max(0.0, g) for g in gone], 0.8, color=_BEFORE, label="parameters removed")
    axes.bar(places, [100 * layer.sparsity for layer in layers], 0.5, color=_AFTER, label="zeros among what is left")
    axes.set_ylim(0, 100)
    axes.set_ylabel("%")
    axes.legend(frameon=False)
    return figure


def _accuracy(report: Report) -> Any:
    figure, axes = new_figure()
    points = sorted(report.points, key=lambda point: point.macs)
    axes.plot([point.macs for point in points], [point.score for point in points], "o-", color=_AFTER)
    for point in points:
        where = {"textcoords": "offset points", "xytext": (5, 5), "fontsize": 8}
        axes.annotate(_text(point.name), (point.macs, point.score), **where)
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    axes.set_xlabel(f"multiply-accumulates of one call{at_batch_size(report.batch_size)}")
    axes.set_ylabel(_text(report.metric))
    return figure


def _sensitivity(report: Report) -> Any:
    figure, axes = new_figure()
    for group, curve in report.sensitivity.items():
        axes.plot([100 * ratio for ratio in curve], list(curve.values()), ".-", linewidth=1, label=_text(group))
    axes.set_xlabel("removed, %")
    axes.set_ylabel("score or error")
    if len(report.sensitivity) <= 12:
        axes.legend(frameon=False, fontsize=7)
    return figure


def _latency(report: Report) -> Any:
    figure, axes = new_figure()
    assert report.benchmark is not None
    rows = report.benchmark.rows
    names = [row.model if row.batch_size is None else f"{row.model}\nbatch {row.batch_size}" for row in rows]
    axes.boxplot([row.samples_ms for row in rows], showfliers=False)
    for place, row in enumerate(rows, 1):  # every sample, spread evenly over the width of its box
        steps = [place - 0.15 + 0.3 * i / max(1, len(row.samples_ms) - 1) for i in range(len(row.samples_ms))]
        axes.plot(steps, row.samples_ms, ".", color=_AFTER, alpha=0.4, markersize=4)
    axes.set_xticks(range(1, len(rows) + 1), names)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("ms for one call")
    return figure
