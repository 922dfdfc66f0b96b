"""A plan is a file that anyone may have written: its steps compute tensors, or nothing at all."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprune
from graphprune import GraphPruneError, Plan
from tests.plans.rewriting.literal_nets import NETS

X = {"ref": 0}


def planned() -> tuple[nn.Module, Any, dict[str, Any]]:
    torch.manual_seed(0)
    model, example, _ = NETS["view"]()
    return model, example, graphprune.plan(model, example, 0.5, output="graph").to_dict()


def steps_with(*added: list[Any]) -> list[Any]:
    """A network that takes x, does what is asked, and returns the last result."""
    steps = [["placeholder", "x", [], {}], *added]
    return [*steps, ["output", "output", [{"ref": len(steps) - 1}], {}]]


def call(target: str, *args: Any, **kwargs: Any) -> list[Any]:
    return ["call_function", target, list(args), kwargs]


def method(target: str, *args: Any) -> list[Any]:
    return ["call_method", target, list(args), {}]


def touch(path: str) -> str:
    return f"__import__('pathlib').Path({path!r}).touch()"


ATTACKS: dict[str, Any] = {
    "argument with code": lambda p: [["placeholder", f"x, y={touch(p)}", [], {}], ["output", "output", [X], {}]],
    "argument with a line": lambda p: [["placeholder", f"x):\n  {touch(p)}\n  return x\ndef f(x", [], {}]],
    "keyword with code": lambda p: steps_with(call("torch.relu", **{f"input=x) or {touch(p)} or print(a": 1})),
    "path with code": lambda p: steps_with(
        ["get_attr", f'training") or [e for e in [{touch(p)}]] or getattr(self, "training', [], {}]
    ),
    "module path with code": lambda p: steps_with(["call_module", f'stem") or ({touch(p)}) or (self, "', [X], {}]),
    "path to the code's globals": lambda p: steps_with(["get_attr", "forward.__globals__", [], {}]),
    "path to no tensor": lambda p: steps_with(["get_attr", "middle", [], {}]),
    "classes": lambda p: steps_with(call("builtins.getattr", X, "__class__")),
    "all classes": lambda p: steps_with(method("__subclasses__")),
    "call anything": lambda p: steps_with(["get_attr", "stem.weight", [], {}], method("__call__", X)),
    "reduce": lambda p: steps_with(method("__reduce_ex__", 2)),
    "attributes": lambda p: steps_with(method("__getattribute__", "__class__")),
    "set attributes": lambda p: steps_with(method("__setattr__", "data", 1)),
    "call Python": lambda p: steps_with(method("apply_", X)),
    "read a name that is data": lambda p: steps_with(call("builtins.getattr", X, X)),
    "files": lambda p: steps_with(call("torch.from_file", p, True, 8)),
    "files as an operator": lambda p: steps_with(call("torch.ops.aten.from_file", p, True, 8)),
    "files as an overload": lambda p: steps_with(call("torch.ops.aten.from_file.default", p, True, 8)),
    "libraries": lambda p: steps_with(call("torch.ops.load_library", p)),
    "builtins": lambda p: steps_with(call("builtins.eval", touch(p))),
    "comparison": lambda p: steps_with(call("graphprune.expect_comparison", "call", X, X, True, "")),
    "class": lambda p: steps_with(["build", "pathlib:Path", [p], {}]),
    "operation": lambda p: steps_with(["exec", touch(p), [], {}]),
    "value": lambda p: steps_with(call("torch.relu", {"torch": "load"})),
    "reference": lambda p: steps_with(call("torch.relu", {"ref": 99})),
    "depth": lambda p: steps_with(call("torch.relu", _deep(5000))),
}


def _deep(levels: int) -> Any:
    out: Any = 0
    for _ in range(levels):
        out = [out]
    return out


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_but_tensors_is_touched(name: str, tmp_path: Path) -> None:
    target = tmp_path / "touched"
    model, example, data = planned()
    hostile = copy.deepcopy(data)
    hostile["rewrites"][0]["steps"] = ATTACKS[name](str(target))
    with pytest.raises(GraphPruneError, match=r"not a plan|the plan|no comparison"):
        Plan.from_dict(hostile).apply(model)(example)
    assert not target.exists()


def test_the_plan_itself_is_fine() -> None:
    model, example, data = planned()
    assert Plan.from_dict(data).apply(model)(example).shape == (2, 4, 8, 8)
