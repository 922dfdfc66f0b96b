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
from typer.testing import CliRunner, Result

import graphprune
from graphprune import GraphPruneError
from graphprune.cli import app
from graphprune.factories import InputShape, load_factory, load_weights, save_weights
from graphprune.importance import registry

ZOO = '''
import torch
from torch import nn

import graphprune

print("imported")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        print("called")
        return self.head(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))

    @classmethod
    def small(cls):
        return cls(), torch.randn(2, 3, 8, 8)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.body, self.out = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.out.weight = self.table.weight

    def forward(self, tokens, mask):
        return self.out(self.body(self.table(tokens)).relu() * mask)


@graphprune.criterion("zoo_first")
def zoo_first(context, group):
    return torch.arange(group.size, 0, -1).double()


made = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
number = 3


def net():
    return Net.small()


def tokens():
    return Tied()


def meta():
    with torch.device("meta"):
        return Net(), torch.empty(1, 3, 8, 8)


def broken():
    raise RuntimeError("first line\\nsecond line")


def needs(width):
    return nn.Linear(width, width)


def nothing():
    return None
'''


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test has a current directory of its own, with the module `zoo` in it."""
    (tmp_path / "zoo.py").write_text(ZOO, encoding="utf-8")
    (tmp_path / "unimportable.py").write_text("import there_is_no_such_package\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    yield
    for name in ("zoo", "unimportable"):
        sys.modules.pop(name, None)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), terminal_width=200, env={"COLUMNS": "200"})


def ok(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def as_json(*arguments: str) -> Any:
    """Standard output must be one JSON object and nothing else."""
    return json.loads(ok(*arguments, "--json"))


def failed(*arguments: str) -> str:
    """The one line of an error that the user can act on."""
    result = run(*arguments)
    assert result.exit_code == 1 and result.stdout == "", result.output
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.splitlines()[-1] == line
    return line


def wrong(*arguments: str) -> str:
    """Bad usage."""
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == "", result.output
    return " ".join(result.stderr.replace("│", " ").split())


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
    assert stays[0]["count"] == stays[0]["length"] == 4 and stays[0]["reasons"] == ["part of the model's output"]
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
    data = as_json("prune", "zoo:net", "--ratio", "0.5", "-o", "half")
    assert data["files"] == {"plan": "half.plan.json", "weights": "half.safetensors"}
    assert data["verification"]["passed"] and len(data["verification"]["checks"]) == 3
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
    assert written() == {"half.plan.json", "half.safetensors"}


def written() -> set[str]:
    """Files in the current directory that no test put there."""
    return set(os.listdir()) - {"zoo.py", "unimportable.py", "__pycache__"}


def test_prune_prints_a_comparison() -> None:
    text = ok("prune", "zoo:net", "--ratio", "0.5", "--no-verify")
    rows = [line.split() for line in text.splitlines()]
    assert ["before", "after", "removed"] in rows and "2 of 2 groups pruned, 1 batch norms folded" in text
    # With the batch norm folded: 4 x 27 + 4, 3 x 4 + 3, 4 x 3 + 4 parameters are left of 224 + 16 + 54 + 28.
    assert ["parameters", "322", "143", "55.6%"] in rows
    # Two images of 36 positions: 8 x 27 + 6 x 8 and 4 x 27 + 3 x 4 each, and the head.
    assert ["MACs", "at", "batch", "size", "2", "19,056", "8,664", "54.5%"] in rows
    assert "not verified" in text and "written: pruned.plan.json, pruned.safetensors" in text


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
        (["--granularity", "heads"], {"granularity": "heads"}),
    ]
    for arguments, options in cases:
        ok("prune", "zoo:net", *arguments)
        model, example = (load_factory("zoo:net", seed=7).model if "--seed" in arguments else base.model), base.example
        expected = graphprune.plan(model, example, **{"ratio": 0.5, **options})
        found = graphprune.Plan.load("pruned.plan.json")
        assert found.removed == expected.removed and found.folds == expected.folds, arguments


def test_tied_weights_are_written_once_and_read_back() -> None:
    shapes = ["--input-shape", "2,5:int64", "--input-shape", "2,5,1"]
    data = as_json("prune", "zoo:tokens", *shapes, "--ratio", "0.5")
    stored = safetensors.torch.load_file("pruned.safetensors")
    assert sorted(stored) == ["body.bias", "body.weight", "table.weight"]
    assert sum(t.numel() for t in stored.values()) == data["after"]["parameters"]
    small = graphprune.Plan.load("pruned.plan.json").apply(load_factory("zoo:tokens").model)
    load_weights(small, "pruned.safetensors")
    assert small.get_parameter("out.weight") is small.get_parameter("table.weight")


def test_weights_are_loaded_first() -> None:
    model = load_factory("zoo:net", seed=3).model
    with torch.no_grad():
        model.get_parameter("first.weight")[::2] *= 1e-3
    save_weights(model, "mine.safetensors")
    ok("prune", "zoo:net", "--weights", "mine.safetensors", "--ratio", "0.5")
    removed = graphprune.Plan.load("pruned.plan.json").removed
    assert removed["first.weight"][0] == (0, 2, 4, 6)


def test_meta_models_are_planned_without_weights() -> None:
    data = as_json("prune", "zoo:meta", "--ratio", "0.5")
    assert data["files"] == {"plan": "pruned.plan.json", "weights": None} and Path("pruned.plan.json").exists()
    assert data["after"]["parameters"] == 143 and not Path("pruned.safetensors").exists()
    assert "a model on the meta device has no weights to write" in ok("prune", "zoo:meta")


# -- export and bench


def test_export_dense_pruned_and_by_plan() -> None:
    dense = as_json("export", "zoo:net", "dense.onnx")
    assert dense["dynamic_batch"] and dense["max_relative_error"] < 1e-4 and dense["verification"] is None
    assert dense["inputs"] == ["x"] and dense["parameters"] == 322
    ratio = as_json("export", "zoo:net", "ratio.onnx", "--ratio", "0.5", "--fixed-batch", "--opset", "18")
    assert (ratio["opset"], ratio["dynamic_batch"], ratio["batch_size"]) == (18, False, 2)
    assert ratio["parameters"] == 143 and ratio["verification"]["passed"]
    ok("prune", "zoo:net", "--ratio", "0.5")
    trained = safetensors.torch.load_file("pruned.safetensors")
    safetensors.torch.save_file({name: t * 0 + 1 for name, t in trained.items()}, "trained.safetensors")
    planned = ["--plan", "pruned.plan.json", "--pruned-weights", "trained.safetensors", "--no-verify"]
    text = ok("export", "zoo:net", "plan.onnx", *planned)
    assert text.startswith("plan.onnx: opset ") and "relative error" in text
    found = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load("plan.onnx").graph.initializer}
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


# -- what goes wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere.at:all"], "there is no module 'nowhere', neither installed nor in"),
        (["inspect", "zoo.more:net"], "there is no module 'zoo.more'"),
        (["inspect", "unimportable:net"], "No module named 'there_is_no_such_package' (unimportable.py:1)"),
        (["inspect", "zoo"], "'zoo' names no model; write module:function"),
        (["inspect", "zoo:none"], "module 'zoo' has no attribute 'none'"),
        (["inspect", "zoo:number"], "zoo:number is no function but int"),
        (["inspect", "zoo:broken"], "failed: RuntimeError: first line | second line (zoo.py:"),
        (["inspect", "zoo:needs"], "calling it without arguments failed: TypeError: needs() missing 1 required"),
        (["inspect", "zoo:nothing"], "returned NoneType; expected a torch.nn.Module or a pair"),
        (["inspect", "zoo:Net"], "zoo:Net returns a model without an example input; add --input-shape"),
        (["inspect", "zoo:Net", "--input-shape", "1,4,8,8"], "example_input held tensors of shape (1, 4, 8, 8)"),
        (["inspect", "zoo:net", "--explain", "first.wieght"], "no parameter or buffer named 'first.wieght'"),
        (["inspect", "zoo:net", "--dot", "no/a.dot"], "the folder no does not exist"),
        (["inspect", "zoo:net", "--svg", "a.bmp"], "must end in one of .dot, .svg, .png, .pdf"),
        (["inspect", "zoo:net", "--weights", "none.safetensors"], "the weights none.safetensors cannot be read"),
        (["inspect", "zoo:net", "--weights", "zoo.py"], "the weights zoo.py cannot be read"),
        (["prune", "zoo:net", "--ratio", "1.0"], "ratio"),
        (["prune", "zoo:net", "--ratio", "nan"], "ratio"),
        (["prune", "zoo:net", "--ratio", "frist=0.5"], "frist"),
        (["prune", "zoo:net", "--ignore", "frist"], "frist"),
        (["prune", "zoo:net", "--scope", "everywhere"], "scope: expected one of 'local', 'global', 'isomorphic'"),
        (["prune", "zoo:net", "--criterion", "l3"], "l3"),
        (["prune", "zoo:net", "--round-to", "0"], "round_to"),
        (["prune", "zoo:net", "--granularity", "kernels"], "kernels"),
        (["prune", "zoo:net", "-o", "no/small"], "the folder no does not exist"),
        (["export", "zoo:net", "no/small.onnx"], "the folder no does not exist"),
        (["export", "zoo:net", "a.onnx", "--plan", "zoo.py"], "the plan zoo.py is no JSON"),
        (["export", "zoo:net", "a.onnx", "--opset", "999"], "opset must be an integer up to"),
        (["export", "zoo:meta", "a.onnx"], "is on the meta device"),
        (["bench", "none.onnx", "--input-shape", "1,3,8,8"], "there is no file none.onnx"),
        (["bench", "zoo:net", "--baseline", "other"], "baseline 'other' is not among the models: net"),
        (["bench", "zoo:net", "--provider", "abacus"], "abacus"),
        (["bench", "zoo:net", "--plot", "no/a.svg"], "the folder no does not exist"),
    ],
)
def test_errors_are_one_line_and_status_1(arguments: list[str], message: str) -> None:
    assert message in failed(*arguments)
    assert not written()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect"], "Missing argument"),
        (["inspect", "zoo:net", "--input-shape", "1,x"], "'1,x' is no shape"),
        (["inspect", "zoo:net", "--input-shape", "1,0"], "every size must be at least 1"),
        (["inspect", "zoo:net", "--input-shape", "1,3:int65"], "'int65' is no data type"),
        (["inspect", "zoo:net", "--seed", "-1"], "--seed"),
        (["prune", "zoo:net", "--ratio", "half"], "'half' is neither a number nor a list of name=number"),
        (["prune", "zoo:net", "--ratio", "0.5,first=0.5"], "neither a number"),
        (["prune", "zoo:net", "--ratio", "first=0.5,first=0.4"], "neither a number"),
        (["prune", "zoo:net", "--ratio", ","], "expected a number or name=number"),
        (["prune", "zoo:net", "--round-to", "x"], "--round-to"),
        (["export", "zoo:net"], "Missing argument"),
        (["export", "zoo:net", "a.onnx", "--ratio", "0.5", "--plan", "p.json"], "give --plan or --ratio, not both"),
        (["export", "zoo:net", "a.onnx", "--pruned-weights", "w"], "needs --plan or --ratio"),
        (["bench", "zoo"], "'zoo' is neither MODULE:FUNCTION nor an .onnx file"),
        (["bench", "a=zoo:net", "a=zoo:Net"], "two models are called 'a'"),
        (["bench", "zoo:net", "--batch", "1,two"], "'1,two' is no list of integers"),
        (["bench", "zoo:net", "--provider-option", "x"], "expected KEY=VALUE"),
        (["unknown"], "No such command 'unknown'"),
    ],
)
def test_bad_usage_is_status_2(arguments: list[str], message: str) -> None:
    assert message in wrong(*arguments)


def test_weights_that_do_not_fit_are_named() -> None:
    state = {name: t.clone() for name, t in load_factory("zoo:net").model.state_dict().items()}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"first.weight": torch.ones(8, 3, 2, 2)}, "'first.weight' has shape (8, 3, 2, 2) in the file and (8, 3, 3"),
        ({"extra": torch.ones(1)}, "the model has no 'extra'"),
        ({"head.bias": None}, "'head.bias' is not in the file"),
    ]
    for change, message in cases:
        changed = {name: t for name, t in {**state, **change}.items() if t is not None}
        safetensors.torch.save_file(changed, "wrong.safetensors")
        assert message in failed("inspect", "zoo:net", "--weights", "wrong.safetensors")
    save_weights(load_factory("zoo:net").model, "good.safetensors")
    assert "is on the meta device; build a real model" in failed("inspect", "zoo:meta", "--weights", "good.safetensors")
    with pytest.raises(GraphPruneError, match="on the meta device and has no values"):
        save_weights(load_factory("zoo:meta").model, "meta.safetensors")
    assert not Path("meta.safetensors").exists()


def test_a_plan_of_another_model_is_refused() -> None:
    ok("prune", "zoo:net")
    line = failed("export", "zoo:tokens", "a.onnx", "--plan", "pruned.plan.json", "--input-shape", "1,2:int64",
                  "--input-shape", "1,2,1")  # fmt: skip
    assert "the plan was made for another model" in line and not Path("a.onnx").exists()


def test_what_fails_verification_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_check = graphprune.verification.Check("zero equivalence", False, 0.5)
    monkeypatch.setattr("graphprune.cli.verify", lambda *_: graphprune.VerificationReport((wrong_check,)))
    assert "verification failed" in failed("prune", "zoo:net")
    assert "verification failed" in failed("export", "zoo:net", "a.onnx", "--ratio", "0.5")
    assert not written()


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
