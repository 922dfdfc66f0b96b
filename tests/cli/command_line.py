"""Calling the command line in this process, in a folder with a module of small models."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from graphprune.cli import app
from graphprune.importance import registry

ZOO = '''
import torch
from torch import nn

import graphprune

print("imported")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        print("called")
        return self.head(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))

    @classmethod
    def small(cls):
        return cls(), torch.randn(2, 3, 8, 8)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.body, self.out = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.out.weight = self.table.weight

    def forward(self, tokens, mask):
        return self.out(self.body(self.table(tokens)).relu() * mask)


@graphprune.criterion("zoo_first")
def zoo_first(context, group):
    return torch.arange(group.size, 0, -1).double()


made = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
number = 3


def net():
    return Net.small()


def seen():
    model, example = Net.small()
    with torch.no_grad():
        for _ in range(40):
            model.train()(torch.randn(16, 3, 8, 8) + 1)
    return model.eval(), example


def counted():
    model, example = Net.small()
    model.kept = 8
    return model, example


def tokens():
    return Tied()


def meta():
    with torch.device("meta"):
        return Net(), torch.empty(1, 3, 8, 8)


def broken():
    raise RuntimeError("first line\\nsecond line")


def needs(width):
    return nn.Linear(width, width)


def nothing():
    return None


def batches():
    x = torch.randn(24, 3, 8, 8)
    return list(zip(x.split(8), (x.mean((1, 2, 3)) > 0).long().split(8)))


def split():
    x = batches()
    return x, x[:1]
'''


def zoo_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make `folder` the current directory, with the module `zoo` in it, until the test is over."""
    (folder / "zoo.py").write_text(ZOO, encoding="utf-8")
    (folder / "unimportable.py").write_text("import there_is_no_such_package\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for table in ("_values", "_origins"):
        monkeypatch.setattr(registry.CRITERIA, table, dict(getattr(registry.CRITERIA, table)))
    yield
    for name in ("zoo", "unimportable"):
        sys.modules.pop(name, None)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), terminal_width=200, env={"COLUMNS": "200"})


def ok(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def as_json(*arguments: str) -> Any:
    """Standard output must be one JSON object and nothing else."""
    return json.loads(ok(*arguments, "--json"))


def failed(*arguments: str) -> str:
    """The one line of an error that the user can act on."""
    result = run(*arguments)
    assert result.exit_code == 1 and result.stdout == "", result.output
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.splitlines()[-1] == line
    return line


def wrong(*arguments: str) -> str:
    """Bad usage."""
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == "", result.output
    return " ".join(result.stderr.replace("│", " ").split())


def written() -> set[str]:
    """Files in the current directory that no test put there."""
    return set(os.listdir()) - {"zoo.py", "unimportable.py", "__pycache__"}
