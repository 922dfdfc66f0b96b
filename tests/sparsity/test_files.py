from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from graphprune import GraphPruneError, sparsity
from graphprune.sparsity.container import MAGIC, SparseFile

from .networks import NETWORKS, cnn, example, mlp


def small_file(path: Path, fraction: float = 0.9) -> nn.Module:
    model = sparsity.magnitude(cnn(), fraction)
    sparsity.save(model, path)
    return model


def forged(listed: object, payload: bytes, length: int | None = None) -> bytes:
    """A file with a right digest around any header."""
    header = listed if isinstance(listed, bytes) else json.dumps(listed).encode()
    packed = zlib.compress(header)
    body = MAGIC + struct.pack("<QQ", len(packed), len(header) if length is None else length) + packed + payload
    return body + hashlib.sha256(body).digest()


def parts(path: Path) -> tuple[list[list[object]], bytes]:
    data = path.read_bytes()
    start = len(MAGIC) + 16
    packed = struct.unpack("<Q", data[len(MAGIC) : len(MAGIC) + 8])[0]
    return json.loads(zlib.decompress(data[start : start + packed])), data[start + packed : -32]


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_through_models_and_state_dicts(name: str, tmp_path: Path) -> None:
    model, x = example(name)
    sparsity.magnitude(model, 0.8)
    model.eval()
    path = sparsity.save(model, tmp_path / "model.gps")
    assert os.listdir(tmp_path) == ["model.gps"]
    with torch.no_grad():
        expected = model(x)
        fresh = example(name)[0].eval()
        if name != "weight norm":  # keeps what it is computed from: only for a model masked alike
            plain = copy.deepcopy(fresh)
            plain.load_state_dict(sparsity.load(path))
            assert torch.equal(plain(x), expected) and not sparsity.masks(plain)
            sparsity.load(path, fresh)
            assert torch.equal(fresh(x), expected)
            for key, mask in sparsity.masks(model).items():
                assert torch.equal(sparsity.masks(fresh)[key], mask)
            unmasked = sparsity.load(path, example(name)[0].eval(), masks=False)
            assert torch.equal(unmasked(x), expected) and not sparsity.masks(unmasked)
        masked = sparsity.magnitude(example(name)[0].eval(), 0.3)
        assert torch.equal(sparsity.load(path, masked)(x), expected)


def test_an_unmasked_file_unmasks_and_trains_on(tmp_path: Path) -> None:
    dense = mlp()
    path = sparsity.save(dense.state_dict(), tmp_path / "dense.gps")
    masked = sparsity.magnitude(mlp(), 0.9)
    sparsity.load(path, masked)
    x = torch.randn(3, 12)
    assert torch.equal(masked(x), dense(x))


@pytest.mark.parametrize(("values", "least"), [("exact", 10.0), ("float16", 20.0)])
def test_ten_times_smaller_than_dense_at_95_percent(tmp_path: Path, values: str, least: float) -> None:
    model = sparsity.magnitude(nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 50)), 0.95)
    dense = 4 * sum(p.numel() for p in model.parameters())
    path = sparsity.save(model, tmp_path / "m.gps", values=values)  # type: ignore[arg-type]
    assert dense / path.stat().st_size > least


@pytest.mark.shared_data
def test_a_trained_network_too(tmp_path: Path, shared_data: Path) -> None:
    state = load_file(str(shared_data / "cifar10_resnet56.safetensors"))
    dense = sum(t.numel() * t.element_size() for t in state.values())
    for tensor in state.values():
        if tensor.dim() > 1:
            tensor[tensor.abs() < tensor.abs().flatten().sort().values[int(0.95 * tensor.numel())]] = 0
    path = sparsity.save(state, tmp_path / "m.gps")
    assert dense / path.stat().st_size > 10
    found = sparsity.load(path)
    assert set(found) == set(state) and all(torch.equal(found[k], v) for k, v in state.items())


def test_float16_rounds_matrices_only(tmp_path: Path) -> None:
    model = cnn()
    with torch.no_grad():
        model[1].running_var.fill_(1e6)
    path = sparsity.save(model, tmp_path / "m.gps", values="float16")
    for name, tensor in sparsity.load(path).items():
        original = model.state_dict()[name]
        assert torch.equal(tensor, original.half().float() if original.dim() > 1 else original)
        assert tensor.dtype == original.dtype


def test_a_thousand_corrupted_files_none_loads(tmp_path: Path) -> None:
    path = tmp_path / "m.gps"
    model = small_file(path)
    good = path.read_bytes()
    chance = random.Random(0)
    fresh = cnn()
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    broken = tmp_path / "broken.gps"
    for number in range(1000):
        data = bytearray(good)
        kind = number % 5
        at = chance.randrange(len(data))
        if kind == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = chance.randbytes(chance.randint(1, 9))
        elif kind == 3:
            del data[at : at + chance.randint(1, 9)]
        else:
            end = min(len(data), at + 40)
            data[at:end] = bytes(end - at) if any(data[at:end]) else b"\xff" * (end - at)
        broken.write_bytes(data)
        with pytest.raises(GraphPruneError, match=r"broken\.gps"):
            sparsity.load(broken, fresh)
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items()) and not sparsity.masks(fresh)
    sparsity.load(path, fresh)
    assert set(sparsity.masks(fresh)) == set(sparsity.masks(model))


