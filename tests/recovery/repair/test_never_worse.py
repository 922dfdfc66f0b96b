"""A repair never makes it worse: over random networks, on inputs that it has never seen."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError, sparsity
from graphprune.importance.calibration import reruns
from graphprune.importance.calibration.replay import Replay
from graphprune.recovery.repair import layers, walk
from graphprune.recovery.repair.checking import Check, Measured
from graphprune.support.walking import named_tensors
from tests.stream_networks import STEPS, STEPS_OF, WIDTH, Network, block, measured, noisy

# Small gains on held samples count only where they are steady, so what is kept is no worse on others: of 136 repairs of
# other networks, none was. This is for the few that chance lets pass.
NOISE, FRESH = 1.005, 4096


def distance(net: nn.Module, dense: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((net(x) - dense(x)).square().sum() / dense(x).square().sum())


def random_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    steps = [step for step in STEPS_OF if step not in (noisy, measured)]  # that nothing can be compared or planned for
    net = Network(random.Random(seed).choices(steps, k=STEPS)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    return net


class Shuffling:
    """Other batches at every pass, but for who sets torch's generator back."""

    draws: torch.Generator | None = None

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.x[torch.randperm(len(self.x), generator=self.draws)].split(32))


class Changing(Shuffling):
    """Other batches at every pass, as it has a generator that nobody knows of."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        self.draws = torch.Generator().manual_seed(0)


FORMS: dict[str, Callable[[Tensor], Any]] = {"list": lambda x: list(x.split(32)), "shuffling": Shuffling}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(4))
def test_random_networks(seed: int, form: str) -> None:
    dense = random_network(seed)
    x, fresh = torch.randn(512, WIDTH), torch.randn(FRESH, WIDTH)
    plan = graphprune.plan(dense, x[:4], 0.4)
    before = distance(plan.apply(dense), dense, fresh)
    for method in ("mean", "least_squares"):
        found = graphprune.recover(dense, plan, x[:4], FORMS[form](x), method)
        assert found.after <= found.before or found.before != found.before
        assert distance(found.model, dense, fresh) <= before * NOISE, (method, str(found))
    masked = sparsity.magnitude(copy.deepcopy(dense), 0.5)
    before = distance(masked, dense, fresh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsity.reconstruct(masked, dense, x[:4], FORMS[form](x))
    assert distance(masked, dense, fresh) <= before * NOISE


def repaired(kind: str, dense: nn.Module, x: Tensor, data: Any) -> nn.Module:
    if kind != "reconstruct":
        return graphprune.recover(dense, graphprune.plan(dense, x[:4], 0.4), x[:4], data, kind).model
    masked = sparsity.magnitude(copy.deepcopy(dense), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sparsity.reconstruct(masked, dense, x[:4], data)


@pytest.mark.parametrize("form", [*FORMS, "changing"])
@pytest.mark.parametrize("kind", ["mean", "least_squares", "reconstruct"])
@pytest.mark.parametrize("seed", range(2))
def test_memory_makes_no_difference(seed: int, kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same network, whether runs are replayed or not: of all that replays, criteria do not."""
    dense, x = random_network(seed), torch.randn(128, WIDTH)
    held, replayed = Replay.finish, []

    def finish(memory: Replay, *results: Any) -> None:
        if not results:  # those of checks are of inputs that are held, which stay the same
            replayed.append(memory.replaying)
        held(memory, *results)

    monkeypatch.setattr(Replay, "finish", finish)
    nets = []
    for cache in (walk.CACHE, -1):
        monkeypatch.setattr(walk, "CACHE", cache)
        torch.manual_seed(seed)
        nets.append(repaired(kind, dense, x, {**FORMS, "changing": Changing}[form](x)))
    assert not any(replayed) if form == "changing" else any(replayed) or seed  # seed 1 reads values in every run
    ours, theirs = (named_tensors(net) for net in nets)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["mean", "least_squares", "reconstruct"])
