"""Pictures of a dependency graph: one panel per group, its members in a column, the ties between them as arcs.

A spring layout of such graphs is a ball of wool. Columns keep the order of the network, never overlap and grow with the
network, so that fifty parameter axes and five hundred are equally readable.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import networkx as nx

from ..errors import GraphPruneError
from ..support.files import check_target, replacing
from ..support.plots import write_figure
from ..support.types import PathLike
from .groups import Group

FORMATS = (".dot", ".svg", ".png", ".pdf")

# Inches, at a font of 7 points whose characters are 0.6 as wide as high.
_FONT = 7.0
_LETTER = 0.602 * _FONT / 72
_LINE = 0.155
_HEADER = 0.24
_PAD = 0.10
_GAP = 0.14
_MARGIN = 0.2
_MARKER = 0.035
_LARGEST_ARC = 1.1
_ASPECT = 1.5
# matplotlib cannot write images of 2**16 pixels a side, and few programs show more than this.
_MOST_PIXELS = 2**15
_LARGEST_AREA = 10**8

_ROLES = {"out": "produces channels", "in": "reads channels", "vector": "one value per channel", "other": "other"}
_SHAPES = {"out": "s", "in": "o", "vector": "D", "other": "^"}
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#a5673f", "#5b8c00")
_REST = "#8a8a8a"
_DARK = "#1d3b5c"


@dataclasses.dataclass(frozen=True)
class _Row:
    """One parameter axis in a panel."""

    text: str
    role: str
    frozen: bool


@dataclasses.dataclass(frozen=True)
class _Panel:
    """A group, or all frozen axes. `arcs`: (upper row, lower row, operation)."""

    title: str
    rows: tuple[_Row, ...]
    arcs: tuple[tuple[int, int, str], ...]
    frozen: bool

    @property
    def arc_width(self) -> float:
        """Inches that the widest arc needs."""
        return max((_reach(b - a) for a, b, _ in self.arcs), default=0.0)

    @property
    def width(self) -> float:
        text = max((len(row.text) for row in self.rows), default=0) * _LETTER + 3 * _MARKER
        return max(2 * _PAD + self.arc_width + 2 * _MARKER + text, 2 * _PAD + len(self.title) * _LETTER * 1.05)

    @property
    def height(self) -> float:
        return _HEADER + len(self.rows) * _LINE + _PAD


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One explanation in the legend: of a marker (`role`) or of the colour of a tie."""

    x: float
    text: str
    role: str | None
    colour: str


def draw_dependencies(groups: Sequence[Group], ties: nx.MultiGraph, path: PathLike) -> Path:
    """Write a picture of a dependency graph: the groups, what belongs to them, and which operation ties what to what.

    The ending of `path` chooses the format: `.dot` is text for Graphviz, which need not be installed; `.svg`, `.png`
    (150 dots per inch, less for huge ones) and `.pdf` are drawn with matplotlib. Each group is a panel that lists its
    parameter axes in graph order with their lengths; arcs are ties, coloured by operation. Axes with indices that
    cannot be removed stand in a grey panel of their own. The size of the picture grows with the network.

    Raises:
        GraphPruneError: another ending, a path that cannot be written, or matplotlib is not installed.
    """
    target = check_target(path)
    suffix = target.suffix.lower()
    if suffix not in FORMATS:
        raise GraphPruneError(f"cannot draw {target}: its name must end in one of {', '.join(FORMATS)}")
    if suffix == ".dot":
        with replacing(target) as temporary:
            temporary.write_text(as_dot(groups, ties) + "\n", encoding="utf-8")
        return target
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GraphPruneError("drawings need matplotlib: pip install 'graphprune[bench]'; .dot does not") from error
    figure = _figure(Figure, _panels(groups, ties))
    width, height = figure.get_size_inches()
    dpi = min(150.0, _MOST_PIXELS / max(width, height), math.sqrt(_LARGEST_AREA / (width * height)))
    # Text stays text, so that a browser finds a parameter by its name.
    with matplotlib.rc_context({"svg.fonttype": "none", "pdf.fonttype": 42}):
        return write_figure(figure, target, dpi=dpi, facecolor="white")


