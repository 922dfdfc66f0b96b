"""A report as JSON, CSV, Markdown, plain text and one self-contained HTML page."""

from __future__ import annotations

import base64
import csv
import dataclasses
import html
import io
import json
from collections.abc import Iterable, Sequence

from ...support.plots import figure_as_svg
from .figures import figures
from .summary import HEADINGS, LAYER_COLUMNS, Layer, Report, form

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; margin: 2rem auto; padding: 0 1rem; max-width: 1100px; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid #e3e8ee; }
th { border-bottom: 2px solid #8fa8c4; } td:first-child, th:first-child { text-align: left; }
.wide { overflow-x: auto; } img { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
""".strip()


@form(".json")
def as_json(report: Report) -> str:
    """Everything."""
    return json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@form(".csv")
def as_csv(report: Report) -> str:
    """One line per layer, unformatted numbers, after one line of names."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([field.name for field in dataclasses.fields(Layer)])
    writer.writerows(dataclasses.astuple(layer) for layer in report.layers)
    return out.getvalue()


@form(".md")
def as_markdown(report: Report) -> str:
    """Tables of the summary and of the layers."""
    layers = [[column.text(layer) for column in LAYER_COLUMNS] for layer in report.layers]
    parts = [f"# {_plain(report.title)}", _markdown(HEADINGS, report.rows())]
    parts += [f"## {report.layers_title}", _markdown([c.header for c in LAYER_COLUMNS], layers)]
    if report.benchmark is not None:
        parts += ["## Measurement", "\n".join(f"- {_plain(line)}" for line in report.benchmark.circumstances())]
    if report.notes:
        parts += ["## Notes", "\n".join(f"- {_plain(note)}" for note in report.notes)]
    return "\n\n".join(parts) + "\n"


@form(".txt")
def as_text(report: Report) -> str:
    """As it is printed."""
    return f"{report}\n"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    escaped = "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in text)
    return " ".join(escaped.split())


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, [":--" if i == 0 else "--:" for i in range(len(headings))]]
    text = [f"| {' | '.join(_plain(cell) for cell in lines[0])} |", f"| {' | '.join(lines[1])} |"]
    return "\n".join([*text, *(f"| {' | '.join(_plain(cell) for cell in row)} |" for row in rows)])


@form(".html")
def as_html(report: Report) -> str:
    """One page with tables and plots, without scripts and without anything to load."""
    escape = html.escape
    parts = [f"<h1>{escape(report.title)}</h1>", _html(HEADINGS, report.rows())]
    for caption, figure in figures(report):
        data = base64.b64encode(figure_as_svg(figure)).decode("ascii")
        image = f'<img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}">'
        parts.append(f"<h2>{escape(caption)}</h2><figure>{image}</figure>")
    layers = [[column.text(layer) for column in LAYER_COLUMNS] for layer in report.layers]
    parts += [f"<h2>{escape(report.layers_title)}</h2>", _html([c.header for c in LAYER_COLUMNS], layers)]
    for heading, lines in (
        ("Measurement", report.benchmark.circumstances() if report.benchmark is not None else ()),
        ("Notes", report.notes),
    ):
        if lines:
            items = "".join(f"<li>{escape(line)}</li>" for line in lines)
            parts.append(f"<h2>{heading}</h2><ul>{items}</ul>")
    head = f'<meta charset="utf-8"><title>{escape(report.title)}</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _html(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in headings)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
