"""Weights beside a graph: named by what is in them, and never those of another graph, whenever an export is killed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphprune.runtimes.external import named_by_contents, put_network_in_place
from graphprune.support.files import workspace


def network(value: float) -> onnx.ModelProto:
    """y = x + weight, or in another branch x + bias; both of 300 numbers."""
    kind = helper.make_tensor_value_info("x", TensorProto.FLOAT, [300])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [300])
    inner = helper.make_tensor_value_info("z", TensorProto.FLOAT, [300])
    branches = [
        helper.make_graph(
            [helper.make_node("Add", ["x", name], ["z"])], name, [], [inner],
            [numpy_helper.from_array(np.full(300, number, np.float32), name)],
        )
        for name, number in (("weight", value), ("bias", -value))
    ]  # fmt: skip
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    node = helper.make_node("If", ["flag"], ["y"], then_branch=branches[0], else_branch=branches[1])
    constant = helper.make_node("Identity", ["scale"], ["unused"])
    scale = numpy_helper.from_array(np.full(300, value, np.float32), "scale")
    graph = helper.make_graph([node, constant], "net", [kind, flag], [out], [scale])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def put(value: float, target: Path, external: bool) -> None:
    with workspace(target) as folder:
        graph, data = folder / target.name, None
        onnx.save(network(value), graph, save_as_external_data=external, location=f"{target.name}.data",
                  size_threshold=0)  # fmt: skip
        if external:
            data = named_by_contents(graph, folder / f"{target.name}.data")
        put_network_in_place(graph, data, target)


def answer(path: Path) -> list[float]:
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    zeros = np.zeros(300, np.float32)
    return [float(session.run(["y"], {"x": zeros, "flag": np.array(flag)})[0].mean()) for flag in (True, False)]


def test_all_tensors_name_the_file_that_holds_them(tmp_path: Path) -> None:
    target = tmp_path / "net[1].onnx"
    put(3.0, target, True)
    (data,) = set(tmp_path.iterdir()) - {target}
    assert data.name == f"net[1].onnx.{hashlib.sha256(data.read_bytes()).hexdigest()[:12]}.data"
    assert data.stat().st_size >= 3 * 1200 and target.stat().st_size < 1500 and answer(target) == [3.0, -3.0]
    put(4.0, target, True)
    assert len(list(tmp_path.iterdir())) == 2 and answer(target) == [4.0, -4.0]


def counted(left: list[int], original: Callable[..., Any]) -> Callable[..., Any]:
    def step(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            os._exit(9)
        return original(*arguments, **named)

    return step


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_killed_before_any_change_of_the_folder_the_path_holds_a_whole_network(
    before: bool, after: bool, tmp_path: Path
) -> None:
    (tmp_path / "start").mkdir()
    put(1.0, tmp_path / "start" / "net.onnx", before)
    killed, step, answers = True, 0, []
    while killed:
        step += 1
        target = shutil.copytree(tmp_path / "start", tmp_path / str(step)) / "net.onnx"
        child = os.fork()
        if not child:
            left = [step]
            for name in ("replace", "rename", "unlink", "rmdir"):
                setattr(os, name, counted(left, getattr(os, name)))
            put(2.0, target, after)
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        answers.append(answer(target))
    old, new = [1.0, -1.0], [2.0, -2.0]
    assert step > 2 and answers[0] == old and answers[-1] == new
    assert answers == [old] * answers.count(old) + [new] * answers.count(new)
    assert len(list(target.parent.iterdir())) == 1 + after
