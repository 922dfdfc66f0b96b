"""The layers of a recorded run that read channels: y = W x + b, as linear layers and convolutions."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx

from ...tracing.names import operator_name
from ...tracing.trace import Trace

_MATRIX = frozenset(("linear", "mm", "matmul", "addmm"))


@dataclasses.dataclass(frozen=True)
class Reader:
    """One weight that is used by linear layers or convolutions alone.

    `weight`, `bias`: parameter names; `bias` is empty where there is none. `in_axis`,
    `out_axis`: axes of the weight (for a convolution of several groups axis 1 counts inside one group). `order`: place
    of its first call in the run; `calls`: how often it is called. `adds`: its one result is used once, in a plain
    addition of two tensors of the same shape, and the other operand is there before. `after`: the readers (by weight)
    whose results its input is computed from, and those of that other operand.
    """

    weight: str
    bias: str
    convolution: bool
    transposed: bool
    groups: int
    in_axis: int
    out_axis: int
    order: int
    calls: int
    adds: bool
    after: frozenset[str]

    @property
    def separable(self) -> bool:
        """Its results are those of one matrix product per group. Of transposed convolutions only those of one group
        are seen that way."""
        return not self.transposed or self.groups == 1


def find_readers(trace: Trace) -> list[Reader]:
    """Every reader, in the order of the first calls."""
    index = {node: i for i, node in enumerate(trace.graph.nodes)}
    calls: dict[str, list[fx.Node]] = {}
    for name, node in trace.parameters.items():
        users = list(node.users)
        forms = {_form(user, node) for user in users}
        if users and len(forms) == 1 and None not in forms and _bias(users) is not None:
            calls[name] = sorted(users, key=index.__getitem__)
    ancestors = _ancestors(trace, {n: name for name, nodes in calls.items() for n in nodes})
    out = []
    for name, nodes in calls.items():
        first = nodes[0]
        kind, in_axis, out_axis, groups = _form(first, trace.parameters[name])  # type: ignore[misc]
        before = frozenset().union(*(ancestors[a] for n in nodes for a in n.all_input_nodes)) - {name}
        other = _added(first) if len(nodes) == 1 else None
        adds = other is not None and all(
            index[n] < index[first] for weight in ancestors[other] for n in calls[weight]
        ) and name not in ancestors[other]
        if adds and other is not None:
            before |= ancestors[other]
        transposed = kind == "transposed"
        bias = _bias(nodes) or ""
        convolution = kind != "linear"
        place = index[first], len(nodes)
        out.append(Reader(name, bias, convolution, transposed, groups, in_axis, out_axis, *place, adds, before))
    return sorted(out, key=lambda r: r.order)


def _form(user: fx.Node, weight: fx.Node) -> tuple[str, int, int, int] | None:
    """(kind, input axis, output axis, groups) of a call that multiplies with `weight`; None for any other call."""
    operation, args = operator_name(user), user.args
    dims = len(weight.meta["val"].shape)
    if operation == "convolution" and args[1] is weight and args[0] is not weight and args[2] is not weight:
        return ("transposed", 0, 1, int(args[8])) if args[6] else ("convolution", 1, 0, int(args[8]))  # type: ignore[arg-type]
    if operation == "linear" and dims == 2 and args[1] is weight and args[0] is not weight:
        return "linear", 1, 0, 1
    if operation in ("mm", "matmul") and dims == 2 and args[1] is weight and args[0] is not weight:
        return "linear", 0, 1, 1
    if operation == "addmm" and dims == 2 and args[2] is weight and args[1] is not weight and not user.kwargs:
        return "linear", 0, 1, 1
    return None


def _bias(nodes: list[fx.Node]) -> str | None:
    """The name of the bias, "" without one. None where there is one that is not these calls' own parameter."""
    found: set[Any] = set()
    for node in nodes:
        operation, args = operator_name(node), node.args
        if operation == "addmm":
            found.add(args[0])
        elif operation in ("convolution", "linear"):
            found.add(args[2] if len(args) > 2 else node.kwargs.get("bias"))
        else:
            found.add(None)
    bias = found.pop()
    if found or not (bias is None or isinstance(bias, fx.Node)):
        return None
    if bias is None:
        return ""
    alone = all(user in nodes for user in bias.users)
    return bias.meta.get("parameter") if alone else None


def _added(node: fx.Node) -> fx.Node | None:
    """The other operand, where the result of `node` goes into a plain addition and nowhere else."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    if operator_name(user) not in ("add", "add_") or user.kwargs or len(user.args) != 2:
        return None
    left, right = user.args
    other = right if left is node else left
    if not isinstance(other, fx.Node) or other is node or other.op != "call_function":
        return None
    meta = other.meta.get("val")
    return other if getattr(meta, "shape", None) == node.meta["val"].shape else None


def _ancestors(trace: Trace, readers: dict[fx.Node, str]) -> dict[fx.Node, frozenset[str]]:
    """The readers that each recorded tensor depends on, itself included."""
    out: dict[fx.Node, frozenset[str]] = {}
    for node in trace.graph.nodes:
        inputs = [out[a] for a in node.all_input_nodes]
        own = frozenset((readers[node],)) if node in readers else frozenset()
        out[node] = own.union(*inputs) if len(inputs) != 1 or own else inputs[0]
    return out
