"""From scores to masks: exactly as many pruned as asked for, whatever the ties and however large the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import GraphPruneError
from ..planning.allocation.rounding import nearest
from ..support.suggestions import check_choice

Scope = Literal["global", "layer"]
Array = npt.NDArray[Any]


class Ranked(Protocol):
    """What has a score for each of its parts: a weight, or the blocks of one."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def mask(self) -> Tensor | None:
        """Boolean, of the scores' shape, false where it is masked already."""


_R = TypeVar("_R", bound=Ranked)


def check_sparsity(value: Any, where: str = "sparsity") -> float:
    """A fraction of weights to prune, in [0, 1)."""
    ordinary = isinstance(value, (int, float, np.floating, np.integer)) and not isinstance(value, bool)
    if not ordinary or not 0 <= float(value) < 1:
        raise GraphPruneError(
            f"{where}: expected a number in [0, 1), the fraction of weights to prune; got {value!r}"
        )
    return float(value)


def check_scope(value: Any) -> None:
    """Raise GraphPruneError unless it is a scope."""
    check_choice("scope", value, ("global", "layer"))


def count_to_prune(sparsity: float, total: int) -> int:
    """`sparsity` x `total` rounded to nearest, halves up; at least one of them stays, as the sparsity is below 1."""
    return min(nearest(sparsity * total), total - 1)


def lowest(scores: Array, count: int) -> npt.NDArray[np.bool_]:
    """True at exactly `count` of the lowest scores, shape (n,). Of equal ones, those with a lower index stay out of it.

    Linear in n: a selection instead of sorting, and no limit on n (torch.quantile refuses more than 16 M values).
    """
    if count == 0:
        return np.zeros(scores.shape, bool)
    threshold = np.partition(scores, count - 1)[count - 1]
    out: npt.NDArray[np.bool_] = scores < threshold
    missing = count - int(np.count_nonzero(out))
    out[np.flatnonzero(scores == threshold)[-missing:]] = True
    return out


def keep_highest(
    items: Sequence[_R], scores: Sequence[Tensor], sparsity: float, scope: Scope
) -> list[tuple[_R, Tensor]]:
    """Masks that prune the lowest scores, exactly the fraction `sparsity` of all parts, with what they belong to.

    `scores`: a tensor for each item, finite; its mask has the same shape. Scope "global" ranks all of them together,
    "layer" each by itself. What is masked already goes first, so that masks only grow.

    Raises GraphPruneError if more is masked already than is asked for.
    """
    check_scope(scope)
    flat = [_flat(item, score) for item, score in zip(items, scores, strict=True)]
    if scope == "layer":
        gone = [_prune(values, sparsity, item.name) for item, values in zip(items, flat, strict=True)]
    else:
        joined = _prune(np.concatenate(flat), sparsity, "the model")
        gone = np.split(joined, np.cumsum([len(values) for values in flat])[:-1])
    kept = [torch.from_numpy(~mask).reshape(score.shape) for mask, score in zip(gone, scores, strict=True)]
    return list(zip(items, kept, strict=True))


def _prune(scores: Array, sparsity: float, what: str) -> npt.NDArray[np.bool_]:
    count = count_to_prune(sparsity, len(scores))
    masked = int(np.count_nonzero(np.isneginf(scores)))
    if masked > count:
        raise GraphPruneError(
            f"{what}: {masked} of {len(scores)} are masked already, more than the {count} of a sparsity of "
            f"{sparsity:g}; what is pruned does not come back. Ask for more, or start from an unmasked copy"
        )
    return lowest(scores, count)


def _flat(item: Ranked, score: Tensor) -> Array:
    """Scores as one NumPy vector, row by row; minus infinity where the item is masked."""
    wide = score.detach() if score.dtype == torch.float64 else score.detach().float()
    if not bool(torch.isfinite(wide).all()):
        raise GraphPruneError(
            f"{item.name}: NaN or infinite values among the weights or their gradients; repair them first"
        )
    if item.mask is not None:
        wide = wide.masked_fill(~item.mask, -torch.inf)
    return wide.cpu().reshape(-1).numpy()
