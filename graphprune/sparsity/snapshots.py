"""A model's state under the names that it has without masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .weights import Weight, find_weights, mask_at, steps_of


@dataclasses.dataclass(frozen=True, eq=False)
class PlainState:
    """The state dict as if masks were not there.

    `tensors`: name -> values as the network computes with them. `masks`: name -> true where a weight stays. `weights`:
    every name of every parameter that can be masked. Weights with other parametrisations beside the mask keep the
    names and tensors of their ordinary state dict, the mask among them.
    """

    tensors: dict[str, Tensor]
    masks: dict[str, Tensor]
    weights: dict[str, Weight]
    behind: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> PlainState:
        weights = {site.name: (weight, site) for weight in find_weights(model) for site in weight.sites}
        renamed: dict[str, str] = {}
        hidden: set[str] = set()
        masks: dict[str, Tensor] = {}
        for name, (_, site) in weights.items():
            found = mask_at(site)
            if found is None or len(steps_of(site.module)[site.attribute]) > 1:
                continue
            path = name.removesuffix(site.attribute)
            renamed[f"{path}parametrizations.{site.attribute}.original"] = name
            hidden.add(f"{path}parametrizations.{site.attribute}.0.mask")
            masks[name] = found.mask
        state = model.state_dict(keep_vars=True)
        behind = {renamed.get(key, key): value for key, value in state.items() if key not in hidden}
        tensors = {
            name: torch.where(masks[name], value.detach(), 0.0) if name in masks else _detached(value)
            for name, value in behind.items()
        }
        return cls(tensors, masks, {name: weight for name, (weight, _) in weights.items()}, behind)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values into the model's own tensors; masks stay as they are."""
        with torch.no_grad():
            for name, value in tensors.items():
                self.behind[name].copy_(value)

    def copy(self) -> dict[str, Tensor]:
        """Copies of all tensors, independent of the model."""
        return {name: tensor.clone() for name, tensor in self.tensors.items()}


def _detached(value: Tensor) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else value