def as_dot(groups: Sequence[Group], ties: nx.MultiGraph) -> str:
    """The ties in Graphviz form, one cluster per group."""
    lines = ["graph graphprune {", '  node [shape=box, fontname="sans-serif", fontsize=10];']
    for group in groups:
        lines.append(f"  subgraph cluster_{group.index} {{")
        lines.append(f'    label="group {group.index}: {group.size} {group.kind}s";')
        for m in group.members:
            lines.append(f'    "{m.parameter}[{m.axis}]";')
        lines.append("  }")
    for name, data in ties.nodes(data=True):
        if data["frozen"]:
            lines.append(f'  "{name}" [style=filled, fillcolor=lightgrey];')
    for a, b, data in ties.edges(data=True):
        lines.append(f'  "{a}" -- "{b}" [label="{data["operation"]}"];')
    lines.append("}")
    return "\n".join(lines)


# -- what is shown


def _panels(groups: Sequence[Group], ties: nx.MultiGraph) -> list[_Panel]:
    panels = []
    for group in groups:
        members: dict[str, str] = {}
        for member in group.members:
            members.setdefault(f"{member.parameter}[{member.axis}]", member.role)
        rows = _rows(ties, members)
        title = f"group {group.index}: {group.size} {group.kind}{'s' if group.size != 1 else ''}"
        panels.append(_Panel(title, rows, _arcs(ties, list(members)), False))
    stuck = [node for node, data in ties.nodes(data=True) if data["frozen"]]
    if stuck:
        panels.append(_Panel("not removable", _rows(ties, dict.fromkeys(stuck, "other")), _arcs(ties, stuck), True))
    return panels


def _rows(ties: nx.MultiGraph, roles: dict[str, str]) -> tuple[_Row, ...]:
    widest = max(map(len, roles))
    rows = []
    for node, role in roles.items():
        frozen, length = ties.nodes[node]["frozen"], ties.nodes[node]["length"]
        text = f"{node:<{widest}} {length:>5}" + (f" ({frozen} not removable)" if 0 < frozen < length else "")
        rows.append(_Row(text, role, bool(frozen)))
    return tuple(rows)


def _arcs(ties: nx.MultiGraph, nodes: list[str]) -> tuple[tuple[int, int, str], ...]:
    place = {node: i for i, node in enumerate(nodes)}
    found = {
        (min(place[a], place[b]), max(place[a], place[b]), str(data["operation"]).rstrip("_"))
        for a, b, data in ties.subgraph(nodes).edges(data=True)
    }
    # Long arcs first, so that short ones are drawn over them.
    return tuple(sorted(found, key=lambda arc: (arc[0] - arc[1], arc)))


def _reach(rows: int) -> float:
    """How far to the left an arc over so many rows goes, in inches."""
    return min(_LARGEST_ARC, 0.10 + 0.11 * math.sqrt(max(rows - 1, 0)))


# -- where it is


def _columns(panels: list[_Panel], count: int) -> list[list[_Panel]]:
    """Panels in order, each on the column that is shortest so far."""
    columns: list[list[_Panel]] = [[] for _ in range(count)]
    heights = [0.0] * count
    for panel in panels:
        shortest = heights.index(min(heights))
        columns[shortest].append(panel)
        heights[shortest] += panel.height + _GAP
    return [column for column in columns if column]


def _extent(columns: list[list[_Panel]]) -> tuple[float, float]:
    width = sum(max(p.width for p in column) + _GAP for column in columns) - _GAP
    height = max(sum(p.height + _GAP for p in column) - _GAP for column in columns)
    return width, height


def _arranged(panels: list[_Panel]) -> list[list[_Panel]]:
    """As many columns as bring the page nearest to a landscape format."""

    def misfit(columns: list[list[_Panel]]) -> float:
        width, height = _extent(columns)
        return abs(math.log(width / height / _ASPECT))

    return min((_columns(panels, n) for n in range(1, min(len(panels), 40) + 1)), key=misfit)


# -- drawing it


def _figure(make: Any, panels: list[_Panel]) -> Any:
    if not panels:
        figure = make(figsize=(4, 1))
        figure.text(0.5, 0.5, "no parameter has an axis longer than 1", ha="center", va="center", fontsize=_FONT)
        return figure
    columns = _arranged(panels)
    names = _operations(panels)
    width, height = _extent(columns)
    legend = _legend(panels, names, max(width, 4.0))
    below = len(legend) * _LINE + _GAP
    size = max(width, 4.0) + 2 * _MARGIN, height + below + 2 * _MARGIN
    figure = make(figsize=size)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, size[0])
    axes.set_ylim(size[1], 0)  # y grows downwards, as one reads
    axes.axis("off")
    left = _MARGIN
    for column in columns:
        widest, top = max(p.width for p in column), _MARGIN
        for panel in column:
            _draw_panel(axes, panel, left, top, widest, names)
            top += panel.height + _GAP
        left += widest + _GAP
    for number, line in enumerate(legend):
        for entry in line:
            _draw_entry(axes, entry, _MARGIN + height + _GAP + (number + 0.5) * _LINE)
    return figure


