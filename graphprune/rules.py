"""Teach graphprune an operator it does not know, such as one of your own made with `torch.library`.

An operator without a rule freezes every channel that flows through it, and `graphprune.doctor` names it. A rule is one
function of one call of the operator. It says how the channels of the result follow from those of the operands:

>>> import torch, graphprune
>>> from graphprune import rules
>>> @torch.library.custom_op("readme::scale_rows", mutates_args=())
... def scale_rows(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
...     return x * factor
>>> @scale_rows.register_fake
... def _(x, factor):
...     return torch.empty_like(x)
>>> class Net(torch.nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.first, self.last = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)
...         self.factor = torch.nn.Parameter(torch.rand(8))
...     def forward(self, x):
...         return self.last(scale_rows(self.first(x), self.factor))
>>> graphprune.trace(Net(), torch.randn(3, 4)).groups
()
>>> @rules.rule("readme::scale_rows")
... def scale_rows_rule(call):
...     x, factor = call.state(call.arg(0)), call.state(call.arg(1))
...     call.tie(x.axis(-1), factor.axis(0), x.shape[-1])  # a channel of x goes together with its factor
...     return x  # the result has the channels of x
>>> small = graphprune.prune(Net(), torch.randn(3, 4), 0.5)  # and proves the rule
>>> small.first.out_features, small.factor.shape, small.last.in_features
(4, torch.Size([4]), 4)
>>> rules.unregister("readme::scale_rows")

An operator that multiplies with weights, as linear layers and convolutions do, also says along which axes: then its
weights make and read channels as those of torch's layers do.

>>> @torch.library.custom_op("readme::project", mutates_args=())
... def project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
...     return x @ weight + bias  # weight (in, out)
>>> @project.register_fake
... def _(x, weight, bias):
...     return x.new_empty(*x.shape[:-1], weight.shape[1])
>>> class Projections(torch.nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.weights = torch.nn.ParameterList([torch.randn(4, 8), torch.randn(8, 2)])
...         self.biases = torch.nn.ParameterList([torch.randn(8), torch.randn(2)])
...     def forward(self, x):
...         for weight, bias in zip(self.weights, self.biases):
...             x = project(x, weight, bias).tanh()
...         return x
>>> @rules.rule("readme::project")
... def project_rule(call):
...     x, weight, bias = (call.state(call.arg(i)) for i in range(3))
...     call.reads(weight.axis(0))  # sums over it,
...     call.tie(x.axis(-1), weight.axis(0), weight.shape[0])  # along the last axis of x
...     call.produces(weight.axis(1))
...     call.tie(weight.axis(1), bias.axis(0), weight.shape[1])
...     last = len(x.shape) - 1
...     return rules.State(call.shape, {**x.axes, last: weight.axis(1)})
>>> net, x = Projections(), torch.randn(3, 4)
>>> graphprune.count(net, x).macs  # 3 * 4 * 8 + 3 * 8 * 2
144
>>> graphprune.prune(net, x, budget=graphprune.Budget(macs=0.5)).weights[0].shape
torch.Size([4, 4])
>>> rules.unregister("readme::project")

Such a call is counted as the elements of its result, times those of its weight, by the length of the axis that it
produces; of a weight laid out as that of a transposed convolution, (in, out, kernel), as the elements of the data by
the length of the axis that it reads. Budgets and latencies follow, and `recover` refits the weight as it does torch's,
after it has tried the operator on the data with other weights: where its results are no sums over the weight, plus the
bias, the layer is left as it is.

What a rule may use of its `call`:

- `call.arg(position, name)`: an argument as it was passed; `call.state(argument)`: the coordinates of a tensor, a
  `State` with `.shape` and `.axis(a)` (what lies along one axis; empty where no channel does).
- `call.tie(a, b, length)`: two axes of that length lose the same indices.
- `call.freeze(axis_map, kind, text)`: nothing along this axis can be removed; `call.freeze_state(state, kind, text)`.
- `call.reads(axis_map)`, `call.produces(axis_map)`: this axis of a weight is summed over, along an axis of another
  operand that it is tied to; what the call makes of that one are the channels of its result.
- `call.statistics(axis_map)`: the result is a statistic over this axis (a mean, a norm), which changes when some go.
- `call.reshape(state, shape)`: the same elements in another shape. `call.shape`, `call.shapes`: of the results.
- `elementwise`, `nothing`: ready-made rules. `State(shape, {axis: axis_map})`: a result put together by hand.

It returns the State of the result, or a list with one State (or None) per result. `prune` proves every rule on the
example: with a wrong one it raises GraphPruneError and gives nothing back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from .dependency.context import NodeContext as Call
from .dependency.context import Result
from .dependency.declared import declared_products
from .dependency.rules.elementwise import pointwise as elementwise
from .dependency.rules.registry import RULES, Rule, has_rule
from .dependency.rules.registry import empty as nothing
from .dependency.state import State
from .errors import GraphPruneError
from .support.registry import Registry, origin_of
from .support.suggestions import did_you_mean
from .tracing.names import BUILT_IN
from .tracing.operators import declare, undeclare

__all__ = ["Call", "Result", "State", "elementwise", "nothing", "registered", "rule", "unregister"]

_F = TypeVar("_F", bound=Rule)
_REGISTERED: Registry[Rule] = Registry(
    "rule",
    'rule: {name} has a rule already, {origin}; take it back with graphprune.rules.unregister("{name}") first',
)


def rule(*operators: Any) -> Callable[[_F], _F]:
    """Register the decorated function as the rule of operators, all their overloads.

    `operators`: names such as "mylib::scale_rows", or the operators themselves (`torch.ops.mylib.scale_rows`, what
    `torch.library.custom_op` returns). The function takes a `Call` and returns a `State`, or a list with one State or
    None per result; it is returned unchanged. See the module's docstring for an example.

    Raises GraphPruneError for names without a library, and for operators that have a rule already: the built-in ones,
    or another function's. Defining the same function again (in a notebook) replaces it. When a rule itself raises, or
    returns something that does not fit the call, `trace`, `plan` and `prune` raise GraphPruneError that names it.
    """
    names = [_qualified(operator) for operator in operators]
    if not names:
        raise GraphPruneError('rule: expected at least one operator; write @rule("library::operator")')

    def register(function: _F) -> _F:
        if not callable(function):
            raise GraphPruneError(f"rule: expected a function of one call, got {type(function).__name__}")
        for name in names:
            if name not in _REGISTERED and has_rule(_key(name)):
                raise GraphPruneError(f"rule: {name} has a built-in rule")
        for name in names:
            _REGISTERED.add(name, function)
            RULES.add(_key(name), _checked(name, function), function)
            declare(_key(name), functools.partial(declared_products, function))
        return function

    return register


def unregister(operator: Any) -> None:
    """Take back the rule of an operator: from now on it freezes again. Raises GraphPruneError where none was
    registered; built-in rules stay."""
    name = _qualified(operator)
    if name not in _REGISTERED:
        known = ", ".join(registered()) or "none"
        hint = did_you_mean(name, registered())
        raise GraphPruneError(f"unregister: no rule was registered for {name}; registered: {known}{hint}")
    _REGISTERED.remove(name)
    RULES.remove(_key(name))
    undeclare(_key(name))


def registered() -> tuple[str, ...]:
    """Names of the operators with a rule of the user's, sorted."""
    return tuple(sorted(_REGISTERED))


