"""Which rule analyses which operator. Adding an operator means adding one decorated function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...support.registry import Registry
from ...tracing.names import target_name
from ..context import NodeContext, Result
from ..state import State

Rule = Callable[[NodeContext], Result]
RULES: Registry[Rule] = Registry("rule for an operator")


rule = RULES.register
"""Register a rule for ATen operators by name, all overloads (`aten.add.Tensor` is "add")."""


def rule_for(target: Any) -> Rule:
    """The rule of an operator; untagged unknown operators freeze what flows through them."""
    found = RULES.get(target_name(target) or str(target))
    if found is not None:
        return found
    if torch.Tag.pointwise in getattr(target, "tags", ()):
        return RULES["<pointwise>"]
    return unknown


def unknown(context: NodeContext, text: str = "") -> Result:
    """An operator without a rule: nothing that flows through it can be removed."""
    for state in context.states():
        context.freeze_state(state, "operator", text or f"no rule for the operator {context.operation}")
    return empty(context)


def empty(context: NodeContext) -> Result:
    """Results without coordinates."""
    meta = context.node.meta.get("val")
    if isinstance(meta, tuple):
        return [State(s) if s is not None else None for s in context.shapes]
    return State(context.shape) if context.shapes and context.shapes[0] is not None else None
