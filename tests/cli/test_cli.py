"""The command line, called in this process and, once, as a program of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import safetensors.torch
import torch

import graphprune
from graphprune.cli.factories import InputShape, load_factory
from tests.cli.command_line import as_json, failed, ok, written, zoo_folder
from tests.runtimes.latency import law


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from zoo_folder(tmp_path, monkeypatch)


# -- inspect


def test_inspect() -> None:
    text = ok("inspect", "zoo:net", "--explain", "second.weight")
    assert "zoo:net: Net" in text and "Groups: what can be removed together" in text
    assert "first.weight[0]" in text and "second.weight[0]" in text
    assert "axis 1 (8): group 0, 8 channels" in text and "part of the model's output" in text
    assert "MACs of one forward pass at batch size 2" in text and "axes of kernel positions" in text
    assert "imported" not in text and "called" not in text


def test_inspect_as_json() -> None:
    data = as_json("inspect", "zoo:net", "--explain", "head.bias", "--dot", "a.dot", "--svg", "a.svg")
    model, example = load_factory("zoo:net").model, torch.randn(2, 3, 8, 8)
    graph, counted = graphprune.trace(model, example), graphprune.count(model, example)
    assert data["class"] == "Net" and data["parameters"] == counted.parameters and data["macs"] == counted.macs
    assert data["per_layer"]["first"] == {"kind": "Conv2d", "parameters": 224, "macs": 2 * 36 * 8 * 27}
    groups = [(g["name"], g["kind"], g["size"]) for g in data["groups"]]
    assert groups == [(g.name, g.kind, g.size) for g in graph.groups]
    members = {(m["parameter"], m["axis"]): m for m in data["groups"][0]["members"]}
    assert members["second.weight", 1] == {"parameter": "second.weight", "axis": 1, "role": "in", "per_unit": 1}
    assert len(data["frozen"]) == len(graph.frozen)
    stays = [entry for entry in data["frozen"] if (entry["parameter"], entry["axis"]) == ("head.weight", 0)]
    assert stays[0]["count"] == stays[0]["length"] == 4 and len(stays[0]["reasons"]) == 1
    assert data["explained"] == {"head.bias": graph.explain("head.bias")}
    assert data["files"] == ["a.dot", "a.svg"] and Path("a.svg").exists()
    assert Path("a.dot").read_text().startswith("graph graphprune {")


def test_models_of_other_forms() -> None:
    assert as_json("inspect", "zoo:Net", "--input-shape", "5,3,8,8")["batch_size"] == 5
    assert as_json("inspect", "zoo:Net.small")["batch_size"] == 2
    assert as_json("inspect", "zoo:made", "--input-shape", "7,4")["per_layer"]["0"]["macs"] == 7 * 24
    assert as_json("inspect", "zoo:net", "--input-shape", "1,3,9,9")["batch_size"] == 1
    assert as_json("inspect", "zoo:meta")["parameters"] == as_json("inspect", "zoo:net")["parameters"]
    data = as_json("inspect", "zoo:tokens", "--input-shape", "2,5:int64", "--input-shape", "2,5,6:float32")
    assert data["macs"] == 10 * (36 + 66) and data["parameters"] == 66 + 42


def test_torchvision() -> None:
    pytest.importorskip("torchvision")
    data = as_json("inspect", "torchvision.models:resnet18", "--input-shape", "1,3,32,32")
    assert data["parameters"] == 11_689_512 and len(data["groups"]) == 12


# -- prune


def test_prune_writes_a_plan_and_weights_that_fit_it() -> None:
    data = as_json("prune", "zoo:net", "--ratio", "0.5", "--recover", "none", "-o", "half")
    assert data["files"] == {"plan": "half.plan.json", "weights": "half.safetensors"}
    assert data["verification"]["passed"] and len(data["verification"]["checks"]) == 4
    first = {"name": "forward", "passed": True, "error": None, "detail": "1 outputs"}
    assert data["verification"]["checks"][0] == first
    assert data["before"]["macs"] > data["after"]["macs"] and data["folded"] == 1
    assert {(g["size"], g["kept"]) for g in data["groups"]} == {(8, 4), (6, 3)}
    loaded = load_factory("zoo:net")
    plan = graphprune.Plan.load("half.plan.json")
    small = plan.apply(loaded.model).eval()
    assert sum(p.numel() for p in small.parameters()) == data["after"]["parameters"]
    image = torch.randn(3, 3, 8, 8)
    expected = small(image)
    for parameter in small.parameters():
        parameter.data.zero_()
    safetensors.torch.load_model(small, "half.safetensors")
    assert torch.equal(small(image), expected)
    assert written() == {"half.plan.json", "half.safetensors"} and data["repaired"] is None


def test_prune_repairs_what_it_can() -> None:
    data = as_json("prune", "zoo:seen", "--ratio", "0.5", "-o", "half")
    loaded = load_factory("zoo:seen")
    small = graphprune.load("half.safetensors", loaded.model).eval()
    same = graphprune.prune(loaded.model, torch.randn(2, 3, 8, 8), 0.5)
    image = torch.randn(3, 3, 8, 8)
    assert data["repaired"] == "moments" and torch.equal(small(image), same(image))


def test_data_that_are_made_reach_the_plan_and_the_repair() -> None:
    data = as_json("prune", "zoo:net", "--criterion", "wanda", "--data", "synthetic:8", "--seed", "3", "-o", "made")
    loaded = load_factory("zoo:net", seed=3)
    made = graphprune.synthesize(loaded.model, loaded.example, 8, seed=3)
    same = graphprune.prune(loaded.model, loaded.example, 0.5, criterion="wanda", data=made)
    small = graphprune.load("made.safetensors", loaded.model).eval()
    image = torch.randn(3, 3, 8, 8)
    assert data["repaired"] == "least_squares" and torch.equal(small(image), same(image))
    text = ok("prune", "zoo:net", "--criterion", "wanda", "--data", "synthetic:8")
    assert "least_squares, from what layers read on the data" in text
    assert "write synthetic, or synthetic:64" in failed("prune", "zoo:net", "--data", "synthetic:few")


def test_prune_into_a_graph() -> None:
    data = as_json("prune", "zoo:net", "--ratio", "0.5", "--output-mode", "graph", "-o", "graph")
    assert data["output"] == "graph" and data["rewritten"] == [""]
    assert data["verification"]["passed"]
    loaded = load_factory("zoo:net")
    small = graphprune.load("graph.safetensors", loaded.model)
    assert isinstance(small, torch.fx.GraphModule)
    assert small(torch.randn(3, 3, 9, 8)).shape == (3, 4)


def test_prune_prints_a_comparison() -> None:
    text = ok("prune", "zoo:net", "--ratio", "0.5", "--no-verify")
    rows = [line.split() for line in text.splitlines()]
    assert ["before", "after", "removed"] in rows and "2 of 2 groups pruned, 1 batch norms folded" in text
    # With the batch norm folded: 4 x 27 + 4, 3 x 4 + 3, 4 x 3 + 4 parameters are left of 224 + 16 + 54 + 28.
    assert ["parameters", "322", "143", "55.6%"] in rows
    # Two images of 36 positions: 8 x 27 + 6 x 8 and 4 x 27 + 3 x 4 each, and the head.
    assert ["MACs", "at", "batch", "size", "2", "19,056", "8,664", "54.5%"] in rows
    assert "not verified" in text and "written: pruned.plan.json, pruned.safetensors" in text


@pytest.mark.filterwarnings("ignore::graphprune.GraphPruneWarning")
def test_options_reach_the_plan() -> None:
    base = load_factory("zoo:net")
    cases: list[tuple[list[str], dict[str, Any]]] = [
        (["--ratio", "first=0.25,second*=0.5"], {"ratio": {"first": 0.25, "second*": 0.5}}),
        (["--ratio", "first=0.25", "--ratio", "second=0.5"], {"ratio": {"first": 0.25, "second": 0.5}}),
        (["--ratio", "0.4", "--ignore", "first"], {"ratio": 0.4, "ignore": ["first"]}),
        (["--ratio", "0.3", "--scope", "global"], {"ratio": 0.3, "scope": "global"}),
        (["--criterion", "l1", "--round-to", "4"], {"criterion": "l1", "round_to": 4}),
        (["--ratio", "0.9", "--min-channels", "3", "--keep-bn"], {"ratio": 0.9, "min_channels": 3, "fold_bn": False}),
        (["--criterion", "random", "--seed", "7"], {"criterion": "random", "seed": 7}),
        (["--criterion", "zoo_first"], {"criterion": "zoo_first"}),
        (["--granularity", "channels", "--granularity", "heads"], {"granularity": ["channels", "heads"]}),
        (["--granularity", "heads", "--allow-nothing"], {"granularity": "heads"}),
    ]
    for arguments, options in cases:
        ok("prune", "zoo:net", *arguments)
        model, example = (load_factory("zoo:net", seed=7).model if "--seed" in arguments else base.model), base.example
        expected = graphprune.plan(model, example, **{"ratio": 0.5, **options})
        found = graphprune.Plan.load("pruned.plan.json")
        assert found.removed == expected.removed and found.folds == expected.folds, arguments


def test_what_is_said_of_sizes_reaches_the_plan() -> None:
    data = as_json("prune", "zoo:counted")
    assert not graphprune.Plan.load("pruned.plan.json").attributes and "kept stays 8" in data["unsettled"][0]
    data = as_json("prune", "zoo:counted", "--size", "kept=follow")
    assert [str(a) for a in graphprune.Plan.load("pruned.plan.json").attributes] == ["kept: 8 -> 4"]
    assert not data["unsettled"] and not as_json("prune", "zoo:counted", "--size", "kept=hold")["unsettled"]


def test_budgets_reach_the_plan() -> None:
    base = load_factory("zoo:net")
    cases: list[tuple[list[str], graphprune.Budget]] = [
        (["--budget", "macs=0.6"], graphprune.Budget(macs=0.6)),
        (["--budget", "macs=0.8,params=250"], graphprune.Budget(macs=0.8, params=250)),
        (["--budget", "memory=0.7", "--budget", "params=0.9"], graphprune.Budget(memory=0.7, params=0.9)),
    ]
    for arguments, budget in cases:
        ok("prune", "zoo:net", *arguments)
        expected = graphprune.plan(base.model, base.example, budget=budget)
        assert graphprune.Plan.load("pruned.plan.json").removed == expected.removed, arguments


def test_layers_and_channels_within_a_budget() -> None:
    kinds = ["--granularity", "layer", "--granularity", "channels"]
    data = as_json("prune", "zoo:net", *kinds, "--budget", "macs=0.6", "--layer-criterion", "output")
    base = load_factory("zoo:net")
    wanted = graphprune.plan(
        base.model, base.example, budget=graphprune.Budget(macs=0.6), granularity=["layer", "channels"],
        layer_criterion="output",
    )  # fmt: skip
    found = graphprune.Plan.load("pruned.plan.json")
    assert (found.removed, found.layers) == (wanted.removed, wanted.layers)
    assert data["layers"] == [block.module for block in wanted.layers] and data["verification"]["passed"]
    assert "need a budget" in failed("prune", "zoo:net", *kinds, "--ratio", "0.5")


def test_a_latency_table_and_a_plan_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    law.device(monkeypatch, step=4)  # measuring this machine takes a minute: tests/planning/test_within_latency.py
    data = as_json("latency-table", "zoo:net", "table.json", "--provider", "cpu")
    assert all(steps == list(range(0, 64, 4)) for steps in data["stairs"].values())
    assert data["points"] >= 3 and data["dense_ms"] > 0 and set(data["stairs"]) == {"conv", "pointwise", "linear"}
    text = ok("prune", "zoo:net", "--budget", "latency=1", "--latency-table", "table.json")
    plan = graphprune.Plan.load("pruned.plan.json")
    assert plan.latency is not None and plan.latency.measured_ms is None and "not measured" in text
    assert plan.latency.predicted_ms <= 1.0001 * plan.latency.dense_ms
    other = failed("prune", "zoo:net", "--budget", "latency=1", "--latency-table", "table.json", "--precision", "int8")
    assert "made for onnxruntime in fp32, not for onnxruntime in int8" in " ".join(other.split())


def test_tied_weights_are_written_once_and_read_back() -> None:
    shapes = ["--input-shape", "2,5:int64", "--input-shape", "2,5,1"]
    data = as_json("prune", "zoo:tokens", *shapes, "--ratio", "0.5")
    stored = safetensors.torch.load_file("pruned.safetensors")
    assert sorted(stored) == ["body.bias", "body.weight", "table.weight"]
    assert sum(t.numel() for t in stored.values()) == data["after"]["parameters"]
    small = graphprune.load("pruned.safetensors", load_factory("zoo:tokens").model)
    assert small.get_parameter("out.weight") is small.get_parameter("table.weight")


def test_weights_are_loaded_first() -> None:
    model = load_factory("zoo:net", seed=3).model
    with torch.no_grad():
        model.get_parameter("first.weight")[::2] *= 1e-3
    graphprune.save(model, "mine.safetensors")
    ok("prune", "zoo:net", "--weights", "mine.safetensors", "--ratio", "0.5", "--criterion", "l2")
    removed = graphprune.Plan.load("pruned.plan.json").removed
    assert removed["first.weight"][0] == (0, 2, 4, 6)


def test_meta_models_are_planned_without_weights() -> None:
    data = as_json("prune", "zoo:meta", "--ratio", "0.5")
    assert data["files"] == {"plan": "pruned.plan.json", "weights": None} and Path("pruned.plan.json").exists()
    assert data["after"]["parameters"] == 143 and not Path("pruned.safetensors").exists()
    assert "a model on the meta device has no weights to write" in ok("prune", "zoo:meta")


# -- export and bench


def test_export_dense_pruned_and_by_plan() -> None:
    dense = as_json("export", "zoo:net", "dense.onnx", "--dynamic", "x:2=height", "--dynamic", "x:3=width")
    assert dense["dynamic_batch"] and dense["max_relative_error"] < 1e-4 and dense["verification"] is None
    assert dense["dynamic_axes"] == {"x": {"0": "batch", "2": "height", "3": "width"}}
    assert dense["checked_sizes"][0] == {"batch": 2, "height": 8, "width": 8} and len(dense["checked_sizes"]) > 1
    assert dense["inputs"] == ["x"] and dense["parameters"] == 322
    ratio = as_json("export", "zoo:net", "ratio.onnx", "--ratio", "0.5", "--fixed-batch", "--opset", "18")
    assert (ratio["opset"], ratio["dynamic_batch"], ratio["batch_size"]) == (18, False, 2)
    assert ratio["parameters"] == 143 and ratio["verification"]["passed"]
    ok("prune", "zoo:net", "--ratio", "0.5")
    small = graphprune.load("pruned.safetensors", load_factory("zoo:net").model)
    for parameter in small.parameters():
        parameter.data.fill_(1)
    graphprune.save(small, "trained.safetensors")
    text = ok("export", "zoo:net", "plan.onnx", "--plan", "pruned.plan.json", "--no-verify")
    assert text.startswith("plan.onnx: opset ") and "relative error" in text
    ok("export", "zoo:net", "trained.onnx", "--pruned", "trained.safetensors")
    found = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load("trained.onnx").graph.initializer}
    assert found["first.weight"].shape == (4, 3, 3, 3) and (found["first.weight"] == 1).all()
    shapes = {t.name: tuple(t.dims) for t in onnx.load("ratio.onnx").graph.initializer}
    assert shapes["head.weight"] in ((4, 3), (3, 4))
    assert "parity not checked" in ok("export", "zoo:net", "dense.onnx", "--no-check")


BENCH = ["--rounds", "2", "--warmup", "1", "--min-time", "0", "--provider", "cpu"]


def test_bench_of_factories_and_files() -> None:
    ok("export", "zoo:net", "small.onnx", "--ratio", "0.5")
    data = as_json("bench", "zoo:net", "small.onnx", *BENCH, "--batch", "1,3", "--plot", "plot.svg")
    assert [(row["model"], row["batch_size"]) for row in data["rows"]] == [
        ("net", 1), ("small", 1), ("net", 3), ("small", 3),
    ]  # fmt: skip
    assert data["baseline"] == "net" and data["provider"] == "CPUExecutionProvider" and data["threads"] == 1
    assert Path("plot.svg").exists()
    text = ok("bench", "small.onnx", "again=small.onnx", *BENCH, "--baseline", "again", "--threads", "2")
    assert "speed-up against 'again'" in text and "2 threads" in text
    assert as_json("bench", "zoo:Net", *BENCH, "--input-shape", "2,3,8,8")["rows"][0]["batch_size"] == 2
    names = [row["model"] for row in as_json("bench", "zoo:net", "dense=zoo:net", "zoo:Net.small", *BENCH)["rows"]]
    assert names == ["net", "dense", "Net.small"]


def test_bench_reads_the_input_shape_of_a_file() -> None:
    ok("export", "zoo:net", "free.onnx")
    ok("export", "zoo:net", "fixed.onnx", "--fixed-batch")
    ok("export", "zoo:tokens", "tokens.onnx", "--input-shape", "2,5:int64", "--input-shape", "2,5,1")
    assert as_json("bench", "free.onnx", *BENCH)["rows"][0]["batch_size"] == 1
    assert as_json("bench", "fixed.onnx", *BENCH)["rows"][0]["batch_size"] == 2
    assert as_json("bench", "tokens.onnx", *BENCH)["rows"][0]["batch_size"] == 1
    proto = onnx.load("free.onnx")
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    onnx.save(proto, "open.onnx")
    assert "does not fix the shape of its input 'x'; add --input-shape" in failed("bench", "open.onnx", *BENCH)
    Path("garbage.onnx").write_text("no protobuf")
    assert "garbage.onnx cannot be read as an ONNX file" in failed("bench", "garbage.onnx", *BENCH)


# -- models by name


def test_same_spec_and_seed_give_the_same_weights() -> None:
    first, again, other = (load_factory("zoo:net", seed=seed).model for seed in (1, 1, 2))
    assert torch.equal(first.get_parameter("first.weight"), again.get_parameter("first.weight"))
    assert not torch.equal(first.get_parameter("first.weight"), other.get_parameter("first.weight"))


def test_input_shapes() -> None:
    image = InputShape.parse("1,3,4").tensor(seed=1)
    assert image.shape == (1, 3, 4) and image.dtype == torch.float32 and image.std() > 0
    assert torch.equal(image, InputShape.parse("1,3,4").tensor(seed=1))
    tokens = InputShape.parse("2,7:int64").tensor()
    assert tokens.dtype == torch.int64 and not tokens.any()
    half = torch.nn.Linear(2, 2).bfloat16()
    assert InputShape.parse("2").tensor(half).dtype == torch.bfloat16
    assert InputShape.parse("2:float16").tensor(half).dtype == torch.float16
    assert InputShape.parse("2:bool").tensor(half.to("meta")).device.type == "meta"


def test_version_and_help() -> None:
    assert ok("--version").strip() == f"graphprune {graphprune.__version__}"
    text = ok("--help")
    assert all(name in text for name in ("inspect", "prune", "export", "bench"))
    for name in ("inspect", "prune", "export", "bench"):
        assert "--json" in ok(name, "--help")


def test_as_a_program() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(graphprune.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from graphprune.cli import main; main()"]

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)

    # The console script does not put the current directory on sys.path; a model that prints must not spoil the JSON.
    done = call("prune", "zoo:net", "--ratio", "0.5", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["after"]["parameters"] == 143
    assert "imported" in done.stderr and "called" in done.stderr
    broken = call("prune", "zoo:net", "--ratio", "1.5", "--json")
    assert broken.returncode == 1 and broken.stdout == "" and "Traceback" not in broken.stderr
    assert broken.stderr.splitlines()[-1].startswith("error: ratio")
