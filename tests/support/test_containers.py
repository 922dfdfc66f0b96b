"""Tensors with a document: every bit counts, and other readers of safetensors find the weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from graphprune import GraphPruneError
from graphprune.support.containers import TensorFile, seal, separate, write_tensors
from graphprune.support.runs import counted, read_run, score, write_run
from tests.sealing import sealed

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "sha256": torch.tensor(True), "none": torch.empty(0, 4)}


def opened(path: Path) -> TensorFile:
    return TensorFile(path, "document", "is another file")


def test_back_as_it_was(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "x", TENSORS, "document", '"sha256":"' + "0" * 64 + '"')
    file = opened(path)
    assert file.document == '"sha256":"' + "0" * 64 + '"' and sorted(file.names) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(file.tensor(name), tensor) and file.shape(name) == tuple(tensor.shape)
    assert safetensors.torch.load_file(path).keys() == TENSORS.keys()


def test_the_digest_is_the_hash_of_the_file_with_zeros_in_its_place(tmp_path: Path) -> None:
    data = write_tensors(tmp_path / "x", TENSORS, "document", "{}").read_bytes()
    noted = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["sha256"]
    assert hashlib.sha256(data.replace(noted.encode(), b"0" * 64)).hexdigest() == noted
    assert sealed(data) == data


def test_every_bit_of_the_file_counts(tmp_path: Path) -> None:
    data = write_tensors(tmp_path / "x", TENSORS, "document", '{"a": "b"}').read_bytes()
    path = tmp_path / "damaged"
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(GraphPruneError, match="damaged"):
            opened(path)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(GraphPruneError, match="damaged"):
            opened(path)


def test_a_file_can_be_sealed_again(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "x", TENSORS, "document", "{}")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(GraphPruneError, match=r"x is damaged, or was changed since it was written"):
        opened(path)
    seal(path)
    assert opened(path).document == "{}" and path.read_bytes() == sealed(bytes(data))


def test_strangers(tmp_path: Path) -> None:
    path = tmp_path / "x"
    safetensors.torch.save_file(TENSORS, path)
    with pytest.raises(GraphPruneError, match="x is another file"):
        opened(path)
    for digest in ({}, {"sha256": "0"}, {"sha256": "g" * 64}):
        safetensors.torch.save_file(TENSORS, path, {"document": "{}", **digest})
        with pytest.raises(GraphPruneError, match="x has no digest"):
            opened(path)
    safetensors.torch.save_file(TENSORS, path)
    with pytest.raises(GraphPruneError, match="no place for a digest"):
        seal(path)


def test_shared_and_strided_tensors_are_copied_and_others_are_not() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    found = separate({"whole": base, "part": base[1], "turned": base.t(), "own": base.clone()})
    assert found["whole"].data_ptr() == base.data_ptr()
    assert all(tensor.is_contiguous() for tensor in found.values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 4
    assert torch.equal(found["part"], base[1]) and torch.equal(found["turned"], base.t())


def test_runs(tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert read_run(path, "run/1", {}) is None
    write_run(path, "run/1", {"settings": {"a": (1, 2), "shapes": {"x": [1]}}, "b": 3}, TENSORS)
    found = read_run(path, "run/1", {"a": [1, 2]})
    assert found is not None and found[0]["b"] == 3 and torch.equal(found[1]["a"], TENSORS["a"])
    for settings, message in (({"a": 1}, r"a \[1, 2\] instead of 1"), ({"shapes": {}}, "names or shapes")):
        with pytest.raises(GraphPruneError, match=message):
            read_run(path, "run/1", settings)
    with pytest.raises(GraphPruneError, match=r"no checkpoint of such a run.*delete it"):
        read_run(path, "run/2", {})
    for document in ("{}", "[]", '{"settings": 3}', "{"):
        write_tensors(path, TENSORS, "run/1", document)
        with pytest.raises(GraphPruneError, match=r"cannot be read .*; delete it to start again"):
            read_run(path, "run/1", {})


def test_values_of_runs() -> None:
    assert (score(None), score(2), score(0.5), counted(3, 3)) == (None, 2.0, 0.5, 3)
    for value in (True, "x", float("nan"), float("inf"), [1]):
        with pytest.raises(TypeError):
            score(value)
    for value in (True, -1, 4, 2.0, "2", None):
        with pytest.raises(TypeError):
            counted(value, 3)