def test_a_thousand_lying_files_with_a_right_digest_never_crash(tmp_path: Path) -> None:
    path = tmp_path / "m.gps"
    small_file(path)
    listed, payload = parts(path)
    chance = random.Random(1)
    values: list[object] = [
        0, 1, -1, 7, 2**31, 2**40, 2**61, 2**62, 2**80, True, None, "", "float16", "float64", "int8", "bool", "gaps",
        "bitmap", "dense", [], [1], [2**30, 2**30], [0], {}, 0.5, "x" * 1000,
    ]  # fmt: skip
    refused = 0
    tracemalloc.start()
    for number in range(1000):
        lying = copy.deepcopy(listed)
        data = bytearray(payload)
        for _ in range(chance.randint(1, 3)):
            if chance.random() < 0.3:
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            else:
                lying[chance.randrange(len(lying))][chance.randrange(10)] = chance.choice(values)
        if number % 50 == 0:
            lying.append(copy.deepcopy(lying[0]))
        path.write_bytes(forged(lying, bytes(data)))
        try:
            sparsity.load(path, cnn())
        except GraphPruneError:
            refused += 1
        try:
            found = sparsity.load(path)
        except GraphPruneError:
            continue
        assert sum(t.numel() for t in found.values()) < 2**20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 900 and peak < 64 * 2**20


@pytest.mark.parametrize(
    ("listed", "length"),
    [
        (b"[" * 10**6, None), (b"{}", None), (b"null", None), (b"[1]", None), (b'"\xff"', None), (b"9" * 10**5, None),
        (b"[]", 2**63), (b"[]", 3), (b"[]", 1),
    ],
)  # fmt: skip
def test_hostile_headers(tmp_path: Path, listed: bytes, length: int | None) -> None:
    path = tmp_path / "m.gps"
    path.write_bytes(forged(listed, b"", length))
    with pytest.raises(sparsity.DamagedError):
        SparseFile(path)


def test_bombs_are_not_expanded(tmp_path: Path) -> None:
    path = tmp_path / "m.gps"
    stream = zlib.compress(bytes(50 * 10**6))
    header_bomb = b" " * (15 * 2**20) + b"[]"
    entry = ["w", "float32", "float32", [2**30], "bitmap", 0, 2**27, len(stream), len(zlib.compress(b"")), False]
    tracemalloc.start()
    for data, message in (
        (forged([entry], stream + zlib.compress(b"")), "declares tensors of 4294967296 bytes"),
        (forged([[*entry[:3], [80], *entry[4:6], 10, *entry[7:]]], stream + zlib.compress(b"")), "another length"),
    ):
        path.write_bytes(data)
        with pytest.raises(sparsity.DamagedError, match=message):
            sparsity.load(path)
    path.write_bytes(forged(header_bomb, b""))
    assert sparsity.load(path) == {}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20


def test_very_sparse_tensors_load_when_allowed(tmp_path: Path) -> None:
    path = sparsity.save({"zeros": torch.zeros(80_000_000, dtype=torch.float32)}, tmp_path / "m.gps")
    with pytest.raises(GraphPruneError, match="pass max_bytes=320000000"):
        sparsity.load(path)
    assert not sparsity.load(path, max_bytes=320_000_000)["zeros"].any()


def test_another_model_is_refused_before_anything_changes(tmp_path: Path) -> None:
    path = tmp_path / "m.gps"
    small_file(path)
    other = cnn()
    other[5] = nn.Linear(192, 4)
    for model, message in (
        (other, r"5.weight is float32 \(3, 192\), not float32 \(4, 192\)"),
        (cnn().double(), r"0.weight is float32 .*, not float64"),
        (cnn()[:5], "this one has no 5"),
        (nn.Sequential(*cnn(), nn.Linear(3, 3)), "it has no 6"),
    ):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(GraphPruneError, match=message):
            sparsity.load(path, model)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> object:
            return {"a": 1}

    for thing, options, message in (
        (Extra(2, 2), {}, "_extra_state' is dict: only tensors"),
        ([1], {}, "expected a torch.nn.Module or a state dict, got a list"),
        ({"w": torch.zeros(2, device="meta")}, {}, "w: only ordinary tensors"),
        ({"w": torch.zeros(2, 2).to_sparse()}, {}, "w: only ordinary tensors"),
        (mlp(), {"values": "int8"}, "values: expected 'exact' or 'float16'"),
        ({"w": torch.full((2, 2), 1e9)}, {"values": "float16"}, "does not fit float16"),
    ):
        with pytest.raises(GraphPruneError, match=message):
            sparsity.save(thing, tmp_path / "m.gps", **options)  # type: ignore[arg-type]
    with pytest.raises(GraphPruneError, match="does not exist"):
        sparsity.save(mlp(), tmp_path / "no" / "m.gps")
    assert os.listdir(tmp_path) == []
    for path in (tmp_path / "missing.gps", tmp_path):
        with pytest.raises(GraphPruneError, match="there is no such file"):
            sparsity.load(path)


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gps"
    small_file(path)
    before = path.read_bytes()
    with pytest.raises(GraphPruneError):
        sparsity.save({"ok": torch.zeros(3), "w": torch.zeros(2, device="meta")}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["m.gps"]
