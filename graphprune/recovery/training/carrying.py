"""An optimizer goes on after a pruning step: its state is cut as the parameters were."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...dependency.reparametrised import plain
from ...errors import GraphPruneError
from ...plans.plan import Plan
from ...plans.surgery.folding import fold_names
from ...support.cutting import cut_tensor
from ...support.doors import door
from ...support.walking import all_modules, named_tensors
from ...tracing.matching import OtherNames

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


@door("model", "small")
def carry_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, small: nn.Module, plan: Plan
) -> tuple[str, ...]:
    """Make `optimizer`, which trains `model`, train `small = plan.apply(model)` and go on as if nothing had happened.

    Every parameter is replaced by the one of the same name in `small` (of the layer that has moved up, where layers are
    left out), in its parameter group with all options, and its state (momentum, averages of gradients and squares)
    loses the slices that the parameter lost: what stays is, bit for bit, what it was. State in another shape than the
    parameter's, or of a parameter that a batch norm was folded into, has no such meaning; these parameters start anew,
    and their names are returned. Learning rate schedulers that hold the optimizer go on working. Parameters of other
    modules, where `model` is a part of what the optimizer trains, stay in it as they are, with their state.

    Raises GraphPruneError where the optimizer trains no parameter of `model`, or where `small` was not made by `plan`;
    then nothing is changed.
    """
    plan.check(model)
    before, after = named_tensors(model), named_tensors(small)
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in before.items():
        names[id(tensor)].append(name)
    after_names = {id(tensor): name for name, tensor in reversed(after.items())}
    computed = OtherNames.of(plain(model)).tensors
    carried = _Carried(plan, after, before, _Moves(plan, model), computed)
    if not any(id(p) in names for group in optimizer.param_groups for p in group["params"]):
        raise GraphPruneError(
            "carry_optimizer: the optimizer trains no parameter that is in the model; pass the optimizer that trained "
            "it"
        )
    groups: list[dict[int, tuple[Tensor, str]]] = []
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    restarted: list[str] = []
    for group in optimizer.param_groups:
        members: dict[int, tuple[Tensor, str]] = {}
        known = group.get("param_names", [""] * len(group["params"]))
        for old, title in zip(group["params"], known, strict=True):
            own = names.get(id(old))
            if own is None:  # another module's
                members[id(old)] = old, title
                if old in optimizer.state:
                    state[old] = optimizer.state[old]
                continue
            prefix = next((title.removesuffix(name) for name in own if title.endswith(name)), "")
            for new in carried.successors(own):
                members[id(new)] = new, prefix + after_names[id(new)]
            found = carried.successor(own)
            if found is None or old not in optimizer.state:
                continue
            flat = isinstance(optimizer, torch.optim.LBFGS)  # its state is of all parameters in one vector
            new_state = None if flat else carried.state(optimizer.state[old], old, found, own)
            if new_state is None:
                restarted.append(own[0])
            else:
                state[found] = new_state
        groups.append(members)
    for group, members in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [new for new, _ in members.values()]
        if "param_names" in group:
            group["param_names"] = [title for _, title in members.values()]
    optimizer.state = state
    if isinstance(optimizer, torch.optim.LBFGS):  # it has a list, and a count, of its own
        optimizer._params, optimizer._numel_cache = optimizer.param_groups[0]["params"], None
    return tuple(restarted)


class _Moves:
    """Where names of `model` are found after the plan; None for what lies in a layer that is left out."""

    def __init__(self, plan: Plan, model: nn.Module) -> None:
        modules = all_modules(model)
        self._gone: dict[str, set[str]] = defaultdict(set)
        deleted: dict[str, set[str]] = defaultdict(set)
        for block in (piece for whole in plan.layers for piece in whole.pieces):
            owner, _, name = block.module.rpartition(".")
            self._gone[owner].add(name)
            if block.listed:
                deleted[owner].add(name)
        self._places: dict[str, dict[str, str]] = {}
        for owner in deleted:
            items = list(modules[owner]._modules)
            numbered = items == [str(i) for i in range(len(items))]
            stay = [name for name in items if name not in deleted[owner]]
            self._places[owner] = {name: str(i) if numbered else name for i, name in enumerate(stay)}

    def __call__(self, name: str) -> str | None:
        parts = name.split(".")
        steps = [(".".join(parts[:i]), part) for i, part in enumerate(parts)]
        if any(part in self._gone.get(prefix, ()) for prefix, part in steps):
            return None
        return ".".join(self._places.get(prefix, {}).get(part, part) for prefix, part in steps)


class _Carried:
    """`computed`: names of parameters -> of the weights that are computed from them."""

    def __init__(
        self,
        plan: Plan,
        after: Mapping[str, Tensor],
        before: Iterable[str],
        moved: _Moves,
        computed: Mapping[str, str],
    ) -> None:
        self._plan = plan
        names = {name: new for name in before if (new := moved(name)) is not None}
        self._after = {old: after[new] for old, new in names.items() if new in after}
        for name in names.keys() - self._after.keys():
            if not any(name.startswith(f"{fold.batch_norm}.") for fold in plan.folds):
                raise GraphPruneError(f"carry_optimizer: {name} is missing after pruning; pass plan.apply(model)")
        folded = {n for fold in plan.folds for n in fold_names(fold)}
        changed = folded | {scale.parameter for scale in plan.rescales}
        self._folded = folded | {name for name, weight in computed.items() if weight in changed}
        # a bias that folding adds belongs where its weight is
        added = {w: moved(b) or b for w, b in map(fold_names, plan.folds) if b not in plan.structure}
        self._added = {weight: after[bias] for weight, bias in added.items() if bias in after}

    def successor(self, names: Sequence[str]) -> Tensor | None:
        """The parameter of these names in the smaller model."""
        return next((self._after[n] for n in names if n in self._after), None)

    def successors(self, names: Sequence[str]) -> list[Tensor]:
        """It, and the bias that folding gives to its layer."""
        return [held[n] for held in (self._after, self._added) for n in names if n in held]

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
