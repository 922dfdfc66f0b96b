"""What each axis of a parameter does: produce channels, read them, or scale them."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..tracing.names import operator_name
from .analysis import Analysis
from .dims import Root
from .groups import Role


def axis_roles(analysis: Analysis) -> dict[Root, Role]:
    """What each parameter axis does: produce channels, consume them, or scale them."""
    roles: dict[Root, Role] = {}
    for name, node in analysis.trace.parameters.items():
        shape = node.meta["val"].shape
        long = [a for a, n in enumerate(shape) if n > 1]
        for a in range(len(shape)):
            roles[(name, a)] = "vector" if len(long) == 1 else "other"
        for user in node.users:
            _contraction_roles(roles, name, user, node)
    for node in analysis.trace.graph.nodes:
        _moved_roles(roles, analysis, node)
    return roles


# Position of the weight among the arguments, and its (in, out) axes.
_WEIGHTS = {"linear": (1, 1, 0), "mm": (1, -2, -1), "bmm": (1, -2, -1), "matmul": (1, -2, -1), "addmm": (2, -2, -1),
            "baddbmm": (2, -2, -1), "_grouped_mm": (1, -2, -1)}  # fmt: skip


def _moved_roles(roles: dict[Root, Role], analysis: Analysis, node: fx.Node) -> None:
    """Weights that were sliced, picked, transposed or scaled before a contraction reads them."""
    operation = operator_name(node)
    if operation == "convolution":
        position, reads, makes = 1, *((0, 1) if node.args[6] else (1, 0))
    elif operation in _WEIGHTS:
        position, reads, makes = _WEIGHTS[operation]
    else:
        return
    weight = node.args[position]
    if not isinstance(weight, fx.Node) or weight.op == "get_attr" or not weight.meta.get("constant_value"):
        return
    state = analysis.state(weight)
    if len(state.shape) < 2:
        return
    sides: tuple[tuple[int, Role], ...] = ((reads, "in"), (makes, "out"))
    for axis, role in sides:
        for dim in state.axis(axis):
            root = analysis.dims.root_of[dim]
            if roles.get(root) == "other":
                roles[root] = role


def _contraction_roles(roles: dict[Root, Role], name: str, user: fx.Node, node: fx.Node) -> None:
    operation = operator_name(user)
    args: tuple[Any, ...] = user.args
    ndim = len(node.meta["val"].shape)
    if ndim < 2:
        return
    if operation == "convolution" and len(args) > 1 and args[1] is node:
        transposed = bool(args[6])
        roles[(name, 0)], roles[(name, 1)] = ("in", "out") if transposed else ("out", "in")
    elif operation == "linear" and len(args) > 1 and args[1] is node:
        roles[(name, 0)], roles[(name, 1)] = "out", "in"
    elif operation in ("embedding", "_embedding_bag") and args[0] is node:
        roles[(name, 1)] = "out"
    elif operation in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        roles[(name, 0)], roles[(name, 1)] = "out", "in"
    elif operation in ("mm", "bmm", "matmul", "addmm", "baddbmm"):
        first = 1 if operation in ("addmm", "baddbmm") else 0
        if args[first] is node:
            roles[(name, ndim - 1)], roles[(name, ndim - 2)] = "in", "out"
        elif args[first + 1] is node:
            roles[(name, ndim - 2)], roles[(name, ndim - 1)] = "in", "out"
    elif operation in (
        "t",
        "transpose",
        "permute",
        "view",
        "reshape",
        "split",
        "split_with_sizes",
        "_weight_norm_interface",
        "mul",
        "div",
        "detach",
    ):
        for after in user.users:
            inner = operator_name(after)
            if operation == "t" and inner in ("mm", "addmm", "matmul"):
                roles[(name, 0)], roles[(name, 1)] = "out", "in"
            elif inner in ("linear", "convolution", "getitem") or operation == "_weight_norm_interface":
                roles[(name, 0)], roles[(name, 1)] = "out", "in"
