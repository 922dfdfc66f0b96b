"""What users can rely on: the public names, their signatures, and the examples in their docstrings."""

from __future__ import annotations

import difflib
import doctest
import importlib
import pkgutil

import pytest

import graphprune
from tests.public_api import GOLDEN, public_api

MODULES = [m.name for m in pkgutil.walk_packages(graphprune.__path__, graphprune.__name__ + ".")]


def test_public_names_and_signatures_are_those_of_the_list() -> None:
    listed, found = GOLDEN.read_text(encoding="utf-8").splitlines(), public_api().splitlines()
    changes = "\n".join(difflib.unified_diff(listed, found, "tests/public_api.txt", "the package", lineterm="", n=0))
    assert not changes, (
        f"{changes}\nThe public interface is not the one that tests/public_api.txt promises. If that is meant: "
        "python -m tests.public_api --write, commit the file, and tell users in CHANGELOG.md."
    )


def test_the_list_shows_defaults_and_members() -> None:
    text = public_api()
    assert "def graphprune.plan(model: nn.Module, example_input: Any, ratio: float | Mapping[str, float] | None" in text
    assert "    graphprune.Plan.apply(self, model: nn.Module) -> nn.Module" in text
    assert "class graphprune.Group(index: int, name: str, kind: GroupKind, size: int, members: tuple" in text
    assert "scope: str = 'local', criterion: Criterionlike | None = None" in text
    assert "graphprune.runtimes.export_onnx = graphprune.export_onnx" in text
    assert " at 0x" not in text


@pytest.mark.parametrize("name", [graphprune.__name__, *MODULES])
def test_examples_in_docstrings(name: str) -> None:
    # "graphprune.trace" and others are functions as attributes of the package; import_module always gives the module
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not failed


def test_the_main_functions_have_examples() -> None:
    finder = doctest.DocTestFinder(recurse=False)
    for function in (graphprune.prune, graphprune.trace, graphprune.count):
        assert any(test.examples for test in finder.find(function)), function.__name__
