"""What a model returns in training mode only is an output: it stays as wide as it was."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.tracing.branching import branches_on_training
from graphprune.tracing.example import result_tensors

Pair = collections.namedtuple("Pair", "y deep")


@dataclasses.dataclass
class Record:
    y: Tensor
    deep: Tensor | None = None


class Net(nn.Module):
    """A body, a head, and a deep head whose result training uses; `finish` says how."""

    def __init__(self, finish: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.deep, self.out = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1), nn.Conv2d(16, 4, 1)
        self.kept: list[Any] = [None]
        self.__dict__["finish"] = finish

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.body(x))
        return self.finish(self, h, self.out(h))


class Stacked(Net):
    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.body(x))
        y, deep = self.out(h), self.deep(h)
        return torch.stack([y, deep], 1) if self.training else y


class Kept(Net):
    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.body(x))
        self.kept[0] = self.deep(h)
        y = self.out(h)
        if self.training:
            return [y, *self.kept]
        return y


class Feature(Net):
    """The feature map itself is returned too."""

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.body(x))
        y = self.out(h)
        return (y, h) if self.training else y


class Chosen(Net):
    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.body(x))
        y, deep = self.out(h), self.deep(h)
        result = deep if self.training else y
        return result


class InCondition(Net):
    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.body(x))
        found = {"y": self.out(h)}
        if self.training and self.out.bias is not None:
            found["deep"] = self.deep(h)
        return found


class ByName(Net):
    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.body(x))
        y = self.out(h)
        return Pair(y, self.deep(h)) if getattr(self, "training") else y  # noqa: B009


class Inherited(Kept):
    pass


def finish(y: Tensor, deep: Tensor, training: bool) -> Any:
    return (y, deep) if training else y


def look_up(net: nn.Module, y: Tensor, deep: Tensor) -> Any:
    if net.training:
        return y, deep
    return y


class PassedOn(Net):
    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.body(x))
        return finish(self.out(h), self.deep(h), self.training)


class ByHelper(Net):
    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.body(x))
        return look_up(self, self.out(h), self.deep(h))


class ByStaticMethod(Net):
    @staticmethod
    def of(net: nn.Module, y: Tensor, deep: Tensor) -> Any:
        return (y, deep) if net.training else y

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.body(x))
        return self.of(self, self.out(h), self.deep(h))


class ByProperty(Net):
    @property
    def deeply(self) -> bool:
        return self.training

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.body(x))
        y = self.out(h)
        return (y, self.deep(h)) if self.deeply else y


class AsIndex(Net):
    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.body(x))
        return (self.out(h), self.deep(h))[: 1 + self.training]


class FeatureByFlag(Net):
    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.body(x))
        return finish(self.out(h), h, self.training)


@dataclasses.dataclass(slots=True)
class SlottedRecord:
    y: Tensor
    deep: Tensor | None = None


class Slotted(Net):
    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.body(x))
        return SlottedRecord(self.out(h), self.deep(h) if self.training else None)


def _method(net: Net, h: Tensor, y: Tensor) -> Any:
    deep = net.deep(h)
    return Record(y, deep) if net.training else Record(y)


FORMS = [
    Stacked, Kept, Feature, Chosen, InCondition, ByName, Inherited, PassedOn, ByHelper, ByStaticMethod, ByProperty,
    AsIndex, FeatureByFlag, Slotted,
]  # fmt: skip


def shapes(out: Any) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in result_tensors(out)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [*FORMS, _method])
def test_what_training_returns_is_as_wide_as_before(make: Any, training: bool) -> None:
    net = (Net(_method) if make is _method else make(lambda *_: None)).train(training)
    x = torch.randn(2, 3, 6, 6)
    small = graphprune.prune(net, x, 0.5, fold_bn=False)
    assert shapes(small.train()(x)) == shapes(net.train()(x)) and shapes(small.eval()(x)) == shapes(net.eval()(x))
    assert len(small.body.weight) == (16 if make in (Feature, FeatureByFlag) else 8)


class Dropped(nn.Module):
    """Functional dropout between layers, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.p = nn.Linear(4, 8), nn.Linear(8, 3), 0.5

    def forward(self, x: Tensor) -> Any:
        h = nn.functional.dropout(self.a(x), self.p, self.training)
        y = self.b(nn.functional.dropout(h, 0.0 if not self.training else self.p))
        if self.training:
            return y, h.mean()
        return y


def test_dropout_does_not_double_the_graph() -> None:
    net, x = Dropped().eval(), torch.randn(2, 4)
    trace = graphprune.trace(net, x).trace
    names = [str(n.target) for n in trace.graph.nodes if n.op == "call_function"]
    assert names.count("aten.linear.default") == 2 and any("mean" in name for name in names)
    assert len(graphprune.prune(net, x, 0.5).a.weight) == 4


class _Passes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


class _Number(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1 if self.training else 0.0)


class _OwnNumber(nn.Module):
    rate = 0.1

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.0 if not self.training else self.rate)


class _Off(nn.Module):
    checkpointing = False

    def forward(self, x: Tensor) -> Any:
        if self.checkpointing and self.training:
            return x, x
        return x


class _OffByName(nn.Module):
    checkpointing = False

    def forward(self, x: Tensor) -> Any:
        if getattr(self, "checkpointing", False) and self.training and x.numel():
            return x, x
        return x


class _On(_Off):
    checkpointing = True


class _Stores(nn.Module):
    def forward(self, x: Tensor) -> Any:
        training = self.training
        return (x, x) if training else x


class _Helper(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return self._finish(x)

    def _finish(self, x: Tensor) -> Any:
        if not self.training:
            return x
        return x, x


class _Inner(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return next((y if not self.training else (y, y)) for y in [x])


@pytest.mark.parametrize("kind", [_Passes, _Number, _OwnNumber, _Off, _OffByName, nn.Dropout, nn.BatchNorm2d])
def test_code_that_does_the_same_in_both_modes(kind: Any) -> None:
    assert not branches_on_training([kind(3) if kind in (nn.BatchNorm2d,) else kind()])


@pytest.mark.parametrize("kind", [_On, _Stores, _Helper, _Inner, *FORMS])
def test_code_that_may_not(kind: Any) -> None:
    assert branches_on_training([kind(lambda *_: None) if issubclass(kind, Net) else kind()])
