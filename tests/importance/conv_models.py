"""Small networks, and the members of one group of each, written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .reference import blocks, every


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn1(self.conv1(x))))


class Residual(nn.Module):
    """A stem and two blocks that add to it: one group of three producers, their norms and three consumers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        for n in (1, 2):
            self.add_module(f"a{n}", nn.Conv2d(8, 5, 3, padding=1, bias=False))
            self.add_module(f"b{n}", nn.Conv2d(5, 8, 3, padding=1, bias=False))
            self.add_module(f"bn{n}", nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        x = F.relu(x + self.bn1(self.b1(F.relu(self.a1(x)))))
        x = F.relu(x + self.bn2(self.b2(F.relu(self.a2(x)))))
        return self.fc(x.mean((2, 3)))


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).flatten(1))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up1, self.up2 = nn.ConvTranspose2d(3, 6, 2), nn.ConvTranspose2d(6, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up2(F.relu(self.up1(x)))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.depthwise, self.bn2 = nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6)
        self.project = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.relu(self.bn2(self.depthwise(F.relu(self.bn(self.expand(x)))))))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(48, 10), nn.LayerNorm(10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.norm(self.fc1(x.flatten(1)))))


def bn(name: str, count: int) -> list[Any]:
    return [(f"{name}.{a}", 0, every(count), "vector") for a in ("weight", "bias", "running_mean", "running_var")]


def conv(name: str, count: int, bias: bool = True, axis: int = 0) -> list[Any]:
    out = [(f"{name}.weight", axis, every(count), "out")]
    return [(f"{name}.bias", 0, every(count), "vector"), *out] if bias else out


CASES: dict[str, tuple[Callable[[], nn.Module], str, int, list[Any]]] = {
    "plain": (Plain, "conv1", 8, [*bn("bn1", 8), *conv("conv1", 8), ("conv2.weight", 1, every(8), "in")]),
    "residual": (
        Residual,
        "stem",
        8,
        [
            *(m for name in ("stem", "b1", "b2") for m in conv(name, 8, bias=False)),
            *(m for name in ("stem_bn", "bn1", "bn2") for m in bn(name, 8)),
            *((f"{name}.weight", 1, every(8), "in") for name in ("a1", "a2", "fc")),
        ],
    ),
    "flattened": (Flattened, "conv", 6, [*conv("conv", 6), ("fc.weight", 1, blocks(6, 16), "in")]),
    "transposed": (Transposed, "up1", 6, [*conv("up1", 6, axis=1), ("up2.weight", 0, every(6), "in")]),
    "depthwise": (
        Depthwise,
        "expand",
        6,
        [
            *conv("expand", 6),
            *bn("bn", 6),
            *conv("depthwise", 6),
            *bn("bn2", 6),
            ("project.weight", 1, every(6), "in"),
        ],
    ),
    "normed": (
        Normed,
        "fc1",
        10,
        [
            *conv("fc1", 10),
            ("norm.weight", 0, every(10), "vector"),
            ("norm.bias", 0, every(10), "vector"),
            ("fc2.weight", 1, every(10), "in"),
        ],
    ),
}
