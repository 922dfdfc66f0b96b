"""What goes wrong on the command line: one line and status 1, or status 2 for bad usage, and nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import graphprune
from graphprune import GraphPruneError
from graphprune.cli.factories import load_factory
from tests.cli.command_line import failed, ok, run, written, wrong, zoo_folder


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from zoo_folder(tmp_path, monkeypatch)


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
        (["inspect", "zoo:nothing"], "returned: expected a torch.nn.Module, got None; pass the network; the function"),
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
        (["prune", "zoo:net", "--size", "kept=hold"], "no module keeps"),
        (["prune", "zoo:net", "--scope", "everywhere"], "scope: expected one of 'local', 'global', 'isomorphic'"),
        (["prune", "zoo:net", "--criterion", "l3"], "l3"),
        (["prune", "zoo:net", "--round-to", "0"], "round_to"),
        (["prune", "zoo:net", "--granularity", "kernels"], "kernels"),
        (["prune", "zoo:net", "--budget", "macs=0.00001"], "macs cannot be brought to"),
        (["prune", "zoo:net", "--budget", "latency=0.5", "--latency-table", "none.json"], "none.json: cannot be read"),
        (["prune", "zoo:net", "--provider", "abacus"], "abacus"),
        (["prune", "zoo:net", "--runtime", "abacus"], "abacus"),
        (["prune", "zoo:net", "--recover", "abacus"], "abacus"),
        (["prune", "zoo:net", "--precision", "int4"], "int4"),
        (["latency-table", "zoo:net", "no/a.json"], "the folder no does not exist"),
        (["prune", "zoo:net", "-o", "no/small"], "the folder no does not exist"),
        (["export", "zoo:net", "no/small.onnx"], "the folder no does not exist"),
        (["export", "zoo:net", "a.onnx", "--plan", "zoo.py"], "the plan zoo.py is no JSON"),
        (["export", "zoo:net", "a.onnx", "--opset", "999"], "opset must be an integer up to"),
        (["export", "zoo:net", "a.onnx", "--dynamic", "ids:1=n"], "there is no input 'ids'; there are x"),
        (["export", "zoo:net", "a.onnx", "--dynamic", "x:7=n"], "x has no axis 7; its 4 axes are 0 to 3"),
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
        (["prune", "zoo:net", "--size", "kept"], "'kept' is no NAME=follow"),
        (["prune", "zoo:net", "--budget", "speed=2"], "unknown budget 'speed'. Known: macs, params, memory, latency"),
        (["prune", "zoo:net", "--budget", "macs=x"], "expected one of macs"),
        (["prune", "zoo:net", "--budget", "latency=2"], "latency is a fraction"),
        (["prune", "zoo:net", "--budget", "macs=0.5,macs=0.4"], "each once"),
        (["prune", "zoo:net", "--budget", "macs=0.5", "--ratio", "0.5"], "only one of"),
        (["export", "zoo:net"], "Missing argument"),
        (["export", "zoo:net", "a.onnx", "--ratio", "0.5", "--plan", "p.json"], "give only one of --pruned"),
        (["export", "zoo:net", "a.onnx", "--pruned", "w", "--plan", "p.json"], "only one of"),
        (["export", "zoo:net", "a.onnx", "--dynamic", "x=n"], "expected INPUT:AXIS=NAME, such as ids:1=length"),
        (["export", "zoo:net", "a.onnx", "--dynamic", "x:1=n", "--dynamic", "x:1=m"], "'x' has two names"),
        (["bench", "zoo"], "'zoo' is neither MODULE:FUNCTION nor a file (.onnx, "),
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
    graphprune.save(load_factory("zoo:net").model, "good.safetensors")
    assert "is on the meta device; build a real model" in failed("inspect", "zoo:meta", "--weights", "good.safetensors")
    with pytest.raises(GraphPruneError, match="on the meta device and has no values"):
        graphprune.save(load_factory("zoo:meta").model, "meta.safetensors")
    assert not Path("meta.safetensors").exists()
    assert "there is no such file" in failed("export", "zoo:net", "a.onnx", "--pruned", "none.safetensors")


def test_a_plan_of_another_model_is_refused() -> None:
    ok("prune", "zoo:net")
    line = failed("export", "zoo:tokens", "a.onnx", "--plan", "pruned.plan.json", "--input-shape", "1,2:int64",
                  "--input-shape", "1,2,1")  # fmt: skip
    assert "the plan was made for another model" in line and not Path("a.onnx").exists()


@pytest.mark.filterwarnings("error")  # a warning would be told twice
def test_nothing_removed_is_an_error_or_one_line() -> None:
    nothing = "nothing was removed, although ratio=0.5 was asked for: "
    assert f"{nothing}granularity='heads'" in failed("prune", "zoo:net", "--granularity", "heads")
    assert f"{nothing}round_to=64" in failed("prune", "zoo:net", "--round-to", "64")
    assert "nothing was removed of 'head' (part of the model's out" in failed("prune", "zoo:net", "--ratio", "head=0.5")
    assert f"{nothing[:19]}, although ratio=0.01" in failed("export", "zoo:net", "a.onnx", "--ratio", "0.01")
    assert f"{nothing}round_to=64" in failed(
        "pipeline", "zoo:net", "zoo:batches", "--option", "round_to=64", "--finetune-epochs", "0"
    )
    assert not written()
    done = run("prune", "zoo:net", "--round-to", "64", "--allow-nothing")
    (line,) = [line for line in done.stderr.splitlines() if "removed" in line]
    assert line.startswith(f"warning: {nothing}round_to=64") and done.exit_code == 0 and written()
    done = run("prune", "zoo:net", "--ratio", "0")
    assert "nothing was removed" not in done.stderr and done.exit_code == 0


def test_what_fails_verification_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_check = graphprune.plans.verification.Check("zero equivalence", False, 0.5)
    monkeypatch.setattr("graphprune.cli.proof.verify", lambda *_: graphprune.VerificationReport((wrong_check,)))
    assert "verification failed" in failed("prune", "zoo:net")
    assert "verification failed" in failed("export", "zoo:net", "a.onnx", "--ratio", "0.5")
    assert not written()
