from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphprune import GraphPruneError, sparsity
from graphprune.sparsity import LotteryTicket, lottery_ticket

X = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
Y = (X[:, :3].argmax(1)).long()


def build() -> nn.Module:
    first = [nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU()]
    return nn.Sequential(*first, nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3))


def train(model: nn.Module, first: int, last: int) -> None:
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(first, last):
        batch = torch.randperm(64)[:16]
        optimiser.zero_grad()
        F.cross_entropy(model(X[batch]), Y[batch]).backward()
        optimiser.step()


def accuracy(model: nn.Module) -> float:
    assert not model.training
    with torch.no_grad():
        return float((model(X).argmax(1) == Y).float().mean())


def find(model: nn.Module, **options: Any) -> LotteryTicket:
    arguments = {"steps": 12, "rounds": 3, "evaluate": accuracy, **options}
    return lottery_ticket(model, train, 0.8, **arguments)


def plain(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in sparsity.make_permanent(copy.deepcopy(model)).state_dict().items()}


@pytest.mark.parametrize("rewind", [0, 4])
def test_the_protocol_step_by_step(rewind: int) -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    ticket = find(model, rewind=rewind)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items()) and not sparsity.masks(model)

    # The same by hand, with plain multiplications before and after each step instead of a parametrisation.
    weights = ["0.weight", "3.weight", "5.weight"]
    net = copy.deepcopy(model).train()
    if rewind:
        torch.manual_seed(0)
        train(net, 0, rewind)
    rewound = copy.deepcopy(net.state_dict())
    masks = {k: torch.ones_like(before[k]) for k in weights}
    for number in range(1, 5):
        net.load_state_dict(rewound)
        torch.manual_seed(number)
        optimiser = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
        for _ in range(rewind, 12):
            batch = torch.randperm(64)[:16]
            optimiser.zero_grad()
            for k in weights:
                net.get_parameter(k).data.mul_(masks[k])
            F.cross_entropy(net(X[batch]), Y[batch]).backward()
            for k in weights:
                net.get_parameter(k).grad.mul_(masks[k])
            optimiser.step()
        for k in weights:
            net.get_parameter(k).data.mul_(masks[k])
        if number == 4:
            break
        flat = torch.cat([net.get_parameter(k).detach().abs().flatten() for k in weights])
        count = int((0.8 if number == 3 else 1 - 0.2 ** (number / 3)) * len(flat) + 0.5)
        gone = flat <= flat.sort().values[count - 1]
        pieces = gone.split([masks[k].numel() for k in weights])
        masks = {k: (~g).float().view(masks[k].shape) for k, g in zip(weights, pieces, strict=True)}
    for k in weights:
        assert torch.equal(ticket.masks[k].float(), masks[k])
        torch.testing.assert_close(plain(ticket.model)[k], net.get_parameter(k).detach())
    assert [r.sparsity for r in ticket.rounds] == pytest.approx([0, 1 - 0.2 ** (1 / 3), 1 - 0.2 ** (2 / 3), 0.8])
    net.eval()
    assert ticket.rounds[-1].score == accuracy(net)


def test_the_reset_keeps_masks_and_sets_everything_else_back() -> None:
    model = build()
    ticket = find(model, rewind=3)
    fresh = ticket.fresh()
    found = plain(fresh)
    assert not torch.equal(ticket.initial["0.weight"], ticket.rewound["0.weight"])
    for name, value in ticket.rewound.items():
        expected = torch.where(ticket.masks[name], value, 0.0) if name in ticket.masks else value
        assert torch.equal(found[name], expected)
    assert sum(int((~m).sum()) for m in ticket.masks.values()) == round(0.8 * (240 + 320 + 48))
    train(fresh.train(), 3, 12)
    assert all(torch.equal(m, ticket.masks[k]) for k, m in sparsity.masks(fresh).items())
    assert torch.equal(ticket.fresh()[0].weight, torch.where(ticket.masks["0.weight"], ticket.rewound["0.weight"], 0.0))


def test_controls() -> None:
    ticket = find(build())
    chance = torch.get_rng_state()
    other = ticket.random_reinit(build, seed=7)
    assert torch.equal(torch.get_rng_state(), chance)
    assert torch.equal(other[0].weight, ticket.random_reinit(build, seed=7)[0].weight)
    assert all(torch.equal(m, ticket.masks[k]) for k, m in sparsity.masks(other).items())
    torch.manual_seed(7)
    assert torch.equal(other[3].weight, torch.where(ticket.masks["3.weight"], build()[3].weight, 0.0))
    shuffled = ticket.random_masks(seed=7)
    for name, mask in sparsity.masks(shuffled).items():
        assert mask.sum() == ticket.masks[name].sum() and not torch.equal(mask, ticket.masks[name])
    kept = sparsity.masks(shuffled)["0.weight"]
    assert torch.equal(shuffled[0].weight[kept], ticket.initial["0.weight"][kept])


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("rewind", [0, 3])
def test_a_run_stopped_in_any_training_ends_alike(tmp_path: Path, rewind: int) -> None:
    model = build()
    whole = find(model, rewind=rewind)
    for stop in range(5 if rewind else 4):
        path = tmp_path / f"{stop}.safetensors"
        calls = 0

        def stopping(net: nn.Module, first: int, last: int, stop: int = stop) -> None:
            nonlocal calls
            calls += 1
            if calls > stop:
                train(net, first, last - 1)
                raise StoppedError
            train(net, first, last)

        with pytest.raises(StoppedError):
            lottery_ticket(
                model, stopping, 0.8, steps=12, rounds=3, evaluate=accuracy, rewind=rewind, checkpoint=path
            )
        # the model of the new process may have other weights: those of the run count, once it has any
        torch.manual_seed(99)
        again = find(build() if path.exists() else model, rewind=rewind, checkpoint=path)
        assert again.rounds == whole.rounds
        assert all(torch.equal(m, whole.masks[k]) for k, m in again.masks.items())
        assert all(torch.equal(v, plain(whole.model)[k]) for k, v in plain(again.model).items())
        assert all(torch.equal(v, whole.initial[k]) for k, v in again.initial.items())
    finished = find(model, rewind=rewind, checkpoint=path)
    assert all(torch.equal(v, plain(whole.model)[k]) for k, v in plain(finished.model).items())


def test_checkpoints_of_other_runs_and_damaged_ones(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    find(build(), checkpoint=path)
    with pytest.raises(GraphPruneError, match="of another run, with steps 12 instead of 13"):
        find(build(), checkpoint=path, steps=13)
    with pytest.raises(GraphPruneError, match="of another run, with names or shapes"):
        find(nn.Sequential(nn.Linear(12, 3)), checkpoint=path)
    good = path.read_bytes()
    for bad in (b"", good[:100], good[:-1], b"\xff" * 50):
        path.write_bytes(bad)
        with pytest.raises(GraphPruneError, match="cannot be read"):
            find(build(), checkpoint=path)


def test_errors_come_before_any_training() -> None:
    for options, message in (
        ({"steps": 0}, "steps: expected an integer of at least 1"),
        ({"rounds": 0}, "rounds: expected"),
        ({"rewind": 12}, "expected rewind < steps"),
        ({"rewind": -1}, "rewind: expected"),
        ({"scope": "up"}, "scope: expected"),
        ({"ignore": "none such"}, "ignore: no module or parameter matches"),
        ({"evaluate": lambda model: float("nan")}, "evaluate returned nan"),
    ):
        with pytest.raises(GraphPruneError, match=message):
            find(build(), **options)
    with pytest.raises(GraphPruneError, match="has masks already"):
        find(sparsity.magnitude(build(), 0.5))
