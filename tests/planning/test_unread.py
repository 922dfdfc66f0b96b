"""Numbers that modules keep and the call does not read. What they must be says the class itself: the pruned network is
compared with one that was constructed narrower."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError
from graphprune.errors import GraphPruneWarning

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class _Pooled(nn.Module):
    """`stages`, then a linear head on their mean."""

    stages: nn.Module
    head: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.stages(x).relu().mean((2, 3)))
        return out


class Chained(_Pooled):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.num_features = self.head_width = width
        self.stages, self.head = nn.Conv2d(3, self.num_features, 3), nn.Linear(width, 5)


class Computed(_Pooled):
    """The number is computed, and layers are multiples of it."""

    def __init__(self, width: int = 32, share: float = 0.5) -> None:
        super().__init__()
        self.c = int(width * share)
        self.share = share
        self.stages = nn.Sequential(nn.Conv2d(3, 2 * self.c, 3), nn.Conv2d(2 * self.c, self.c, 1))
        self.head = nn.Linear(self.c, 5)


class Listed(_Pooled):
    """A list of widths, in a loop."""

    def __init__(self, widths: Iterable[int] = (8, 16, 32)) -> None:
        super().__init__()
        self.widths = list(widths)
        layers: list[nn.Module] = []
        inside = 3
        for i, width in enumerate(self.widths):
            layers.append(nn.Conv2d(inside, width, 1))
            if i:
                layers += [nn.BatchNorm2d(width)]
            inside = width
        self.stages, self.head = nn.Sequential(*layers), nn.Linear(inside, 5)
        self.num_features = inside


class Block(nn.Module):
    def __init__(self, inside: int, outside: int, times: int = 2) -> None:
        super().__init__()
        self.hidden = outside * times
        self.outside = outside
        self.enter, self.leave = nn.Conv2d(inside, self.hidden, 1), nn.Conv2d(self.hidden, self.outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.leave(self.enter(x).relu())
        return out


class Nested(_Pooled):
    """Numbers handed on to modules inside, by a comprehension."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.width = width
        first = [Block(3, width)]
        self.stages = nn.Sequential(*first, *[Block(width, width) for _ in range(depth - 1)])
        self.head = nn.Linear(self.stages[-1].outside, 5)


class Derived(Nested):
    """A base class builds; the number comes from one of its layers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width=width, depth=2)
        self.pooled = self.head.in_features
        self.last = self.stages[-1].leave.out_channels


def _conv(inside: int, outside: int, **options: Any) -> nn.Module:
    return nn.Conv2d(inside, outside, **{"kernel_size": 1, **options})


class Helped(_Pooled):
    """By methods and functions, with a branch."""

    def __init__(self, width: int = 16, deep: bool = True, norm: type[nn.Module] | None = nn.BatchNorm2d) -> None:
        super().__init__()
        self.planes = 3
        self.stages = self._stage(width, deep, norm)
        self.head = nn.Linear(self.planes, 5)

    def _stage(self, width: int, deep: bool, norm: Any) -> nn.Module:
        layers = nn.Sequential()
        for i in range(2):
            layers.append(_conv(self.planes, width))
            if norm is not None:
                layers.add_module(f"norm{i}", norm(width))
            self.planes = width
        return layers if deep else layers[:1]


class Later(_Pooled):
    """Only another method builds with the number."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.num_features = 0
        self._build(width)
        self.num_features = int(str(width))

    def _build(self, width: int) -> None:
        self.stages, self.head = nn.Conv2d(3, width, 1), nn.Linear(width, 5)

    def reset(self, classes: int) -> None:
        self.head = nn.Linear(self.num_features, classes) if classes else nn.Identity()


