"""The loss of a batch: what a loss function is called with, what is usual where there is none, and what models return
beside their answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ...errors import GraphPruneError
from ...support.types import LossFunction
from ...tracing.example import ExampleInput


def logits_of(output: Any) -> Tensor:
    """The scores among what a classifier returns: the tensor, `.logits`, ["logits"], ["out"] or the first of a tuple.

    Raises GraphPruneError where there are none.
    """
    for name in ("logits", "out"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if isinstance(output, Tensor):
        return output
    raise GraphPruneError(f"the model returns a {type(output).__name__} without logits; pass loss_fn(output, targets)")


def loss_in(output: Any) -> Tensor | None:
    """The loss that the model itself returns, where it is given labels: `.loss` or ["loss"]."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.is_floating_point() else None


def without_loss(tensors: Iterable[Tensor], output: Any) -> list[Tensor]:
    """The tensors of an output that are answers: without the loss, unless that is all there is."""
    found, loss = list(tensors), loss_in(output)
    return [t for t in found if t is not loss] or found


def labels_of(inputs: ExampleInput, targets: Any) -> Any:
    """The targets of a batch, which a model that computes its own loss takes as its argument `labels`."""
    return inputs.kwargs.get("labels") if targets is None else targets


def default_loss(output: Any, targets: Any) -> Tensor:
    """Cross-entropy of logits and class numbers; without targets, the loss that the model itself returns."""
    if targets is None:
        loss = loss_in(output)
        if loss is not None:
            return loss
        raise GraphPruneError(
            "data: yields no targets, and the model returns no loss of its own; yield (inputs, targets), or dicts with "
            "the model's labels, or pass loss_fn"
        )
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        found = f"{targets.dtype} tensors" if isinstance(targets, Tensor) else type(targets).__name__
        raise GraphPruneError(f"data: targets are {found}, not class numbers; pass loss_fn(output, targets)")
    return F.cross_entropy(logits_of(output), targets)


def batch_loss(
    loss_fn: LossFunction | None, output: Any, inputs: ExampleInput, targets: Any, batch: int | None = None
) -> Tensor:
    """The mean loss of a batch, a scalar: `loss_fn(output, targets)`, or without a function the `default_loss`. Where a
    batch is a dict of keyword arguments without targets, the function gets that dict. `batch`: its number, for errors.

    Raises GraphPruneError where the function fails or returns something else.
    """
    if loss_fn is None:
        return _scalar(default_loss(output, targets))
    wanted = dict(inputs.kwargs) if targets is None and inputs.kwargs and not inputs.args else targets
    try:
        loss = loss_fn(output, wanted)
    except GraphPruneError:
        raise
    except Exception as error:
        place = "" if batch is None else f" on batch {batch}"
        if wanted is None:
            which = "yields" if batch is None else f"batch {batch} has"
            raise GraphPruneError(
                f"data: {which} no targets, and loss_fn(output, None) failed: {type(error).__name__}: {error}; yield "
                f"pairs (inputs, targets)"
            ) from error
        raise GraphPruneError(
            f"loss_fn failed{place}: {type(error).__name__}: {error}; it is called with the model's output and the "
            f"targets that data yields"
        ) from error
    return _scalar(loss)


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        kind = f"{loss.dtype} " if isinstance(loss, Tensor) and not loss.is_floating_point() else ""
        found = f"a {kind}tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise GraphPruneError(f"loss_fn returned {found}; expected the mean loss of the batch, a scalar tensor")
    return loss.reshape(())
