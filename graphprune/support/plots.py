"""Plots, drawn with matplotlib where it is installed (it is an optional dependency)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import GraphPruneError
from ..support.types import PathLike
from .files import check_target, replacing

if TYPE_CHECKING:
    from pathlib import Path


def new_figure(width: float = 7.0, height: float = 4.0) -> tuple[Any, Any]:
    """An empty matplotlib figure of `width` x `height` inches and its axes; no window, no global state.

    Raises:
        GraphPruneError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GraphPruneError("plots need matplotlib: pip install 'graphprune[bench]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def save_figure(figure: Any, path: PathLike, *, dpi: int = 150) -> Path:
    """Write a matplotlib figure; the ending of `path` chooses the format (.png, .svg, .pdf...).

    Raises:
        GraphPruneError: the path cannot be written or its ending is no format that matplotlib writes.
    """
    target = check_target(path)
    formats = sorted(figure.canvas.get_supported_filetypes())
    if target.suffix[1:].lower() not in formats:
        raise GraphPruneError(f"cannot draw {target}: its name must end in one of .{', .'.join(formats)}")
    return write_figure(figure, target, dpi=dpi)


def write_figure(figure: Any, target: Path, **options: Any) -> Path:
    """Draw a figure into memory, then write it: matplotlib's writers do not all survive a full disk.

    Raises:
        GraphPruneError: the path cannot be written.
    """
    import io

    buffer = io.BytesIO()
    figure.savefig(buffer, format=target.suffix[1:].lower(), **options)
    with replacing(target) as temporary:
        temporary.write_bytes(buffer.getbuffer())
    return target


def figure_as_svg(figure: Any) -> bytes:
    """A matplotlib figure as an SVG image; the same figure gives the same bytes."""
    import io

    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "graphprune"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def grouped_bars(
    path: PathLike,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    lower: Mapping[str, Sequence[float]] | None = None,
    upper: Mapping[str, Sequence[float]] | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
    title: str = "",
    ylabel: str = "",
) -> Path:
    """A bar chart: for each group one bar of each series, with optional whiskers from `lower` to `upper`.

    Every sequence has one entry per group. `labels` are written above the bars.

    Raises:
        GraphPruneError: matplotlib is missing, the path cannot be written, there is nothing to draw, or a sequence
            has another length than `groups`.
    """
    if not groups or not series:
        raise GraphPruneError("nothing to draw: give at least one group and one series")
    for kind in (series, lower or {}, upper or {}, labels or {}):
        for name, values in kind.items():
            if len(values) != len(groups):
                raise GraphPruneError(f"series {name!r} has {len(values)} entries for {len(groups)} groups")
    figure, axes = new_figure(max(6.0, 1.5 + 0.55 * len(groups) * (len(series) + 1)))
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        places = [g - 0.4 + (i + 0.5) * width for g in range(len(groups))]
        whiskers = None
        if lower is not None and upper is not None:
            whiskers = [
                [max(v - low, 0.0) for v, low in zip(values, lower[name], strict=True)],
                [max(high - v, 0.0) for v, high in zip(values, upper[name], strict=True)],
            ]
        bars = axes.bar(places, values, width, label=name, yerr=whiskers, capsize=3)
        if labels is not None:
            axes.bar_label(bars, labels=labels[name], padding=3, fontsize=8)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return save_figure(figure, path)
