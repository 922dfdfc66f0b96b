"""`recover="blocks"`: the whole network goes down the error of its blocks, beside slow references."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.errors import GraphPruneError
from graphprune.importance.calibration import find_readers
from graphprune.plans.history import history_of, repair_after
from graphprune.recovery.repair.blocks import fit, fit_blocks
from graphprune.recovery.repair.blocks.places import Place, Watch, find_places
from graphprune.recovery.repair.blocks.samples import shuffled
from graphprune.recovery.repair.blocks.settings import BlockFit
from graphprune.recovery.repair.blocks.weights import Weights, own_parameters
from graphprune.recovery.repair.walk import target_of
from graphprune.tracing.example import ExampleInput
from graphprune.tracing.trace import record_run

SETTINGS = BlockFit(passes=10, lr=0.03, batch_size=16)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.norm(self.first(x.relu())).relu())


def residual() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), Block(8), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    for _ in range(5):
        net(torch.randn(32, 3, 8, 8))
    return net.eval()


def images(batches: int = 6, samples: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(samples, 3, 8, 8, generator=generator) for _ in range(batches)]


class Decoder(nn.Module):
    """Embedding, one layer of attention and a perceptron around a residual stream, the head tied to the embedding."""

    def __init__(self, width: int = 16, words: int = 30) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.table(tokens)
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 4
        x = x + self.out(scores.masked_fill(mask[:, None] == 0, -1e9).softmax(-1) @ self.value(x))
        x = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return {"logits": self.head(x)}


def sentences() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    lengths = (5, 7, 5, 6, 7, 6, 5, 7)
    return [
        {"tokens": torch.randint(0, 20, (24, n), generator=generator), "mask": torch.ones(24, n, dtype=torch.long)}
        for n in lengths
    ]


class Batches:
    def __init__(self, *batches: Tensor) -> None:
        self.batches = batches

    def inputs(self) -> Iterator[ExampleInput]:
        return iter(map(ExampleInput.of, self.batches))


class Some(nn.Module):
    """A layer that sees the first inputs alone."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x[:, : self.layer.in_features])
        return made


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def pruned(net: nn.Module, x: Tensor) -> tuple[nn.Module, nn.Module, list[Place], list[int]]:
    """The dense network and the pruned one, not repaired; the places, and which channels of the stream stay."""
    plan = graphprune.plan(net, x[:2], 0.5, round_to=1)
    small, dense = plan.apply(net), graphprune.fold_conv_bn(net, x[:2])
    trace = record_run(small, x[:2])
    readers = find_readers(trace)
    places = find_places(trace, readers, {r.weight: target_of(plan, r, torch.device("cpu")) for r in readers})
    stays = [i for i in range(8) if i not in plan.removed["2.second.weight"][0]]
    assert 0 < len(stays) < 8
    return dense, small, places, stays


