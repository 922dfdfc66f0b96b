"""Files that are read, mutated: damaged (the digest stays what it was) or hostile (with a digest that fits)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphprune
from graphprune import Curve, GraphPruneError, GroupKind, Sensitivity, sparsity
from graphprune.cli.factories import common_input, load_weights
from graphprune.runtimes.latency.context import Context
from graphprune.runtimes.latency.kernels import Kernel, Sample
from tests.runtimes.latency.law import table
from tests.sealing import sealed, sealed_json
from tests.waiting import time_limit

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
X = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1] * 4)
DEEP, TWICE = "@deep@", "@twice@"
# Seconds for one load, refused or not.
LIMIT = 60


class Net(nn.Module):
    """A literal size, a folded batch norm and a width in an attribute: something of everything a plan can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.scale, self.width = nn.Linear(16, 16), 12
        self.body, self.head = nn.Linear(16, 24), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x))
        y = y * self.scale(y.mean((2, 3))).view(-1, 16, 1, 1).sigmoid()
        a, b = self.body(y.mean((2, 3))).split(self.width, 1)
        return self.head(a * b)  # type: ignore[no-any-return]


class Residual(nn.Module):
    """Layers that can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 2))


def seeded(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


class Stopped(BaseException):
    """Between two epochs, as if the run had been killed."""


def _stop(*_: Any) -> None:
    raise Stopped


def finetune(path: Path, on_epoch: Any = None) -> None:
    graphprune.finetune(
        small_net(), [(X, Y)], epochs=2, optimizer="adamw", evaluate=lambda m: 0.5, patience=2, checkpoint=path,
        on_epoch=on_epoch, progress=False,
    )  # fmt: skip


def pipeline(path: Path, on_epoch: Any = None) -> None:
    graphprune.pipeline(
        small_net(), X, [(X, Y)], 0.5, schedule="linear", prune_epochs=2, finetune_epochs=1, train_epochs=0,
        checkpoint=path.parent, on_epoch=on_epoch, progress=False,
    )  # fmt: skip


def lottery(path: Path, stop: bool = False) -> None:
    calls = iter(range(100))

    def train(model: nn.Module, first: int, last: int) -> None:
        if stop and next(calls) == 1:
            raise Stopped
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)

    sparsity.lottery_ticket(
        small_net(), train, 0.5, steps=2, rounds=2, evaluate=lambda m: 0.5, checkpoint=path
    )  # fmt: skip


def inputs(path: Path) -> None:
    graphprune.synthesize(small_net(), X, 4, steps=2, batch_size=2, path=path)


def _stopped(action: Callable[[], None]) -> None:
    with contextlib.suppress(Stopped):
        action()


def _apply(path: Path, model: nn.Module) -> None:
    graphprune.Plan.load(path).apply(model)


def _save_plan(path: Path) -> None:
    graphprune.plan(seeded(Net), IMAGE, 0.5, output="hybrid", round_to=1).save(path)


def _save_layers(path: Path) -> None:
    graphprune.plan(seeded(Residual), X, 0.4, granularity="layer").save(path)


def _save_model(path: Path) -> None:
    graphprune.save(graphprune.prune(seeded(Net), IMAGE, 0.5, output="hybrid", round_to=1), path)


def _save_sparse(path: Path) -> None:
    sparsity.save(sparsity.magnitude(seeded(Net), 0.9), path)


def _save_table(path: Path) -> None:
    made, kernel = table(8), Kernel("conv", (1, 14, 14), (3, 3), (1, 1), (1, 1), (1, 1))
    made.surface(kernel, (64, 64), (True, True))
    made.contexts["abc"] = Context(0.25, 0.01, 0.002, {Sample(kernel, (64, 64)): 1.25}, 0.75)
    made.save(path)


def _save_curves(path: Path) -> None:
    curves = tuple(Curve(f"{i}.weight[0]", GroupKind.CHANNEL, 8, (2, 4), (0.25, 1.0 + i)) for i in range(3))
    Sensitivity("error", "l2", "abc", curves).save(path)


def _write_onnx(path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [8, 3]) for name in ("x", "y")]
    weight = numpy_helper.from_array(X[:3].numpy(), "weight")
    nodes = [helper.make_node("MatMul", ["x", "weight"], ["z"]), helper.make_node("Relu", ["z"], ["y"])]
    onnx.save(helper.make_model(helper.make_graph(nodes, "net", ends[:1], ends[1:], [weight])), path)


def _save_weights(path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file(small_net().state_dict(), path)


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file. `kind`: "json", "tensors", "sparse" or "bytes"; `key`: of the document in a file of tensors, ""
    where there is none. `digest`: damage is noticed; `edited`: the digest may be removed by people."""

    name: str
    file: str
    kind: str
    make: Callable[[Path], None]
    load: Callable[[Path], Any]
    key: str = ""
    digest: bool = True
    edited: bool = False


