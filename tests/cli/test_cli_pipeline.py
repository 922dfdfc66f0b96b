"""`graphprune pipeline`: the call, its files, its errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import graphprune
from graphprune.cli.factories import load_data, load_factory

from .command_line import as_json, failed, ok, written, wrong, zoo_folder


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from zoo_folder(tmp_path, monkeypatch)


def test_is_the_call_and_writes_what_it_made() -> None:
    data = as_json(
        "pipeline", "zoo:net", "zoo:split", "--sparsity", "0.25", "--schedule", "linear", "--prune-epochs", "2",
        "--finetune-epochs", "1", "--train-epochs", "1", "--option", "criterion=l1", "--lr", "0.05", "--seed", "3",
        "--distil", "--regularize", "lasso", "-o", "small", "--report", "page.html", "--report", "page.md",
    )  # fmt: skip
    loaded = load_factory("zoo:net", seed=3)
    train, held_out = load_data("zoo:split", seed=3)
    done = graphprune.pipeline(
        loaded.model, loaded.example, train, 0.25, schedule="linear", prune_epochs=2, finetune_epochs=1, train_epochs=1,
        options={"criterion": "l1"}, lr=0.05, seed=3, distillation=True, regularize="lasso", evaluate=held_out,
    )  # fmt: skip
    assert data["training"] == json.loads(json.dumps(done.to_dict()))["training"]
    assert data["tuning"] == json.loads(json.dumps(done.to_dict()))["tuning"] and len(data["tuning"]) == 3
    assert data["report"]["scores"] == dict(done.report.scores)
    assert written() == {
        "small.safetensors", "small.report.json", "small.1.plan.json", "small.2.plan.json", "page.html", "page.md"
    }  # fmt: skip
    assert sorted(data["files"]) == sorted(written())
    model = graphprune.load("small.safetensors", loaded.model)
    removed = [graphprune.Plan.load(f"small.{number}.plan.json").removed for number in (1, 2)]
    assert [p.removed for p in graphprune.plans.history.history_of(model).plans] == removed
    assert all(torch.equal(v, done.model.state_dict()[k]) for k, v in model.state_dict().items())


def test_masks_a_budget_and_checkpoints() -> None:
    arguments = ["pipeline", "zoo:net", "zoo:batches", "--method", "magnitude", "--option", "scope=layer"]
    arguments += ["--sparsity", "0.75", "--finetune-epochs", "1", "--checkpoint", "state"]
    first = as_json(*arguments)
    assert first["report"]["after"]["sparsity"] > 0.5 and first["files"] == ["pruned.safetensors", "pruned.report.json"]
    assert [p.name for p in Path("state").iterdir()] == ["tuning.safetensors"]
    assert as_json(*arguments) == first
    assert "seed" in failed(*arguments, "--seed", "1")
    half = as_json("pipeline", "zoo:net", "zoo:batches", "--macs", "0.5", "--finetune-epochs", "0")
    assert half["report"]["after"]["macs"] <= 0.5 * half["report"]["before"]["macs"]
    assert half["files"][-1] == "pruned.plan.json"
    text = ok("pipeline", "zoo:net", "zoo:split", "--finetune-epochs", "1")
    assert "top-1 accuracy, after recovery" in text and "written: pruned.safetensors" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["zoo:nothing"], "NoneType"),
        (["zoo:number"], "no function"),
        (["zoo"], "names no data"),
        (["zoo:broken"], "RuntimeError"),
        (["zoo:batches", "--schedule", "cubicle"], "cubic"),
        (["zoo:batches", "--method", "chanels"], "method"),
        (["zoo:batches", "--patience", "2"], "evaluate"),
        (["zoo:batches", "--option", "citerion=l1"], "citerion"),
        (["zoo:batches", "--report", "none/page.html"], "folder"),
        (["zoo:batches", "--lr", "-1"], "lr"),
        (["zoo:batches", "--regularize", "laso", "--train-epochs", "1"], "lasso"),
        (["zoo:batches", "--regularize", "lasso"], "train_epochs"),
    ],
)
def test_errors_are_one_line(arguments: list[str], text: str) -> None:
    assert text in failed("pipeline", "zoo:net", *arguments)
    assert not written()


def test_bad_usage() -> None:
    assert "NAME=VALUE" in wrong("pipeline", "zoo:net", "zoo:batches", "--option", "l1")


def test_advise() -> None:
    data = as_json("advise", "zoo:net", "--goal", "size", "--data", "zoo:split", "--seed", "2", "--tolerance", "0.2")
    loaded = load_factory("zoo:net", seed=2)
    train, held_out = load_data("zoo:split", seed=2)
    found = graphprune.advise(loaded.model, loaded.example, "size", data=train, evaluate=held_out, tolerance=0.2)
    expected = json.loads(json.dumps(found.to_dict()))
    assert {k: data[k] for k in expected if k != "model"} == {k: v for k, v in expected.items() if k != "model"}
    assert data["class"] == "Net" and "Recommended" in ok("advise", "zoo:net", "--finetune")
    assert "goal" in failed("advise", "zoo:net", "--goal", "best")
