"""Find mixtures of experts: routers whose outputs are ranked by a top-k, and what lies behind each output."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, fx, nn

from ...support.walking import all_modules, named_tensors
from ...tracing.example import ExampleInput
from ...tracing.names import operator_name
from ...tracing.operators import Kind, Move, kind_of, operator_of
from ...tracing.trace import Trace, record_run


@dataclasses.dataclass(frozen=True)
class Experts:
    """One mixture of experts, and which of them go.

    `router`: the weight (experts, width) whose outputs are ranked. `listed`: path of a ModuleList with one module for
    each expert, "" where the experts lie stacked along the first axis of tensors. `gone`: their numbers, sorted.
    """

    router: str
    listed: str
    gone: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, data: Any) -> Experts:
        """From `dataclasses.asdict`. Raises KeyError, TypeError or ValueError for anything else."""
        gone = tuple(data["gone"])
        plain = isinstance(data["router"], str) and isinstance(data["listed"], str)
        if not plain or any(type(i) is not int or i < 0 for i in gone) or list(gone) != sorted(set(gone)):
            raise ValueError(f"no experts: {data!r}")
        return cls(data["router"], data["listed"], gone)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A mixture as found. `block`: path of the smallest module around router and experts. `stacked`: tensors whose
    first axis counts experts, the router's own among them. `chosen`: how many experts a token gets."""

    experts: Experts
    block: str
    number: int
    chosen: int
    stacked: tuple[str, ...]


def find_mixtures(model: nn.Module, example_input: Any) -> tuple[Mixture, ...]:
    """The mixtures of experts of `model`, in the order in which they run.

    A router is a weight of two axes whose product is ranked by a top-k, with nothing but a bias and a softmax or
    sigmoid in between. Its experts are the modules of a ModuleList as long as it has outputs, or tensors of three and
    more axes with that first length, in the smallest module around it that holds such.
    """
    trace = record_run(model, ExampleInput.of(example_input))
    named = named_tensors(model)
    found = []
    for name, node in trace.parameters.items():
        tensor = named.get(name)
        chosen = _ranked(trace, node, tensor) if tensor is not None and tensor.dim() == 2 else None
        mixture = None if chosen is None else _mixture(model, name, chosen, named)
        if mixture is not None:
            found.append(mixture)
    return tuple(found)


def _ranked(trace: Trace, weight: fx.Node, tensor: Tensor | None) -> int | None:
    """How many outputs of a product with `weight` a top-k takes; None where none does."""
    assert tensor is not None
    stack, seen = [(weight, False)], {weight}
    while stack:
        node, multiplied = stack.pop()
        for user in node.users:
            if operator_name(user) == "topk" and multiplied:
                value = user.args[0].meta.get("val") if isinstance(user.args[0], fx.Node) else None
                number = user.args[1] if len(user.args) > 1 else None
                if value is not None and value.shape[-1] == tensor.shape[0] and isinstance(number, int):
                    return number
            product = kind_of(user) is Kind.CONTRACTION
            if ((product and not multiplied) or _between(user)) and user not in seen:
                seen.add(user)
                stack.append((user, multiplied or product))
    return None


def _between(node: fx.Node) -> bool:
    """What may lie between a router's product and the top-k: nothing that mixes experts but a softmax."""
    operator = operator_of(node)
    if operator is None or operator.kind is Kind.SOFTMAX:
        return operator is not None
    if operator.kind is Kind.POINTWISE:
        return operator.sums or operator.scales or len(node.all_input_nodes) == 1
    return operator.move in (Move.STAYS, Move.RESHAPES) or (operator.move is Move.ARRANGES and operator.view)


def _mixture(model: nn.Module, router: str, chosen: int, named: dict[str, Tensor]) -> Mixture | None:
    number = named[router].shape[0]
    modules = all_modules(model)
    owner = router.rpartition(".")[0]
    beside = [n for n, t in named.items() if n.rpartition(".")[0] == owner and t.dim() and t.shape[0] == number]
    around = [owner]
    while around[-1]:
        around.append(around[-1].rpartition(".")[0])
    for path in around:
        prefix = f"{path}." if path else ""
        inside = [n for n in named if n.startswith(prefix)]
        stacked = [n for n in inside if named[n].dim() >= 3 and named[n].shape[0] == number]
        lists = [p for p, m in modules.items() if p.startswith(prefix) and _equal_modules(m, number)]
        if stacked or lists:
            flat = [n for n in inside if named[n].dim() == 2 and named[n].shape[0] == number]
            biases = [n for n in flat if stacked and _beside(n, stacked)]
            listed = lists[0] if len(lists) == 1 else ""
            if lists and not listed:
                return None
            tensors = tuple(dict.fromkeys([*beside, *([] if listed else [*stacked, *biases])]))
            return Mixture(Experts(router, listed), path, number, chosen, tensors)
    return None


def _beside(name: str, stacked: list[str]) -> bool:
    """A tensor of the module that holds stacked weights: their biases."""
    return name.rpartition(".")[0] in {s.rpartition(".")[0] for s in stacked}


def _equal_modules(module: nn.Module, number: int) -> bool:
    """A ModuleList of that many modules of one class and the same shapes."""
    if not isinstance(module, nn.ModuleList) or len(module) != number or number < 2:
        return False
    shapes = [[tuple(t.shape) for t in named_tensors(m).values()] for m in module]
    return all(s == shapes[0] and s for s in shapes) and len({type(m) for m in module}) == 1
