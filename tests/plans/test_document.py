"""Plans as files: damaged ones are noticed, edited ones are told how, and those without a digest are checked."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError, Plan
from tests.sealing import sealed_json

IMAGE = torch.randn(1, 3, 8, 8)


class Grouped(nn.Module):
    """A folded norm, depthwise filters, an attribute that forward reads, and a graph in the place of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8)
        self.c, self.groups = nn.Conv2d(8, 4, 1), 8

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.norm(self.a(x)).relu())
        out: Tensor = self.c(x.view(x.shape[0], self.groups, -1, *x.shape[2:]).flatten(1, 2))
        return out


def planned() -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    model = Grouped().eval()
    return model, graphprune.plan(model, IMAGE, 0.5)


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return str(a) == str(b) and first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_plan_is_the_same_from_dict_text_and_file(tmp_path: Path) -> None:
    model, plan = planned()
    path = plan.save(tmp_path / "plan.json")
    text = path.read_text()
    assert json.loads(text) == json.loads(sealed_json(plan.to_dict()))
    path.write_text(json.dumps(json.loads(text), indent=2, sort_keys=True))
    plain = [plan.to_dict(), json.loads(json.dumps(plan.to_dict())), json.loads(text)]
    for again in (*map(Plan.from_dict, plain), Plan.load(path)):
        assert again == plan and same(again.apply(model), plan.apply(model))