class Tokens(nn.Module):
    """Heads and their product; forward reads the features of a head alone. Parameters of its own."""

    def __init__(self, heads: int = 4, features: int = 4, dim: int = 12) -> None:
        super().__init__()
        self.n_heads, self.features, self.dim = heads, features, dim
        self.inner = self.n_heads * self.features
        self.q, self.k, self.v = (nn.Linear(dim, self.inner) for _ in range(3))
        self.out = nn.Linear(self.inner, dim)
        self.place = nn.Parameter(torch.randn(1, 6, dim))
        self.norm, self.last = nn.LayerNorm(dim), nn.Linear(dim, 2)
        self.first = nn.Linear(3, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(2).mT[:, :6]) + self.place
        q, k, v = (f(self.norm(x)).unflatten(-1, (-1, self.features)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = (q @ k.mT).softmax(-1) @ v
        out: Tensor = self.last(x + self.out(y.transpose(1, 2).flatten(2)))
        return out


def numbers(model: nn.Module) -> dict[str, Any]:
    """Everything whole that modules of the user's keep."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        if not type(module).__module__.startswith("torch")
        for name, value in vars(module).items()
        if type(value) is int or (type(value) in (list, tuple) and all(type(i) is int for i in value))
    }


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


NARROWER: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], dict[str, Any]]] = {
    "chained": (Chained, lambda: Chained(8), {}),
    "computed": (Computed, lambda: Computed(16), {}),
    "listed": (Listed, lambda: Listed((4, 8, 16)), {}),
    "nested": (Nested, lambda: Nested(8), {}),
    "derived": (Derived, lambda: Derived(8), {}),
    "helped": (Helped, lambda: Helped(8), {}),
    "helped without norm": (lambda: Helped(16, norm=None), lambda: Helped(8, norm=None), {}),
    "later": (Later, lambda: Later(8), {}),
    "heads": (Tokens, lambda: Tokens(2), {"granularity": "heads"}),
    "features": (Tokens, lambda: Tokens(4, 2), {"granularity": "head features"}),
    "stream": (Tokens, lambda: Tokens(4, 4, 6), {"granularity": "embedding"}),
}


@pytest.mark.parametrize("name", NARROWER)
def test_as_if_made_narrower(name: str) -> None:
    make, narrower, options = NARROWER[name]
    model = make().eval()
    before = numbers(model)
    small = graphprune.prune(model, X, 0.5, round_to=1, fold_bn=False, **options)
    assert shapes(small) == shapes(narrower()), "the reference is not what pruning made"
    assert numbers(small) == numbers(narrower())
    assert numbers(model) == before


def test_other_methods_fit_the_pruned_network() -> None:
    small: Any = graphprune.prune(Later().eval(), X, 0.5)
    small.reset(7)
    assert small(X).shape == (2, 7)


def test_random_stacks() -> None:
    """Widths of all sizes, cut by random fractions: the list is what the layers have."""
    choose = random.Random(0)
    for _ in range(12):
        widths = [choose.randint(3, 40) for _ in range(choose.randint(1, 5))]
        small: Any = graphprune.prune(Listed(widths).eval(), X, choose.uniform(0.1, 0.8), fold_bn=False)
        convs = [m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)]
        assert small.widths == convs and small.num_features == small.head.in_features == convs[-1]


class Interval(Chained):
    """A number that only happens to be equal, and one that is."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.log_interval, self.seed = 16, 32


def test_an_equal_number_stays_and_is_listed() -> None:
    plan = graphprune.plan(Interval().eval(), X, 0.5)
    assert {a.name for a in plan.attributes} == {"num_features", "head_width"}
    assert [(u.name, u.value) for u in plan.unsettled] == [("log_interval", 16)]
    assert "log_interval stays 16" in plan.summary()
    small: Any = plan.apply(Interval().eval())
    assert (small.log_interval, small.seed, small.num_features) == (16, 32, 8)
    again = graphprune.Plan.from_dict(plan.to_dict())
    assert again == plan


def test_the_user_says_what_follows() -> None:
    model = Interval().eval()
    asked = graphprune.plan(model, X, 0.5, sizes={"log_*": "follow", "head_width": "hold"})
    assert {(a.name, a.new) for a in asked.attributes} == {("num_features", 8), ("log_interval", 8)}
    assert not asked.unsettled
    small: Any = graphprune.prune(model, X, 0.5, sizes={"num_features": "hold"})
    assert small.num_features == 16 and small.head_width == 8


class Apart(_Pooled):
    """Two layers of one number; only one of them can go."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.stages = nn.Sequential(nn.Conv2d(3, self.width, 1), nn.Conv2d(self.width, self.width, 1))
        self.head = nn.Linear(self.width, 5)


def test_a_number_for_widths_that_differ_is_listed() -> None:
    model = Apart().eval()
    plan = graphprune.plan(model, X, 0.5, ignore=["stages.1"])
    assert not plan.attributes and [u.name for u in plan.unsettled] == ["width"]
    assert "8 and 16" in plan.unsettled[0].why
    with pytest.raises(GraphPruneError, match="new widths differ"):
        ratios = {"stages.0": 0.25, "stages.1": 0.5}
        graphprune.plan(model, X, ratios, round_to=1, sizes={"width": "follow"})


def test_a_class_without_source() -> None:
    space: dict[str, Any] = {"nn": nn}
    code = """
class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.width = 16
        self.stages, self.head = nn.Conv2d(3, self.width, 1), nn.Linear(self.width, 5)
    def forward(self, x):
        return self.head(self.stages(x).mean((2, 3)))
"""
    exec(compile(code, "<nowhere>", "exec"), space)
    plan = graphprune.plan(space["Hidden"]().eval(), X, 0.5)
    assert [u.name for u in plan.unsettled] == ["width"] and not plan.attributes
    followed = graphprune.plan(space["Hidden"]().eval(), X, 0.5, sizes={"width": "follow"})
    assert [str(a) for a in followed.attributes] == ["width: 16 -> 8"]


class Looping(Chained):
    """The call itself uses the number where no recording sees it."""

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.num_features):
            x = x + i
        return super().forward(x)


class Asking(Chained):
    def forward(self, x: Tensor) -> Tensor:
        if self.num_features > 12:
            x = x * 2
        return super().forward(x)


@pytest.mark.parametrize(("kind", "why"), [(Looping, "loops over it"), (Asking, "the call asks whether")])
def test_what_the_call_itself_does_with_a_number_stays(kind: type[nn.Module], why: str) -> None:
    model = kind().eval()
    plan = graphprune.plan(model, X, 0.5)
    assert why in next(u.why for u in plan.unsettled if u.name == "num_features")
    graphprune.prune(model, X, 0.5)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"num_featurs": "follow"}, "did you mean"),
        ({"num_features": "maybe"}, "sizes\\['num_features'\\]"),
        (["num_features"], "expected a dict"),
        ({3: "hold"}, "expected a dict"),
    ],
)
def test_what_sizes_does_not_take(sizes: Any, said: str) -> None:
    with pytest.raises(GraphPruneError, match=said):
        graphprune.plan(Chained().eval(), X, 0.5, sizes=sizes)


class Reading(Chained):
    def forward(self, x: Tensor) -> Tensor:
        y = self.stages(x).relu().mean((2, 3))
        out: Tensor = self.head(y.view(-1, self.num_features))
        return out


def test_a_size_that_the_call_reads_cannot_be_held() -> None:
    with pytest.raises(GraphPruneError, match="read by the call itself"):
        graphprune.plan(Reading().eval(), X, 0.5, sizes={"num_features": "hold"})


def test_nothing_goes_nothing_changes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphPruneWarning)
        plan = graphprune.plan(Interval().eval(), X, 0.0)
    assert not plan.attributes and not plan.unsettled


def test_settings_are_no_numbers_of_modules() -> None:
    """What a configuration holds is `fit_config`'s matter."""

    class Configured(Chained):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(width=16)

    small: Any = graphprune.prune(Configured().eval(), X, 0.5)
    assert small.config.width == 16


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "densenet121", "vit_tiny_patch16_224"])
def test_classifiers_of_timm_get_new_heads(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"img_size": 64} if name.startswith("vit") else {}
    model, x = timm.create_model(name, num_classes=4, **options).eval(), torch.randn(1, 3, 64, 64)
    small = graphprune.prune(model, x, 0.5)
    small.reset_classifier(6)
    assert small(x).shape == (1, 6) and small.num_features < model.num_features


def test_yolo_blocks() -> None:
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    model, x = tasks.DetectionModel("yolov8n.yaml", verbose=False).eval(), torch.randn(1, 3, 64, 64)
    small = graphprune.prune(model, x, 0.5, verify=False)
    for block in small.modules():
        if type(block).__name__ == "C2f":
            assert block.c == block.cv1.conv.out_channels // 2
            y = torch.randn(1, block.cv1.conv.in_channels, 8, 8)
            torch.testing.assert_close(block.forward_split(y), block.forward(y))


def test_heads_of_a_t5() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config).eval()
    tokens = torch.randint(3, 50, (1, 6))
    small = graphprune.prune(model, {"input_ids": tokens, "decoder_input_ids": tokens}, 0.5, granularity="heads")
    found = [m for m in small.modules() if type(m).__name__ == "T5Attention"]
    assert [(m.n_heads, m.inner_dim, m.q.out_features) for m in found] == [(2, 16, 16)] * 9
