"""Gates: gated units, squeeze and excitation, selection, routing."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import conv, image, network, tokens, variant, vector


@network(image())
class GatedUnitFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 20)
        self.head = conv(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.glu(self.stem(x), dim=1))


@network(tokens())
class GatedUnitModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(10, 28)
        self.gate = nn.GLU()
        self.down = nn.Linear(14, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(self.up(x)))


class GatedFeedForward(nn.Module):
    """SwiGLU and GEGLU, fused into one projection or not."""

    def __init__(self, how: str, hidden: int = 16) -> None:
        super().__init__()
        self.how = how
        self.hidden = hidden
        self.embed = nn.Linear(10, 12)
        if how == "separate":
            self.gate = nn.Linear(12, hidden, bias=False)
            self.up = nn.Linear(12, hidden, bias=False)
        else:
            self.both = nn.Linear(12, 2 * hidden)
        self.down = nn.Linear(hidden, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        if self.how == "separate":
            z = F.silu(self.gate(y)) * self.up(y)
        elif self.how == "chunk":
            gate, up = self.both(y).chunk(2, dim=-1)
            z = F.silu(gate) * up
        elif self.how == "split":
            up, gate = self.both(y).split(self.hidden, -1)
            z = up * F.gelu(gate)
        elif self.how == "slice":
            both = self.both(y)
            z = F.silu(both[..., : self.hidden]) * both[..., self.hidden :]
        else:  # interleaved: even features gate, odd features pass
            both = self.both(y)
            z = F.gelu(both[..., ::2]) * both[..., 1::2]
        return self.head(y + self.down(z))


for _how in ("separate", "chunk", "split", "slice", "interleaved"):
    variant(f"gated_feed_forward_{_how}", lambda how=_how: GatedFeedForward(how), tokens())  # type: ignore[misc]


@network(image())
class SingleChannelGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 13)
        self.gate = conv(13, 1, 1)
        self.head = conv(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(y * torch.sigmoid(self.gate(y)))


@network(image())
class ExpandedSingleGate(nn.Module):
    """The one-channel gate is expanded by hand to the width of what it gates."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.gate = conv(12, 1)
        self.head = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        gate = self.gate(y).sigmoid().expand(-1, y.shape[1], -1, -1)
        return self.head(y * gate)


