"""What modules, tensors, names and patterns mean, against a slow reference, and the same wherever they are taken."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError, sparsity
from graphprune.tracing.matching import NameTable, items_of, modules_around

PARTS = ("a", "b", "ab", "0", "1", "weight", "[a]")


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """Trees of modules, in which modules and parameters are registered more than once."""
    modules: list[nn.Module] = [Part()]
    for _ in range(draw(st.integers(1, 7))):
        new = Part() if draw(st.booleans()) else nn.Module()
        owner = draw(st.sampled_from(modules))
        free = [name for name in PARTS if not hasattr(owner, name)]
        if free:
            owner.add_module(draw(st.sampled_from(free)), new)
            modules.append(new)
    for owner in modules:
        free = [name for name in PARTS if not hasattr(owner, name)]
        if free and draw(st.booleans()):
            shared = draw(st.sampled_from(modules))
            if all(m is not owner for m in shared.modules()):
                owner.add_module(free[0], shared)
        if isinstance(owner, Part) and draw(st.integers(0, 4)) == 0:
            owner.weight = modules[0].weight
    return modules[0]


def every_name(model: nn.Module) -> dict[str, Any]:
    """Name -> module or tensor."""
    found = dict(model.named_modules(remove_duplicate=False))
    found |= dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def above(name: str) -> list[str]:
    """The name, and those of the modules around it, from the outermost."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def slowly_hit(item: Any, names: dict[str, Any]) -> dict[str, str]:
    """Name -> the outermost name at or above it that the item names."""
    out = {}
    for name in names:
        for other in above(name):
            if not isinstance(item, str):
                hit = names[other] is item
            else:
                hit = other == item if item in names else fnmatch.fnmatchcase(other, item)
            if hit:
                out[name] = other
                break
    return out


def slowly_meant(item: Any, names: dict[str, Any]) -> set[str]:
    hit = {id(names[name]) for name in slowly_hit(item, names)}
    return {name for name, value in names.items() if id(value) in hit}


ITEMS = st.lists(st.sampled_from([*PARTS, "*", "?", ".", "[ab]", "weight", "bias"]), max_size=5).map("".join)


@settings(max_examples=300)
@given(networks(), st.lists(ITEMS, min_size=1, max_size=4), st.data())
def test_every_item_means_what_the_reference_says(model: nn.Module, texts: list[str], data: st.DataObject) -> None:
    names, table = every_name(model), NameTable.of(model)
    known = sorted(names)
    items: list[Any] = [*texts, data.draw(st.sampled_from(known)), names[data.draw(st.sampled_from(known))]]
    fitting = []
    for item in items:
        expected = slowly_meant(item, names)
        if not expected:
            with pytest.raises(GraphPruneError, match="x: no module or parameter matches"):
                table.meant(item, "x")
            continue
        fitting.append(item)
        meant = table.meant(item, "x")
        assert meant.keys() == expected
        direct = slowly_hit(item, names)
        if isinstance(item, str):
            assert {name: hit for name, hit in meant.items() if name in direct} == direct
        (text,) = table.texts(item, "x")
        assert isinstance(text, str) and slowly_meant(text, names) == expected
    everything = table.all_meant(fitting, "x")
    assert everything == {name for item in fitting for name in slowly_meant(item, names)}
    around = {other for name in everything for other in above(name)[:-1]}
    assert sorted(modules_around(everything)) == sorted(around)


@settings(max_examples=200)
@given(networks(), st.lists(ITEMS, min_size=1, max_size=5, unique=True))
def test_of_several_the_innermost_counts_names_before_patterns(model: nn.Module, texts: list[str]) -> None:
    names, table = every_name(model), NameTable.of(model)
    fitting = [text for text in texts if slowly_meant(text, names)]
    modules = dict(model.named_modules(remove_duplicate=False))
    ranked = table.ranked(fitting, "ratio")
    same = {name: [n for n in names if names[n] is names[name]] for name in names}
    for name in names:
        candidates = []
        for place, text in enumerate(fitting):
            for other in same[name]:
                hit = slowly_hit(text, names).get(other)
                if hit is not None:
                    module = hit if hit in modules else hit.rpartition(".")[0]
                    candidates.append((len(module), text in names, len(text), -place, text))
        if not candidates:
            assert name not in ranked
        else:
            assert max(ranked[other] for other in same[name])[1] == max(candidates)[-1]


