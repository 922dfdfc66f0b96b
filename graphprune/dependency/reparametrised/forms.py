"""How a weight is computed from other tensors, and what these become when it loses channels."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor

from ...support.cutting import cut_tensor

Axes = Mapping[int, Sequence[int]]
# Up to this many rows or columns all singular values are computed; beyond it the largest alone.
_SMALL = 64


@dataclasses.dataclass(frozen=True)
class Held:
    """Indices of an axis that cannot go (a mask), and why."""

    axis: int
    mask: np.ndarray
    text: str


class Form(abc.ABC):
    """One weight that is computed. `title`: what computes it, for people. `changeable`: whether what it is computed
    from can make any weight of its shape."""

    title: str = "a parametrisation"
    changeable = False

    @abc.abstractmethod
    def value(self) -> Tensor:
        """The weight in eval mode: what the network computes with."""

    @abc.abstractmethod
    def sources(self) -> dict[str, Tensor]:
        """What it is computed from, by name in its module."""

    @abc.abstractmethod
    def cuts(self, axes: Axes) -> dict[str, Axes]:
        """What the sources lose, by name, where the weight loses the indices `axes`."""

    @abc.abstractmethod
    def axes(self, cuts: Mapping[str, Axes]) -> Axes:
        """The inverse of `cuts`."""

    @abc.abstractmethod
    def tensors(self, weight: Tensor, axes: Axes) -> dict[str, Tensor]:
        """The new sources, by name in the module, once the weight has lost the indices `axes` and is `weight`."""

    def held(self) -> tuple[Held, ...]:
        """What the weight cannot lose."""
        return ()

    def settled(self, weight: Tensor) -> Tensor:
        """What becomes of a weight that has lost channels: itself, unless the form normalises it as a whole."""
        return weight


def _wide(tensor: Tensor) -> Tensor:
    """Detached, in float64 where the device has it."""
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)


@dataclasses.dataclass(frozen=True, eq=False)
class WeightNorm(Form):
    """w = g v / |v|, the norm over all axes but `dim`, or over all (-1). `names`: of v and g in the module."""

    names: tuple[str, str]
    v: Tensor
    g: Tensor
    dim: int
    title = "weight_norm"
    changeable = True

    def value(self) -> Tensor:
        with torch.no_grad():
            return torch._weight_norm(self.v.detach(), self.g.detach(), self.dim)

    def sources(self) -> dict[str, Tensor]:
        return dict(zip(self.names, (self.v, self.g), strict=True))

    def cuts(self, axes: Axes) -> dict[str, Axes]:
        rows = {self.dim: axes[self.dim]} if self.dim in axes else {}
        return {self.names[0]: axes, self.names[1]: rows} if rows else {self.names[0]: axes}

    def axes(self, cuts: Mapping[str, Axes]) -> Axes:
        return cuts.get(self.names[0], {})

    def tensors(self, weight: Tensor, axes: Axes) -> dict[str, Tensor]:
        """v loses what the weight loses and g becomes the length of what is left. Where the weight has another
        direction (it was refitted), v takes it and keeps its own length."""
        v = cut_tensor(self.v, axes)
        if set(axes) <= {self.dim} and torch.equal(weight, cut_tensor(self.value(), axes)):
            return dict(zip(self.names, (v, cut_tensor(self.g, axes)), strict=True))
        new_v, new_g = self._taken_apart(_wide(v), _wide(weight), 8 * torch.finfo(weight.dtype).eps)
        return dict(zip(self.names, (new_v.to(v.dtype), new_g.to(self.g.dtype)), strict=True))

    def _taken_apart(self, v: Tensor, weight: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
        def norm(tensor: Tensor) -> Tensor:
            return torch.norm_except_dim(tensor, 2, self.dim)

        v = torch.where(norm(v) > 0, v, 1.0)  # of what has no length any direction is as good
        length, wanted = norm(v), norm(weight)
        axes = [a for a in range(v.dim()) if a != self.dim]
        along = (weight * v).sum(axes, keepdim=self.dim != -1) / length  # negative where g was
        kept = (norm(weight - v * (along / length)) <= rounding * wanted) | (wanted == 0)
        return torch.where(kept, v, weight * (length / wanted)), torch.where(kept, along, wanted)


@dataclasses.dataclass(frozen=True, eq=False)
class SpectralNorm(Form):
    """w = o / s, s the largest singular value of o as a matrix with `dim` as its rows, found by power iteration: s = u'
    o v. `names`: of o, u and v in the module; a vector o has no u and v."""

    names: tuple[str, ...]
    o: Tensor
    uv: tuple[Tensor, ...]
    dim: int
    title = "spectral_norm"

    def value(self) -> Tensor:
        with torch.no_grad():
            o = self.o.detach()
            if not self.uv:
                return torch.nn.functional.normalize(o, dim=0)
            u, v = self.uv
            return o / torch.dot(u, torch.mv(self._matrix(o), v))

    def sources(self) -> dict[str, Tensor]:
        return dict(zip(self.names, (self.o, *self.uv), strict=True))

    def cuts(self, axes: Axes) -> dict[str, Axes]:
        found: dict[str, Axes] = {self.names[0]: axes}
        if self.uv:
            gone = torch.zeros([n for axis, n in enumerate(self.o.shape) if axis != self.dim], dtype=torch.bool)
            for axis, indices in axes.items():
                if axis != self.dim:
                    gone.index_fill_(axis - (axis > self.dim), torch.tensor(list(indices)), True)
            found[self.names[1]] = {0: axes[self.dim]} if self.dim in axes else {}
            found[self.names[2]] = {0: torch.nonzero(gone.flatten()).flatten().tolist()} if gone.any() else {}
        return {name: cut for name, cut in found.items() if cut}

    def axes(self, cuts: Mapping[str, Axes]) -> Axes:
        return cuts.get(self.names[0], {})

    def settled(self, weight: Tensor) -> Tensor:
        """Normalised anew: of a spectral norm of 1, as all that the form can make."""
        if weight.is_meta:
            return weight
        wide = _wide(weight)
        return (wide / _leading(self._matrix(wide))[0]).to(weight.dtype)

    def tensors(self, weight: Tensor, axes: Axes) -> dict[str, Tensor]:
        """o loses what the weight loses; u and v are its first singular vectors, where power iteration ends."""
        o = cut_tensor(self.o, axes)
        if not self.uv:
            return {self.names[0]: o}
        made = [o]
        if o.is_meta:
            matrix = self._matrix(o)
            made += [old.new_empty(n) for old, n in zip(self.uv, matrix.shape, strict=True)]
        else:
            _, u, v = _leading(self._matrix(_wide(o)))
            turned = torch.sum(o * weight) < 0  # before the first power iteration s may be of either sign
            made += [new.to(old) for new, old in zip((-u if turned else u, v), self.uv, strict=True)]
        return dict(zip(self.names, made, strict=True))

    def _matrix(self, tensor: Tensor) -> Tensor:
        return tensor.movedim(self.dim, 0).flatten(1) if tensor.dim() > 1 else tensor.reshape(1, -1)


def _leading(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular value of a matrix, and its vectors."""
    if min(matrix.shape) <= _SMALL:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return s[0], u[:, 0], v[0]
    start = np.random.default_rng(0).standard_normal(min(matrix.shape))  # the same result each time
    found = svds(matrix.cpu().numpy(), k=1, v0=start)
    first, value, second = (torch.from_numpy(np.array(part, order="C")).to(matrix) for part in found)
    return value[0], first[:, 0], second[0]
