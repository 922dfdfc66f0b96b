"""An optimizer goes on after a pruning step: its state is cut as the parameters were."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraphPruneError
from ..plans import Plan
from ..surgery.cutting import cut_tensor
from ..surgery.folding import fold_names
from ..tracing.names import named_tensors

# Averages of gradients and of their squares, in torch's optimizers: where a parameter is multiplied by f, its
# gradient is divided by f.
_POWERS = {
    "momentum_buffer": 1,
    "exp_avg": 1,
    "grad_avg": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "square_avg": 2,
    "sum": 2,
}


def carry_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, small: nn.Module, plan: Plan
) -> tuple[str, ...]:
    """Make `optimizer`, which trains `model`, train `small = plan.apply(model)` and go on as if nothing had happened.

    Every parameter is replaced by the one of the same name in `small`, in its parameter group with all options, and its
    state (momentum, averages of gradients and squares) loses the slices that the parameter lost: what stays is, bit for
    bit, what it was. State in another shape than the parameter's, or of a parameter that a batch norm was folded into,
    has no such meaning; these parameters start anew, and their names are returned. Learning rate schedulers that
    hold the optimizer go on working.

    Raises GraphPruneError where the optimizer holds parameters that `model` has not, or where `small` was not made by
    `plan`; then nothing is changed.
    """
    plan.check(model)
    before, after = named_tensors(model), named_tensors(small)
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in before.items():
        names[id(tensor)].append(name)
    carried = _Carried(plan, after, {n for fold in plan.folds for n in fold_names(fold)})
    groups: list[list[Tensor]] = []
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    restarted: list[str] = []
    for group in optimizer.param_groups:
        members: dict[int, Tensor] = {}
        for old in group["params"]:
            own = names.get(id(old))
            if own is None:
                raise GraphPruneError(
                    f"carry_optimizer: the optimizer trains a parameter of shape {tuple(old.shape)} that is not in the "
                    f"model; pass the optimizer that trained it"
                )
            for new in carried.successors(own):
                members[id(new)] = new
            found = next((after[n] for n in own if n in after), None)
            if found is None or old not in optimizer.state:
                continue
            new_state = carried.state(optimizer.state[old], old, found, own)
            if new_state is None:
                restarted.append(own[0])
            else:
                state[found] = new_state
        groups.append(list(members.values()))
    after_names = {id(tensor): name for name, tensor in reversed(after.items())}
    for group, new_members in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = new_members
        if "param_names" in group:
            group["param_names"] = [after_names[id(p)] for p in new_members]
    optimizer.state = state
    return tuple(restarted)


class _Carried:
    def __init__(self, plan: Plan, after: Mapping[str, Tensor], folded: set[str]) -> None:
        self._plan = plan
        self._after = after
        self._folded = folded
        # a bias that folding adds belongs where its weight is
        self._added = {w: b for w, b in map(fold_names, plan.folds) if b not in plan.structure and b in after}

    def successors(self, names: Sequence[str]) -> list[Tensor]:
        wanted = [n for n in names if n in self._after]
        wanted += [self._added[n] for n in names if n in self._added]
        return [self._after[n] for n in wanted]

    def state(
        self, state: Mapping[str, Any], old: Tensor, new: Tensor, names: Sequence[str]
    ) -> dict[str, Any] | None:
        """The state of the smaller parameter; None where it has to start anew."""
        cut = next((self._plan.removed[n] for n in names if n in self._plan.removed), {})
        shape = tuple(n - len(cut.get(axis, ())) for axis, n in enumerate(old.shape))
        if shape != tuple(new.shape):
            raise GraphPruneError(
                f"carry_optimizer: {names[0]} has shape {tuple(new.shape)} after pruning, the plan leaves {shape}; "
                f"pass plan.apply(model)"
            )
        if self._folded.intersection(names):
            return None
        factor = self._factor(old, names)
        out: dict[str, Any] = {}
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                out[key] = value.clone() if isinstance(value, Tensor) else value
                continue
            if factor is not None:
                if key not in _POWERS:
                    return None
                value = (value / factor ** _POWERS[key]).to(value.dtype)
            if value.shape != old.shape:
                if cut:
                    return None
                out[key] = value.clone()
            else:
                out[key] = cut_tensor(value, cut) if cut else value.detach().clone()
        return out

    def _factor(self, old: Tensor, names: Sequence[str]) -> Tensor | None:
        """By what the parameter's rows were multiplied, so that attention keeps its temperature."""
        scales = [r for r in self._plan.rescales if r.parameter in names]
        if not scales:
            return None
        factor = torch.ones([1] * old.dim(), device=old.device)
        for scale in scales:
            part = torch.ones(old.shape[scale.axis], device=old.device)
            part[list(scale.indices)] = scale.factor
            view = [1] * old.dim()
            view[scale.axis] = -1
            factor = factor * part.reshape(view)
        return factor
