"""The two penalties: group lasso, and weight decay that grows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ....dependency.reparametrised import plain
from ....errors import GraphPruneError
from ....plans.naming import in_plain_names
from ....plans.plan import Plan
from ....support.numbers import check_integer
from ....support.types import Ignore
from .penalty import GroupPenalty


class GroupLasso(GroupPenalty):
    """Group lasso on whole channels, for your own training loop: weight * sum over channels of sqrt(n) norm(w).

    w: all that goes with a channel (`GroupPenalty`), n: how many numbers that is, norm: the Euclidean one (Yuan and
    Lin, 2006; over dependency groups: Fang et al., DepGraph, 2023). Each channel is drawn to zero with the same force
    however small it is already, `weight` per number in the root mean square: the weak ones get there, and pruning finds
    them. ::

        lasso = graphprune.GroupLasso(model, example_input, weight=1e-3)
        for x, y in loader:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            lasso.add_gradients()  # or: (loss_fn(model(x), y) + lasso.penalty()).backward()
            optimizer.step()
        small = graphprune.prune(model, example_input, 0.5)

    - `model`: the network that is trained; wrappers are looked through. It may be moved, loaded and changed in value,
      and must keep its structure.
    - `example_input`: as for `graphprune.trace`, which runs the model once, here; the groups are found once.
    - `weight`: at least 0.
    - `ignore`: modules, parameters, names or patterns whose outputs will not be pruned: their channels are left alone.

    With a GradScaler: `scaler.unscale_(optimizer)` first, or `add_gradients(scaler)`. With gradient accumulation once a
    step, after the last backward; before or after clipping, as you like (`finetune`: after, as weight decay is not
    clipped either). `graphprune.finetune` and `graphprune.pipeline` take one as `regularize`.

    Raises GraphPruneError for a weight out of range, where the model fails on the example input, and where it has no
    channels that could be pruned.

    >>> import torch, graphprune
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.ReLU(), torch.nn.Linear(3, 1, bias=False))
    >>> for parameter in net.parameters():
    ...     _ = torch.nn.init.ones_(parameter)
    >>> graphprune.GroupLasso(net, torch.ones(1, 2), weight=0.1).penalty()  # 3 channels of 3 ones: 0.1 * 3 * 3
    tensor(0.9000, grad_fn=<MulBackward0>)
    """

    kind = "lasso"

    def __init__(
        self, model: nn.Module, example_input: Any, weight: float = 1e-3, *, ignore: Ignore = None
    ) -> None:
        super().__init__(model, example_input, weight, ignore=ignore)
        self._roots = np.sqrt(self._units.sizes)[self._units.owner]

    def _value(self, sums: Tensor) -> Tensor:
        norms = _roots(self._units.squares(sums))
        return self.weight * (torch.as_tensor(self._roots).to(norms) * norms).sum()


# Largest factors: of channels that a plan removes, and of all by how weak they are.
_CHOSEN, _EVERY = 1.0, 0.01


class GrowingPenalty(GroupPenalty):
    """Weight decay of whole channels that grows while a network is trained: half the sum over channels of f norm(w)^2.

    w: all that goes with a channel (`GroupPenalty`). f is 0 at first and grows at every `step()`, by weight / steps
    where a channel is the weakest of its group, by nothing where it is the strongest, in between in proportion to its
    norm, and no further than `weight` (Wang et al., Neural Pruning via Growing Regularization, 2021; over dependency
    groups: Fang et al., 2023). With a `plan` the channels that it removes grow by weight / steps each and all others by
    nothing (Wang's GReg-1): they fade out while the rest takes over what they did, and `plan.apply` cuts what is about
    zero. ::

        plan = graphprune.plan(model, example_input, budget=graphprune.Budget(macs=0.4), fold_bn=False)
        fading = graphprune.GrowingPenalty(model, example_input, steps=1000, plan=plan)
        for x, y in loader:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            fading.add_gradients()
            optimizer.step()
            fading.step()
        small = plan.apply(model)

    - `weight`: the largest f, at least 0; default 1 with a plan and 0.01 without, which are Wang's: what is on its way
      out may be decayed by far more than what stays. `steps`: of the optimizer until the weakest have it, at least 1.
      What is left of a channel is about exp(-sum of f times learning rate), with momentum m of the sum over 1 - m.
    - `plan`: of this model, which removes channels.
    - `model`, `example_input`, `ignore`, GradScaler, accumulation: as for `GroupLasso`. `state_dict`: what has grown.

    Raises GraphPruneError as `GroupLasso` does, and for a plan of another model, or one that removes no whole channels.
    """

    kind = "growing"

    def __init__(
        self,
        model: nn.Module,
        example_input: Any,
        weight: float | None = None,
        steps: int = 1000,
        *,
        plan: Plan | None = None,
        ignore: Ignore = None,
    ) -> None:
        check_integer("GrowingPenalty: steps", steps, 1)
        if plan is not None and not isinstance(plan, Plan):
            raise GraphPruneError(f"GrowingPenalty: plan: expected a graphprune.Plan, got {type(plan).__name__}")
        known = (_EVERY if plan is None else _CHOSEN) if weight is None else weight
        super().__init__(model, example_input, known, ignore=ignore)
        self.steps = steps
        self._going = None if plan is None else self._removed(plan)
        self._factors = torch.zeros(len(self._units.owner))
        self._squares: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        """Once after every step of the optimizer: the factors grow, by the norms that the last penalty was made of."""
        if self._going is not None:
            standing = self._going
        else:
            squares = self._squares if self._squares is not None else self._units.squares(self._sums(self._lives()))
            standing = self._standing(squares.clamp_min(0).sqrt())
        self._squares = None
        self._factors = (self._factors + standing.to(self._factors) * (self.weight / self.steps)).clamp_max(self.weight)

    def state_dict(self) -> dict[str, Any]:
        """{"factors": f of every channel, group after group}."""
        return {"factors": self._factors.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken, of a penalty on the same network. Raises GraphPruneError, changing
        nothing, for other states."""
        factors = state.get("factors") if isinstance(state, Mapping) and len(state) == 1 else None
        if not isinstance(factors, Tensor) or factors.shape != self._factors.shape or not factors.is_floating_point():
            raise GraphPruneError(
                f"GrowingPenalty: expected the state of a GrowingPenalty on this network, factors of shape "
                f"{tuple(self._factors.shape)}"
            )
        if not bool(((factors >= 0) & (factors <= self.weight)).all()):
            raise GraphPruneError(f"GrowingPenalty: the state has factors outside of 0 to {self.weight:g}, the weight")
        self._factors, self._squares = factors.detach().to(self._factors, copy=True), None

    def settings(self) -> dict[str, Any]:
        """What must be the same for two penalties to be the same, as JSON."""
        going = None if self._going is None else self._going.nonzero().flatten().tolist()
        return {**super().settings(), "steps": self.steps, "going": going}

    def _value(self, sums: Tensor) -> Tensor:
        squares = self._units.squares(sums)
        self._squares = squares.detach()
        return 0.5 * (self._factors.to(squares) * squares).sum()

    def _standing(self, norms: Tensor) -> Tensor:
        """0 for the strongest channel of a group, 1 for the weakest, linear in between; 0 where all are equal."""
        owner = torch.from_numpy(self._units.owner).to(norms.device)
        none = norms.new_zeros(len(self._units.groups))
        most, least = (none.scatter_reduce(0, owner, norms, how, include_self=False) for how in ("amax", "amin"))
        spread = most - least
        return torch.where(spread[owner] > 0, (most[owner] - norms) / spread[owner], 0.0)

    def _removed(self, plan: Plan) -> Tensor:
        """Which units the plan removes."""
        plan.check(self._model)
        bare = plain(self._model)
        removed = in_plain_names(plan, bare, self._model).removed
        masks = []
        for group in self._units.groups:
            member = next(m for m in group.members if m.parameter in self._units.names)
            gone = list(removed.get(member.parameter, {}).get(member.axis, ()))
            masks.append(np.isin(member.positions, gone).all(axis=1))
        mask = np.concatenate(masks)
        if not mask.any():
            raise GraphPruneError("GrowingPenalty: plan: it removes none of the channels that may go, so nothing grows")
        return torch.from_numpy(mask)


def _roots(squares: Tensor) -> Tensor:
    """Square roots whose gradient at 0 is 0: what has got there stays there."""
    there = squares > 0
    return torch.where(there, torch.where(there, squares, 1.0).sqrt(), 0.0)
