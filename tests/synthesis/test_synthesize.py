"""What is made, for which models, and what stays as it was."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError, synthesize
from graphprune.synthesis import fitting
from tests.synthesis.networks import Chain, convolutional, several, trained

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def divergence(model: nn.Module, inputs: Any) -> float:
    """From hooks and torch's own statistics, in double precision."""
    found: list[float] = []

    def look(norm: Any, args: tuple[Tensor]) -> None:
        x = args[0].double()
        axes = [a for a in range(x.dim()) if a != 1]
        mean, variance = x.mean(axes), x.var(axes, correction=0) + norm.eps
        stored = norm.running_var.double() + norm.eps
        parts = ((mean - norm.running_mean.double()) ** 2 + variance) / stored - 1 - (variance / stored).log()
        found.append(float(parts.mean()) / 2)

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [m.register_forward_pre_hook(look) for m in norms]
    with torch.no_grad():
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    for hook in hooks:
        hook.remove()
    return sum(found) / len(found)


@pytest.mark.parametrize("low, high", [(0.0, 255.0), (0.0, 0.01)])
def test_statistics_come_near_whatever_the_range_of_inputs(low: float, high: float) -> None:
    model = convolutional(low, high)
    made = synthesize(model, X, 32, steps=60)
    assert len(made) == 1 and made[0].shape == (32, 3, 8, 8) and made.samples == 32
    noise = divergence(model, torch.randn(32, 3, 8, 8))
    assert math.isclose(divergence(model, made[0]), made.after, rel_tol=1e-3)
    assert made.after < 0.2 * made.before and made.after < 0.05 * noise


def test_made_inputs_repair_better_than_noise() -> None:
    model = convolutional(0, 255)
    plan = graphprune.plan(model, X, 0.5, criterion="l2", round_to=1)
    real = nn.functional.interpolate(torch.rand(64, 3, 4, 4), size=(8, 8)) * 255

    def error(data: Any) -> float:
        small = graphprune.recover(model, plan, X, data).model
        return float((small(real) - model(real)).detach().square().mean())

    assert error(synthesize(model, X, 64, steps=50)) < 0.3 * error([torch.randn(64, 3, 8, 8)])


def test_the_same_whatever_was_drawn_before_and_as_many_as_asked() -> None:
    model = convolutional()
    torch.manual_seed(5)
    whole = synthesize(model, X, 20, steps=5, batch_size=8, seed=3)
    torch.manual_seed(6)
    again = synthesize(model, X, 16, steps=5, batch_size=8, seed=3)
    other = synthesize(model, X, 16, steps=5, batch_size=8, seed=4)
    assert [len(x) for x in whole] == [8, 8, 4]
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=False))
    assert not torch.equal(whole[0], whole[1]) and not torch.equal(whole[0], other[0])


