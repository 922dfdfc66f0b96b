"""A check without data: the same network on random inputs that have exactly the statistics that it has stored.

Random inputs are no data, and on them a trained network makes what it never makes: whether a repair helps there says
nothing about it. What it does rest on is that stored statistics are those of the activations. So it is tried where that
holds: a twin of the network, with all its weights, whose statistics are those of random inputs, is pruned and repaired
in the same way. What makes the twin worse rests on something else than statistics - that channels are independent, that
activations are normal - which does not hold in this network. It knows nothing of data, and can be wrong both ways; on
random inputs alone trained networks seem to get worse by most repairs, whatever these do on data.

A network whose statistics are those that batch norms start with has seen no data yet: of that, random inputs say more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...errors import GraphPruneError
from ...plans.surgery import clone_with
from ...support.walking import named_tensors
from ...tracing.example import ExampleInput
from ...tracing.state import evaluating
from ...tracing.trace import run_model
from .batchnorm import reestimate

# Multiply-accumulates that a run may cost, and samples at least and at most.
_WORK, _LEAST, _MOST = 1 << 31, 2, 64


class Drawn:
    """One batch of random inputs like an example."""

    def __init__(self, example: ExampleInput) -> None:
        self.example = example

    def inputs(self) -> Iterator[ExampleInput]:
        """The batch, the same at every pass."""
        yield self.example


def drawn(model: nn.Module, example: ExampleInput, macs: int) -> Drawn:
    """Inputs like the example: numbers with its mean and spread, normally distributed; whole numbers from among its
    own. As many samples as are cheap (`macs`: what a run on the example costs), or as the example has where the model
    takes no other number.

    Raises GraphPruneError where the model fails on them.
    """
    generator = torch.Generator().manual_seed(0)
    n = example.samples
    count = min(max(_WORK * n // max(macs, 1), _LEAST), _MOST)

    def like(tensor: Tensor, more: bool) -> Tensor:
        shape = (count, *tensor.shape[1:]) if more and tensor.dim() and tensor.shape[0] == n else tuple(tensor.shape)
        if not (tensor.is_floating_point() or tensor.is_complex()):
            own = tensor.detach().cpu().flatten()
            picked = torch.randint(max(len(own), 1), (math.prod(shape),), generator=generator)
            return own[picked].reshape(shape).to(tensor.device) if len(own) else tensor
        kind = torch.complex64 if tensor.is_complex() else torch.float32
        known = tensor.detach().cpu().to(kind)
        spread = known.std() if known.numel() > 1 and bool(known.std() > 0) else torch.ones(())
        numbers = torch.randn(shape, generator=generator, dtype=kind) * spread + known.mean()
        return numbers.to(tensor.device, tensor.dtype)

    def tried(more: bool) -> Drawn:
        batch = example.map(lambda t: like(t, more))
        with evaluating(model):
            run_model(model, batch.clone(), "example_input")
        return Drawn(batch)

    try:
        return tried(True)
    except GraphPruneError:
        return tried(False)


def fresh(model: nn.Module) -> bool:
    """Whether all batch norms have the statistics that they start with."""
    named = named_tensors(model)
    stored = {1.0: [t for n, t in named.items() if n.endswith("running_var")],
              0.0: [t for n, t in named.items() if n.endswith("running_mean")]}  # fmt: skip
    return all(bool((tensor == value).all()) for value, tensors in stored.items() for tensor in tensors)


def twin(model: nn.Module, inputs: Drawn) -> nn.Module:
    """A copy of the model whose batch norms have the statistics of these inputs.

    Raises GraphPruneError where these cannot be had.
    """
    made = clone_with(model, {})
    reestimate(made, inputs)
    for norm in (m for m in made.modules() if isinstance(m, _BatchNorm) and isinstance(m.running_mean, Tensor)):
        assert norm.running_mean is not None and norm.running_var is not None
        if not bool(norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
            raise GraphPruneError("example_input: statistics of inputs like it are not finite")
    return made
