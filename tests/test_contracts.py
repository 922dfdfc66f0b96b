"""The contracts on imports hold, and an import that breaks one is found: shown on a copy of the package."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS, DOOR, CIRCLES = (
    "Rooms use only rooms below them",
    "The public names are for users: no room imports them",
    "No circles, between rooms or between files of one",
)
BREACHES = {
    "upwards": (ROOMS, {"support/tables.py": "from ..planning import request\n"}),
    "upwards inside a function": (ROOMS, {"tracing/trace.py": "def late():\n    from .. import workflows\n"}),
    "by the door": (DOOR, {"planning/widths.py": "from .. import prune\n"}),
    "a new room": (ROOMS, {"attic/__init__.py": "", "attic/things.py": "from ..errors import GraphPruneError\n"}),
    "a circle of files": (CIRCLES, {"dependency/groups.py": "from . import graph\n"}),
    "a circle of folders": (CIRCLES, {"plans/surgery/cutting.py": "from ..verification import results\n"}),
    "for types alone": (
        ROOMS,
        {"plans/plan.py": "import typing\nif typing.TYPE_CHECKING:\n    from ..sparsity import Schedule\n"},
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("importlinter")
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "graphprune", folder / "graphprune", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def lint(folder: Path) -> tuple[int, str]:
    code = "import sys; sys.path.insert(0, '.'); from importlinter import cli; cli.lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_package_keeps_them(copy: Path) -> None:
    status, text = lint(copy)
    assert status == 0 and all(f"{name} KEPT" in text for name in (ROOMS, DOOR, CIRCLES)), text


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_is_found(name: str, copy: Path) -> None:
    contract, lines = BREACHES[name]
    before = {path: (copy / "graphprune" / path).read_text() if (copy / "graphprune" / path).exists() else None
              for path in lines}  # fmt: skip
    try:
        for path, line in lines.items():
            file = copy / "graphprune" / path
            file.parent.mkdir(exist_ok=True)
            file.write_text((before[path] or "") + "\n" + line)
        status, text = lint(copy)
        assert status == 1 and f"{contract} BROKEN" in text, text
    finally:
        for path, old in before.items():
            file = copy / "graphprune" / path
            if old is None:
                file.unlink()
            else:
                file.write_text(old)
        shutil.rmtree(copy / "graphprune" / "attic", ignore_errors=True)
