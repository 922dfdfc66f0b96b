"""Gradients of a loss over calibration batches: of the weights, and of gates on what layers read."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...errors import GraphPruneError
from ...tracing.example import ExampleInput, flatten_tensors
from ...tracing.state import evaluating, unfused
from ...tracing.trace import run_model
from .layers import Reader
from .loss import batch_loss, without_loss
from .observe import data_place
from .statistics import Calibration


def _loss(calibration: Calibration, example: ExampleInput, targets: Any, index: int) -> Tensor:
    """The mean loss of a batch."""
    output = run_model(calibration.model, example.clone(), "data")
    loss = batch_loss(calibration.loss_fn, output, example, targets, index)
    if not loss.requires_grad:
        raise GraphPruneError("loss_fn returned a loss that does not depend on the model's output through gradients")
    if not bool(torch.isfinite(loss.detach()).all()):
        raise GraphPruneError(
            f"data: the loss of batch {index} is {float(loss.detach())}: nothing can be learnt from that; leave these "
            f"samples out, or look at their inputs and targets"
        )
    return loss


@contextlib.contextmanager
def _differentiable(model: nn.Module, weights: bool) -> Iterator[list[nn.Parameter]]:
    """Eval mode with gradients; only the weights asked for require any. The flags are put back."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    with evaluating(model), torch.enable_grad():
        try:
            for p, _ in flags:
                p.requires_grad_(weights and p.is_floating_point())
            yield [p for p, _ in flags if p.requires_grad]
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)


def weight_gradients(calibration: Calibration) -> dict[str, Tensor]:
    """The gradient of the mean loss over all samples, by parameter name, in float64."""
    return _accumulated(calibration, squared=False)


def squared_gradients(calibration: Calibration) -> dict[str, Tensor]:
    """The mean over samples of the squared gradient of each sample's loss, by parameter name, in float64: the diagonal
    of the empirical Fisher information. One backward pass per sample."""
    return _accumulated(calibration, squared=True)


def _accumulated(calibration: Calibration, squared: bool) -> dict[str, Tensor]:
    names = {id(p): n for n, p in calibration.model.named_parameters()}
    total: dict[str, Tensor] = {}
    count = 0
    with _differentiable(calibration.model, True) as parameters:
        for index, (example, targets) in enumerate(calibration.data):
            n = example.samples
            parts = _singles(example, targets, n) if squared else [(example, targets)]
            for part, wanted in parts:
                loss = _loss(calibration, part, wanted, index)
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        value = gradient.double()
                        value = value.square() if squared else value * n
                        name = names[id(parameter)]
                        total[name] = total[name] + value if name in total else value
            count += n
    return {name: value / count for name, value in total.items()}


def _singles(example: ExampleInput, targets: Any, n: int) -> list[tuple[ExampleInput, Any]]:
    """A batch, sample by sample: tensors as long as the batch are cut along their first axis."""
    whole = ExampleInput((targets,), {})

    def cut(value: ExampleInput, i: int) -> ExampleInput:
        return value.map(lambda t: t[i : i + 1] if t.dim() and t.shape[0] == n else t)

    return [(cut(example, i), cut(whole, i).args[0]) for i in range(n)]


class _Watching(TorchFunctionMode):
    """Sees the calls that read the weights of watched layers; `weights` by identity."""

    def __init__(self, weights: Mapping[int, Reader]) -> None:
        super().__init__()
        self.weights = weights
        self.found: dict[str, list[Tensor]] = {r.weight: [] for r in weights.values()}

    def reader(self, args: Any, kwargs: Any) -> Reader | None:
        """The watched layer whose weight a call reads."""
        return next((self.weights[id(a)] for a in (*args, *kwargs.values()) if id(a) in self.weights), None)


