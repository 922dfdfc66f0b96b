from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from graphprune.errors import GraphPruneError
from graphprune.runtimes import Provider, export_onnx, sessions
from graphprune.runtimes.arguments import FlatArguments
from graphprune.runtimes.providers import CPU, CUDA, why_not
from graphprune.runtimes.sessions import BoundSession, device_of, match_inputs, open_session, probe, run_once
from tests.runtimes import nets


@pytest.fixture(scope="module")
def convnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(nets.ConvNet(), torch.randn(2, 3, 8, 8), tmp_path_factory.mktemp("onnx") / "net.onnx").path


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    example = {"ids": torch.zeros(2, 5, dtype=torch.long), "mask": torch.ones(2, 5)}
    return export_onnx(nets.TokenNet(), example, tmp_path_factory.mktemp("onnx") / "net.onnx").path


def test_settings_of_a_session(convnet: Path) -> None:
    session = open_session(convnet, Provider(CPU), threads=2)
    options = session.get_session_options()
    assert options.intra_op_num_threads == 2 and options.inter_op_num_threads == 1
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert session.get_providers() == [CPU]


@pytest.mark.skipif(why_not(CUDA) is None, reason="CUDA loads here")
def test_no_silent_fallback(convnet: Path) -> None:
    # The plain InferenceSession would return one that runs on the CPU.
    with pytest.raises(GraphPruneError, match=f"{CUDA}"):
        open_session(convnet, Provider(CUDA), threads=1)


def test_a_fallback_of_the_library_is_noticed(convnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = onnxruntime.InferenceSession

    def fallback(path: str, options: Any, providers: Any, **kwargs: Any) -> Any:
        assert providers[0][0] == CUDA and providers[1] == CPU and providers[0][1] == {"enable_cuda_graph": "1"}
        return real(path, options, providers=[CPU])

    monkeypatch.setattr(onnxruntime, "InferenceSession", fallback)
    with pytest.raises(GraphPruneError, match=f"fell back to {CPU} instead of {CUDA}"):
        open_session(convnet, Provider(CUDA), threads=1, cuda_graph=True)


def test_files_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"this is no model")
    with pytest.raises(GraphPruneError, match=r"cannot load bad\.onnx"):
        open_session(tmp_path / "bad.onnx", Provider(CPU), threads=1)


def test_nodes_and_outputs_of_a_run(convnet: Path, tokens: Path, tmp_path: Path) -> None:
    found = probe(convnet, FlatArguments.of(torch.randn(3, 3, 8, 8)), Provider(CPU), tmp_path)
    assert set(found.nodes) == {CPU} and found.nodes[CPU] >= 4
    assert [output.shape for output in found.outputs] == [(3, 4)]
    arguments = FlatArguments.of({"ids": torch.zeros(4, 5, dtype=torch.long), "mask": torch.ones(4, 5)})
    found = probe(tokens, arguments, Provider(CPU), tmp_path)
    assert [output.shape for output in found.outputs] == [(4, 5, 8), (4, 5, 8), (4, 5), (4, 5), ()]
    assert [output.element_type for output in found.outputs] == [1, 1, 7, 1, 1]
    assert os.listdir(tmp_path) == []


def test_bound_memory_is_written_by_every_run(tokens: Path, tmp_path: Path) -> None:
    arguments = FlatArguments.of({"ids": torch.randint(0, 11, (4, 5)), "mask": torch.rand(4, 5)})
    expected = run_once(open_session(tokens, Provider(CPU), threads=1), arguments, Provider(CPU))
    outputs = probe(tokens, arguments, Provider(CPU), tmp_path).outputs
    for given in (None, outputs):
        bound = BoundSession(open_session(tokens, Provider(CPU), threads=1), arguments, Provider(CPU), outputs=given)
        addresses = [value.data_ptr() for value in bound._outputs]
        for _ in range(3):
            for value in bound._outputs:
                # Run must fill the very same memory again.
                value.update_inplace(np.zeros(value.shape(), value.numpy().dtype))
            bound.run()
            assert all(torch.equal(a, b) for a, b in zip(bound.outputs(), expected, strict=True))
        assert addresses == [value.data_ptr() for value in bound._outputs]
        assert bound.output_types() == outputs


def test_inputs_by_name_and_by_position(tokens: Path) -> None:
    session = open_session(tokens, Provider(CPU), threads=1)
    ids, mask = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5)
    for example in ({"mask": mask, "ids": ids}, (ids, mask), {"mask": mask, "more": torch.ones(1), "ids": ids}):
        assert [name for name, _ in match_inputs(session, FlatArguments.of(example))] == ["ids", "mask"]
        assert match_inputs(session, FlatArguments.of(example))[0][1] is ids
    with pytest.raises(GraphPruneError, match=r"has the inputs .*'ids', 'mask'.* holds 1 tensors"):
        match_inputs(session, FlatArguments.of(ids))
    # One name fits, at another place: by position would be wrong.
    with pytest.raises(GraphPruneError, match="give a dict with these names"):
        match_inputs(session, FlatArguments.of({"mask": ids, "other": mask}))
    with pytest.raises(GraphPruneError, match=r"'ids' of the file is a tensor\(int64\), but .* torch.int32"):
        match_inputs(session, FlatArguments.of((ids.int(), mask)))
    with pytest.raises(GraphPruneError, match=r"shape \['batch', 5\], which does not take \[2, 6\]"):
        match_inputs(session, FlatArguments.of((torch.zeros(2, 6, dtype=torch.long), mask)))
    with pytest.raises(GraphPruneError, match="which does not take"):
        match_inputs(session, FlatArguments.of((ids[0], mask)))


def test_a_run_that_fails(tokens: Path) -> None:
    session = open_session(tokens, Provider(CPU), threads=1)
    example = {"ids": torch.full((2, 5), 99), "mask": torch.ones(2, 5)}
    with pytest.raises(GraphPruneError, match=r"cannot run the model.*indices"):
        run_once(session, FlatArguments.of(example), Provider(CPU))


def test_inputs_are_copied(convnet: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    bound = BoundSession(open_session(convnet, Provider(CPU), threads=1), FlatArguments.of(x), Provider(CPU))
    before = bound.outputs()[0]
    x.zero_()
    bound.run()
    assert torch.equal(bound.outputs()[0], before)


def test_bfloat16_crosses_into_the_runtime_and_back() -> None:
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    value = sessions._to_device(x, "cpu", 0)
    assert value.element_type() == 16 and torch.equal(sessions._to_tensor(value), x)
    for other in (torch.rand(3) > 0.5, torch.arange(3, dtype=torch.uint8), torch.randn(2, 3).half(), torch.tensor(2)):
        assert torch.equal(sessions._to_tensor(sessions._to_device(other, "cpu", 0)), other)


def test_device_of_options() -> None:
    assert device_of(None) == 0 and device_of({"device_id": "2"}) == 2
    with pytest.raises(GraphPruneError, match="device_id must be an integer"):
        device_of({"device_id": "first"})
