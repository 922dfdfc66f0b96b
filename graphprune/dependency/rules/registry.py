"""Which rule analyses which operator: one of its own, by its name, or the generic one that reads the table's line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...support.registry import Registry
from ...tracing.names import target_name
from ...tracing.operators import Operator, named, operator_of, operator_of_target
from ..context import NodeContext, Result
from ..state import State

Rule = Callable[[NodeContext], Result]
RULES: Registry[Rule] = Registry("rule for an operator")


rule = RULES.register
"""Register a rule for ATen operators by name, all overloads (`aten.add.Tensor` is "add"), or as "<form>" for all whose
line in the table has that form (`Operator.rule`)."""


def rule_for(target: Any) -> Rule:
    """The rule of an operator; untagged unknown operators freeze what flows through them."""
    found = RULES.get(target_name(target) or str(target))
    if found is None:
        operator = operator_of_target(target)
        found = RULES.get(operator.rule) if operator is not None else None
    if found is None and torch.Tag.pointwise in getattr(target, "tags", ()):
        found = RULES["<pointwise>"]
    return found or unknown


def line_of(context: NodeContext) -> Operator:
    """What the table says of the call that a generic rule analyses."""
    found = operator_of(context.node)
    assert found is not None
    return found


def has_rule(name: str) -> bool:
    """Whether an operator has a rule, of its own or a generic one."""
    operator = named(name)
    return name in RULES or (operator is not None and operator.rule in RULES)


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