def stages(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What the two blocks and the network make."""
    ends, y = [], x
    with torch.no_grad():
        for number, module in enumerate(model):  # type: ignore[arg-type]
            y = module(y)
            if number in (2, 3):
                ends.append(y)
    return [*ends, y]


def errors(
    small: nn.Module, dense: nn.Module, x: Tensor, stays: list[int], spread: Tensor | None = None
) -> list[float]:
    """Squared errors of these over the variance around the means of the channels (on the inputs `spread`, where they
    are others), the slow way."""
    found = []
    usual = stages(dense, x if spread is None else spread)
    for a, b, c in zip(stages(small, x), stages(dense, x), usual, strict=True):
        wanted, known = (t[:, stays] if t.dim() == 4 else t for t in (b, c))
        channels = known.movedim(1, -1).reshape(-1, known.shape[1])
        variance = sum(float(c.var(correction=0)) for c in channels.T) / channels.shape[1]
        found.append(float((a - wanted).square().mean()) / variance)
    return found


def test_a_linear_network_comes_to_the_least_squares_solution() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 8) @ torch.randn(8, 8)
    dense, small = Some(8, 3), Some(5, 3)
    wanted = dense(x).detach()
    read = torch.cat([x[:, :5], torch.ones(256, 1)], 1)
    best = (read @ torch.linalg.lstsq(read, wanted).solution - wanted).square().mean()
    start = (small(x) - wanted).square().mean().detach()
    done = fit_blocks(dense, small, [], Batches(x), None, BlockFit(passes=40, lr=0.1, batch_size=64))
    reached = (small(x) - wanted).square().mean().detach()
    assert done.failed == "" and math.isnan(done.before) is False
    assert reached - best < 0.01 * (start - best)


def test_places_are_what_hooks_on_the_blocks_see() -> None:
    x = images(1)[0]
    dense, small, places, stays = pruned(residual(), x)
    assert [place.weight for place in places] == ["2.second.weight", "3.second.weight"]
    assert all(place.sum for place in places)
    with Watch(dense, places) as wanted:
        theirs = stages(dense, x)
    with Watch(small, places) as found:
        ours = stages(small, x)
    for number, place in enumerate(places):
        assert len(wanted.made[place.weight]) == len(found.made[place.weight]) == 1
        torch.testing.assert_close(place.wanted(wanted.made[place.weight][0]), theirs[number][:, stays])
        torch.testing.assert_close(found.made[place.weight][0], ours[number])


def test_where_nothing_is_added_the_layers_are_the_places() -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3))
    trace = record_run(net, torch.randn(2, 6))
    readers = find_readers(trace)
    plan = graphprune.plan(net, torch.randn(2, 6), 0.5)
    places = find_places(trace, readers, {r.weight: target_of(plan, r, torch.device("cpu")) for r in readers})
    assert [(p.weight, p.sum) for p in places] == [("0.weight", False), ("2.weight", False), ("4.weight", False)]
    assert places[0].after == {"0.weight", "0.bias"}
    assert places[1].after == {"0.weight", "0.bias", "2.weight", "2.bias"}


class Normed(nn.Module):
    """A block that ends in a batch norm, which folding makes the bias of a layer without one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.norms[1](self.second(self.norms[0](self.first(x)).relu()))).relu()


def test_blocks_that_end_in_a_folded_batch_norm_are_compared() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), Normed(8), Normed(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ).eval()
    data = images()
    plan = graphprune.plan(net, data[0][:2], 0.5)
    found = graphprune.recover(net, plan, data[0][:2], data, SETTINGS)
    assert found.layers[-1].changed and found.layers[-1].note.startswith("2 blocks and the outputs")


@pytest.mark.parametrize("fold_bn", [True, False])
def test_better_than_least_squares_on_inputs_that_nobody_saw(fold_bn: bool) -> None:
    net, data, unseen = residual(), images(), torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    plan = graphprune.plan(net, data[0][:2], 0.5, fold_bn=fold_bn)
    with torch.no_grad():
        wanted, before = net(unseen), state(net)
        found = [graphprune.recover(net, plan, data[0][:2], data, m) for m in ("least_squares", SETTINGS)]
        reached = [float((repaired.model(unseen) - wanted).square().mean()) for repaired in found]
    assert reached[1] < reached[0] and found[1].after < found[0].after
    assert found[1].layers[:-1] == found[0].layers
    assert found[1].layers[-1].changed and found[1].layers[-1].method == "blocks"
    assert found[1].layers[-1].after < found[1].layers[-1].before
    assert same(before, state(net))
    assert repair_after(found[1].model, plan) == "blocks"
    report = graphprune.verify(net, found[1].model, plan, data[0][:2])
    assert report.passed, str(report)


def test_the_error_is_that_of_the_blocks_and_the_outputs() -> None:
    """A pass of one step tells the error of the start."""
    x = images(1, 64)[0]
    dense, small, places, stays = pruned(residual(), x)
    by_hand = errors(small, dense, x, stays)
    done = fit_blocks(dense, small, places, Batches(x), None, BlockFit(passes=1, batch_size=64, outputs=0.5))
    assert done.places == 2
    assert done.before == pytest.approx((by_hand[0] + by_hand[1]) / 2 + 0.5 * by_hand[2], rel=1e-4)


