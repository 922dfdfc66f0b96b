"""Second moments of what a layer reads, and of what it should make of it, gathered batch by batch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import GraphPruneError
from .layers import Reader
from .observe import Call

# Weights that a user's operator is tried with at a time.
UNITS = 256
# Positions (pixels, tokens) looked at per sample; neighbouring ones say nearly the same.
POSITIONS = 64


class NoProducts(GraphPruneError):
    """A user's operator does not compute what its rule says."""


class Moments:
    """Sums of z z^T and z y^T over rows, z = (x, 1): all that least squares needs, whatever the number of rows.

    One problem per group of the layer: `gram` (groups, features + 1, features + 1), `cross` (groups, features + 1,
    outputs), `energy` (groups, outputs) the sums of y^2, in float64. `rows` counts rows, `samples` samples.

    As long as there are at most half as many rows as features, the rows themselves are held, which are smaller
    (`few`); asking for the sums ends that.
    """

    def __init__(self, groups: int, features: int, outputs: int, device: torch.device | None = None) -> None:
        self._sizes, self._device = (groups, features, outputs), device
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None
        self._few: list[tuple[Tensor, Tensor]] = []
        self.rows = 0
        self.samples = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows x (groups, n, features) and targets y (groups, n, outputs). Products of one batch are taken in its own
        precision (float32 at least), sums over batches in float64."""
        kind = torch.promote_types(x.dtype, torch.float32)
        x, y = x.to(kind), y.to(kind)
        self.rows += x.shape[1]
        if self._sums is None and 2 * self.rows <= self._sizes[1]:
            self._few.append((x.contiguous(), y.contiguous()))
        else:
            self._add(x, y)

    def _add(self, x: Tensor, y: Tensor) -> None:
        gram, cross, energy = self._summed()
        z = torch.cat([x, x.new_ones(x.shape[0], x.shape[1], 1)], 2)
        gram += z.mT @ z
        cross += z.mT @ y
        energy += y.double().square().sum(1)

    def _summed(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._sums is None:
            groups, features, outputs = self._sizes
            shapes = (features + 1, features + 1), (features + 1, outputs), (outputs,)
            gram, cross, energy = (
                torch.zeros(groups, *shape, dtype=torch.float64, device=self._device) for shape in shapes
            )
            self._sums = gram, cross, energy
            held, self._few = self._few, []
            for x, y in held:
                self._add(x, y)
        return self._sums

    @property
    def few(self) -> tuple[Tensor, Tensor] | None:
        """All rows x (groups, rows, features) and y (groups, rows, outputs) in float64, while they are held."""
        if self._sums is not None or not self._few:
            return None
        if len(self._few) > 1 or self._few[0][0].dtype != torch.float64:
            x, y = (torch.cat(parts, 1).double() for parts in zip(*self._few, strict=True))
            self._few = [(x, y)]
        return self._few[0]

    @property
    def features(self) -> int:
        return self._sizes[1]

    def missed(self, weights: Tensor) -> Tensor:
        """The sum of z (y - z W) over rows, (groups, features + 1, outputs), for weights W of that shape."""
        few = self.few
        if few is None:
            return self.cross - self.gram @ weights
        left = few[1] - few[0] @ weights[:, :-1] - weights[:, -1:]
        return torch.cat([few[0].mT @ left, left.sum(1, keepdim=True)], 1)

    def mean_missed(self, weights: Tensor) -> Tensor:
        """The mean of y - z W over rows, (groups, outputs), for weights W (groups, features + 1, outputs)."""
        few, rows = self.few, max(self.rows, 1)
        if few is None:
            return (self.cross[:, -1] - (self.gram[:, -1:] @ weights)[:, 0]) / rows
        x, y = (t.mean(1, keepdim=True) for t in few)
        return (y - x @ weights[:, :-1] - weights[:, -1:])[:, 0]

    def squared_error(self, weights: Tensor) -> float:
        """The sum of |z W - y|^2 over rows, groups and outputs."""
        few = self.few
        if few is not None:
            missed = torch.baddbmm(few[1], few[0], weights[:, :-1], alpha=-1).sub_(weights[:, -1:])
            return float(torch.linalg.vector_norm(missed).square())
        fit = (weights * (self.gram @ weights - 2 * self.cross)).sum()
        return max(0.0, float(fit + self.energy.sum()))

    @property
    def gram(self) -> Tensor:
        return self._summed()[0]

    @property
    def cross(self) -> Tensor:
        return self._summed()[1]

    @property
    def energy(self) -> Tensor:
        return self._summed()[2]

    @staticmethod
    def bytes_needed(groups: int, features: int, outputs: int) -> int:
        """Memory of one object, at most."""
        return 8 * groups * (features + 1) * (features + 1 + outputs)

    @property
    def variance(self) -> Tensor:
        """Mean of y^2 minus its squared mean, (groups, outputs)."""
        few = self.few
        if few is not None:
            return few[1].var(1, correction=0)
        mean = self.cross[:, -1] / max(self.rows, 1)
        return (self.energy / max(self.rows, 1) - mean.square()).clamp_min(0)


def rows_of(
    reader: Reader, call: Call, y: Tensor | None, weight: Tensor, first_sample: int
) -> tuple[Tensor, Tensor]:
    """What a call read and the wanted results, row by row: x (groups, n, features), y (groups, n, outputs); without
    `y`, outputs is 0.

    Features are in the order of the flattened weight of one output: channels, then kernel positions. At most
    `POSITIONS` positions of a sample are taken, spread evenly and differently for every sample (`first_sample` is the
    number of the batch's first one), so that cutting the data into other batches gives the same rows.
    """
    assert call.x is not None
    if reader.convolution:
        return _patches(reader, call, y, weight, first_sample)
    if reader.declared:
        return _declared_rows(reader, call, y, weight, first_sample)
    x = call.x
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    y = x.new_empty(*x.shape[:2], 0) if y is None else y.reshape(x.shape[0], -1, y.shape[-1])
    if x.shape[1] > POSITIONS:
        picked = _positions(x.shape[0], x.shape[1], first_sample, x.device)
        sample = torch.arange(x.shape[0], device=x.device)[:, None]
        x, y = x[sample, picked], y[sample, picked]
    return x.flatten(0, 1)[None], y.flatten(0, 1)[None]


def _declared_rows(
    reader: Reader, call: Call, y: Tensor | None, weight: Tensor, first_sample: int
) -> tuple[Tensor, Tensor]:
    """The rows of a user's operator, which only it can tell: what it makes with weights that are 1 at one place of one
    output and 0 everywhere else. Raises NoProducts where its results are not the sums of these that its weight says."""
    assert call.x is not None and call.again is not None
    features = weight.numel() // weight.shape[reader.out_axis]
    rest = [n for a, n in enumerate(weight.shape) if a != reader.out_axis]
    unit = torch.eye(features, dtype=weight.dtype, device=weight.device)
    picked: Tensor | None = None
    parts = []
    for columns in unit.split(UNITS, 1):
        kernel = columns.repeat(1, reader.groups).reshape(*rest, -1).movedim(-1, reader.out_axis).contiguous()
        rows, picked = _by_place(reader, call.again(kernel, 0.0), first_sample, picked)
        parts.append(rows.reshape(rows.shape[0], reader.groups, -1).transpose(0, 1))
    x = torch.cat(parts, 2)
    ours = (x.double() @ weight_matrix(reader, weight)).transpose(0, 1).flatten(1)
    scale = 2 + x.double().abs().amax() * weight.detach().double().abs().amax() * features
    for bias in (0.0, 2.0) if reader.bias else (0.0,):
        made, _ = _by_place(reader, call.again(weight.detach(), bias), first_sample, picked)
        if bool((ours + bias - made).abs().amax() <= 1e3 * torch.finfo(made.dtype).eps * scale):
            continue
        raise NoProducts(
            f"{reader.weight}: {reader.declared} does not make sums over its weight along the axes that its rule says "
            "it reads and produces"
        )
    if y is None:
        return x, x.new_empty(*x.shape[:2], 0)
    wanted, _ = _by_place(reader, y, first_sample, picked)
    return x, wanted.reshape(wanted.shape[0], reader.groups, -1).transpose(0, 1)


def _by_place(
    reader: Reader, y: Tensor, first_sample: int, picked: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Results as (rows, outputs), at the chosen positions of every sample, and which these are."""
    y = y.movedim(reader.result_axis, -1)
    y = y.reshape(y.shape[0] if y.dim() > 1 else 1, -1, y.shape[-1])
    if picked is None and y.shape[1] > POSITIONS:
        picked = _positions(y.shape[0], y.shape[1], first_sample, y.device)
    if picked is not None:
        y = y[torch.arange(y.shape[0], device=y.device)[:, None], picked]
    return y.flatten(0, 1), picked


def _positions(samples: int, count: int, first: int, device: torch.device) -> Tensor:
    """`POSITIONS` different positions below `count` for each sample: steps of the golden section, shifted."""
    step = max(1, round(count * 0.6180339887498949))
    while math.gcd(step, count) != 1:
        step += 1
    start = torch.arange(first, first + samples, device=device) * 7919
    return (start[:, None] + torch.arange(min(POSITIONS, count), device=device) * step) % count


def _patches(
    reader: Reader, call: Call, y: Tensor | None, weight: Tensor, first_sample: int
) -> tuple[Tensor, Tensor]:
    x = call.x
    assert x is not None and call.geometry is not None
    stride, padding, dilation, _ = call.geometry
    kernel = weight.shape[2:]
    dims = len(kernel)
    if x.dim() == dims + 1:  # a single sample without batch axis
        x, y = x[None], None if y is None else y[None]
    if reader.transposed:
        x, stride = _spread(x, kernel, call.geometry), (1,) * dims
    else:
        x = F.pad(x, _padding(padding, kernel, dilation))
    for axis in range(dims):
        x = x.unfold(2 + axis, (kernel[axis] - 1) * dilation[axis] + 1, stride[axis])
    for axis in range(dims):  # now (N, C, out..., kernel...)
        x = x[(slice(None),) * (2 + dims + axis) + (slice(None, None, dilation[axis]),)]
    sites = x.shape[2 : 2 + dims]
    picked = _positions(x.shape[0], math.prod(sites), first_sample, x.device)
    where = torch.unravel_index(picked, sites)
    sample = torch.arange(x.shape[0], device=x.device)[:, None]
    index: tuple[Any, ...] = (sample, slice(None), *where)
    x = x[index]  # (N, n, C, kernel...)
    if reader.transposed:
        x = x.flip(tuple(range(3, 3 + dims)))
    rows = x.shape[0] * x.shape[1]
    x = x.reshape(rows, reader.groups, -1).transpose(0, 1)
    if y is None:
        return x, x.new_empty(*x.shape[:2], 0)
    return x, y[index].reshape(rows, reader.groups, -1).transpose(0, 1)


def _spread(x: Tensor, kernel: torch.Size, geometry: tuple[Any, Any, Any, Any]) -> Tensor:
    """What an ordinary convolution of stride 1, with the kernel turned around, reads where a transposed one reads x:
    zeros between and around the values."""
    stride, padding, dilation, extra = geometry
    wide = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)))
    wide[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
    margins = [(k - 1) * d - p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    sides = [(m, m + e) for m, e in zip(margins, extra, strict=True)]
    return F.pad(wide, list(itertools.chain.from_iterable(reversed(sides))))


def weight_matrix(reader: Reader, weight: Tensor) -> Tensor:
    """A weight as (groups, features, outputs per group), float64; features as in `rows_of`."""
    by_output = weight.detach().double().movedim(reader.out_axis, 0)  # transposed ones are of one group
    return by_output.reshape(reader.groups, by_output.shape[0] // reader.groups, -1).mT


def as_weight(reader: Reader, solution: Tensor, like: Tensor) -> Tensor:
    """The inverse of `weight_matrix`."""
    by_output = like.movedim(reader.out_axis, 0)
    return solution.mT.reshape(by_output.shape).movedim(0, reader.out_axis).to(like.dtype)


def _padding(padding: tuple[int, ...] | str, kernel: torch.Size, dilation: tuple[int, ...]) -> list[int]:
    """What F.pad wants: last axis first, both sides."""
    if padding == "valid":
        return [0] * (2 * len(kernel))
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        sides = [(t // 2, t - t // 2) for t in totals]
    else:
        sides = [(int(p), int(p)) for p in padding]
    return list(itertools.chain.from_iterable(reversed(sides)))