FORMATS = {
    f.name: f
    for f in (
        Format("plan", "plan.json", "json", _save_plan, lambda p: _apply(p, seeded(Net)), edited=True),
        Format("plan of layers", "plan.json", "json", _save_layers, lambda p: _apply(p, seeded(Residual)), edited=True),
        Format("model", "m.safetensors", "tensors", _save_model, lambda p: graphprune.load(p, Net), "graphprune"),
        Format("sparse model", "m.gps", "sparse", _save_sparse, lambda p: sparsity.load(p, seeded(Net))),
        Format("sparse state", "m.gps", "sparse", _save_sparse, sparsity.load),
        Format("training", "run.safetensors", "tensors", lambda p: _stopped(lambda: finetune(p, _stop)), finetune,
               "graphprune.training/3"),
        Format("pipeline", "tuning.safetensors", "tensors", lambda p: _stopped(lambda: pipeline(p, _stop)), pipeline,
               "graphprune.training/3"),
        Format("lottery", "t.safetensors", "tensors", lambda p: _stopped(lambda: lottery(p, True)), lottery,
               "graphprune.lottery/1"),
        Format("inputs", "i.safetensors", "tensors", inputs, inputs, "graphprune.inputs/1"),
        Format("latency table", "t.json", "json", _save_table, graphprune.LatencyTable.load),
        Format("sensitivity", "s.json", "json", _save_curves,
               lambda p: graphprune.plan(small_net(), X, 0.5, criterion=Sensitivity.load(p).criterion)),
        Format("dense weights", "w.safetensors", "tensors", _save_weights, lambda p: load_weights(small_net(), p),
               digest=False),
        Format("onnx", "m.onnx", "bytes", _write_onnx, lambda p: common_input([], [str(p)], []), digest=False),
    )
}  # fmt: skip


# -- mutations

ODD: list[Any] = [
    0, 1, -1, 7, 2**31, 2**63, 2**64, 10**400, -(2**80), float("inf"), float("-inf"), float("nan"), 1e308, 0.5, True,
    None, "", "weight", "../../x", "a\0b", [], [1], {}, {"a": 1}, [[]], "x" * 1000, "stem", "norm", "__class__", DEEP,
    list(range(1000)), "0", "-1", "1e9", {"ref": 0},
]  # fmt: skip