def _qualified(operator: Any) -> str:
    """"library::name" of an operator, an overload or a custom op, without the overload."""
    for attribute in ("_qualified_op_name", "_qualname"):  # a torch.ops packet, a torch.library.custom_op
        operator = getattr(operator, attribute, operator)
    if not isinstance(operator, str):  # an overload
        schema = getattr(operator, "_schema", None)
        operator = getattr(schema, "name", operator)
    if not isinstance(operator, str):
        raise GraphPruneError(f'rule: expected an operator or its name "library::operator", got {operator!r}')
    library, separator, name = operator.partition("::")
    if not (separator and library and name and "::" not in name and "." not in name):
        raise GraphPruneError(f'rule: expected a name like "library::operator", without an overload, got {operator!r}')
    return operator


def _key(name: str) -> str:
    library, _, bare = name.partition("::")
    return bare if library in BUILT_IN else name


def _checked(name: str, function: Rule) -> Rule:
    """What the function says must fit the call; its own errors name it."""

    @functools.wraps(function)
    def call_rule(call: Call) -> Result:
        who = f"the rule for {name} ({origin_of(function)})"
        try:
            result = function(call)
        except GraphPruneError:
            raise
        except Exception as error:
            raise GraphPruneError(f"{who} raised {type(error).__name__}: {error}") from error
        several = isinstance(call.node.meta.get("val"), tuple)
        if several != isinstance(result, list):
            wanted = f"a list of {len(call.shapes)} states" if several else "one State"
            raise GraphPruneError(f"{who} must return {wanted}, it returned {type(result).__name__}")
        states = result if isinstance(result, list) else [result]
        if len(states) != len(call.shapes):
            raise GraphPruneError(f"{who} returned {len(states)} states for {len(call.shapes)} results")
        for state, shape in zip(states, call.shapes, strict=True):
            _check_state(who, state, shape)
        return result

    return call_rule


def _check_state(who: str, state: Any, shape: tuple[int, ...] | None) -> None:
    if state is None:
        return
    if not isinstance(state, State):
        raise GraphPruneError(f"{who} must return a State or None for each result, it returned {type(state).__name__}")
    if shape is None or state.shape != shape:
        raise GraphPruneError(f"{who} returned a State of shape {state.shape} for a result of shape {shape}")
    for axis, axis_map in state.axes.items():
        if not 0 <= axis < len(shape) or any(len(v) != shape[axis] for v in axis_map.values()):
            raise GraphPruneError(f"{who}: the coordinates on axis {axis} of its State do not have that axis' length")
