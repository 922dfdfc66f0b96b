"""docs/robustness.json: what attacks on files, kills of writers, interrupts and threads came to, a section each, with
versions; and docs/robustness.md, which shows it.

    python -m tools._robustness     # the page anew, from the figures
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors

from graphprune.support.tables import Column, render, table
from graphprune.support.versions import running_versions
from tools._common import markdown_table

PAGE = Path(__file__).parents[1] / "docs" / "robustness.json"
HEAD = """# Attacks on what it promises

{doc}`guide/promises` says what holds whatever happens. Each table is what a tool came to that tries the opposite; a
failure would be a model, a file or a process that is not what it should be, an error that is no `GraphPruneError`, or
damage that was not noticed.
"""
SECTIONS = {
    "attacks": (
        "Damaged files",
        "Bits flipped, bytes cut off, fields removed, renamed, doubled and set to anything, half of them with a digest "
        "made to fit. *Accepted*: what remains a file that makes sense, such as another number where any number does "
        "(weights and ONNX files of others carry no digest). Memory: the most that loading took beyond loading a good "
        "file.",
        ("file", "mutations", "refused", "accepted", "memory_mib", "failures"),
        "python -m tools.attack_files --count {count}",
    ),
    "kills": (
        "Killed writers",
        "A child that writes without end is killed at random moments; then the name must hold the whole old file or "
        "the whole new one. *While writing*: kills that came between the first and the last byte.",
        ("writer", "kills", "old", "new", "while_writing", "failures"),
        "python -m tools.kill_writers --count {count}",
    ),
    "interrupts": (
        "Interrupted calls",
        "A real signal at a random moment. *Came out*: as KeyboardInterrupt; the others came after the call was done.",
        ("network", "call", "interrupts", "came_out", "finished", "failures"),
        "python -m tools.interrupt_calls --count {count}",
    ),
    "threads": (
        "Shared models",
        "{threads} threads at once for {seconds:g} s; every plan, answer and loss is compared with that of one thread "
        "alone.",
        ("thread", "network", "calls", "failures"),
        "python -m tools.share_models --threads {threads} --seconds {seconds:g}",
    ),
}


def record(section: str, rows: Sequence[dict[str, Any]], **about: Any) -> None:
    """Write one section; the others stay."""
    data = json.loads(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
    versions = {"python": platform.python_version(), **running_versions(), "numpy": np.__version__}
    versions |= {"safetensors": safetensors.__version__, "onnx": onnx.__version__}
    data[section] = {**about, "versions": versions, "rows": list(rows)}
    PAGE.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    write_page(data)


def write_page(data: dict[str, Any]) -> None:
    """docs/robustness.md."""
    parts = [HEAD]
    for name, (title, text, columns, command) in SECTIONS.items():
        if name not in data:
            continue
        found = data[name]
        headings = [column.replace("memory_mib", "memory, MiB").replace("_", " ") for column in columns]
        rows = [[f"{row[c]:,}" if isinstance(row[c], int) else str(row[c]) for c in columns] for row in found["rows"]]
        versions = ", ".join(f"{library} {version}" for library, version in found["versions"].items())
        parts.append(
            f"## {title}\n\n{text.format(**found)}\n\n    {command.format(**found)}\n\n"
            f"{markdown_table(headings, rows)}\n\nVersions: {versions}.\n"
        )
    PAGE.with_suffix(".md").write_text("\n".join(parts), encoding="utf-8")


def show(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Print the rows as a table."""
    print(render(table(rows, [Column(c, c, justify="left" if i == 0 else "right") for i, c in enumerate(columns)])))


if __name__ == "__main__":
    write_page(json.loads(PAGE.read_text(encoding="utf-8")))