class Noisy(nn.Module):
    """Draws from all generators, counts its calls, and writes into a buffer and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.calls, self.seen = nn.BatchNorm1d(3), 0, []  # type: ignore[var-annotated]
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        self.last.copy_(x[0].detach())
        drawn = torch.randn(3) + float(np.random.rand()) + random.random()
        found: Tensor = self.norm(x + 0.01 * drawn)
        return found


def test_the_model_and_all_random_state_stay_as_they_were() -> None:
    torch.manual_seed(0)
    model, example = Noisy().train(), torch.randn(4, 3)
    model.norm.running_mean.fill_(2)
    model.norm.weight.grad = torch.ones(3)
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    first = synthesize(model, example, 16, steps=10)
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # type: ignore[index]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training and model.norm.training and model.calls == 0 and model.seen == []
    assert model.norm.weight.requires_grad and torch.equal(model.norm.weight.grad, torch.ones(3))
    assert model.norm.bias.grad is None
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    assert torch.equal(first[0], synthesize(model, example, 16, steps=10)[0]), "the model's own draws too"
    assert torch.equal(states[0], after[0]) and np.array_equal(states[1], after[1]) and states[2] == after[2]


def test_several_inputs_in_the_form_of_the_example() -> None:
    model, example = several()
    made = synthesize(model, example, 24, steps=60)
    (batch,) = made
    assert isinstance(batch, dict) and isinstance(batch["pair"], tuple) and batch["pair"][1] == 0.5
    assert batch["image"].shape == (24, 2, 7) and batch["pair"][0].shape == (24, 5)
    assert batch["kind"].tolist() == [2, 1] * 12 and batch["mask"].shape == (4, 4)
    assert abs(float(batch["image"].mean())) > 0.3, "not the noise that it was"
    assert math.isclose(divergence(model, batch), made.after, rel_tol=1e-3) and made.after < 0.05 * made.before
    small = graphprune.prune(model, example, 0.5, criterion="wanda", data=made, round_to=1)
    assert small.conv.out_channels == 3


def test_what_no_batch_norm_depends_on_stays_the_examples() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
            return self.norm(x + bias.clamp_min(-1)) * y

    x, y, bias = torch.randn(2, 3), torch.randn(2, 1), torch.tensor([[0.0], [-math.inf]])
    (batch,) = synthesize(Net().eval(), (x, y, bias), 4, steps=5)
    assert torch.equal(batch[1], y.repeat(2, 1)) and torch.equal(batch[2], bias.repeat(2, 1))
    assert not torch.equal(batch[0], x.repeat(2, 1))


def test_precisions_and_numbers() -> None:
    for kind in (torch.float64, torch.bfloat16):
        model = convolutional().to(kind)
        assert synthesize(model, X.to(kind), 4, steps=3)[0].dtype == kind

    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.norm(x.abs())
            return found

    model = trained(Waves(), *(torch.randn(8, 3, dtype=torch.complex64) * 2 for _ in range(9)))
    made = synthesize(model, torch.randn(2, 3, dtype=torch.complex64), 64, steps=60)
    assert made[0].is_complex() and made.after < 0.2 * made.before


def test_a_model_that_takes_one_batch_size_only() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.norm(x.view(5, 3))
            return found

    assert [len(x) for x in synthesize(Fixed().eval(), torch.randn(5, 3), 10, steps=2)] == [5, 5]


def test_views_that_other_memory_does_not_allow() -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm1d(4 * 36)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            found: Tensor = self.norm(y.view(len(y), -1))
            return found

    assert synthesize(Viewing().eval(), X, 4, steps=2)[0].is_contiguous()


def test_batches_are_as_large_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = convolutional()
    assert len(synthesize(model, X, 200, steps=1)[0]) == 128
    monkeypatch.setattr(fitting, "MEMORY", 100_000)
    made = synthesize(model, X, 40, steps=1)
    held: dict[int, int] = {}

    def packed(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(packed, lambda t: t):
        out = model(made[0].requires_grad_())
    del out
    assert 1 < len(made[0]) < 40 and sum(held.values()) < 150_000


def test_it_stops_when_nothing_comes_of_more() -> None:
    model = trained(nn.Sequential(nn.BatchNorm1d(2)), torch.randn(64, 2), torch.randn(64, 2))
    made = synthesize(model, torch.randn(2, 2), 64, steps=500)
    assert made.batches[0].steps < 200 and made.after < 1e-3


@pytest.mark.parametrize("fixed", [None, 12])
def test_language_models_say_sequences(fixed: int | None) -> None:
    model = Chain(fixed=fixed).eval()
    made = synthesize(model, torch.zeros(3, 12, dtype=torch.long), 70, seed=1)
    tokens = torch.cat(list(made))
    assert [len(x) for x in made] == [32, 32, 6] and tokens.shape == (70, 12) and math.isnan(made.after)
    follows = (tokens[:, 1:] == (tokens[:, :-1] + 1) % 11).float().mean()
    assert follows > 0.99 and len(tokens[:, 0].unique()) == 11
    free = synthesize(Chain().eval(), torch.zeros(3, 12, dtype=torch.long), 70, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(made, free, strict=True)), "whether short sequences are taken or not"


def test_tokens_are_as_likely_as_the_model_says() -> None:
    model = Chain(tokens=4).eval()
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log()[:, None].expand(4, 4))
        model.head.bias.zero_()
    made = torch.cat(list(synthesize(model, torch.zeros(1, 30, dtype=torch.long), 200)))
    shares = torch.bincount(made[:, 1:].flatten(), minlength=4) / made[:, 1:].numel()
    assert torch.allclose(shares, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.02)


IDS = torch.zeros(2, 6, dtype=torch.long)


@pytest.mark.parametrize(
    "model, example, said",
    [
        (nn.Linear(3, 2), torch.randn(2, 3), r"no batch norm .*stores any.* data="),
        (nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), torch.randn(2, 3), "no batch norm"),
        (Chain(ahead=True), IDS, "no causal one.*changes with those behind"),
        (nn.Embedding(5, 2), IDS, r"returns no logits of shape \(samples, tokens, 5\)"),
        (Chain(), IDS[:, :1], "one token long"),
        (nn.Sequential(nn.Flatten(), nn.Embedding(5, 5), nn.Flatten()), IDS, "returns no logits"),
    ],
)
def test_models_for_which_nothing_can_be_made(model: nn.Module, example: Tensor, said: str) -> None:
    with pytest.raises(GraphPruneError, match=said):
        synthesize(model.eval(), example)


def test_what_no_gradient_leads_to_is_an_error() -> None:
    class Still(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.norm(x.detach())
            return found

    with pytest.raises(GraphPruneError, match="no gradient leads"):
        synthesize(Still().eval(), torch.randn(2, 3))
    broken = nn.Sequential(nn.BatchNorm1d(3)).eval()
    broken[0].running_var.fill_(math.nan)
    with pytest.raises(GraphPruneError, match="NaN or infinite"):
        synthesize(broken, torch.randn(2, 3))
    with pytest.raises(GraphPruneError, match="meta device"):
        synthesize(nn.BatchNorm1d(3, device="meta"), torch.randn(2, 3))
    with pytest.raises(GraphPruneError, match=r"RuntimeError"):
        synthesize(nn.Linear(3, 2), torch.randn(2, 4))


@pytest.mark.parametrize(
    "wrong", [{"n": 0}, {"n": 2.5}, {"n": True}, {"steps": 0}, {"seed": -1}, {"batch_size": 0}, {"batch_size": "8"}]
)
def test_arguments_out_of_range(wrong: dict[str, Any]) -> None:
    name = next(iter(wrong))
    with pytest.raises(GraphPruneError, match=f"^{name}: expected an integer"):
        synthesize(convolutional(), X, **wrong)


def test_pictures() -> None:
    made = synthesize(convolutional(0, 255), X, 12, steps=5, batch_size=8)
    images = made.images()
    assert images.shape == (12, 3, 8, 8) and images.min() == 0 and images.max() == 1
    place = torch.cat(list(made))[:, 1].flatten()
    low, high = torch.quantile(place, torch.tensor([0.01, 0.99]))
    assert torch.allclose(images[:, 1].flatten(), ((place - low) / (high - low)).clamp(0, 1), atol=1e-6)
    assert "12 inputs in 2 batches" in str(made) and len(made[:1]) == 1
    flat = synthesize(trained(nn.Sequential(nn.BatchNorm1d(2)), torch.randn(8, 2)), torch.randn(2, 2), 4, steps=2)
    with pytest.raises(GraphPruneError, match="no pictures"):
        flat.images()


def test_inference_mode_changes_nothing() -> None:
    with torch.inference_mode():
        inside, x = convolutional(), X.clone()
    model = copy.deepcopy(inside)
    wanted = synthesize(model, X, 4, steps=2)[0]
    with torch.inference_mode():
        found = synthesize(model, x, 4, steps=2)[0]
    assert not found.is_inference() and torch.equal(found, wanted)
    assert torch.equal(synthesize(inside, x, 4, steps=2)[0], wanted), "the model was made in it"


class Stop(Exception):
    pass


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = convolutional(), tmp_path / "made.safetensors"
    whole = synthesize(model, X, 20, steps=5, batch_size=8)
    batch = fitting.Fitting.batch
    made: list[int] = []

    def stopping(self: Any, number: int, samples: int, steps: int) -> Any:
        made.append(number)
        if number == 2 and made.count(2) == 1:
            raise Stop
        return batch(self, number, samples, steps)

    monkeypatch.setattr(fitting.Fitting, "batch", stopping)
    with pytest.raises(Stop):
        synthesize(model, X, 20, steps=5, batch_size=8, path=path)
    found = synthesize(model, X, 20, steps=5, batch_size=8, path=path)
    assert made == [0, 1, 2, 2]
    read = synthesize(model, X, 20, steps=5, batch_size=8, path=path)
    assert made == [0, 1, 2, 2], "all of it is in the file"
    for other in (found, read):
        assert all(torch.equal(a, b) for a, b in zip(whole, other, strict=True))
        assert (whole.before, whole.after) == (other.before, other.after)
        assert [b.steps for b in whole.batches] == [b.steps for b in other.batches]


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    model, path = convolutional(), tmp_path / "made.safetensors"
    synthesize(model, X, 8, steps=2, path=path)
    before = path.read_bytes()
    for other, options, said in (
        (convolutional(0, 2), {"n": 8, "steps": 2}, "with model"),
        (model, {"n": 9, "steps": 2}, "with n 8 instead of 9"),
        (model, {"n": 8, "steps": 3}, "with steps"),
        (model, {"n": 8, "steps": 2, "seed": 1}, "with seed"),
    ):
        with pytest.raises(GraphPruneError, match=said):
            synthesize(other, X, path=path, **options)  # type: ignore[arg-type]
    assert path.read_bytes() == before
    path.write_bytes(before[:-1])
    with pytest.raises(GraphPruneError, match=r"cannot be read|damaged"):
        synthesize(model, X, 8, steps=2, path=path)
