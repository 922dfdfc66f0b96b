from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError, Plan
from graphprune.dependency.whole.experts import find_mixtures
from tests.moe_networks import ListedMixture, Needed, StackedMixture, Transformer
from tests.tracing.counting_reference import computed


def slow(model: Transformer, x: Tensor, gone: dict[int, set[int]]) -> Tensor:
    """Token by token and expert by expert, with the experts that go left out of the ranking."""
    x = model.inward(x)
    for number, layer in enumerate(model.layers):
        out = torch.zeros_like(x)
        for b in range(x.shape[0]):
            for t in range(x.shape[1]):
                token = x[b, t]
                router = layer.gate if isinstance(layer, ListedMixture) else None
                logits = router(token) if router is not None else layer.router @ token
                order = [int(i) for i in logits.argsort(descending=True) if int(i) not in gone.get(number, set())]
                top = order[: layer.top_k if isinstance(layer, ListedMixture) else layer.config.top_k]
                weights = torch.softmax(logits[top], -1)
                for weight, i in zip(weights, top, strict=True):
                    if isinstance(layer, ListedMixture):
                        made = layer.experts[i](token)
                    else:
                        made = F.silu(token @ layer.up[i] + layer.up_bias[i]) @ layer.down[i]
                    out[b, t] += weight * made
        x = x + out
    return model.head(x)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("experts, top_k, ratio", [(6, 2, 0.5), (4, 1, 0.25), (8, 3, 0.6), (5, 2, 0.9), (6, 2, 0.0)])