class _Gates(_Watching):
    """Gives every watched layer an input of its own whose gradient is kept."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reader = self.reader(args, kwargs)
        if reader is not None and args and isinstance(args[0], Tensor):
            place = data_place(func, reader)
            x = args[place]
            gate = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
            gate.retain_grad()
            self.found[reader.weight].append(gate)
            args = (*args[:place], gate, *args[place + 1 :])
        return func(*args, **kwargs)


def gate_products(calibration: Calibration) -> dict[str, Tensor]:
    """For each reader: the derivative of each sample's loss by a factor on each channel it reads, at 1: activation
    times gradient, summed over positions. Shape (samples, channels), float64."""
    readers = {id(calibration.weights[r.weight]): r for r in calibration.readers.values()}
    out: dict[str, list[Tensor]] = {r.weight: [] for r in readers.values()}
    with _differentiable(calibration.model, False), unfused():
        for index, (example, targets) in enumerate(calibration.data):
            n = example.samples
            with _Gates(readers) as gates:
                loss = _loss(calibration, example, targets, index)
            (loss * n).backward()
            for reader in readers.values():
                parts = [_by_channel(reader, g) for g in gates.found[reader.weight] if g.grad is not None]
                if parts:
                    out[reader.weight].append(torch.stack(parts).sum(0))
    return {name: torch.cat(parts) for name, parts in out.items() if parts}


def _by_channel(reader: Reader, gate: Tensor) -> Tensor:
    assert gate.grad is not None
    product = (gate.detach() * gate.grad).double()
    return channels_first(product, reader.data_axis).sum(2)


def channels_first(x: Tensor, axis: int) -> Tensor:
    """What a layer reads or makes, with channels along `axis` (from the end), as (samples, channels, positions)."""
    x = x if x.dim() + axis > 0 else x[None]
    x = x.movedim(axis, 1)
    return x.flatten(2) if x.dim() > 2 else x[:, :, None]


# Samples over which sensitivities are averaged; more change them little.
_SENSITIVITY_SAMPLES = 512


class _Results(_Watching):
    """Adds up the squared gradient of every watched layer's result when it is made, by weight name and output: neither
    results nor gradients are held."""

    def __init__(self, weights: Mapping[int, Reader]) -> None:
        super().__init__(weights)
        self.squares: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        reader = self.reader(args, kwargs)
        if reader is None or not isinstance(out, Tensor):
            return out
        out = out if out.requires_grad else out.detach().requires_grad_()
        out.register_hook(functools.partial(self._add, reader))
        return out.clone()  # what follows may write in place

    def _add(self, reader: Reader, gradient: Tensor) -> None:
        squares = channels_first(gradient.detach().double().square(), reader.result_axis).sum((0, 2))
        known = self.squares.get(reader.weight)
        self.squares[reader.weight] = squares if known is None else known + squares


def sensitivities(calibration: Calibration) -> dict[str, Tensor]:
    """How much the network's outputs move, squared and to first order, per mean squared change of each result of each
    reader: for output channel o, the mean over samples of sum over positions of (d v'f / d y_o)^2, with f all outputs
    and v random signs (Hutchinson's estimate of the squared Jacobian). Needs no labels. Shape (outputs,), float64.
    """
    readers = {id(calibration.weights[r.weight]): r for r in calibration.readers.values()}
    results, count = _Results(readers), 0
    generator = torch.Generator().manual_seed(0)
    with _differentiable(calibration.model, False), unfused():
        for example in calibration.data.inputs():
            with results:
                made = run_model(calibration.model, example.clone(), "data")
                outputs = without_loss(flatten_tensors(made), made)
            outputs = [o for o in outputs if o.is_floating_point() and o.requires_grad]
            signs = [(torch.randint(0, 2, o.shape, generator=generator) * 2 - 1).to(o) for o in outputs]
            if outputs:
                torch.autograd.backward(outputs, signs)
            del made, outputs  # before the next batch makes its own
            count += example.samples
            if count >= _SENSITIVITY_SAMPLES:
                break
    return {name: value / count for name, value in results.squares.items()}
