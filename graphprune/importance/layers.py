"""What a layer is worth: how much changes when it is left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dependency.whole.blocks import Block
from ..dependency.whole.bypassing import Change, changed, left_out
from ..errors import GraphPruneError
from ..support.progress import stage
from ..support.suggestions import check_choice
from ..support.types import LossFunction
from ..tracing.example import ExampleInput, result_tensors
from ..tracing.state import evaluating
from ..tracing.trace import run_model
from .calibration import CalibrationData, batch_loss, without_loss
from .latency import Cost, measured_gains

LAYER_CRITERIA = ("block_influence", "output", "taylor", "loss", "magnitude", "latency")
_NEED_LOSS = ("taylor", "loss")


def check_layer_criterion(criterion: Any, data: Any, branches: bool = False) -> str | Cost:
    """The criterion's name, or the function that it is; None is "block_influence", or "output" for branches.

    Raises GraphPruneError for unknown ones and missing data.
    """
    name = ("output" if branches else "block_influence") if criterion is None else criterion
    if branches and name == "block_influence":
        raise GraphPruneError("criterion: branches make no stream of their own to compare; use \"output\"")
    if callable(name):
        return cast("Cost", name)
    check_choice("criterion", name, LAYER_CRITERIA, "a function of a network, for layers")
    if name in _NEED_LOSS and data is None:
        raise GraphPruneError(
            f"criterion={name!r} needs data= with pairs (inputs, targets), or with the labels that the model takes; "
            f'"magnitude" needs none'
        )
    return str(name)


def layer_scores(
    model: nn.Module,
    blocks: Sequence[Block],
    criterion: str | Cost,
    batches: CalibrationData | Sequence[Any],
    loss_fn: LossFunction | None,
    example: ExampleInput | None = None,
) -> list[float]:
    """One score per block, the least important lowest. `batches` yields pairs (inputs, targets); `loss_fn`: as in
    `batch_loss`.

    - "block_influence": 1 - cos(input, result), the mean over tokens for results of shape (batch, tokens, channels) as
      in Men et al., ShortGPT, 2024, else the mean over samples. Needs no loss.
    - "output": |a - b|² / |a|² of the network's outputs a without the layer, b, over all samples. Needs no loss.
    - "taylor": first order change of the loss when the layer's contribution is scaled to nothing: with the result
      x + g (f(x) - x), or g f(x) of a branch, the mean over samples of |dL/dg| at g = 1.
    - "loss": the loss with the layer bypassed minus the loss of the network, both averaged over samples.
    - "magnitude": mean |w| over the layer's weights with two axes or more (no biases, no norms). Needs no data.
    - "latency": minus the milliseconds gained by leaving it out, in ONNX Runtime on `example` (default: the first
      batch), see `graphprune.importance.latency`. It says what a layer costs and nothing of what it is good for.
    - a function of a network: what it returns without the layer minus what it returns for the network, as "latency"
      with another measure.
    """
    if criterion == "block_influence":
        return _influence(model, blocks, batches)
    if criterion == "output":
        return _output_change(model, blocks, batches)
    if criterion == "magnitude":
        return [_mean_magnitude([model.get_submodule(path) for path in block.modules]) for block in blocks]
    if criterion == "latency" or not isinstance(criterion, str):
        given = example if example is not None else next(iter(batches))[0]
        return measured_gains(model, blocks, given, None if isinstance(criterion, str) else criterion)
    if criterion == "taylor":
        return _taylor(model, blocks, batches, loss_fn)
    whole = _mean_loss(model, batches, loss_fn)
    out = []
    with stage("layers left out", len(blocks), "layers") as now:
        for block in blocks:
            with changed(model, [(block, left_out(block))]):
                out.append(_mean_loss(model, batches, loss_fn) - whole)
            now.advance()
    return out


def _mean_magnitude(modules: Sequence[nn.Module]) -> float:
    weights = [p.detach() for module in modules for p in module.parameters() if p.dim() > 1]
    total = sum(float(w.abs().sum(dtype=torch.float64)) for w in weights)
    return total / max(sum(w.numel() for w in weights), 1)


def _influence(model: nn.Module, blocks: Sequence[Block], batches: Any) -> list[float]:
    sums = [0.0] * len(blocks)
    counts = [0] * len(blocks)

    def look(index: int) -> Change:
        def change(x: Tensor, y: Tensor) -> Tensor:
            a, b = ((t if t.dim() == 3 else t.flatten(1)).double() for t in (x, y))
            away = 1 - F.cosine_similarity(a, b, dim=-1)
            sums[index] += float(away.sum())
            counts[index] += away.numel()
            return y

        return change

    with torch.no_grad(), changed(model, [(b, look(i)) for i, b in enumerate(blocks)]), evaluating(model):
        for example, _ in batches:
            run_model(model, example.clone(), "data")
    return [s / max(n, 1) for s, n in zip(sums, counts, strict=True)]


def _output_change(model: nn.Module, blocks: Sequence[Block], batches: Any) -> list[float]:
    changes, size = [0.0] * len(blocks), 0.0
    for example, _ in batches:
        with evaluating(model):
            whole = float_outputs(model, example)
            size += sum(float(t.square().sum()) for t in whole)
            for i, block in enumerate(blocks):
                with changed(model, [(block, left_out(block))]):
                    pairs = zip(whole, float_outputs(model, example), strict=True)
                    changes[i] += sum(float((a - b).square().sum()) for a, b in pairs)
    return [change / max(size, 1e-300) for change in changes]


def float_outputs(model: nn.Module, example: ExampleInput) -> list[Tensor]:
    """The floating point outputs of one run, in double precision."""
    made = run_model(model, example.clone(), "data")
    found = without_loss(result_tensors(made), made)
    return [t.detach().double() for t in found if t.is_floating_point()]


def _taylor(model: nn.Module, blocks: Sequence[Block], batches: Any, loss_fn: LossFunction | None) -> list[float]:
    sums = [0.0] * len(blocks)
    samples = 0
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        for index, (example, targets) in enumerate(batches):
            gates: list[Tensor | None] = [None] * len(blocks)

            def gate(i: int, gates: list[Tensor | None] = gates) -> Change:
                def change(x: Tensor, y: Tensor) -> Tensor:
                    made = torch.ones(y.shape[0], *(1,) * (y.dim() - 1), dtype=y.dtype, device=y.device)
                    gates[i] = made.requires_grad_()
                    return made * y if blocks[i].branch else x + made * (y - x)

                return change

            with changed(model, [(b, gate(i)) for i, b in enumerate(blocks)]), evaluating(model), torch.enable_grad():
                loss, count = _loss(model, example, targets, loss_fn, index)
                made = [g for g in gates if g is not None]
                if not loss.requires_grad:
                    raise GraphPruneError("loss_fn: its result does not depend on the model's output through gradients")
                found = iter(torch.autograd.grad(loss * count, made, allow_unused=True))
            for i, g in enumerate(gates):
                gradient = next(found) if g is not None else None
                sums[i] += 0.0 if gradient is None else float(gradient.double().abs().sum())
            samples += count
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    return [s / max(samples, 1) for s in sums]


def _mean_loss(model: nn.Module, batches: Any, loss_fn: LossFunction | None) -> float:
    total, samples = 0.0, 0
    for index, (example, targets) in enumerate(batches):
        with evaluating(model):
            loss, count = _loss(model, example, targets, loss_fn, index)
        total += float(loss) * count
        samples += count
    return total / max(samples, 1)


def _loss(
    model: nn.Module, example: ExampleInput, targets: Any, loss_fn: LossFunction | None, index: int
) -> tuple[Tensor, int]:
    """The mean loss of a batch, and how many samples it has."""
    loss = batch_loss(loss_fn, run_model(model, example.clone(), "data"), example, targets, index)
    return loss, example.samples
