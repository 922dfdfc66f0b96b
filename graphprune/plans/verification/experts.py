"""The oracle of expert pruning: the original whose router gives the removed experts no chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...dependency.whole.experts import Experts
from ...errors import GraphPruneError
from ...support.walking import named_tensors
from ...tracing.example import ExampleInput, result_tensors
from ...tracing.operators import Kind, Move, Operator, function_name, named
from .results import TOLERANCE, Check, VerificationReport, relative_error
from .running import examples_for, run, same_shapes


class RouterWatch(TorchFunctionMode):
    """Looks at the outputs of routers while a model runs, and can bar experts: their logits become -inf."""

    def __init__(self, model: nn.Module, experts: Sequence[Experts], bar: bool) -> None:
        super().__init__()
        named = named_tensors(model)
        self.known: dict[int, Experts] = {id(named[e.router]): e for e in experts}
        self.kept: list[Tensor] = list(named.values())  # ids stay theirs
        self.bar = bar
        self.logits: dict[str, list[Tensor]] = {e.router: [] for e in experts}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        mine = next((self.known[id(a)] for a in (*args, *(kwargs or {}).values()) if id(a) in self.known), None)
        if mine is None or not isinstance(out, Tensor):
            return out
        name = function_name(func)
        operator = named(name)
        if operator is not None and operator.kind is Kind.CONTRACTION:
            self.logits[mine.router].append(out.detach())
            if self.bar and mine.gone:
                barred = torch.tensor(mine.gone, device=out.device)
                return out.index_fill(-1, barred, -math.inf)
        elif name == "__get__" or (operator is not None and _turns(operator)):  # W.T is an attribute of W
            self.known[id(out)] = mine
            self.kept.append(out)
        return out


def _turns(operator: Operator) -> bool:
    return operator.move is Move.STAYS or (operator.move is Move.ARRANGES and operator.view)


def verify_experts(
    original: nn.Module,
    pruned: nn.Module,
    experts: Sequence[Experts],
    example_input: Any,
    tolerance: float = TOLERANCE,
) -> VerificationReport:
    """Check that `pruned` is `original` without these experts.

    - *forward*: it runs and its outputs have the original's shapes; those that count experts (what routers say of each)
      are without those removed.
    - *barred experts*: on the example input, and on noise where all inputs are floating point, it computes what the
      original does when its router's outputs for the removed experts are set to -inf. Single numbers beside other
      outputs are no results but losses, in which the number of experts is a factor: they are not compared.
    """
    checks = []
    for number, example in enumerate(examples_for(ExampleInput.of(example_input))):
        made = run(pruned, example, "verify (pruned)")
        watch = RouterWatch(original, experts, bar=True)
        with watch:
            whole = run(original, example, "verify (barred experts)")
        got, wanted = _comparable(result_tensors(made), result_tensors(whole), [e.gone for e in experts])
        if not number:
            checks.append(same_shapes(got, wanted))
        missed = [router for router, seen in watch.logits.items() if not seen]
        if missed:
            raise GraphPruneError(f"verify: the product with {missed[0]} was not seen; its experts cannot be proven")
        if any(p.is_meta for p in original.parameters()):
            continue
        error = relative_error(got, wanted)
        checks.append(Check("barred experts" if not number else "barred experts, noise", error <= tolerance, error))
    return VerificationReport(tuple(checks))


def _comparable(
    got: Sequence[Tensor], wanted: Sequence[Tensor], gone: Sequence[Sequence[int]]
) -> tuple[list[Tensor], list[Tensor]]:
    """The results of both without losses, those of the original without what it says of removed experts."""
    results = [t for t in wanted if t.dim()]
    if not results or [t.dim() for t in got if not t.dim()] != [t.dim() for t in wanted if not t.dim()]:
        return list(got), list(wanted)
    kept = [t for t in got if t.dim()]
    cut = [_without(b, a, gone) for a, b in zip(kept, results, strict=False)]
    return kept, [*cut, *results[len(cut) :]]


def _without(wanted: Tensor, got: Tensor, gone: Sequence[Sequence[int]]) -> Tensor:
    """What was said of the removed experts, -inf or a chance of 0, is taken out where the other result lacks it."""
    for places in map(list, gone):
        if places and wanted.shape[:-1] == got.shape[:-1] and wanted.shape[-1] - len(places) == got.shape[-1]:
            if max(places) < wanted.shape[-1] and (wanted.is_meta or bool(_never(wanted[..., places]).all())):
                stay = [i for i in range(wanted.shape[-1]) if i not in set(places)]
                return wanted[..., stay]
    return wanted


def _never(said: Tensor) -> Tensor:
    return (said == 0) | (said == -math.inf)
