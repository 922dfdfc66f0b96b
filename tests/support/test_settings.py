"""What holds settings, what does not, and how they are read and set."""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import enum
import functools
import logging
import threading
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from graphprune.support.settings import is_settings, is_settings_object, settings_of, with_setting


@dataclasses.dataclass
class Data:
    width: int = 4


@dataclasses.dataclass(frozen=True)
class Frozen:
    width: int = 4


class Plain:
    def __init__(self) -> None:
        self.width = 4


class Named(NamedTuple):
    width: int = 4


class Attributes(dict[str, int]):
    __getattr__ = dict.__getitem__


class Twice(dict[str, int]):
    def __setattr__(self, name: str, value: int) -> None:
        super().__setattr__(name, value)
        super().__setitem__(name, value)


class Guarded(collections.OrderedDict[str, int]):
    def __setitem__(self, name: str, value: int) -> None:
        raise AssertionError("it cannot be changed")


def twice() -> Twice:
    made = Twice()
    made.width = 4
    return made


def guarded() -> Guarded:
    made = Guarded()
    dict.__setitem__(made, "width", 4)
    return made


OBJECTS: list[Any] = [
    Data(), Frozen(), Plain(), SimpleNamespace(width=4), argparse.Namespace(width=4), Attributes(width=4), twice(),
    guarded(),
]  # fmt: skip
TABLES: list[Any] = [{"width": 4}, collections.OrderedDict(width=4), Named()]


class Mode(enum.Enum):
    FAST = 4


class Number(enum.IntEnum):
    FAST = 4


class OneOfItsKind:
    def __deepcopy__(self, memo: Any) -> OneOfItsKind:
        return self


class Called:
    width = 4

    def __call__(self) -> None: ...


class Closing(Plain):
    def __del__(self) -> None: ...


@dataclasses.dataclass
class Module(nn.Module):
    width: int = 4


NEITHER: list[Any] = [
    nn.Linear(1, 1), Module(), torch.zeros(1), nn.Parameter(torch.zeros(1)), torch.Size([4]), torch.float32, torch,
    lambda: 4, Data, Plain().__init__, functools.partial(int), len, Mode.FAST, Number.FAST, Mode, OneOfItsKind(),
    Called(), Closing(), logging.getLogger(), threading.Lock(), Path("x"), 4, 4.0, True, None, "width", b"w", [4], (4,),
    {4}, range(4), {4: 4}, MappingProxyType({"width": 4}), object(), torch.Generator(), collections.Counter(),
    collections.UserDict(width=4), collections.defaultdict(int, width=4), collections.deque([4]),
]  # fmt: skip


@pytest.mark.parametrize("value", OBJECTS, ids=lambda v: type(v).__name__)
def test_objects(value: Any) -> None:
    assert is_settings(value) and is_settings_object(value)


@pytest.mark.parametrize("value", TABLES, ids=lambda v: type(v).__name__)
def test_dicts_and_named_tuples(value: Any) -> None:
    assert is_settings(value) and not is_settings_object(value)


@pytest.mark.parametrize("value", NEITHER, ids=lambda v: type(v).__name__)
def test_neither(value: Any) -> None:
    assert not is_settings(value) and not is_settings_object(value)


@pytest.mark.parametrize("value", [*OBJECTS, *TABLES], ids=lambda v: type(v).__name__)
def test_read_and_set(value: Any) -> None:
    assert settings_of(value) == {"width": 4}
    mine = copy.copy(value) if not isinstance(value, Guarded) else guarded()
    changed = with_setting(mine, "width", 2)
    assert settings_of(changed) == {"width": 2} and type(changed) is type(value)
    assert (changed is mine) != isinstance(value, Named)
    assert settings_of(value) == {"width": 4}
    for read in (lambda v: v.width, lambda v: v["width"]):
        try:
            expected = read(value)
        except (AttributeError, TypeError, KeyError):
            continue
        assert expected == 4 and read(changed) == 2


def test_configurations_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(num_hidden_layers=3)
    assert is_settings_object(config) and settings_of(config)["num_hidden_layers"] == 3
    assert with_setting(config, "num_hidden_layers", 2).num_hidden_layers == 2


def test_configurations_of_diffusers() -> None:
    pytest.importorskip("diffusers")
    from diffusers.configuration_utils import FrozenDict

    config = FrozenDict(width=4)
    assert is_settings_object(config) and settings_of(config)["width"] == 4
    with_setting(config, "width", 2)
    assert config["width"] == config.width == 2
