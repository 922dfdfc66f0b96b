"""`Synthetic` wherever data are taken: the inputs of that very model, made once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError, Synthetic, sparsity
from graphprune.synthesis import calls
from tests.synthesis.networks import convolutional

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELLED = [(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4)]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that inputs were made of, copied."""
    found: list[nn.Module] = []
    original = calls.synthesize

    def counted(model: nn.Module, *args: Any, **options: Any) -> Any:
        found.append(copy.deepcopy(model))
        return original(model, *args, **options)

    monkeypatch.setattr(calls, "synthesize", counted)
    return found


def synthetic() -> Synthetic:
    return Synthetic(16, steps=3)


def weights(model: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = model.state_dict()
    return found


def planned(model: nn.Module) -> graphprune.Plan:
    return graphprune.plan(model, X, 0.5, criterion="l2", round_to=1)


def reconstructed(model: nn.Module, data: Any) -> nn.Module:
    return sparsity.reconstruct(sparsity.magnitude(copy.deepcopy(model), 0.5), model, X, data)


TAKING: dict[str, Callable[[nn.Module, Any], dict[str, Tensor]]] = {
    "plan": lambda m, d: weights(graphprune.plan(m, X, 0.5, criterion="reconstruction", data=d).apply(m)),
    "prune": lambda m, d: weights(graphprune.prune(m, X, 0.5, criterion="wanda", data=d)),
    "recover": lambda m, d: weights(graphprune.recover(m, planned(m), X, d).model),
    "gradually": lambda m, d: weights(
        graphprune.prune_gradually(m, X, 0.5, steps=2, criterion="wanda", data=d, recover="least_squares")
    ),
    "channels": lambda m, d: weights(sparsity.Channels(X, criterion="wanda", data=d)(m, 0.5)),
    "reconstruct": lambda m, d: weights(reconstructed(m, d)),
    "sensitivity": lambda m, d: {
        c.name: torch.tensor(c.errors) for c in graphprune.sensitivity(m, X, d, ratios=[0.5]).curves
    },
    "advise": lambda m, d: {"": torch.tensor([o.fidelity or 0.0 for o in graphprune.advise(m, X, data=d).options])},
    "pipeline": lambda m, d: weights(
        graphprune.pipeline(
            m, X, LABELLED, 0.5, options={"criterion": "wanda"}, calibration=d, recover="least_squares",
            finetune_epochs=1, progress=False,
        ).model
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKING)
def test_as_the_inputs_themselves(name: str, made: list[nn.Module]) -> None:
    model, data = convolutional(), synthetic()
    found = TAKING[name](model, data)
    assert len(made) == 1 and all(torch.equal(made[0].state_dict()[n], t) for n, t in model.state_dict().items())
    expected = TAKING[name](model, graphprune.synthesize(model, X, 16, steps=3))
    assert found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())
    if name == "prune":
        TAKING["recover"](model, data)
        assert len(made) == 1, "made once"


def test_other_weights_or_another_example_have_inputs_of_their_own(made: list[nn.Module]) -> None:
    model, data = convolutional(), synthetic()
    first = data.inputs(model, X)
    assert data.inputs(copy.deepcopy(model), X) is first and data.inputs(model, X + 1) is first
    assert data.inputs(model, torch.randn(2, 3, 9, 9)) is not first
    with torch.no_grad():
        model[0].weight.mul_(2)
    second = data.inputs(model, X)
    assert second is not first and len(made) == 3
    assert torch.equal(second[0], graphprune.synthesize(model, X, 16, steps=3)[0])
    assert data.inputs(model, X) is second and len(data._made) == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda m, d: graphprune.finetune(m, d, epochs=1, progress=False),
        lambda m, d: graphprune.pipeline(m, X, d, finetune_epochs=1, progress=False),
        lambda m, d: graphprune.Evaluation(d)(m),
    ],
)
def test_where_targets_are_needed_it_says_so(call: Callable[[nn.Module, Any], Any]) -> None:
    with pytest.raises(GraphPruneError, match="without targets"):
        call(convolutional(), synthetic())


def test_criteria_with_a_loss_want_targets() -> None:
    loss = nn.functional.cross_entropy
    with pytest.raises(GraphPruneError, match="targets"):
        graphprune.plan(convolutional(), X, 0.5, criterion="taylor", data=synthetic(), loss_fn=loss)


def test_the_reason_comes_through() -> None:
    with pytest.raises(GraphPruneError, match="no batch norm"):
        graphprune.prune(nn.Linear(3, 2), torch.randn(1, 3), 0.5, data=synthetic())
    with pytest.raises(GraphPruneError, match=r"^n: expected"):
        Synthetic(0)
