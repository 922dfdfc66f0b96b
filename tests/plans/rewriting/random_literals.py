"""Random networks whose sizes are numbers in their code: the same seed always makes the same one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[["nn.ModuleDict", Tensor], Tensor]


class Literals(nn.Module):
    """A chain of steps between convolutions; numbers in a step's closure are literals, as if written there."""

    def __init__(self, stem: nn.Module, steps: list[Step], modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.stem, self.steps, self.parts = stem, tuple(steps), nn.ModuleDict(modules)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        for step in self.steps:
            y = step(self.parts, y)
        return y


class Nested(nn.Module):
    """The same in a module of its own, with a residual around it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).relu() * 0.5


def random_literals(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Model, example, and an example of another batch size and resolution."""
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = int(rng.choice([8, 12, 16]))
        model = _chain(rng, 3, width, int(rng.integers(1, 4)))
        if rng.random() < 0.4:
            model = nn.Sequential(Nested(model), _chain(rng, _width(model), 8, 1))
        model = nn.Sequential(model, nn.Conv2d(_width(model), 3, 1))
        return model.eval(), torch.randn(2, 3, 8, 8), torch.randn(3, 3, 12, 8)


def _width(model: nn.Module) -> int:
    with torch.no_grad():
        return int(model(torch.zeros(1, 3, 8, 8)).shape[1])


def _chain(rng: np.random.Generator, before: int, width: int, count: int) -> nn.Module:
    steps: list[Step] = []
    modules: dict[str, nn.Module] = {}
    stem = nn.Sequential(nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    for index in range(count):
        kind = str(rng.choice(list(_KINDS)))
        step, width = _KINDS[kind](rng, width, f"part{index}", modules)
        steps.append(step)
        if rng.random() < 0.6:
            after = int(rng.choice([8, 12, 16]))
            modules[f"conv{index}"] = nn.Conv2d(width, after, 3, padding=1)
            steps.append(lambda m, y, name=f"conv{index}": m[name](y).relu())  # type: ignore[misc]
            width = after
    return Literals(stem, steps, modules)


def _split(rng: np.random.Generator, c: int, name: str, modules: dict[str, nn.Module]) -> tuple[Step, int]:
    a = int(rng.integers(1, c))
    return lambda m, y: torch.cat([p * (i + 1) for i, p in enumerate(y.split([a, c - a], 1))], 1), c


def _swap(rng: np.random.Generator, c: int, name: str, modules: dict[str, nn.Module]) -> tuple[Step, int]:
    a = int(rng.integers(1, c))
    return lambda m, y: torch.cat([y[:, a:], 2 * y[:, : a - c]], 1), c


def _halves(rng: np.random.Generator, c: int, name: str, modules: dict[str, nn.Module]) -> tuple[Step, int]:
    half = c // 2
    return lambda m, y: y.narrow(1, 0, half) * y[:, -half:].sigmoid(), half


def _gate(rng: np.random.Generator, c: int, name: str, modules: dict[str, nn.Module]) -> tuple[Step, int]:
    modules[name] = nn.Linear(c, c)
    return lambda m, y: y * m[name](y.mean((2, 3))).view(-1, c, 1, 1).sigmoid(), c


def _shuffle(rng: np.random.Generator, c: int, name: str, modules: dict[str, nn.Module]) -> tuple[Step, int]:
    g = int(rng.choice([2, 4]))

    def step(m: nn.ModuleDict, y: Tensor) -> Tensor:
        b, _, h, w = y.shape
        return y.view(b, g, c // g, h, w).transpose(1, 2).reshape(b, c, h, w)

    return step, c


def _depthwise(rng: np.random.Generator, c: int, name: str, modules: dict[str, nn.Module]) -> tuple[Step, int]:
    modules[name] = nn.Conv2d(c, c, 3, groups=c)
    return lambda m, y: F.conv2d(y, m[name].weight, m[name].bias, padding=1, groups=c), c


def _tokens(rng: np.random.Generator, c: int, name: str, modules: dict[str, nn.Module]) -> tuple[Step, int]:
    modules[name] = nn.Linear(c, c)

    def step(m: nn.ModuleDict, y: Tensor) -> Tensor:
        h, w = y.shape[-2:]
        tokens = m[name](y.reshape(-1, c, h * w).mT)
        return y + tokens.mT.reshape(-1, c, h, w)

    return step, c


def _attend(rng: np.random.Generator, c: int, name: str, modules: dict[str, nn.Module]) -> tuple[Step, int]:
    modules[name] = nn.Linear(c, 3 * 4 * 4)
    modules[name + "out"] = nn.Linear(16, c)

    def step(m: nn.ModuleDict, y: Tensor) -> Tensor:
        b, _, h, w = y.shape
        q, k, v = m[name](y.flatten(2).mT).view(b, h * w, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, -1, 16)
        return y + m[name + "out"](out).mT.reshape(b, c, h, w)

    return step, c


_KINDS = {f.__name__: f for f in (_split, _swap, _halves, _gate, _shuffle, _depthwise, _tokens, _attend)}