@pytest.mark.parametrize("seed", range(2))
def test_against_a_loop(stacked: bool, experts: int, top_k: int, ratio: float, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Transformer(stacked, experts, top_k).eval(), torch.randn(2, 4, 5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = graphprune.plan(model, x, ratio, granularity="experts")
    small = graphprune.prune(model, x, ratio, granularity="experts")
    number = min(int(ratio * experts + 0.5), experts - top_k)
    assert [len(e.gone) for e in plan.experts] == ([number] * 2 if number else [])
    gone = {i: set(e.gone) for i, e in enumerate(plan.experts)}
    torch.testing.assert_close(small(x), slow(model, x, gone), atol=1e-5, rtol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.config.num_local_experts == experts
    if number and stacked:
        assert small.config.num_local_experts == experts - number and small.layers[0].up.shape[0] == experts - number
    elif number:
        assert len(small.layers[1].experts) == small.layers[1].num_experts == experts - number
    assert graphprune.verify(model, small, plan, x).passed


def test_those_go_that_the_router_likes_least() -> None:
    model = Transformer().eval()
    with torch.no_grad():
        for layer, unloved in zip(model.layers, ([1, 3, 4], [0, 2, 5]), strict=True):
            layer.gate.bias[unloved] -= 50
    plan = graphprune.plan(model, torch.randn(2, 4, 5), 0.5, granularity="experts", data=[torch.randn(8, 4, 5)])
    assert [e.gone for e in plan.experts] == [(1, 3, 4), (0, 2, 5)]
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(plan.apply(model)(x), model(x))


@pytest.mark.parametrize("stacked", [False, True])
def test_then_channels_and_one_file(stacked: bool, tmp_path: Path) -> None:
    model, x = Transformer(stacked).eval(), torch.randn(2, 4, 5)
    small = graphprune.prune(graphprune.prune(model, x, 0.5, granularity="experts"), x, 0.25)
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
    path = graphprune.save(small, tmp_path / "small.safetensors")
    again = graphprune.load(path, lambda: Transformer(stacked)).eval()
    assert torch.equal(again(x), small(x))


def test_what_cannot_go_is_named() -> None:
    x = torch.randn(2, 4, 8)
    plan = graphprune.plan(Needed().eval(), x, 0.5, granularity="experts")
    assert plan.empty and "gate.weight" in plan.frozen[0]
    plan = graphprune.plan(nn.Linear(8, 8), x, 0.5, granularity="experts")
    assert plan.empty and "no mixture" in plan.frozen[0]
    held = graphprune.plan(Transformer().eval(), torch.randn(1, 2, 5), 0.5, granularity="experts", ignore="layers.0")
    assert [e.router for e in held.experts] == ["layers.1.gate.weight"]


def test_found_mixtures() -> None:
    model = Transformer(stacked=True)
    found = find_mixtures(model, torch.randn(1, 2, 5))
    assert [m.number for m in found] == [6, 6] and found[0].chosen == 2 and isinstance(model.layers[0], StackedMixture)
    assert set(found[0].stacked) == {f"layers.0.{n}" for n in ("router", "up", "up_bias", "down")}


def test_wrong_networks_and_files_are_refused(tmp_path: Path) -> None:
    model, x = Transformer().eval(), torch.randn(2, 4, 5)
    plan = graphprune.plan(model, x, 0.5, granularity="experts")
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan and "experts left out" in str(plan)
    small = plan.apply(model)
    with torch.no_grad():
        small.layers[0].gate.weight[0] += 1
    assert not graphprune.verify(model, small, plan, x).passed
    bad = plan.to_dict()
    for change in (
        {"router": "nowhere"},
        {"gone": [99]},
        {"gone": [1, 0]},
        {"gone": [-1]},
        {"listed": 3},
        {"gone": None},
    ):
        with pytest.raises(GraphPruneError):
            Plan.from_dict({**bad, "experts": [{**bad["experts"][0], **change}]})
    wrong = dataclasses.replace(plan, experts=tuple(dataclasses.replace(e, listed="head") for e in plan.experts))
    with pytest.raises(GraphPruneError, match="no list"):
        wrong.apply(model)


class Routed(nn.Module):
    """The loss of the routers is computed outside of the mixtures, with a number of its own; the other number is one of
    hidden channels that happens to be the same."""

    def __init__(self, stacked: bool) -> None:
        super().__init__()
        self.net, self.num_experts, self.classes, self.top_experts = Transformer(stacked), 6, 6, 6

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def balance(self, logits: Tensor) -> Tensor:
        share = F.one_hot(logits.argmax(-1), self.num_experts).float().mean(0)
        return (share * logits.softmax(-1).mean(0)).sum() * self.num_experts


@pytest.mark.parametrize("stacked", [False, True])
def test_numbers_of_experts_outside_of_the_mixtures_follow(stacked: bool) -> None:
    torch.manual_seed(0)
    model, x = Routed(stacked).eval(), torch.randn(2, 4, 5)
    small = graphprune.prune(model, x, 0.34, granularity="experts")
    assert (small.num_experts, small.classes, small.top_experts) == (4, 6, 6) and model.num_experts == 6
    weight = small.net.layers[0].router if stacked else small.net.layers[0].gate.weight
    assert small.balance(small.net.inward(x).flatten(0, 1) @ weight.T).item() > 0


class Balanced(Routed):
    """Returns what the first router says and its loss too, as mixtures do while they are trained."""

    def forward(self, x: Tensor) -> Any:
        layer = self.net.layers[0]
        weight = layer.router if hasattr(layer, "router") else layer.gate.weight
        logits = self.net.inward(x).flatten(0, 1) @ weight.T
        return self.net(x), logits, self.balance(logits)


@pytest.mark.parametrize("stacked", [False, True])
def test_networks_that_return_what_their_routers_say(stacked: bool) -> None:
    torch.manual_seed(0)
    model, x = Balanced(stacked).eval(), torch.randn(2, 4, 5)
    plan = graphprune.plan(model, x, 0.34, granularity="experts")
    small = graphprune.prune(model, x, 0.34, granularity="experts")
    _, logits, loss = small(x)
    kept = [i for i in range(6) if i not in plan.experts[0].gone]
    assert small.num_experts == 4 and torch.equal(logits, model(x)[1][:, kept]) and loss.isfinite()
    assert graphprune.verify(model, small, plan, x).passed
    with torch.no_grad():
        small.net.layers[0].get_parameter("router" if stacked else "gate.weight")[0].add_(0.1)
    assert not graphprune.verify(model, small, plan, x).passed  # also where no token goes another way


def test_a_number_stays_where_mixtures_come_out_different() -> None:
    model, x = Routed(False).eval(), torch.randn(2, 4, 5)
    small = graphprune.prune(model, x, 0.34, granularity="experts", ignore="net.layers.0")
    assert [small.net.layers[i].num_experts for i in (0, 1)] == [6, 4] and small.num_experts == 6
    assert small.net.config.num_local_experts == 6


def test_options_that_experts_do_not_take() -> None:
    model, x = Transformer().eval(), torch.randn(2, 4, 5)
    with pytest.raises(GraphPruneError, match="experts take one number"):
        graphprune.plan(model, x, {"*": 0.5}, granularity="experts")
    with pytest.raises(GraphPruneError, match="experts take one number"):
        graphprune.plan(model, x, granularity="experts", budget=graphprune.Budget(macs=0.5))
    with pytest.raises(GraphPruneError, match="routing"):
        graphprune.plan(model, x, 0.5, granularity="experts", criterion="taylor")
    with pytest.raises(GraphPruneError, match="does not go with"):
        graphprune.plan(model, x, 0.5, granularity=["experts", "heads"])


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_hugging_face(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    options = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    options |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    options |= {"num_local_experts": 6} if name == "Mixtral" else {"num_experts": 6, "moe_intermediate_size": 24}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options, output_router_logits=name == "Mixtral")
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    x = {"input_ids": torch.randint(0, 50, (2, 11)), "use_cache": False}
    plan = graphprune.plan(model, x, 0.5, granularity="experts")
    assert [len(e.gone) for e in plan.experts] == [3, 3]
    small = graphprune.prune(model, x, 0.5, granularity="experts")
    assert graphprune.verify(model, small, plan, x).passed
    small = graphprune.prune(small, x, 0.5, granularity=["heads", "mlp"])
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())
    assert [small.num_experts, small.model.layers[0].mlp.experts.num_experts] == [3, 3]
    small.train()(**x, labels=x["input_ids"], output_router_logits=True).loss.backward()
    fewer = graphprune.prune(model, x, 0.5, granularity="experts")
    assert graphprune.fit_config(fewer, x)


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe"])
def test_budgets_of_hugging_face_mixtures(name: str, kind: str) -> None:
    """Against a count by what runs: two axes of every matrix product, and all rows of the grouped ones."""
    transformers = pytest.importorskip("transformers")
    options = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    options |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    options |= {"num_local_experts": 6} if name == "Mixtral" else {
        "num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
    }  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**options)).eval()
    x = {"input_ids": torch.randint(0, 60, (4, 8)), "use_cache": False}
    small = graphprune.prune(model, x, budget=graphprune.Budget(**{kind: 0.5}))
    counted = [graphprune.count(net, x) for net in (small, model)]
    # only the products of two rotary tables are no weights' and no attention's
    assert [c.macs for c in counted] == [computed(net, x) for net in (small, model)]
    assert [c.parameters for c in counted] == [sum(p.numel() for p in net.parameters()) for net in (small, model)]
    used = counted[0].macs / counted[1].macs if kind == "macs" else counted[0].parameters / counted[1].parameters
    assert 0.99 * 0.5 <= used <= 0.5
