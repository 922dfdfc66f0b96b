"""The weights of an ONNX graph in a file of their own, whose name says what is in it: a graph never meets others.

An export puts the weights in place, then the graph that names them, in one step, and then removes those that the graph
before named. Whenever it is killed, the path holds the whole old network or the whole new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import GraphPruneError
from ..support.files import put_in_place

# A protobuf message ends at 2 GiB; the graph around the weights needs some of it.
LARGE = 2**31 - 2**27

# Graphs beside their weights are small.
_LARGEST_GRAPH = 2**28
# Between its weights and its graph an export has this long, in seconds.
_PATIENCE = 600.0


def named_by_contents(graph: Path, data: Path) -> Path:
    """Give the file of weights beside a new graph the name of the graph, 12 digits of its SHA-256 and ".data", and make
    the graph name it; its new path."""
    import onnx

    with data.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    proto = onnx.load(str(graph), load_external_data=False)
    final = data.with_name(f"{graph.name}.{digest}.data")
    for entry in _locations(proto.graph):
        entry.value = final.name
    os.replace(data, final)
    onnx.save(proto, str(graph))
    return final


def put_network_in_place(graph: Path, data: Path | None, target: Path) -> Path | None:
    """Move a new graph, and its weights where they have a file, from a `workspace` to `target` and beside it; where the
    weights are then. Weights of the graph that was there are removed.

    Raises:
        GraphPruneError: a file cannot be put in place; the network that was there is whole.
    """
    before = _weights_of(target)
    final = None if data is None else target.with_name(data.name)
    known = final is not None and final.exists()
    if data is not None and final is not None:
        os.utime(data)
        put_in_place(data, final)
    try:
        put_in_place(graph, target)
    except GraphPruneError:
        if final is not None and not known:
            final.unlink(missing_ok=True)
        raise
    used = _weights_of_others(target)
    for old in _all_weights(target):
        with contextlib.suppress(OSError):
            needless = old.name in before or time.time() - old.stat().st_mtime > _PATIENCE
            if needless and old != final and old.name not in used:
                old.unlink()
    return final


def weights_beside(graph: Path) -> tuple[Path, ...]:
    """The files beside a graph that it takes weights from; none where it is no ONNX file."""
    return tuple(graph.with_name(name) for name in sorted(_named_by(graph)) if name == Path(name).name)


def _all_weights(target: Path) -> list[Path]:
    """The files beside `target` that `named_by_contents` has named for it."""
    ours = re.compile(rf"{re.escape(target.name)}\.[0-9a-f]{{12}}\.data")
    with contextlib.suppress(OSError):
        return [path for path in target.parent.iterdir() if ours.fullmatch(path.name) and path.is_file()]
    return []


def _weights_of(target: Path) -> set[str]:
    """The names of files that the graph at `target`, if there is one, takes its weights from."""
    return _named_by(target) if _all_weights(target) else set()


def _named_by(path: Path) -> set[str]:
    """The names of files that a graph, if it is one, takes its weights from."""
    import onnx

    with contextlib.suppress(Exception):
        if path.is_file() and path.stat().st_size <= _LARGEST_GRAPH:
            return {entry.value for entry in _locations(onnx.load(str(path), load_external_data=False).graph)}
    return set()


def _weights_of_others(target: Path) -> set[str]:
    """The names of files that other graphs in the folder take their weights from: copies of the one before, say."""
    found: set[str] = set()
    if _all_weights(target):
        for other in target.parent.glob("*.onnx"):
            found |= set() if other == target else _named_by(other)
    return found


def _locations(graph: Any) -> Iterator[Any]:
    """Where the tensors of a graph and of those inside it lie, if not in it."""
    tensors = list(graph.initializer)
    for attribute in (a for node in graph.node for a in node.attribute):
        tensors += [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]
        for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from _locations(inner)
    for tensor in tensors:
        yield from (entry for entry in tensor.external_data if entry.key == "location")
