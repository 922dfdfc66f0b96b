"""Pages say what is true: their code runs, and the paths and modules that they name exist."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import graphprune
from tests import documents
from tests.documents import ROOT

GUIDE = [f"docs/guide/{page}.md" for page in ("first-steps", "choosing", "no-data", "said", "promises", "runtimes")]
WITH_CODE = ["ARCHITECTURE.md", "CONTRIBUTING.md", *GUIDE]
PAGES = [*WITH_CODE, "README.md", "docs/guide/limits.md", "findings/README.md"]


@pytest.mark.parametrize("name", WITH_CODE)
def test_code_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert documents.run(ROOT / name) > 0


def test_differences_and_errors_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\nx = 2\n```\n\n```python\n>>> x + 1\n3\n```\n")
    assert documents.blocks(page) == [(4, "x = 2\n"), (8, ">>> x + 1\n3\n")] and documents.run(page) == 2
    page.write_text("```python\n>>> 1 + 1\n3\n```\n")
    with pytest.raises(AssertionError, match=r"Expected:\s+3\s+Got:\s+2"):
        documents.run(page)
    page.write_text("```python\nraise ZeroDivisionError\n```\n")
    with pytest.raises(ZeroDivisionError):
        documents.run(page)


@pytest.mark.parametrize("name", PAGES)
def test_named_files_exist(name: str) -> None:
    page = ROOT / name
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    paths = re.findall(r"`((?:graphprune|tests|tools|docs|models|findings)/[\w./-]*)`", text)
    missing += [path for path in paths if not (ROOT / path).exists()]
    tools = [f"tools/{name}.py" for name in re.findall(r"-m tools\.([a-z]\w+)", text)]
    missing += [tool for tool in tools if not (ROOT / tool).exists()]
    assert not missing


def test_the_tower_names_every_room() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    tower = text[text.index("doors  ") : text.index("ground  ")]
    rooms = {path.name for path in (ROOT / "graphprune").iterdir() if (path / "__init__.py").exists()}
    assert rooms and rooms == set(re.findall(r"^ {4}(\w+)/ ", tower, re.MULTILINE)) | {"cli"}


def test_no_room_has_the_name_of_a_public_function() -> None:
    rooms = {path.name for path in (ROOT / "graphprune").iterdir() if (path / "__init__.py").exists()}
    assert all(inspect.ismodule(getattr(graphprune, name)) for name in rooms & set(graphprune.__all__))
    assert {path.name for path in (ROOT / "graphprune").glob("*.py")} == {
        "__init__.py", "_version.py", "errors.py", "rules.py"
    }  # fmt: skip


def test_the_reference_has_every_public_name() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs/api").glob("*.md")))
    named = re.findall(r"^\.\. auto(?:class|function|exception):: (\w+)$", pages, re.MULTILINE)
    modules = [getattr(graphprune, name) for name in re.findall(r"^\.\. automodule:: graphprune\.(\w+)$", pages, re.M)]
    described = {id(getattr(module, name)) for module in modules for name in module.__all__}
    public = [name for name in graphprune.__all__ if not name.startswith("_")]
    missing = [
        name
        for name in public
        if name not in named and id(getattr(graphprune, name)) not in described
        and getattr(graphprune, name) not in modules
    ]  # fmt: skip
    assert not missing and not set(named) - set(public) and len(set(named)) == len(named)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "dummy", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