class SqueezeExcite(nn.Module):
    def __init__(self, how: str, width: int = 16) -> None:
        super().__init__()
        self.how = how
        self.width = width
        self.stem = conv(3, width)
        if how == "convolution":
            self.down: nn.Module = conv(width, 6, 1)
            self.up: nn.Module = conv(6, width, 1)
        else:
            self.down = nn.Linear(width, 6)
            self.up = nn.Linear(6, width)
        self.head = conv(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        if self.how == "convolution":
            gate = self.up(torch.relu(self.down(F.adaptive_avg_pool2d(y, 1))))
        elif self.how == "shape":
            b, c, _, _ = y.size()
            squeezed = F.adaptive_avg_pool2d(y, (1, 1)).view(b, c)
            gate = self.up(torch.relu(self.down(squeezed))).view(b, c, 1, 1)
        elif self.how == "none_index":
            gate = self.up(torch.relu(self.down(y.mean((2, 3)))))[:, :, None, None]
        elif self.how == "literal":
            gate = self.up(torch.relu(self.down(y.mean((2, 3))))).view(-1, 16, 1, 1)
        else:
            gate = self.up(torch.relu(self.down(y.flatten(2).mean(2)))).reshape(-1, self.width, 1, 1)
        return self.head(y * F.hardsigmoid(gate))


for _how in ("convolution", "shape", "none_index", "literal", "attribute"):
    variant(f"squeeze_excite_{_how}", lambda how=_how: SqueezeExcite(how), image())  # type: ignore[misc]


@network(image())
class ConcurrentExcitation(nn.Module):
    """Channel and spatial excitation of the same features, joined by an elementwise maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.channel = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(12, 4, 1), nn.ReLU(), conv(4, 12, 1), nn.Sigmoid())
        self.space = nn.Sequential(conv(12, 1, 1), nn.Sigmoid())
        self.head = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(torch.max(y * self.channel(y), y * self.space(y)))


@network(image())
class EfficientChannelAttention(nn.Module):
    """ECA: a one-dimensional convolution slides along the channels, so that their order matters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.slide = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.head = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        gate = self.slide(y.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1)
        return self.head(y * gate.sigmoid())


@network(image(), statistics=True)
class SpatialAttentionMeanMax(nn.Module):
    """CBAM: a gate from the mean and the maximum over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.gate = conv(2, 1, 5, bias=False)
        self.head = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        summary = torch.cat([y.mean(1, keepdim=True), y.max(1, keepdim=True)[0]], dim=1)
        return self.head(y * self.gate(summary).sigmoid())


@network(image(3, 6))
class SelectiveKernel(nn.Module):
    """SKNet: branches of different dilation, weighted per channel by a softmax over the branches."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.branches = 2
        self.width = width
        self.stem = conv(3, width)
        self.near = conv(width, width, groups=2)
        self.far = nn.Conv2d(width, width, 3, padding=2, dilation=2, groups=2)
        self.squeeze = nn.Linear(width, 6)
        self.select = nn.Linear(6, self.branches * width)
        self.head = conv(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        features = torch.stack([self.near(y), self.far(y)], dim=1)
        pooled = features.sum(1).mean((2, 3))
        weights = self.select(torch.relu(self.squeeze(pooled))).view(-1, self.branches, self.width)
        return self.head((features * torch.softmax(weights, 1)[..., None, None]).sum(1))


@network(image(3, 6))
class SplitAttention(nn.Module):
    """ResNeSt: the radix lies in the channels of one grouped convolution."""

    def __init__(self, width: int = 8, radix: int = 2, cardinality: int = 2) -> None:
        super().__init__()
        self.radix, self.cardinality = radix, cardinality
        self.stem = conv(3, width)
        self.body = conv(width, width * radix, groups=cardinality * radix)
        self.fc1 = conv(width, 12, 1, groups=cardinality)
        self.fc2 = conv(12, width * radix, 1, groups=cardinality)
        self.head = conv(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.body(self.stem(x)))
        b, wide = y.shape[:2]
        parts = torch.split(y, wide // self.radix, dim=1)
        pooled = (parts[0] + parts[1]).mean((2, 3), keepdim=True)
        weights = self.fc2(torch.relu(self.fc1(pooled)))
        weights = weights.view(b, self.cardinality, self.radix, -1).transpose(1, 2)
        weights = F.softmax(weights, dim=1).reshape(b, -1).view(b, -1, 1, 1)
        first, second = torch.split(weights, wide // self.radix, dim=1)
        return self.head(first * parts[0] + second * parts[1])


@network(vector())
class HighwayLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(10, 14)
        self.carry = nn.Linear(14, 14)
        self.change = nn.Linear(14, 14)
        self.head = nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        gate = torch.sigmoid(self.carry(y))
        return self.head(gate * torch.relu(self.change(y)) + (1 - gate) * y)


class MixtureOfExperts(nn.Module):
    """Tokens go to their best expert by boolean indexing, or to every expert with a weight."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed = nn.Linear(10, 12)
        self.router = nn.Linear(12, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12)) for _ in range(3)
        )
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        weights = torch.softmax(self.router(y), dim=-1)
        if self.how == "soft":
            mixed = torch.zeros_like(y)
            for index, expert in enumerate(self.experts):
                mixed = mixed + expert(y) * weights[..., index, None]
        else:
            rows = y.reshape(-1, y.shape[-1])
            chosen = weights.reshape(len(rows), -1).argmax(-1)
            mixed = torch.zeros_like(rows)
            for index, expert in enumerate(self.experts):
                picked = (chosen == index).nonzero().flatten()
                mixed.index_add_(0, picked, expert(rows[picked]))
            mixed = mixed.view_as(y)
        return self.head(y + mixed)


variant("mixture_soft", lambda: MixtureOfExperts("soft"), tokens())
variant("mixture_routed", lambda: MixtureOfExperts("routed"), tokens())


@network(image())
class RoutedByValue(nn.Module):
    """Which expert runs depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.experts = nn.ModuleList([conv(12, 14), conv(12, 14)])
        self.head = conv(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        chosen = 0 if bool(y.abs().max() > 1e6) else 1
        return self.head(torch.relu(self.experts[chosen](y)))


@network(image())
class BilinearGating(nn.Module):
    """A product of two branches followed by a one-channel gate from a third, all from the same stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 10), nn.BatchNorm2d(10), nn.Hardswish())
        self.a = conv(10, 12, 1)
        self.b = conv(10, 12, groups=2)
        self.c = conv(10, 1)
        self.head = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head((self.a(y) * self.b(y)).addcmul(self.c(y), self.a(y)))
