"""How sparse a model is, layer by layer and as a whole."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from ..support.doors import door
from .weights import find_weights, is_weight


@dataclasses.dataclass(frozen=True)
class LayerSparsity:
    """One tensor: `zeros` of its `size` values are zero. `weight`: not a bias, a vector or a norm's parameter.

    `masked`: how many are held at zero by a mask; None without a mask.
    """

    name: str
    shape: tuple[int, ...]
    zeros: int
    weight: bool
    masked: int | None

    @property
    def size(self) -> int:
        """Number of values."""
        out = 1
        for n in self.shape:
            out *= n
        return out

    @property
    def sparsity(self) -> float:
        """The fraction that is zero; 0 for an empty tensor."""
        return self.zeros / self.size if self.size else 0.0


@dataclasses.dataclass(frozen=True)
class SparsityReport:
    """Zeros of every parameter of a model, shared ones once, and of the model as a whole."""

    layers: tuple[LayerSparsity, ...]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(layer.size for layer in self.layers)

    @property
    def zeros(self) -> int:
        """How many of them are zero."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """The fraction of all parameters that is zero."""
        return self.zeros / self.parameters if self.parameters else 0.0

    @property
    def weight_sparsity(self) -> float:
        """The fraction of the weights that is zero: without biases, vectors and parameters of norms."""
        weights = [layer for layer in self.layers if layer.weight]
        size = sum(layer.size for layer in weights)
        return sum(layer.zeros for layer in weights) / size if size else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "parameters": self.parameters,
            "zeros": self.zeros,
            "sparsity": self.sparsity,
            "weight_sparsity": self.weight_sparsity,
            "layers": [
                {**dataclasses.asdict(layer), "shape": list(layer.shape), "sparsity": layer.sparsity}
                for layer in self.layers
            ],
        }

    def __str__(self) -> str:
        rows = [(x.name, "x".join(map(str, x.shape)), x.size, x.zeros, x.sparsity) for x in self.layers if x.weight]
        rows.append(("all weights", "", sum(r[2] for r in rows), sum(r[3] for r in rows), self.weight_sparsity))
        rows.append(("all parameters", "", self.parameters, self.zeros, self.sparsity))
        wide = max(len(row[0]) for row in rows)
        shapes = max(len(row[1]) for row in rows)
        return "\n".join(
            f"{name:{wide}}  {shape:>{shapes}}  {zeros:>11,} of {size:>11,} zero  {100 * part:6.2f} %"
            for name, shape, size, zeros, part in rows
        )


@door("model")
def report(model: nn.Module) -> SparsityReport:
    """Count zeros as the network computes with them: masks applied, shared parameters once.

    Raises GraphPruneError for what is no module, and for parameters that have no shape yet.

    >>> import torch, graphprune
    >>> net = graphprune.sparsity.magnitude(torch.nn.Linear(8, 16), 0.5)
    >>> graphprune.sparsity.report(net).weight_sparsity
    0.5
    """
    layers = []
    for weight in find_weights(model):
        value = weight.value
        zeros = 0 if value.is_meta else value.numel() - int(value.count_nonzero())
        masked = None if weight.mask is None else weight.mask.numel() - int(weight.mask.count_nonzero())
        layers.append(LayerSparsity(weight.name, tuple(value.shape), zeros, is_weight(weight), masked))
    return SparsityReport(tuple(layers))