def _operations(panels: list[_Panel]) -> dict[str, str]:
    """A colour for each operation; the most frequent ones get one of their own."""
    counts: dict[str, int] = {}
    for panel in panels:
        for _, _, operation in panel.arcs:
            counts[operation] = counts.get(operation, 0) + 1
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    return {name: _COLOURS[i] if i < len(_COLOURS) else _REST for i, name in enumerate(ranked)}


def _text(axes: Any, x: float, y: float, text: str, **options: Any) -> None:
    # A dollar sign would start a formula.
    style = {"fontsize": _FONT, "family": "monospace", "va": "center_baseline", "parse_math": False}
    axes.text(x, y, text, **{**style, **options})


def _draw_panel(axes: Any, panel: _Panel, left: float, top: float, width: float, colours: dict[str, str]) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.patches import FancyBboxPatch

    axes.add_patch(
        FancyBboxPatch(
            (left, top),
            width,
            panel.height,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor="#f0f0f0" if panel.frozen else "#f6f9fd",
            edgecolor="#b5b5b5" if panel.frozen else "#8fa8c4",
            linewidth=0.6,
        )
    )
    colour = "#555555" if panel.frozen else _DARK
    _text(axes, left + _PAD, top + _HEADER / 2, panel.title, weight="bold", color=colour)
    x = left + _PAD + panel.arc_width + _MARKER
    first = top + _HEADER + _LINE / 2
    # one collection: drawing hundreds of single arcs takes minutes
    curves = [_arc(x, first + a * _LINE, first + b * _LINE, _reach(b - a)) for a, b, _ in panel.arcs]
    axes.add_collection(
        LineCollection(curves, colors=[colours[o] for _, _, o in panel.arcs], linewidths=0.7, alpha=0.85),
        autolim=False,
    )
    for number, row in enumerate(panel.rows):
        y = first + number * _LINE
        colour = "#777777" if row.frozen else _DARK
        _marker(axes, x, y, row.role, colour)
        _text(axes, x + 3 * _MARKER, y, row.text, color="#666666" if row.frozen else "#111111")


def _arc(x: float, top: float, bottom: float, reach: float) -> list[tuple[float, float]]:
    """Half an ellipse, open to the right."""
    middle, half = (top + bottom) / 2, (bottom - top) / 2
    angles = [math.pi * (i / 24 - 0.5) for i in range(25)]
    return [(x - reach * math.cos(angle), middle + half * math.sin(angle)) for angle in angles]


def _marker(axes: Any, x: float, y: float, role: str, colour: str) -> None:
    face = "white" if role == "in" else colour
    axes.plot([x], [y], _SHAPES[role], ms=3.2, mfc=face, mec=colour, mew=0.7, zorder=3)


def _legend(panels: list[_Panel], colours: dict[str, str], width: float) -> list[list[_Entry]]:
    """What markers and colours mean, in lines that fit into the width."""
    roles = {row.role for panel in panels if not panel.frozen for row in panel.rows}
    entries: list[tuple[str, str | None, str]] = []
    entries += [(text, role, _DARK) for role, text in _ROLES.items() if role in roles]
    entries += [(f"tied by {name}", None, colour) for name, colour in colours.items()]
    lines: list[list[_Entry]] = [[]]
    x = _MARGIN
    for text, role, colour in entries:
        space = 0.22 + (len(text) + 2) * _LETTER
        if lines[-1] and x + space > width + _MARGIN:
            lines.append([])
            x = _MARGIN
        lines[-1].append(_Entry(x, text, role, colour))
        x += space
    return lines


def _draw_entry(axes: Any, entry: _Entry, y: float) -> None:
    if entry.role is not None:
        _marker(axes, entry.x + 0.08, y, entry.role, entry.colour)
    else:
        axes.plot([entry.x, entry.x + 0.16], [y, y], color=entry.colour, linewidth=1.4, solid_capstyle="butt")
    _text(axes, entry.x + 0.22, y, entry.text, color="#333333")


__all__ = ["FORMATS", "as_dot", "draw_dependencies"]
