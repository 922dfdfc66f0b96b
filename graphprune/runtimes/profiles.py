"""What ONNX Runtime's profiler says about a run: the time of every node of the optimised graph."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..support.types import PathLike
from .providers import Provider
from .sessions import kernel_events, open_session

# Nodes in which the arithmetic of convolutions and matrix products ends up.
_HEAVY = ("Conv", "Deconv", "Gemm", "MatMul", "Attention", "FullyConnected", "ScaledDot")
# Nodes that only say how a tensor is to be read: their time does not depend on widths.
_IDLE = frozenset("Reshape Squeeze Unsqueeze Shape Gather Identity Flatten Constant Cast".split())


@dataclasses.dataclass(frozen=True)
class NodeTime:
    """One node of the optimised graph: its operator, the shapes it was given and made, median seconds of a run."""

    name: str
    operator: str
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    seconds: float

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> NodeTime:
        """From its fields as JSON keeps them."""
        inputs, outputs = (tuple(map(tuple, values[name])) for name in ("inputs", "outputs"))
        return cls(values["name"], values["operator"], inputs, outputs, values["seconds"])

    @property
    def heavy(self) -> bool:
        return any(word in self.operator for word in _HEAVY)

    @property
    def idle(self) -> bool:
        return self.operator in _IDLE

    @property
    def signature(self) -> tuple[Any, ...]:
        """Equal for nodes that do the same work: by the shapes of weights and results, which layouts pad alike."""
        if self.operator == "QLinearConv" and self.outputs:  # its weights are laid out anew, and are not shown
            return ("conv", self.inputs[0], self.outputs[0])
        if "onv" in self.operator and len(self.inputs) > 1:
            return ("conv", self.inputs[1], self.outputs[0][2:] if self.outputs else ())
        if len(self.inputs) > 1 and self.outputs:
            sizes = [int(np.prod(s)) for s in (*self.inputs[:2], self.outputs[0])]
            return ("product", *sizes)
        return (self.operator, self.inputs, self.outputs)


@dataclasses.dataclass(frozen=True)
class Profile:
    """Median seconds of each node, and of a whole call as the caller sees it; `fastest`: of the fastest call."""

    nodes: tuple[NodeTime, ...]
    wall: float
    fastest: float = 0.0


def profile(
    model: PathLike | bytes,
    feeds: Mapping[str, np.ndarray],
    provider: Provider,
    *,
    threads: int,
    options: Mapping[str, str],
    runs: int,
    warmup: int = 2,
) -> Profile:
    """Run a file `runs` times under the profiler, one node after the other, all graph optimisations on."""
    with tempfile.TemporaryDirectory(prefix="graphprune-") as name:
        folder = Path(name)
        path = folder / "model.onnx" if isinstance(model, bytes) else Path(model)
        if isinstance(model, bytes):
            path.write_bytes(model)
        session = open_session(path, provider, threads=threads, provider_options=options, profile=folder / "trace")
        walls = []
        for _ in range(warmup + runs):
            start = time.perf_counter()
            session.run(None, dict(feeds))
            walls.append(time.perf_counter() - start)
        events = kernel_events(session)
    return Profile(_nodes(events, warmup), float(np.median(walls[warmup:])), min(walls[warmup:]))


def _nodes(events: list[dict[str, Any]], warmup: int) -> tuple[NodeTime, ...]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        found[(event["name"], str(event["args"].get("node_index")))].append(event)
    out = []
    for (name, _), made in found.items():
        about = made[0]["args"]
        times = [e["dur"] for e in made[warmup:]] or [e["dur"] for e in made]
        shapes = [_shapes(about.get(key)) for key in ("input_type_shape", "output_type_shape")]
        out.append(
            NodeTime(
                name.removesuffix("_kernel_time"),
                str(about.get("op_name")),
                shapes[0],
                shapes[1],
                float(np.median(times)) * 1e-6,
            )
        )
    return tuple(out)


def _shapes(listed: Any) -> tuple[tuple[int, ...], ...]:
    """The profiler lists {element type: sizes} per tensor."""
    out = []
    for entry in listed or ():
        for sizes in entry.values():
            out.append(tuple(int(s) for s in sizes))
    return tuple(out)