def leaves(data: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a nest."""
    found = []
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        found += [(data, key), *leaves(data[key])]
    return found


def test_whatever_is_changed_lost_or_renamed_in_a_file_is_noticed(tmp_path: Path) -> None:
    _, plan = planned()
    path = plan.save(tmp_path / "plan.json")
    whole = json.loads(path.read_text())
    count = len(leaves(whole))
    for at in range(count):
        for change in ("lose", "alter", "rename"):
            data = copy.deepcopy(whole)
            inside, key = leaves(data)[at]
            if change == "lose" and key != "digest":
                del inside[key]
            elif change == "alter":
                inside[key] = {"other": 1} if isinstance(inside[key], str) else str(inside[key])
            elif change == "rename" and isinstance(key, str):
                inside[f"{key}x"] = inside.pop(key)
            if data == whole:
                continue
            path.write_text(json.dumps(data))
            message = "is damaged: .*changed" if "digest" in data else "has an entry 'digestx'"
            with pytest.raises(GraphPruneError, match=rf"plan\.json {message}" if "digest" in data else message):
                Plan.load(path)
            with pytest.raises(GraphPruneError):
                Plan.from_dict(data)


def test_damaged_text_is_no_plan(tmp_path: Path) -> None:
    _, plan = planned()
    path = plan.save(tmp_path / "plan.json")
    whole = path.read_bytes()
    for at in range(0, len(whole) - 1, 7):
        for byte in (None, b"", bytes([whole[at] ^ 1])):
            path.write_bytes(whole[:at] if byte is None else whole[:at] + byte + whole[at + 1 :])
            with pytest.raises(GraphPruneError, match=r"plan\.json"):
                Plan.load(path)


def edited(plan: Plan, change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    data = json.loads(json.dumps(plan.to_dict()))
    change(data)
    return data


def test_an_edited_plan_works_once_its_digest_is_gone(tmp_path: Path) -> None:
    model, plan = planned()
    path = plan.save(tmp_path / "plan.json")
    gone = plan.removed["a.weight"][0]
    other = sorted({(i + 1) % 8 for i in gone})
    data = json.loads(path.read_text())
    for axes in data["removed"].values():
        axes.update(dict.fromkeys(axes, other))
    path.write_text(json.dumps(data))
    with pytest.raises(GraphPruneError, match='removes the entry "digest"'):
        Plan.load(path)
    del data["digest"]
    path.write_text(json.dumps(data))
    kept = [i for i in range(8) if i not in other]
    assert torch.equal(Plan.load(path).apply(model).get_parameter("c.weight"), model.get_parameter("c.weight")[:, kept])


@pytest.mark.parametrize("section", ["removed", "attributes", "folds"])
def test_without_a_digest_a_lost_entry_is_missed(section: str) -> None:
    _, plan = planned()
    entries = list(getattr(plan, section))
    assert entries
    for at in range(len(entries)):
        data = edited(plan, lambda d: d[section].pop(entries[at] if section == "removed" else at))  # noqa: B023
        with pytest.raises(GraphPruneError, match="lost or gained entries"):
            Plan.from_dict(data)


def test_a_lost_rewrite_is_missed() -> None:
    from tests.plans.rewriting.literal_nets import NETS

    model, example, _ = NETS["view"]()
    plan = graphprune.plan(model, example, 0.5, output="hybrid")
    with pytest.raises(GraphPruneError, match="1 rewrites, and it lists 0"):
        Plan.from_dict(edited(plan, lambda d: d["rewrites"].clear()))


def test_of_axes_that_go_together_none_is_changed_alone() -> None:
    _, plan = planned()
    for name, axes in plan.removed.items():
        for axis in axes:
            for change in (lambda gone: gone[1:], lambda gone: [*gone[:-1], 7 if gone[-1] != 7 else 6]):
                data = edited(plan, lambda d: d["removed"][name].update({str(axis): change(d["removed"][name][str(axis)])}))  # noqa: B023, E501
                if data == edited(plan, lambda d: None):
                    continue
                with pytest.raises(GraphPruneError, match=r"counts say 1 lists, and it lists 2|must be increasing"):
                    Plan.from_dict(data)


def test_whoever_corrects_the_counts_may_leave_a_norm_as_it_is() -> None:
    model, plan = planned()
    data = edited(plan, lambda d: (d["folds"].clear(), d["counts"].update(folds=0)))
    unfolded = Plan.from_dict(data).apply(model)
    assert isinstance(unfolded.norm, nn.BatchNorm2d)
    assert torch.allclose(unfolded(IMAGE), plan.apply(model)(IMAGE), atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["folds"][0].update(axis=1),
        lambda d: d["folds"][0].update(axis=-1),
        lambda d: d["folds"][0].update(axis=10**30),
        lambda d: d["folds"][0].update(layer="c"),
        lambda d: d["folds"][0].update(batch_norm="c"),
        lambda d: d["folds"][0].update(layer=["a"]),
        lambda d: d["folds"].append(d["folds"][0]),
        lambda d: d["removed"]["a.weight"].update({"00": [0]}),
        lambda d: d["removed"]["a.weight"].update({"²": [0]}),
        lambda d: d["removed"]["a.weight"].update({"0": "01"}),
        lambda d: d["removed"]["a.weight"].update({"0": [0.0, 1.0]}),
        lambda d: d["removed"]["a.weight"].update({"0": [True]}),
        lambda d: d["removed"]["a.weight"].update({"0": None}),
        lambda d: d["structure"].update({"a.weight": [8, 3, 3, "3"]}),
        lambda d: d["structure"].update({"a.weight": [-8, 3, 3, 3]}),
        lambda d: d["groups"][0].update(size=0),
        lambda d: d["groups"][0].update(kept=-1),
        lambda d: d["groups"][0].update(weight=1e300),
        lambda d: d["groups"][0].update(asked="all"),
        lambda d: d.update(groups="abc"),
        lambda d: d.update(frozen="abc"),
        lambda d: d.update(output="else"),
        lambda d: d.update(output=[]),
        lambda d: d.update(versions=[]),
        lambda d: d.update(caches=["ab"] * 3),
        lambda d: d.update(latency={}),
        lambda d: d.update(rescales=[{"parameter": "a.weight", "axis": 0, "indices": [8], "factor": 2.0}]),
        lambda d: d.update(rescales=[{"parameter": "a.weight", "axis": 0, "indices": [0], "factor": 1e999}]),
        lambda d: d["attributes"][0].update(new="4"),
        lambda d: d["attributes"][0].update(key=[None]),
        lambda d: d["counts"].pop("folds"),
        lambda d: d.update(counts=None),
    ],
)
def test_fields_of_another_kind_are_refused(change: Callable[[dict[str, Any]], Any]) -> None:
    model, plan = planned()
    with pytest.raises(GraphPruneError):
        Plan.from_dict(edited(plan, change)).apply(model)


def test_infinite_arguments_survive_as_json(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).reshape(-1, 8)
            return self.b(y.masked_fill(y < 0, float("-inf")).clamp(min=-1.0, max=float("inf")))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Masked(), torch.randn(3, 4)
    plan = graphprune.plan(model, x, 0.5, output="graph")
    assert plan.rewrites
    path = plan.save(tmp_path / "plan.json")
    assert "Infinity" not in path.read_text()
    again = Plan.load(path)
    assert again == plan and torch.equal(again.apply(model)(x), plan.apply(model)(x))
    small = graphprune.prune(model, x, 0.5, output="graph")
    loaded = graphprune.load(graphprune.save(small, tmp_path / "m.safetensors"), model)
    assert torch.equal(loaded(x), small(x))
