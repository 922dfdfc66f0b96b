"""Damaged, lying and hostile files: always a GraphPruneError that names the file, never a crash or a wrong model."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError
from tests.sealing import sealed

IMAGE = torch.randn(2, 3, 8, 8)


class Gate(nn.Module):
    """Channels named by a literal."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(16, 16)

    def forward(self, y: Tensor) -> Tensor:
        return y * self.scale(y.mean((2, 3))).view(-1, 16, 1, 1).sigmoid()


class Net(nn.Module):
    """A literal size, a folded batch norm and a width in an attribute: something of everything a plan can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.gate = Gate()
        self.width = 12
        self.body = nn.Linear(16, 24)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(self.norm(self.stem(x)))
        a, b = self.body(y.mean((2, 3))).split(self.width, 1)
        out: Tensor = self.head(a * b)
        return out


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    small = graphprune.prune(Net().eval(), IMAGE, 0.5, output="hybrid", round_to=1)
    return graphprune.save(small, tmp_path_factory.mktemp("good") / "good.safetensors")


def taken_apart(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def forged(header: Any, payload: bytes, length: int | None = None) -> bytes:
    """A safetensors file around any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return sealed(struct.pack("<Q", len(text) if length is None else length) + text + payload)


def lying(path: Path, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The file with another description."""
    header, payload = taken_apart(path)
    document = json.loads(header["__metadata__"]["graphprune"])
    made = change(document)
    header["__metadata__"]["graphprune"] = made if isinstance(made, str) else json.dumps(document)
    return forged(header, payload)


def test_the_file_that_is_attacked_is_good(good: Path) -> None:
    found = graphprune.load(good, Net).eval()
    assert found(IMAGE).shape == (2, 4) and found.width == 6 and isinstance(found.norm, nn.Identity)


def test_truncated_and_damaged_headers(good: Path, tmp_path: Path) -> None:
    whole = good.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    chance = random.Random(0)
    broken = tmp_path / "broken.safetensors"
    dense = Net()
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    for number in range(300):
        data = bytearray(whole)
        kind = number % 4
        if kind == 0:
            del data[chance.randrange(len(data)) :]
        elif kind == 1:
            data += chance.randbytes(chance.randint(1, 9))
        elif kind == 2:
            data[chance.randrange(8)] ^= 1 << chance.randrange(8)
        else:
            at = chance.randrange(8, length)
            del data[at : at + chance.randint(1, 9)]
        broken.write_bytes(data)
        with pytest.raises(GraphPruneError, match=r"broken\.safetensors"):
            graphprune.load(broken, dense)
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    assert os.listdir(tmp_path) == ["broken.safetensors"]


def test_every_flipped_bit_is_noticed(good: Path, tmp_path: Path) -> None:
    whole = good.read_bytes()
    chance = random.Random(1)
    broken = tmp_path / "broken.safetensors"
    for place in range(0, len(whole), 23):
        data = bytearray(whole)
        data[place] ^= 1 << chance.randrange(8)
        broken.write_bytes(data)
        with pytest.raises(GraphPruneError, match=r"broken\.safetensors"):
            graphprune.load(broken, Net)


def test_the_digest_is_that_of_the_file(good: Path) -> None:
    whole = good.read_bytes()
    assert sealed(whole) == whole and whole.count(b'"sha256":"') == 1
    blank = sealed(whole.replace(b'"sha256":"', b'"sha256":"' + b"0" * 64 + b'","x":"', 1))
    assert blank != whole


def test_a_file_without_digest_is_refused(good: Path, tmp_path: Path) -> None:
    header, payload = taken_apart(good)
    del header["__metadata__"]["sha256"]
    (tmp_path / "old.safetensors").write_bytes(forged(header, payload))
    with pytest.raises(GraphPruneError, match=r"old\.safetensors has no digest"):
        graphprune.load(tmp_path / "old.safetensors", Net)


def test_a_list_that_is_named_thousands_of_times_is_not_expanded(good: Path, tmp_path: Path) -> None:
    """30,000 indices for each of 3,000 axes: 0.3 MB that would become 700 MB."""
    header, payload = taken_apart(good)
    document = json.loads(header["__metadata__"]["graphprune"])
    plan = _plan(document)
    names = [f"layer{i}.weight" for i in range(3000)]
    plan["structure"] = {name: [10**5] for name in names}
    text = json.dumps({name: [10**5] for name in sorted(names)})
    plan["structural_hash"] = hashlib.sha256(text.encode()).hexdigest()
    plan.update(attributes=[], folds=[], rescales=[], rewrites=[], caches=[], layers=[], experts=[])
    document["indices"] = [list(range(30_000))]
    plan["removed"] = {name: {"0": 0} for name in names}
    plan["counts"] = dict.fromkeys(plan["counts"], 0) | {"removed": 3000, "lists": 1}
    header["__metadata__"]["graphprune"] = json.dumps(document)
    path = tmp_path / "large.safetensors"
    path.write_bytes(forged(header, payload))
    assert path.stat().st_size < 500_000
    tracemalloc.start()
    with pytest.raises(GraphPruneError, match=r"large\.safetensors: the plan was made for another model"):
        graphprune.load(path, Net)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * 2**20


VALUES: list[Any] = [
    0, 1, -1, 7, 2**31, 2**63, 2**80, -(2**80), 1e400, 0.5, True, None, "", "weight", "../../x", [], [1], {}, {"a": 1},
    [[]], "x" * 1000, "stem", "norm", "__class__", "training", "_parameters",
]  # fmt: skip


def mutate(data: Any, chance: random.Random) -> Any:
    """The same nest with one value, key or item changed."""
    if isinstance(data, dict) and data and chance.random() < 0.9:
        key = chance.choice(list(data))
        if chance.random() < 0.15:
            value = data.pop(key)
            if chance.random() < 0.5:
                data[str(chance.choice(VALUES))] = value
        else:
            data[key] = mutate(data[key], chance)
        return data
    if isinstance(data, list) and data and chance.random() < 0.9:
        at = chance.randrange(len(data))
        if chance.random() < 0.15:
            data.insert(at, copy.deepcopy(data[at]))
        else:
            data[at] = mutate(data[at], chance)
        return data
    return copy.deepcopy(chance.choice(VALUES))


def test_a_thousand_lying_descriptions_never_crash(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "lying.safetensors"
    chance = random.Random(2)
    right = {k: tuple(v.shape) for k, v in graphprune.load(good, Net).state_dict().items()}
    refused = 0
    tracemalloc.start()
    for _ in range(1000):

        def change(document: dict[str, Any]) -> None:
            part = chance.choice(["history", "history", "history", "indices", "aliases", "transient", "format"])
            document[part] = mutate(document[part], chance)

        path.write_bytes(lying(good, change))
        try:
            found = graphprune.load(path, Net)
        except GraphPruneError as error:
            assert "lying.safetensors" in str(error)
            refused += 1
            continue
        assert {k: tuple(v.shape) for k, v in found.state_dict().items()} == right
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 500 and peak < 64 * 2**20


def _deep(document: Any) -> str:
    return '{"format":' + "[" * 10**6


def _plan(document: Any) -> Any:
    return document["history"][0]["plans"][0]


def _cache_in(module: str) -> Callable[[Any], Any]:
    return lambda document: _plan(document).update(
        caches=[[module, "x"]], counts=_plan(document)["counts"] | {"caches": 1}
    )


def _tensor_named(name: str) -> Callable[[Any], Any]:
    return lambda document: document["aliases"].update({name: "stem.weight"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_deep, "is no JSON"),
        (lambda d: "[]", "has the format 'list'"),
        (lambda d: '"' + "x" * (65 * 2**20) + '"', "bytes, more than"),
        (lambda d: "9" * 10**5, "is no JSON"),
        (lambda d: d.update(format="graphprune.model/2"), "expected 'graphprune.model/1'"),
        (lambda d: d.pop("history"), "description is damaged"),
        (lambda d: d["history"].append(d["history"][0]), "two histories"),
        (lambda d: d["history"][0].update(module="nowhere"), "this one has no module nowhere"),
        (lambda d: _plan(d).update(structural_hash="0"), "structural hash"),
        (lambda d: _plan(d)["structure"].update({"stem.weight": [17, 3, 3, 3]}), "structural hash"),
        (lambda d: _plan(d)["folds"][0].update(layer="head"), "norm of 16 channels along axis 0 of head.weight"),
        (lambda d: _plan(d)["folds"][0].update(layer="nothing"), "which it does not describe"),
        (lambda d: _plan(d)["removed"]["stem.weight"].update({"0": -1}), "no place in a list"),
        (lambda d: _plan(d)["removed"]["stem.weight"].update({"0": 10**6}), "description is damaged"),
        (lambda d: _plan(d)["attributes"][0].update(name="training"), "which is no number"),
        (lambda d: _plan(d)["attributes"][0].update(name="_modules", key=["stem"]), "which is no number"),
        (lambda d: _plan(d)["attributes"][0].update(name="forward"), "which is no number"),
        (lambda d: _plan(d)["folds"][0].update(axis=1), "along axis 1 of stem.weight"),
        (lambda d: _plan(d)["folds"][0].update(axis=2), "along axis 2; expected 0 or 1"),
        (lambda d: _plan(d)["folds"][0].update(axis=True), "no whole number"),
        (lambda d: _plan(d)["folds"].append(_plan(d)["folds"][0]), "two batch norms into one layer"),
        (lambda d: _plan(d)["folds"].clear(), "counts say 1 folds, and it lists 0"),
        (lambda d: _plan(d)["attributes"].pop(), "counts say 1 attributes, and it lists 0"),
        (lambda d: _plan(d)["rewrites"].pop(), "counts say 1 rewrites, and it lists 0"),
        (lambda d: _plan(d)["removed"].pop("head.weight"), "lost or gained entries"),
        (lambda d: _plan(d).pop("counts"), "description is damaged|not a plan"),
        (lambda d: (_plan(d)["statistics"] and 0) or _plan(d).update(statistics=1), "neither true nor false"),
        (lambda d: _plan(d)["structure"].update({"stem.weight": [16.0, 3, 3, 3]}), "no whole number"),
        (_cache_in("nowhere"), "cannot be carried out"),
        (lambda d: _plan(d)["rewrites"][0]["steps"].insert(0, ["get_attr", "forward.x", [], {}]), "not a plan"),
        (_tensor_named("stem.weight"), "is said to be"),
        (_tensor_named("nowhere.weight"), "has no nowhere.weight"),
        (_tensor_named("head.weight"), "is said to be"),
        (lambda d: d["aliases"].update({"gate.scale.bias": "gate.scale.bias"}), "is said to be"),
        (lambda d: d["transient"].update({"norm": "load"}), "is no data type"),
    ],
)  # fmt: skip
def test_hostile_descriptions(good: Path, tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(lying(good, change))
    with pytest.raises(GraphPruneError, match=rf"(?s)hostile\.safetensors.*({message})"):
        graphprune.load(path, Net)


def _changed(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_changed("stem.weight", shape=[2**40, 2**40]), "no safetensors file, or damaged"),
        (_changed("stem.weight", shape=[-1]), "no safetensors file, or damaged"),
        (_changed("stem.weight", data_offsets=[0, 2**62]), "no safetensors file, or damaged"),
        (_changed("head.weight", data_offsets=[0, 8]), "no safetensors file, or damaged"),
        (_changed("head.weight", dtype="I32"), "torch.int32 there, and torch.float32 here"),
        (_changed("head.weight", dtype="X32"), "no safetensors file, or damaged"),
        (lambda h: h.update(other=h.pop("head.weight")), "has no other"),
        (lambda h: h.update({"stem._weight": h.pop("head.weight")}), "has no stem._weight"),
        (lambda h: h.update({"": h.pop("head.weight")}), "has no "),
        (lambda h: h["head.weight"].update(shape=h["head.weight"]["shape"][::-1]), "head.weight has shape"),
        (lambda h: h.pop("__metadata__"), "does not say how they were pruned"),
        (lambda h: h["__metadata__"].pop("graphprune"), "does not say how they were pruned"),
        (lambda h: h["__metadata__"].update(graphprune=3), "no safetensors file, or damaged"),
    ],
)
def test_hostile_headers(good: Path, tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    path = tmp_path / "hostile.safetensors"
    header, payload = taken_apart(good)
    change(header)
    path.write_bytes(forged(header, payload))
    with pytest.raises(GraphPruneError, match=rf"hostile\.safetensors.*{message}"):
        graphprune.load(path, Net)


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 7, b"\xff" * 8, struct.pack("<Q", 2**40) + b"{}", forged(b"[" * 10**6, b""), forged(b"null", b""),
     forged(b"{}", b"", 2**63), b"PK\x03\x04" + bytes(100), b"\x80\x02}q\x00." + bytes(100)],
)  # fmt: skip
def test_what_is_no_such_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(data)
    with pytest.raises(GraphPruneError, match=r"hostile\.safetensors"):
        graphprune.load(path, Net)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(GraphPruneError, match="there is no such file"):
            graphprune.load(path, Net)
    with pytest.raises(GraphPruneError, match="expected the path of a file, got int"):
        graphprune.load(3, Net)  # type: ignore[arg-type]
