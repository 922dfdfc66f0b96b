"""docs/robustness.json: what attacks on files and kills of writers came to, a section each, with versions."""

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

PAGE = Path(__file__).parents[1] / "docs" / "robustness.json"


def record(section: str, rows: Sequence[dict[str, Any]], **about: Any) -> None:
    """Write one section; the others stay."""
    data = json.loads(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
    versions = {"python": platform.python_version(), **running_versions(), "numpy": np.__version__}
    versions |= {"safetensors": safetensors.__version__, "onnx": onnx.__version__}
    data[section] = {**about, "versions": versions, "rows": list(rows)}
    PAGE.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def show(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Print the rows as a table."""
    print(render(table(rows, [Column(c, c, justify="left" if i == 0 else "right") for i, c in enumerate(columns)])))