def block(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 1), nn.ModuleList(block(8) for _ in range(3)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.body:
            x = x + layer(x)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


X = torch.randn(1, 3, 6, 6)
BUDGET = graphprune.Budget(macs=0.5)
SELECTORS: dict[str, Callable[[Net], Any]] = {
    "name": lambda m: "body.1", "in a list": lambda m: ["body.1"], "module": lambda m: m.body[1],
    "of both": lambda m: (m.body[1][0], "body.1.2"), "parameters": lambda m: [m.body[1][0].weight, m.body[1][2].weight],
    "pattern": lambda m: "body.[1]", "deep pattern": lambda m: "*.1.?", "of parameters": lambda m: "body.1.*weight",
    "several": lambda m: iter(["body.1.0.weight", m.body[1][2]]),
}  # fmt: skip


def untouched(plan: graphprune.Plan) -> set[str]:
    return {name for name in plan.structure if name.endswith("weight") and 0 not in plan.removed.get(name, {})}


@pytest.mark.parametrize("name", SELECTORS)
def test_one_meaning_everywhere(name: str) -> None:
    """What is ignored is ignored by plan, layers, kernels and masks alike, however it is said."""
    torch.manual_seed(0)
    model, choose = Net().eval(), SELECTORS[name]
    widths = graphprune.plan(model, X, 0.5, ignore=choose(model))
    assert {n for n in untouched(widths) if n.startswith("body")} >= {"body.1.0.weight", "body.1.2.weight"}
    assert "body.0.0.weight" not in untouched(widths) and "body.2.0.weight" not in untouched(widths)
    layers = graphprune.plan(model, X, 0.9, granularity="layer", ignore=choose(model))
    gone = {path for found in layers.layers for path in found.modules}
    assert layers.layers and not any(path.startswith("body.1") for path in gone)
    kernels = graphprune.plan_kernels(model, X, 0.99, ignore=choose(model))
    assert {n for n in kernels.removed if n.startswith("body")} == {"body.0.0.weight", "body.2.0.weight"}


@pytest.mark.parametrize("name", SELECTORS)
def test_masks_leave_out_the_same(name: str) -> None:
    model = Net()
    sparsity.magnitude(model, 0.5, "layer", ignore=SELECTORS[name](model))
    assert sparsity.masks(model).keys() == {
        "stem.weight", "head.weight", *(f"body.{i}.{j}.weight" for i in (0, 2) for j in (0, 2))
    }  # fmt: skip
    other = Net()
    sparsity.magnitude(other, 0.5, "layer", parameters=SELECTORS[name](other))
    assert sparsity.masks(other).keys() == {"body.1.0.weight", "body.1.2.weight"}


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        ("bdy", "ignore: no module or parameter matches 'bdy'; did you mean 'body'?"),
        ("body.7", "ignore: no module or parameter matches 'body.7'; did you mean 'body.2'?"),
        ("zzz*", "ignore: no module or parameter matches 'zzz*'; see model.named_modules()"),
        (nn.Linear(1, 1), "ignore: Linear is no module of this model"),
        (nn.Parameter(torch.zeros(1)), "ignore: Parameter is no parameter or buffer of this model"),
        ([3], "ignore: expected modules, parameters, names or patterns, got int"),
        (3, "ignore: expected modules, parameters, names or patterns, got int"),
        ([None], "ignore: expected modules, parameters, names or patterns, got NoneType"),
    ],
)
def test_one_answer_to_what_is_not_there(ignore: Any, message: str) -> None:
    calls: list[Callable[[nn.Module], Any]] = [
        lambda m: graphprune.plan(m, X, 0.5, ignore=ignore),
        lambda m: graphprune.plan(m, X, 0.5, granularity="layer", ignore=ignore),
        lambda m: graphprune.plan(m, X, budget=BUDGET, granularity=["layer", "channels"], ignore=ignore),
        lambda m: graphprune.plan_kernels(m, X, ignore=ignore),
        lambda m: graphprune.prune_gradually(m, X, 0.5, steps=1, ignore=ignore),
        lambda m: graphprune.sensitivity(m, X, [X], ignore=ignore),
        lambda m: sparsity.Channels(X, ignore=ignore)(m, 0.5),
        lambda m: sparsity.magnitude(m, 0.5, ignore=ignore),
        lambda m: sparsity.n_m(m, ignore=ignore),
        lambda m: sparsity.lottery_ticket(m, lambda net, a, b: None, 0.5, steps=1, rounds=1, ignore=ignore),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(GraphPruneError) as caught:
            call(Net().eval())
        assert str(caught.value).startswith(message), str(caught.value)


@pytest.mark.parametrize("name", SELECTORS)
def test_parts_of_a_model_are_parts_of_its_copies(name: str) -> None:
    """Where a model is pruned step by step, or trained in between, what is ignored stays ignored."""
    model = Net().eval()
    channels = sparsity.Channels(X, ignore=SELECTORS[name](model), round_to=1)
    small = channels(channels(model, 0.25), 0.5)
    gradual = graphprune.prune_gradually(model, X, 0.5, steps=2, ignore=SELECTORS[name](model), round_to=1)
    data = [(X, torch.zeros(1, dtype=torch.long))]
    options = {"ignore": SELECTORS[name](model), "round_to": 1}
    trained = graphprune.pipeline(
        model, X, data, sparsity=0.5, finetune_epochs=2, prune_epochs=2, schedule="cubic", options=options,
        progress=False,
    ).model  # fmt: skip
    for net in (small, gradual, trained):
        assert [layer[0].out_channels for layer in net.body] == [4, 8, 4]


def test_a_shared_module_is_ignored_under_each_of_its_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(8, 8), nn.Linear(8, 2)
            self.b, self.first = self.a, nn.Linear(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.b(self.a(self.first(x)).relu()).relu())  # type: ignore[no-any-return]

    model, x = Twice().eval(), torch.randn(2, 3)
    for ignore in ("a", "b", model.a, model.b.weight, "b.weight"):
        plan = graphprune.plan(model, x, 0.5, ignore=ignore)
        assert not {"a.weight", "b.weight"} & plan.removed.keys(), ignore
    table = NameTable.of(model)
    assert table.meant("b", "x").keys() == {"a", "a.weight", "a.bias", "b", "b.weight", "b.bias"}


@pytest.mark.parametrize(
    ("ratio", "kept"),
    [
        ({"*": 0.5, "body.1": 0.25}, (4, 6, 4)),
        ({"body.1": 0.25, "*": 0.5}, (4, 6, 4)),
        ({"body.?": 0.5, "body.1": 0.25}, (4, 6, 4)),  # as long as each other
        ({"body.[012]": 0.5, "body.1": 0.25}, (4, 6, 4)),  # longer, and says less
        ({"body": 0.25, "*.0.weight": 0.5}, (4, 4, 4)),
        ({"body.1.0": 0.25, "body.?.*.weight": 0.5}, (4, 6, 4)),
        ({"body.1": 0.25}, (8, 6, 8)),
    ],
)
def test_which_ratio_counts(ratio: dict[str, float], kept: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    small = graphprune.prune(model, X, ratio, round_to=1)
    assert tuple(layer[0].out_channels for layer in small.body) == kept


def test_items() -> None:
    part, tensor = nn.ModuleList(), torch.zeros(3)
    assert items_of(None, "x") == [] and items_of("name", "x") == ["name"]
    assert items_of(part, "x") == [part] and items_of(tensor, "x")[0] is tensor
    assert items_of((part, "name"), "x") == [part, "name"] and items_of(iter(["a"]), "x") == ["a"]
