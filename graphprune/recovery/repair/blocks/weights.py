"""The parameters that are fitted: which they are, how fast each goes, and copies of those in half precision."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from ....support.walking import named_tensors

_HALF = (torch.float16, torch.bfloat16)


def own_parameters(model: nn.Module, left: Collection[str] = ()) -> dict[str, nn.Parameter]:
    """Parameters of floating point, each once under its first name, without those called as in `left`."""
    named = {n: t for n, t in named_tensors(model).items() if isinstance(t, nn.Parameter) and t.is_floating_point()}
    passed = {id(tensor) for name, tensor in named.items() if name in left}
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, tensor in named.items():
        if id(tensor) not in passed:
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


class Weights:
    """`parameters` in an optimization by Adam. `lr`: a share of the root mean square of each, as Adam's steps are of
    the same size whatever the size of what they change: pixels from 0 to 255 make weights a hundred times smaller. A
    bias may be small by chance, so the weight beside it counts as well.

    What is in half precision is fitted as a copy in float32, as steps would be lost in rounding.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], lr: float) -> None:
        self._pairs = [(p, p.detach().float().clone() if p.dtype in _HALF else p) for p in parameters.values()]
        self._rates = [lr * _size(name, parameters) for name in parameters]
        groups = [{"params": [own], "lr": rate} for (_, own), rate in zip(self._pairs, self._rates, strict=True)]
        self._optimizer = torch.optim.Adam(groups)

    def forget(self) -> None:
        """No gradients: those of the next backward passes add up."""
        for parameter, _ in self._pairs:
            parameter.grad = None

    def step(self, factor: float) -> None:
        """A step along the gradients, with rates times `factor`."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        halves = [(p, own) for p, own in self._pairs if p is not own]
        for parameter, own in halves:
            own.grad = None if parameter.grad is None else parameter.grad.float()
        self._optimizer.step()
        for parameter, own in halves:
            parameter.data.copy_(own)

    @contextlib.contextmanager
    def alone(self, model: nn.Module) -> Iterator[None]:
        """Inside, these want gradients, and of the model's parameters no others; flags and gradients are afterwards as
        before."""
        before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        fitted = {id(p) for p, _ in self._pairs}
        try:
            for parameter, _, _ in before:
                if parameter.is_floating_point() or parameter.is_complex():
                    parameter.requires_grad_(id(parameter) in fitted)
            yield
        finally:
            for parameter, flag, grad in before:
                parameter.requires_grad_(flag)
                parameter.grad = grad


def _size(name: str, parameters: Mapping[str, nn.Parameter]) -> float:
    path, _, last = name.rpartition(".")
    beside = parameters.get(f"{path}.weight" if path else "weight") if last == "bias" else None
    return max(_root_mean_square(t) for t in (parameters[name], beside) if t is not None)


def _root_mean_square(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt()) if tensor.numel() else 0.0
