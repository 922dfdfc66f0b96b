"""What all penalties on whole channels have in common: which tensors they read, and how gradients reach these."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from ....dependency import Group
from ....dependency.graph import trace
from ....dependency.ignored import ignored_positions
from ....dependency.reparametrised import Live, live_weight, plain
from ....errors import GraphPruneError
from ....support.doors import door
from ....support.numbers import check_number
from ....support.types import Ignore
from ....support.walking import all_modules
from .units import Units


class GroupPenalty(abc.ABC):
    """A penalty on whole channels; `GroupLasso` and `GrowingPenalty` are the two that there are.

    A channel is what pruning removes at once: its slices of all parameters - the filter that makes it, batch norm scale
    and shift, bias, what every consumer reads of it, the same slices of all layers that a residual sum ties - each
    element once, tied tensors once. Weights that a layer computes (weight norm, parametrisations) count as the weights
    that they are. Buffers do not count, and parameters without `requires_grad` do, but get no gradient.
    """

    kind: str

    @door("model")
    def __init__(self, model: nn.Module, example_input: Any, weight: float, *, ignore: Ignore = None) -> None:
        self._who = type(self).__name__
        check_number(f"{self._who}: weight", weight)
        self.weight = float(weight)
        bare = plain(model)
        graph = trace(bare, example_input)
        graph = graph.freezing(ignored_positions(ignore, graph, bare))
        self._model, modules = model, all_modules(model)
        found = {
            name: _live(name, modules)
            for name in dict.fromkeys(m.parameter for group in graph.groups for m in group.members)
        }
        self._shapes = {
            name: tuple(live.value.shape)
            for name, live in found.items()
            if live is not None and (live.value.is_floating_point() or live.value.is_complex())
        }
        self._units = Units(graph.groups, self._shapes)
        if not self._units.groups:
            raise GraphPruneError(
                f"{self._who}: the network has no channels that could be pruned"
                f"{'' if ignore is None else ' beside what is ignored'}, so there is nothing to drive to zero; "
                f"graphprune.doctor says what stands in the way"
            )

    # -- use

    def penalty(self) -> Tensor:
        """The penalty of the model as it is: a scalar to add to the loss, with gradients to the parameters."""
        return self._value(self._sums(self._lives()))

    @torch.no_grad()
    def add_gradients(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Add the penalty's gradient to `.grad` of every parameter that wants one: after the backward passes of a step
        and before `optimizer.step()`. The same as adding `penalty()` to the loss, with memory for the gradient of one
        parameter at a time.

        `scaler`: the GradScaler, where the gradients that are there are scaled by it; None after its `unscale_`.
        Processes of a DistributedDataParallel all add the same, without a word to each other.

        Raises GraphPruneError, changing nothing, where a gradient is sparse.
        """
        lives = self._lives()
        sums = self._sums(lives).requires_grad_()
        with torch.enable_grad():
            (slopes,) = torch.autograd.grad(self._value(sums), sums)
        self._refuse_sparse(lives)
        if scaler is not None:
            slopes = slopes * scaler.get_scale()
        modules = all_modules(self._model)
        for name, live in lives.items():
            wanted = [p for p in live.parameters if p.requires_grad]
            if wanted:
                self._add(name, modules, wanted, slopes[self._units.part(name)])

    def step(self) -> None:  # noqa: B027 - only what grows has something to do
        """Once after every step of the optimizer: what grows, grows. In a `GroupLasso` nothing does."""

    @torch.no_grad()
    def norms(self) -> list[tuple[Group, Tensor]]:
        """Each group with the norms of its channels, (group.size,): how far they are."""
        norms = self._units.squares(self._sums(self._lives())).clamp_min(0).sqrt()
        parts = norms.split([group.size for group in self._units.groups])
        return list(zip(self._units.groups, parts, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on later: tensors by name."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken, of a penalty on the same network. Raises GraphPruneError, changing
        nothing, for other states."""
        if not isinstance(state, Mapping) or state:
            raise GraphPruneError(f"{self._who}: expected the state of a {self._who}, which is empty")

    # -- for trainings

    @door("model")
    def on(self, model: nn.Module) -> Self:
        """The same for a copy of the model, with a state of its own. Raises GraphPruneError where it is no copy."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        made._model = model
        made.load_state_dict(self.state_dict())
        made._lives()
        return made

    def settings(self) -> dict[str, Any]:
        """What must be the same for two penalties to be the same, as JSON."""
        groups = [[group.name, group.size] for group in self._units.groups]
        return {"kind": self.kind, "weight": self.weight, "groups": groups}

    # -- inside

    @abc.abstractmethod
    def _value(self, sums: Tensor) -> Tensor:
        """The penalty, from the sums of squares of all tensors (`Units.sums`)."""

    def _lives(self) -> dict[str, Live]:
        """The tensors as they are. Raises GraphPruneError where the model has another structure by now."""
        modules, out = all_modules(self._model), {}
        for name in self._units.names:
            live = _live(name, modules)
            if live is None or tuple(live.value.shape) != self._shapes[name]:
                found = "is not there" if live is None else f"has shape {tuple(live.value.shape)}"
                raise GraphPruneError(
                    f"{self._who}: {name} {found}, and was of shape {self._shapes[name]} when the penalty was made; "
                    f"make another for this network"
                )
            out[name] = live
        return out

    def _sums(self, lives: Mapping[str, Live]) -> Tensor:
        parts = [self._units.sums(name, live.value) for name, live in lives.items()]
        return torch.cat([part.to(parts[0].device) for part in parts])

    def _add(
        self, name: str, modules: Mapping[str, nn.Module], wanted: list[nn.Parameter], slopes: Tensor
    ) -> None:
        with torch.enable_grad():
            live = _live(name, modules)
            assert live is not None
            sums = self._units.sums(name, live.value)
            gradients: tuple[Tensor | None, ...] = torch.autograd.grad(sums, wanted, slopes.to(sums), allow_unused=True)
        for parameter, gradient in zip(wanted, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)

    def _refuse_sparse(self, lives: Mapping[str, Live]) -> None:
        for name, live in lives.items():
            if any(p.grad is not None and p.grad.layout != torch.strided for p in live.parameters):
                raise GraphPruneError(
                    f"{self._who}: the gradient of {name} is sparse, and the penalty reaches every row of it; make its "
                    f"module without sparse=True, or put it into ignore="
                )


def _live(name: str, modules: Mapping[str, nn.Module]) -> Live | None:
    path, _, attribute = name.rpartition(".")
    return live_weight(modules[path], attribute) if path in modules else None
