"""Masks with a pattern that hardware can use: N:M and blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from ..errors import GraphPruneError
from ..support.doors import door
from ..support.numbers import check_integer, is_integer
from ..support.types import Ignore, Parts
from ..support.warning import warn
from .masks import put_in_force
from .ranking import Scope, check_scope, check_sparsity, keep_highest
from .weights import Weight, select_weights


@door("model", in_place=True)
def n_m(
    model: nn.Module,
    n: int = 2,
    m: int = 4,
    *,
    parameters: Parts = "weights",
    ignore: Ignore = (),
) -> nn.Module:
    """Keep the `n` largest of every `m` consecutive weights along the input axis; the model is changed in place.

    2:4 is the pattern of NVIDIA's sparse tensor cores (Mishra et al., 2021): along the axis that is summed over, which
    is axis 1 of Linear and convolution weights (input channels, for every kernel position by itself) and axis 0 of
    transposed convolutions. Of equal weights those with a lower index stay. Groups that are masked already in part
    keep at most `n`.

    Weights whose input axis is no multiple of `m` (the first convolution of an image network) stay dense, with a
    UserWarning that names them; embeddings have no input axis and stay. `parameters`, `ignore`: see `magnitude`;
    weights that are named there must fit.

    Raises GraphPruneError, with the model as it was, unless 1 <= n < m, and where no weight fits.
    """
    for name, value in (("n", n), ("m", m)):
        check_integer(name, value, 1)
    if n >= m:
        raise GraphPruneError(f"n_m keeps n of every m weights: expected n < m, got {n}:{m}")
    chosen = select_weights(model, parameters, ignore)
    fitting = [w for w in chosen if _has_groups(w, m)]
    left = [w.name for w in chosen if w not in fitting and w.value.dim() > 1 and not _is_table(w)]
    if left and parameters not in ("weights", "all"):
        raise GraphPruneError(f"n_m: the input axis of {', '.join(left)} is no multiple of {m}")
    if not fitting:
        raise GraphPruneError(f"n_m: no weight has an input axis that is a multiple of {m}")
    if left:
        warn(f"n_m: the input axis of {', '.join(left)} is no multiple of {m}; left dense", UserWarning)
    put_in_force([(w, _keep_n_of_m(w, n, m)) for w in fitting])
    return model


def _is_table(weight: Weight) -> bool:
    return isinstance(weight.sites[0].module, (nn.Embedding, nn.EmbeddingBag))


def _input_axis(weight: Weight) -> int:
    return 0 if isinstance(weight.sites[0].module, _ConvTransposeNd) else 1


def _has_groups(weight: Weight, m: int) -> bool:
    return weight.value.dim() > 1 and not _is_table(weight) and weight.value.shape[_input_axis(weight)] % m == 0


def _keep_n_of_m(weight: Weight, n: int, m: int) -> Tensor:
    axis = _input_axis(weight)
    value = _finite(weight)
    scores = value.abs().movedim(axis, -1)
    if weight.mask is not None:
        scores = scores.masked_fill(~weight.mask.movedim(axis, -1), -torch.inf)
    grouped = scores.unflatten(-1, (-1, m))
    order = torch.sort(grouped, dim=-1, descending=True, stable=True).indices[..., :n]
    keep = torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, order, True)
    keep &= grouped > -torch.inf  # pruned weights do not come back to fill a group
    return keep.flatten(-2).movedim(-1, axis)


@door("model", in_place=True)
def blocks(
    model: nn.Module,
    sparsity: float,
    shape: tuple[int, int] = (4, 4),
    scope: Scope = "global",
    *,
    parameters: Parts = "weights",
    ignore: Ignore = (),
) -> nn.Module:
    """Mask whole blocks of `shape` (rows, columns) with the smallest mean of squares; the model is changed in place.

    A weight is looked at as the matrix (output rows, everything else), so that a 3x3 convolution has 9 columns for each
    input channel. Blocks at the right and lower border may be smaller; as means are compared, they are neither favoured
    nor the first to go.

    `sparsity` is the fraction of blocks that are zero afterwards, in [0, 1), rounded to nearest and exact even among
    ties. A block counts as zero only when all of it is masked. `scope`, `parameters`, `ignore`: see `magnitude`.
    """
    wanted = check_sparsity(sparsity)
    check_scope(scope)
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else ()
    if len(sizes) != 2 or not all(is_integer(n, 1) for n in sizes):
        raise GraphPruneError(f"shape: expected (rows, columns) of a block, two integers of at least 1, got {shape!r}")
    weights = [w for w in select_weights(model, parameters, ignore) if w.value.dim() > 1]
    if not weights:
        raise GraphPruneError("blocks: vectors have no blocks; choose weights with at least two axes")
    tiles = [_Tiles(w, sizes[0], sizes[1]) for w in weights]
    kept = keep_highest(tiles, [t.scores for t in tiles], wanted, scope)
    put_in_force([(tile.weight, tile.spread(mask)) for tile, mask in kept])
    return model


class _Tiles:
    """The blocks of one weight, ranked like a weight of their own: a name, a value and a mask."""

    def __init__(self, weight: Weight, rows: int, columns: int) -> None:
        self.weight = weight
        self.name = weight.name
        matrix = _finite(weight).flatten(1)
        self.height, self.width = matrix.shape
        self.rows, self.columns = rows, columns
        ones = torch.ones_like(matrix, dtype=torch.float32)
        wide = matrix if matrix.dtype == torch.float64 else matrix.float()
        self.scores = self._sums(wide.square()) / self._sums(ones)
        self.mask = None if weight.mask is None else self._sums(weight.mask.flatten(1).float()) > 0

    def _sums(self, matrix: Tensor) -> Tensor:
        down, across = -self.height % self.rows, -self.width % self.columns
        padded = nn.functional.pad(matrix, (0, across, 0, down))
        tiles: Tensor = padded.unflatten(1, (-1, self.columns)).unflatten(0, (-1, self.rows))
        return tiles.sum((1, 3))

    def spread(self, mask: Tensor) -> Tensor:
        """The mask of the weight for a mask of its blocks, without what was masked before."""
        wide = mask.repeat_interleave(self.rows, 0)[: self.height].repeat_interleave(self.columns, 1)[:, : self.width]
        out = wide.reshape(self.weight.value.shape)
        return out if self.weight.mask is None else out & self.weight.mask.to(out.device)


def _finite(weight: Weight) -> Tensor:
    value = weight.value
    if not bool(torch.isfinite(value).all()):
        raise GraphPruneError(f"{weight.name}: NaN or infinite values among the weights; repair them first")
    return value