def places(data: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a nest."""
    found: list[tuple[Any, Any]] = []
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        found += [(data, key), *places(data[key])]
    return found


def edit(data: Any, chance: random.Random) -> tuple[Any, str]:
    """A copy of a nest with one value, name or item changed, and how."""
    data = copy.deepcopy(data)
    found = places(data)
    if not found:
        return copy.deepcopy(chance.choice(ODD)), "another type"
    # Lists of numbers are long: half of the edits are of objects and their entries.
    named = [(inside, key) for inside, key in found if isinstance(inside, dict)]
    inside, key = chance.choice(named if named and chance.random() < 0.5 else found)
    value = inside[key]
    how = chance.choice(["removed", "added", "twice", "renamed", "another type", "another value", "swapped"])
    if how == "removed":
        del inside[key]
    elif how == "added":
        new = copy.deepcopy(chance.choice(ODD))
        inside.insert(key, new) if isinstance(inside, list) else inside.update({f"{key}{chance.randrange(9)}": new})
    elif how == "twice" and isinstance(inside, dict):
        inside[f"{key}{TWICE}"] = copy.deepcopy(chance.choice([value, *ODD]))
    elif how == "twice":
        inside.insert(key, copy.deepcopy(value))
    elif how == "renamed" and isinstance(inside, dict):
        inside[chance.choice([f"{key}x", "", "0", str(key)[::-1]])] = inside.pop(key)
    elif how == "swapped":
        other, there = chance.choice(found)
        inside[key], other[there] = copy.deepcopy(other[there]), copy.deepcopy(value)
    elif how == "another value" and type(value) in (int, float):
        inside[key] = value + chance.choice([1, -1, 10**6])
    else:
        inside[key] = copy.deepcopy(chance.choice(ODD))
    return data, how


def text_of(data: Any) -> str:
    """As JSON, with what Python cannot hold: names that appear twice, and lists in lists without end."""
    text = data if isinstance(data, str) else json.dumps(data)
    return text.replace(TWICE, "").replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000)


def corrupt(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """The bytes after an accident."""
    at = chance.randrange(len(data))
    how = chance.choice(["flipped bit", "flipped bit", "cut", "lost bytes", "added bytes", "zeros", "block twice"])
    if how == "flipped bit":
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :], how
    if how == "cut":
        return data[:at], how
    length = chance.choice([1, 8, 64])
    if how == "lost bytes":
        return data[:at] + data[at + length :], how
    if how == "added bytes":
        return data[:at] + chance.randbytes(length) + data[at:], how
    if how == "zeros":
        return data[:at] + bytes(len(data[at : at + length])) + data[at + length :], how
    return data[: at + length] + data[at:], how


def taken_apart(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and payload of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_together(header: Any, payload: bytes, length: int | None = None) -> bytes:
    text = text_of(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


def attack_tensors(data: bytes, key: str, chance: random.Random) -> tuple[bytes, str]:
    """Another header, document, length or payload around the same file."""
    header, payload = taken_apart(data)
    what = chance.choice(["document"] * 4 * bool(key) + ["header", "names", "offsets", "length", "payload"])
    names = [name for name in header if name != "__metadata__"]
    one, other = chance.sample(names, 2)
    if what == "document":
        made, how = edit(json.loads(header["__metadata__"][key]), chance)
        header["__metadata__"][key] = text_of(made)
        return put_together(header, payload), f"document: {how}"
    if what == "header":
        made, how = edit(header, chance)
        return put_together(made, payload), f"header: {how}"
    if what == "names":
        new = chance.choice([other, f"{one}x", "", "optimizer/x/y", "best/x", "masks/0.weight", "model/x"])
        header[one], header[other] = header[other], header[one]
        if new != other:
            header[new] = header.pop(one)
        return put_together(header, payload), "tensors renamed"
    if what == "offsets":
        first, second = header[one], header[other]
        first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]
        return put_together(header, payload), "tensors swapped"
    if what == "length":
        length = chance.choice([0, 1, 8, len(data), 2**31, 2**32, 2**63, 2**64 - 1])
        return put_together(header, payload, length), "length of the header"
    made_bytes, how = corrupt(payload, chance)
    return put_together(header, made_bytes), f"values: {how}"


def attack_sparse(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Another header or other streams, with lengths and digest that fit."""
    start, packed = 28, struct.unpack("<Q", data[12:20])[0]
    listed = json.loads(zlib.decompress(data[start : start + packed]))
    streams = data[start + packed : -32]
    how = "streams"
    if chance.random() < 0.75:
        listed, how = edit(listed, chance)
    else:
        streams, how = corrupt(streams, chance)
    text = text_of(listed).encode()
    length = len(text) if chance.random() < 0.9 else chance.choice([0, 2**20, 2**40, 2**63])
    header = zlib.compress(text)
    body = data[:12] + struct.pack("<QQ", len(header), length) + header + streams
    return body + hashlib.sha256(body).digest(), f"sealed again: {how}"


def mutated(data: bytes, kind: Format, chance: random.Random) -> tuple[bytes, str, bool]:
    """The file after an accident or an attack: bytes, what was done, and whether the digest was made to fit."""
    draw = chance.random()
    if kind.kind == "bytes" or draw < 0.35:
        made, how = corrupt(data, chance)
        return made, how, False
    fits = draw > 0.5 or not kind.digest
    if kind.kind == "json":
        document, how = edit(json.loads(data), chance)
        text = text_of(sealed_json(document) if fits else document)
        return text.encode("utf-8", "surrogatepass"), f"field {how}", fits
    if kind.kind == "sparse":
        made, how = attack_sparse(data, chance)
        return made if fits else made[:-32] + data[-32:], how, fits
    made, how = attack_tensors(data, kind.key, chance)
    return sealed(made) if fits else made, how, fits


# -- verdicts


def unharmed(made: bytes, data: bytes, kind: Format) -> bool:
    """Whether a file that was not sealed again may be accepted: it says the same, or people may have edited it."""
    if made == data or not kind.digest:
        return True
    if kind.kind != "json":
        return False
    try:
        new, old = json.loads(made), json.loads(data)
    except (ValueError, RecursionError):
        return False
    return bool(new == old or (kind.edited and new == {k: v for k, v in old.items() if k != "digest"}))


@dataclasses.dataclass
class Result:
    """Of the attacks on one format. `failures`: what was done, and what came of it."""

    attacks: int = 0
    refused: int = 0
    accepted: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    kinds: Counter[str] = dataclasses.field(default_factory=Counter)


def attack(kind: Format, folder: Path, count: int, seed: int = 0) -> Result:
    """Mutate a good file `count` times and load what comes out."""
    folder.mkdir(parents=True, exist_ok=True)
    path, good = folder / kind.file, folder / f"good-{kind.file}"
    kind.make(path)
    data = path.read_bytes()
    good.write_bytes(data)
    kind.load(path)  # the file that is attacked is good
    result = Result()
    for number in range(count):
        made, how, fits = mutated(data, kind, random.Random(f"{seed} {kind.name} {number}"))
        path.write_bytes(made)
        result.attacks += 1
        result.kinds[how] += 1
        try:
            with time_limit(LIMIT, TimeoutError(f"not loaded or refused after {LIMIT} s")):
                kind.load(path)
        except GraphPruneError:
            result.refused += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            result.failures.append(f"{number}: {how}: {type(error).__name__}: {str(error)[:200]}")
        else:
            result.accepted += 1
            if not fits and not unharmed(made, data, kind):
                result.failures.append(f"{number}: {how}: accepted")
    return result
