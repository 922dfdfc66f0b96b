from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphprune import GraphPruneError, sparsity
from graphprune.sparsity.gradients import loss_gradients
from graphprune.sparsity.weights import select_weights

from .networks import NETWORKS, example, mlp


def batches(x: Tensor, y: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def gradients(model: nn.Module, data: Any, **options: Any) -> list[Tensor]:
    return loss_gradients(model, select_weights(model), data, F.cross_entropy, mean=True, **options)


@pytest.mark.parametrize("times_weight", [False, True])
def test_scores_are_those_of_the_loss_over_all_data(times_weight: bool) -> None:
    model = mlp()
    x, y = torch.randn(10, 12), torch.randint(0, 3, (10,))
    F.cross_entropy(model(x), y).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.dim() == 2}
    scores = {n: (g * model.get_parameter(n) if times_weight else g).abs().detach() for n, g in grads.items()}
    ordered = torch.cat([s.flatten() for s in scores.values()]).sort().values
    threshold = (ordered[303] + ordered[304]) / 2
    # batches of unequal length, as the last one of a loader is
    sparsity.gradient(model, batches(x, y, [4, 4, 2]), F.cross_entropy, 0.5, times_weight=times_weight)
    for name, mask in sparsity.masks(model).items():
        assert torch.equal(mask, scores[name] > threshold)


def test_sums_and_means() -> None:
    model = mlp()
    x, y = torch.randn(10, 12), torch.randint(0, 3, (10,))
    whole = loss_gradients(model, select_weights(model), [(x, y)], F.cross_entropy, mean=True)
    added = loss_gradients(
        model, select_weights(model), batches(x, y, [7, 3]),
        lambda out, target: F.cross_entropy(out, target, reduction="sum"), mean=False,
    )  # fmt: skip
    for a, b in zip(whole, added, strict=True):
        torch.testing.assert_close(a, b)


def test_the_model_is_as_before_but_for_its_masks() -> None:
    model, x = example("cnn")
    model.train()
    model[0].weight.requires_grad_(False)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    before = copy.deepcopy(model.state_dict())
    sparsity.gradient(model, [(x, torch.randint(0, 3, (5,)))], F.cross_entropy, 0.5)
    assert all(m.training for m in model.modules())
    assert not model[0].parametrizations.weight.original.requires_grad
    assert model[0].bias.grad is None
    assert torch.equal(model[5].parametrizations.weight.original.grad, torch.ones(3, 192))
    after = model.state_dict()
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(after[name], before[name])
    assert torch.equal(after["0.parametrizations.weight.original"], before["0.weight"])


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_what_the_network_computes_with(name: str) -> None:
    # finite differences of the effective weight, whatever parametrisation makes it
    model, x = example(name)
    model = model.double().eval()
    x = x.double() if x.is_floating_point() else x
    y = torch.randint(0, 3, (5,) if name != "tied" else (5, 12), generator=torch.Generator().manual_seed(0))
    data = [(x, y.double() if name == "tied" else y)]

    def loss(out: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(out if name != "tied" else out.mean(1), target if name != "tied" else target.softmax(-1))

    sparsity.magnitude(model, 0.3)  # masks are in force already
    weights = select_weights(model)
    found = loss_gradients(model, weights, data, loss, mean=True)
    plain = sparsity.make_permanent(copy.deepcopy(model))
    with torch.no_grad():
        for weight, grad in zip(weights, found, strict=True):
            parameter = plain.get_parameter(weight.name)
            place = tuple(int(i) for i in torch.unravel_index(grad.abs().argmax(), grad.shape))
            steps = []
            for sign in (1, -1):
                parameter[place] += sign * 1e-5
                steps.append(float(loss(plain(x), data[0][1])))
                parameter[place] -= sign * 1e-5
            assert (steps[0] - steps[1]) / 2e-5 == pytest.approx(float(grad[place]) / len(y), rel=1e-4)


def test_dict_batches_and_generators() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": F.cross_entropy(self.layer(inputs), labels)}

    model = Keyword()
    data = ({"inputs": torch.randn(6, 4), "labels": torch.randint(0, 3, (6,))} for _ in range(2))
    sparsity.gradient(model, data, lambda out, batch: out["loss"] * len(batch["labels"]) / 6, 0.5)
    assert int((model.layer.weight == 0).sum()) == 6


def test_a_weight_without_influence_goes_first() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Unused()
    sparsity.gradient(model, [(torch.randn(6, 4), torch.randint(0, 3, (6,)))], F.cross_entropy, 0.5)
    assert not model.unused.weight.any() and model.used.weight.all()


def test_errors_change_nothing() -> None:
    model = mlp()
    x, y = torch.randn(4, 12), torch.randint(0, 3, (4,))
    for data, loss, message in (
        ([], F.cross_entropy, "yields no batch"),
        ([x], F.cross_entropy, "batch 0 has no targets"),
        ([(x, y, y)], F.cross_entropy, "batch 0 is a tuple of length 3"),
        ([(x[:, :3], y)], F.cross_entropy, "RuntimeError"),
        ([(x, y)], lambda o, t: o, r"a tensor of shape \(4, 3\); expected the mean loss"),
        ([(x, y)], lambda o, t: 1.0, "returned float"),
        ([(x, y)], lambda o, t: o.sum() * torch.inf, "the loss is -?(inf|nan)"),
        ([(x, y)], lambda o, t: o.detach().sum(), "does not depend on the weights"),
    ):
        with pytest.raises(GraphPruneError, match=message):
            sparsity.gradient(model, data, loss, 0.5)  # type: ignore[arg-type]
    with pytest.raises(GraphPruneError, match="reduction"):
        sparsity.gradient(model, [(x, y)], F.cross_entropy, 0.5, reduction="max")  # type: ignore[arg-type]
    assert not sparsity.masks(model)
