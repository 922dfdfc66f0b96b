"""A weight of the user's own model with what it is computed from, where it is."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as OldSpectralNorm
from torch.nn.utils.weight_norm import WeightNorm as OldWeightNorm

from ...support.walking import all_modules


class Live(NamedTuple):
    """A weight, and the parameters that it is a function of: itself alone for most."""

    value: Tensor
    parameters: tuple[nn.Parameter, ...]


def live_weight(module: nn.Module, attribute: str) -> Live | None:
    """The weight of this name in `module`, if it has one: a parameter, or what it computes in eval mode (no power
    iteration is made) from its parameters, with gradients to them."""
    parameter = module._parameters.get(attribute)
    if parameter is not None:
        return Live(parameter, (parameter,))
    if parametrize.is_parametrized(module, attribute):
        chain: Any = module.parametrizations[attribute]  # type: ignore[index]
        return Live(_in_eval_mode(chain), tuple(chain.parameters()))
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (OldWeightNorm, OldSpectralNorm)) and hook.name == attribute:
            options = {"do_power_iteration": False} if isinstance(hook, OldSpectralNorm) else {}
            sources = (module._parameters.get(f"{attribute}_{end}") for end in ("g", "v", "orig"))
            return Live(hook.compute_weight(module, **options), tuple(p for p in sources if p is not None))
    return None


def _in_eval_mode(chain: nn.Module) -> Tensor:
    flags = [(part, part.training) for part in all_modules(chain).values()]
    try:
        for part, _ in flags:
            part.training = False
        weight: Tensor = chain()
        return weight
    finally:
        for part, flag in flags:
            part.training = flag