def test_both_networks_see_augmented_inputs() -> None:
    x = images(1, 64)[0]
    dense, small, places, stays = pruned(residual(), x)
    by_hand = errors(small, dense, 0.7 * x.flip(-1), stays, spread=x)
    one = BlockFit(passes=1, batch_size=64, augment=lambda t: 0.7 * t.flip(-1))
    done = fit_blocks(dense, small, places, Batches(x), None, one)
    assert done.before == pytest.approx((by_hand[0] + by_hand[1]) / 2 + by_hand[2], rel=1e-4)


def test_augmentations_are_drawn_anew_in_every_pass_and_are_the_same_in_every_run() -> None:
    data, seen = images(2), []

    def noisy(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x.add_(torch.randn_like(x))  # a copy: the data stay as they are

    made = []
    for augment in (noisy, noisy, None, lambda x: x):
        dense, small, places, _ = pruned(residual(), data[0])
        fit_blocks(dense, small, places, Batches(*data), None, dataclasses.replace(SETTINGS, passes=2, augment=augment))
        made.append(state(small))
    assert same(made[0], made[1]) and not same(made[0], made[2]) and same(made[2], made[3])
    once = torch.cat(seen[:4]).flatten(1).sort(0).values
    assert torch.equal(once, torch.cat(seen[4:8]).flatten(1).sort(0).values)
    assert torch.equal(once, torch.cat(images(2)).flatten(1).sort(0).values)


def test_an_augmentation_gets_what_the_data_hold() -> None:
    torch.manual_seed(0)
    net, data = Decoder().eval(), sentences()
    plan = graphprune.plan(net, data[0], 0.5, ignore=["table"])
    taken = []

    def masked(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        taken.append(sorted(batch))
        return {**batch, "mask": torch.where(torch.rand(batch["mask"].shape) < 0.1, 0, batch["mask"])}

    found = graphprune.recover(net, plan, data[0], data, BlockFit(passes=1, augment=masked))
    assert found.layers[-1].weight == "all blocks" and {tuple(names) for names in taken} == {("mask", "tokens")}


@pytest.mark.parametrize(
    ("augment", "said"),
    [
        (lambda x: None, "a tensor and must return one too, not a NoneType"),
        (lambda x: x[:-1], r"got \d+ samples and returned \d+"),
        (lambda x: (x, x), "not a tuple"),
    ],
)
def test_an_augmentation_that_returns_something_else_is_named(augment: Any, said: str) -> None:
    net, data = residual(), images(2)
    plan, before = graphprune.plan(net, data[0][:2], 0.5), state(net)
    with pytest.raises(GraphPruneError, match=f"BlockFit: augment .*{said}"):
        graphprune.recover(net, plan, data[0][:2], data, dataclasses.replace(SETTINGS, augment=augment))
    assert same(before, state(net))


def test_one_block_after_the_other() -> None:
    """Each fits what it owns to its own end: the first is as if there were no second."""
    x = images(1, 64)[0]
    one = dataclasses.replace(SETTINGS, together=False, passes=12)
    dense, small, places, stays = pruned(residual(), x)
    before, kept = errors(small, dense, x, stays), state(small)
    fit_blocks(dense, small, places, Batches(x), None, one)
    after = errors(small, dense, x, stays)
    assert all(b < 0.8 * a for a, b in zip(before, after, strict=True))
    alone = pruned(residual(), x)[1]
    left = [name for name in kept if not name.startswith(("0.", "2."))]
    fit_blocks(dense, alone, places[:1], Batches(x), None, dataclasses.replace(one, outputs=0.0), left)
    for name in ("0.weight", "2.first.weight", "2.second.bias"):
        assert torch.equal(small.get_parameter(name), alone.get_parameter(name))


def test_the_same_every_time_whatever_was_drawn_before() -> None:
    made = []
    for seed, drawn in ((0, 0), (0, 7), (1, 0)):
        dense, small, places, _ = pruned(residual(), images(1)[0])
        torch.manual_seed(drawn)
        before = torch.get_rng_state()
        fit_blocks(dense, small, places, Batches(*images(2)), None, dataclasses.replace(SETTINGS, passes=2, seed=seed))
        assert torch.equal(before, torch.get_rng_state())
        made.append(state(small))
    assert same(made[0], made[1]) and not same(made[0], made[2])


@pytest.mark.parametrize(("lr", "said"), [(10.0, "taken back"), (1e30, "not finite in pass 1")])
def test_a_fit_that_does_harm_is_taken_back_and_named(lr: float, said: str) -> None:
    net, data = residual(), images()
    plan = graphprune.plan(net, data[0][:2], 0.5)
    plainly = graphprune.recover(net, plan, data[0][:2], data, "least_squares")
    found = graphprune.recover(net, plan, data[0][:2], data, BlockFit(passes=2, lr=lr))
    assert same(state(plainly.model), state(found.model))
    assert not found.layers[-1].changed and said in found.layers[-1].note
    assert (found.before, found.after) == (plainly.before, plainly.after)
    assert repair_after(found.model, plan) == "least_squares"  # what is verified


def test_what_the_user_has_frozen_is_frozen_afterwards() -> None:
    net, data = residual(), images()
    net.requires_grad_(False)
    net[6].requires_grad_(True)
    net.train()
    net[3].eval()
    flags = {n: (p.requires_grad, p.grad) for n, p in net.named_parameters()}
    modes = {n: m.training for n, m in net.named_modules()}
    plan = graphprune.plan(net, data[0][:2], 0.5, fold_bn=False)
    found = graphprune.recover(net, plan, data[0][:2], data, SETTINGS)
    for model in (net, found.model):
        assert flags == {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()}
        assert modes == {n: m.training for n, m in model.named_modules()}
    assert found.layers[-1].changed


def test_in_inference_mode_as_outside() -> None:
    net, x = residual(), images()[0]
    plan = graphprune.plan(net, x[:2], 0.5)
    settings = dataclasses.replace(SETTINGS, passes=4)
    made = []
    for mode in (contextlib.nullcontext, torch.inference_mode):
        with mode():
            made.append(graphprune.recover(net, plan, x[:2], [x + 0], settings))
    assert same(state(made[0].model), state(made[1].model)) and made[0].layers == made[1].layers


def test_a_language_model_keeps_its_table_and_what_is_tied_to_it() -> None:
    torch.manual_seed(0)
    net, data = Decoder().eval(), sentences()
    plan = graphprune.plan(net, data[0], 0.5, ignore=["table"])
    plainly = graphprune.recover(net, plan, data[0], data, "least_squares")
    found = graphprune.recover(net, plan, data[0], data, BlockFit(passes=15, lr=0.01))
    assert found.layers[-1].changed and found.after < plainly.after
    model: Any = found.model
    repaired: Any = plainly.model
    assert torch.equal(model.table.weight, repaired.table.weight) and model.head.weight is model.table.weight
    assert not torch.equal(model.norm.weight, repaired.norm.weight)
    assert graphprune.verify(net, found.model, plan, data[0]).passed


def test_half_precision_is_fitted_as_float32_copies() -> None:
    """Steps of a thousandth are lost in bfloat16 one by one, and not together."""
    start = torch.ones(4, dtype=torch.bfloat16)
    layer = nn.Module()
    layer.weight = nn.Parameter(start.clone())
    layer.weight.requires_grad_(True)
    weights = Weights(own_parameters(layer), 1e-3)
    for _ in range(20):
        weights.forget()
        layer.weight.float().sum().backward()
        weights.step(1.0)
    torch.testing.assert_close(layer.weight.detach().float(), torch.full((4,), 0.98), atol=0.005, rtol=0)
    alone = nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([alone], 1e-3)
    for _ in range(20):
        alone.grad = torch.ones_like(alone)
        optimizer.step()
    assert torch.equal(alone.detach(), start)

    net, data = residual().bfloat16(), [x.bfloat16() for x in images()]
    plan = graphprune.plan(net, data[0][:2], 0.5)
    found = graphprune.recover(net, plan, data[0][:2], data, BlockFit(passes=2))
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}


def test_rates_follow_the_size_of_what_is_fitted() -> None:
    """Inputs a thousand times larger, and the first layer so much smaller: the same network, and the same fit."""
    made = []
    for factor in (1.0, 1024.0):
        net, x = residual(), images(1, 64)[0]
        net[0].weight.data /= factor  # type: ignore[operator, union-attr]
        dense, small, places, _ = pruned(net, x * factor)
        made.append(fit_blocks(dense, small, places, Batches(x * factor), None, SETTINGS))
    assert made[1].after == pytest.approx(made[0].after, rel=1e-3) and made[0].after < 0.8 * made[0].before


def test_a_batch_in_parts_is_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for room in (1 << 40, 1 << 16):
        monkeypatch.setattr(fit, "ACTIVATIONS", room)
        dense, small, places, _ = pruned(residual(), images(1)[0])
        done = fit_blocks(dense, small, places, Batches(images(1)[0]), None, dataclasses.replace(SETTINGS, passes=2))
        made.append((done.after, small))
    assert made[0][0] == pytest.approx(made[1][0], rel=1e-4)
    for a, b in zip(made[0][1].parameters(), made[1][1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("wrong", ["detach", "sign"])
def test_a_network_without_gradients_stays_as_least_squares_left_it(wrong: str) -> None:
    class Rough(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = super().forward(x)
            return made.detach() if wrong == "detach" else Unknown.apply(made)

    class Unknown(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sign()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            raise RuntimeError("sign has no gradient")

    net = Rough(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    before = state(net)
    done = fit_blocks(net, net, [], Batches(*(torch.randn(16, 6) for _ in range(4))), None, SETTINGS)
    assert done.failed == {
        "detach": "no gradients come to the parameters; look for torch.no_grad or detach in forward",
        "sign": "gradients cannot be computed: sign has no gradient",
    }[wrong]
    assert same(before, state(net))


@pytest.mark.parametrize("lengths", [(3, 3, 3), (3, 4, 3)])
def test_every_sample_comes_once(lengths: tuple[int, ...]) -> None:
    batches = [
        {"x": torch.arange(n * k).reshape(n, k) + 1000 * i, "y": torch.arange(n) + 1000 * i, "flag": True}
        for i, (n, k) in enumerate(zip((5, 8, 4), lengths, strict=True))
    ]
    taken = list(shuffled(map(ExampleInput.of, batches), 4, torch.Generator().manual_seed(0)))
    rows = [tuple(row.tolist()) for example in taken for row in example.kwargs["x"]]
    assert sorted(rows) == sorted(tuple(row.tolist()) for batch in batches for row in batch["x"])
    assert all(example.samples <= 4 and example.kwargs["flag"] is True for example in taken)
    for example in taken:  # what belongs together stays together
        assert torch.equal(example.kwargs["x"][:, 0] % 1000, example.kwargs["y"] % 1000 * example.kwargs["x"].shape[1])
    mixed = any(len({row // 1000 for row in example.kwargs["y"].tolist()}) > 1 for example in taken)
    assert mixed is (len(set(lengths)) == 1)


def test_what_cannot_be_is_refused() -> None:
    net, data = residual(), images(2)
    plan = graphprune.plan(net, data[0][:2], 0.5)
    with pytest.raises(GraphPruneError, match="needs inputs to measure on"):
        graphprune.recover(net, plan, data[0][:2], None, "blocks")
    with pytest.raises(GraphPruneError, match=r"recover: expected .* a BlockFit"):
        graphprune.recover(net, plan, data[0][:2], data, 3)  # type: ignore[arg-type]
    numbers = ({"passes": 0}, {"lr": 0}, {"lr": math.nan}, {"batch_size": 1.5}, {"outputs": -1})
    for wrong in (*numbers, {"together": 1}, {"augment": 2}):
        with pytest.raises(GraphPruneError, match=f"BlockFit: {next(iter(wrong))}"):
            BlockFit(**wrong)  # type: ignore[arg-type]
    data[1][0] = math.nan
    with pytest.raises(GraphPruneError, match="NaN"):
        graphprune.recover(net, plan, data[0][:2], data, "blocks")


def test_prune_takes_its_settings_and_tells_how_far_it_is() -> None:
    net, data = residual(), images()
    stages: set[tuple[str, ...]] = set()
    x = data[0][:2]
    small = graphprune.prune(net, x, 0.5, data=data, recover=SETTINGS, progress=lambda now: stages.add(now.stages))
    history = history_of(small)
    assert history is not None and history.repairs == ("blocks",)
    assert any(names[-1] == "fitting blocks" for names in stages)
