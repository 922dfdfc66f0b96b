"""The registry of small networks: how one is declared, built with settled weights, and fed.

    @network(image(3, 8))
    class ChannelFlip(nn.Module): ...

    NETWORKS["channel_flip"]() -> (model, example_input)
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

ModuleType = TypeVar("ModuleType", bound=type[nn.Module])
Example = Callable[[], Any]
BATCH = 2


@dataclasses.dataclass(frozen=True)
class Network:
    """A small network and what may be asked of it.

    `statistics`: something takes a mean, a maximum, a softmax or a norm over channels that could be removed, so that
    zeroing channels is not the same as removing them.
    `batch_axis`: the axis of every example tensor of length `BATCH` that may grow; None where the batch size is fixed.
    `temperature`: an engine may fold a changed attention temperature into the query weights.
    `ignore`: names of modules whose outputs are to stay.
    """

    name: str
    build: Callable[[], nn.Module]
    example: Example
    statistics: bool = False
    batch_axis: int | None = 0
    temperature: bool = False
    ignore: tuple[str, ...] = ()

    def __call__(self) -> tuple[nn.Module, Any]:
        """The model, in eval mode unless it chose otherwise, float32, the same weights every time; and its example."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            model = self.build()
            settle(model)
            model.train(False)
            prepare = getattr(model, "prepare", None)
            if prepare is not None:
                prepare()
            return model, self.example()

    def larger_batch(self, example: Any) -> Any:
        """The example with one more sample, or None where the network is made for one batch size."""
        axis = self.batch_axis
        if axis is None:
            return None

        def grow(value: Tensor) -> Tensor:
            if value.dim() <= axis or value.shape[axis] != BATCH:
                return value
            extra = value.narrow(axis, 0, 1)
            return torch.cat([value, extra if not value.is_floating_point() else extra * 0.7 + 0.1], axis)

        return map_tensors(example, grow)


NETWORKS: dict[str, Network] = {}


def network(example: Example, **flags: Any) -> Callable[[ModuleType], ModuleType]:
    """Register a module class that needs no arguments, under its name in snake case."""

    def register(cls: ModuleType) -> ModuleType:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()
        variant(name, cls, example, **flags)
        return cls

    return register


def variant(name: str, build: Callable[[], nn.Module], example: Example, **flags: Any) -> None:
    """Register one more network, usually a registered class with other arguments."""
    if name in NETWORKS:
        raise ValueError(f"two networks are called {name}")
    NETWORKS[name] = Network(name, build, example, **flags)


def settle(model: nn.Module) -> None:
    """Give constant parameters and running statistics values in which a wrong index shows."""
    for module in model.modules():
        mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(var, Tensor):
            mean.normal_(0, 0.3)
            var.uniform_(0.5, 1.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or parameter.numel() < 2:
                continue
            first = parameter.flatten()[0]
            if bool((parameter == first).all()):
                parameter.copy_(first + 0.3 * torch.randn_like(parameter))


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of tuples, lists and dicts with every tensor replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, function) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    return value


def image(channels: int = 3, size: int = 8) -> Example:
    """A batch of square images, (2, channels, size, size)."""
    return lambda: torch.randn(BATCH, channels, size, size)


def tokens(length: int = 6, width: int = 10) -> Example:
    """A batch of sequences, (2, length, width)."""
    return lambda: torch.randn(BATCH, length, width)


def vector(width: int = 10) -> Example:
    """A batch of vectors, (2, width)."""
    return lambda: torch.randn(BATCH, width)


def signal(channels: int = 6, length: int = 12) -> Example:
    """A batch of one-dimensional signals, (2, channels, length)."""
    return lambda: torch.randn(BATCH, channels, length)


def words(length: int = 6, vocabulary: int = 20) -> Example:
    """A batch of integer sequences, (2, length)."""
    return lambda: torch.randint(0, vocabulary, (BATCH, length))


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the spatial size."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)