@pytest.mark.parametrize("seed", range(3))
def test_checks_begun_at_what_has_changed_are_those_of_the_whole_network(
    seed: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, x = random_network(seed), torch.randn(96, WIDTH)
    original, compared = Check.measured, []

    def both(check: Check, at: str | None = None) -> Measured:
        found = original(check, at)
        if at is not None:
            whole = original(check)
            torch.testing.assert_close(found._misses, whole._misses, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(found.right, whole.right)
            compared.append(at)
        return found

    monkeypatch.setattr(Check, "measured", both)
    repaired(kind, dense, x, list(x.split(32)))
    assert len(compared) > 1


def test_checks_run_what_stands_before_once_while_memory_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    dense, x = Network([block] * STEPS).eval(), torch.randn(96, WIDTH)
    made, nets, counts = reruns.Telling.made, [], []

    def counting(*given: Any) -> Any:
        counts[-1] += 1
        return made(*given)

    monkeypatch.setattr(reruns.Telling, "made", counting)
    for held in (1 << 20, 0):
        monkeypatch.setattr(reruns, "HELD", held)
        counts.append(0)
        nets.append(named_tensors(repaired("least_squares", dense, x, list(x.split(32)))))
    assert 0 < counts[0] < 0.7 * counts[1]
    assert all(torch.equal(tensor, nets[1][name]) for name, tensor in nets[0].items())


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def test_what_makes_held_outputs_worse_is_taken_back_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit that goes wrong; then the mean alone is tried."""
    torch.manual_seed(0)
    monkeypatch.setattr(layers, "ridge_solution", lambda moments, start, ridge, constant: -5 * start)
    dense, x, fresh = Wide().eval(), torch.randn(256, 4), torch.randn(256, 4)
    plan = graphprune.plan(dense, x[:2], 0.5)
    found = graphprune.recover(dense, plan, x[:2], [x], "least_squares")
    (said,) = found.layers
    assert said.method == "mean" and "least squares taken back: on held inputs the error of the outputs" in said.note
    assert found.after < found.before
    assert distance(found.model, dense, fresh) < distance(plan.apply(dense), dense, fresh)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.b(torch.relu(self.a(x))) + 0.3)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.layers, self.o = nn.Linear(6, 8), nn.Sequential(*(Block() for _ in range(3))), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.layers(self.i(x)))


@pytest.mark.parametrize(("rows", "method"), [(40, "mean"), (400, "least squares")])
def test_layers_behind_a_gap_with_few_rows_get_their_means(rows: int, method: str) -> None:
    torch.manual_seed(0)
    dense, x, fresh = Deep().eval(), torch.randn(rows, 6), torch.randn(200, 6)
    plan = graphprune.plan(dense, x[:2], 0.3, granularity="layer", criterion="magnitude")
    found = graphprune.recover(dense, plan, x[:2], list(x.split(20)))
    assert plan.layers and found.layers[0].method == method
    assert ("rows of data are fewer than the 72" in found.layers[0].note) == (method == "mean")
    assert distance(found.model, dense, fresh) < 0.5 * distance(plan.apply(dense), dense, fresh)


def test_encoders_that_look_into_their_first_layer() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
    dense = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    with torch.no_grad():
        for parameter in dense.layers[0].parameters():
            parameter.mul_(0.3)
    x, fresh = torch.randn(64, 5, 16), torch.randn(32, 5, 16)
    plan = graphprune.plan(dense, x[:2], 0.3, granularity="layer", criterion="magnitude")
    assert [block.module for block in plan.layers] == ["layers.0"]
    for method in ("mean", "least_squares"):
        found = graphprune.recover(dense, plan, x[:2], list(x.split(8)), method)
        assert distance(found.model, dense, fresh) < distance(plan.apply(dense), dense, fresh)
        assert {type(m).__module__.partition(".")[0] for m in found.model.modules()} == {"torch"}


def test_depthwise_transposed_convolutions() -> None:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 12, 3), nn.ReLU(), nn.ConvTranspose2d(12, 12, 4, 2, 1, groups=12), nn.ReLU()]
    dense = nn.Sequential(*parts, nn.Conv2d(12, 2, 3)).eval()
    x, fresh = torch.randn(48, 3, 7, 7), torch.randn(32, 3, 7, 7)
    plan = graphprune.plan(dense, x[:2], 0.5)
    for method in ("mean", "least_squares"):
        found = graphprune.recover(dense, plan, x[:2], list(x.split(8)), method)
        assert distance(found.model, dense, fresh) < distance(plan.apply(dense), dense, fresh)


class OneByOne(nn.Module):
    """Layers read single rows, without an axis that counts them: of each sample the token that a value picks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.score = nn.Linear(8, 24), nn.Linear(24, 16), nn.Linear(16, 1)
        self.c, self.d = nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu())
        best = self.score(h).squeeze(-1).argmax(1).tolist()
        return torch.stack([self.d(self.c(h[row, token]).relu()) for row, token in enumerate(best)])


class Unbatched(nn.Module):
    """Convolutions of a single picture."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3, padding=1), nn.ConvTranspose2d(12, 12, 2, 2), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x[0]).relu()).relu().mean((1, 2)))


@pytest.mark.parametrize(("made", "shape"), [(OneByOne, (8, 5, 8)), (Unbatched, (1, 3, 7, 7))])
def test_layers_that_read_one_row_without_an_axis_for_rows(made: type[nn.Module], shape: tuple[int, ...]) -> None:
    dense, data = made().eval(), [torch.randn(shape) for _ in range(16)]
    plan = graphprune.plan(dense, data[0], 0.5)
    for method in ("mean", "least_squares"):
        found = graphprune.recover(dense, plan, data[0], data, method)
        assert found.after < found.before


class Configured(Wide):
    """Has a configuration, from which it is built again, and layers without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 64, bias=False), nn.Linear(64, 4, bias=False)
        self.config = object()

    @classmethod
    def from_pretrained(cls) -> Configured:
        return cls()


def test_no_new_biases_where_a_configuration_has_no_place_for_them() -> None:
    dense, x = Configured().eval(), torch.randn(256, 4)
    plan = graphprune.plan(dense, x[:2], 0.5)
    names = {n for n, _ in dense.named_parameters()}
    for option, same in ((None, True), (False, True), (True, False)):
        found = graphprune.recover(dense, plan, x[:2], [x], new_bias=option).model
        assert ({n for n, _ in found.named_parameters()} == names) == same
    small = graphprune.prune(dense, x[:2], 0.5, data=[x], recover="least_squares")
    assert {n for n, _ in small.named_parameters()} == names


def test_data_that_are_not_finite_are_refused_and_their_batch_is_named() -> None:
    dense = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval()
    data = list(torch.randn(40, 4).split(8))
    plan = graphprune.plan(dense, data[0], 0.5)
    inf, nan = float("inf"), float("nan")
    for value, place, message in (
        (nan, 3, "batch 3 holds 1 NaN"), (inf, 3, "batch 3|batch norm"), (inf, 4, "on batch 4, .* NaN or infinite"),
    ):  # fmt: skip
        broken = [batch.clone() for batch in data]
        broken[place][7, 1] = value
        for method in ("mean", "least_squares", "batchnorm"):
            with pytest.raises(GraphPruneError, match=f"data: .*({message})"):
                graphprune.recover(dense, plan, data[0], broken, method)
        for criterion in ("reconstruction", "activation_mean"):
            with pytest.raises(GraphPruneError, match=f"data: .*({message})"):
                graphprune.plan(dense, data[0], 0.5, criterion=criterion, data=broken)
