"""What is remembered of a constructor is what a reading of it says, wherever the object stands."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from graphprune.support.walking import all_modules
from graphprune.tracing.blueprints import Alikeness, Equation, below, equations_of, read, summary_of
from graphprune.tracing.origin import leaves


class Unit(nn.Module):
    def __init__(self, width: int, parts: int = 2, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.width, self.sizes = width, [width // parts, width * parts]
        self.a = nn.Conv2d(width, self.sizes[0], 1)
        self.b = nn.Sequential(nn.Conv2d(self.sizes[0], 2 * self.sizes[0], 1), act())
        self.scale = nn.Parameter(torch.ones(1, width, 1, 1))

    def rebuild(self, classes: int) -> None:
        self.head = nn.Linear(self.width, classes)


class Whole(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = width * 2
        self.stem, self.units = nn.Conv2d(3, width, 1), nn.ModuleList([Unit(width), Unit(width), Unit(width, 4)])


NETWORKS: dict[str, Any] = {
    "units": lambda: Whole(8),
    "mobilenet": lambda: torchvision.models.mobilenet_v3_small(weights=None),
    "regnet": lambda: torchvision.models.regnet_y_400mf(weights=None),
}


def texts(equations: tuple[Equation, ...], path: str) -> list[str]:
    """Without the numbers that tell objects apart in one reading, and the path that stands inside of names."""
    place = re.compile(rf"(?<![\w.]){re.escape(path)}(?=[.(:'])\.?") if path else re.compile("(?!)")
    return [re.sub(r"\?\d+", "?", place.sub("", f"{e.left} = {e.right}")) for e in equations]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_summary_is_what_a_reading_says(name: str) -> None:
    alikeness = Alikeness()
    for path, module in all_modules(NETWORKS[name]()).items():
        if not type(module).__module__.startswith("torch.nn"):
            reading, summary = read(path, module), summary_of(module, alikeness)
            assert texts(summary.equations, "") == texts(equations_of(reading), path)
            inner = {below(path, e.right.module) for e in summary.equations}
            assert inner == {e.right.module for e in equations_of(reading)}
            assert list(summary.values.values()) == list(reading.values.values())
            assert len(summary.definitions) == len(reading.definitions)


def test_modules_are_alike_by_class_plain_attributes_and_parts() -> None:
    def key(module: nn.Module) -> int | None:
        return Alikeness().key(module)

    assert key(Unit(8)) == key(Unit(8)) is not None
    other = Unit(8)
    other.width = 9
    named = Unit(8)
    named.a.groups = 3
    again = type("Unit", (Unit,), {})(8)
    for module in (other, named, again, Unit(8, 4), Unit(8, act=nn.Sigmoid), Whole(8)):
        assert key(module) != key(Unit(8))
    assert key(Whole(8).units) == key(Whole(8).units)


def test_modules_with_other_objects_are_like_nothing() -> None:
    unit, whole = Unit(8), Whole(8)
    unit.config = SimpleNamespace(width=8)
    assert Alikeness().key(unit) is None
    whole.units[1] = unit
    assert Alikeness().key(whole) is None and Alikeness().key(whole.units[0]) is not None


def test_classes_of_one_name_are_told_apart() -> None:
    """A notebook's cell that is run again makes another class, perhaps where the first one lay."""
    keys = set()
    for _ in range(20):
        made = type("Net", (nn.Module,), {})
        keys.add(Alikeness().key(made()))
        del made
    assert len(keys) == 20


def test_methods_are_part_of_what_is_remembered() -> None:
    alikeness, unit = Alikeness(), Unit(8)
    plain, more = summary_of(unit, alikeness), summary_of(unit, alikeness, ("rebuild",))
    assert set(plain.equations) <= set(more.equations)
    assert summary_of(Unit(8), Alikeness()).equations == plain.equations


def test_places_count_each_number_once() -> None:
    """What stands in an expression is found by its place."""
    for module in (Unit(8), Whole(8)):
        summary = summary_of(module, Alikeness())
        assert [summary.places[leaf] for leaf in summary.leaves] == list(range(len(summary.places)))
        for equation, side in zip(summary.equations, summary.sides, strict=True):
            assert [summary.leaves[place] for place in side.leaves] == list(leaves(equation.left))
            assert side.alone == (equation.left in summary.places)
        assert {summary.leaves[place] for place, _ in summary.computed} >= summary.definitions.keys()


def test_long_lists_are_told_apart() -> None:
    units = [Unit(8), Unit(8), Unit(8)]
    units[0].sizes, units[1].sizes, units[2].sizes = [1] * 500, [*[1] * 499, 2], [1] * 500
    keys = [Alikeness().key(unit) for unit in units]
    assert keys[0] == keys[2] != keys[1]
