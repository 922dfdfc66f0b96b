"""Channels moved: shuffles, permutations, repetitions, groups of channels."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import conv, image, network, tokens, variant


@network(image())
class PixelShuffleUpsampler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand = conv(3, 24)
        self.shuffle = nn.PixelShuffle(2)
        self.head = conv(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.shuffle(self.expand(x))))


@network(image(3, 4))
class PixelShuffleThenFlatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand = conv(3, 16)
        self.classifier = nn.Linear(4 * 8 * 8, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(F.pixel_shuffle(self.expand(x), 2), 1))


@network(image(3, 4))
class TokensThenPixelShuffle(nn.Module):
    """An upsampler whose pixels are first mixed as tokens by a Linear layer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = conv(3, width)
        self.mix = nn.Linear(width, 4 * width)
        self.head = conv(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        b, _, h, w = y.shape
        y = self.mix(y.flatten(2).transpose(1, 2))
        return self.head(F.pixel_shuffle(y.transpose(1, 2).reshape(b, -1, h, w), 2))


@network(image(3, 8))
class PixelUnshuffleStem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.down = nn.PixelUnshuffle(2)
        self.head = conv(24, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(F.silu(self.stem(x))))


@network(image(3, 8))
class UnshuffleShuffleRoundTrip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.inner = conv(32, 32, groups=4)
        self.head = conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(y + F.pixel_shuffle(self.inner(F.pixel_unshuffle(y, 2)), 2))


class ChannelShuffle(nn.Module):
    def __init__(self, groups: int = 3, sizes: str = "attribute") -> None:
        super().__init__()
        self.groups = groups
        self.width = 12
        self.sizes = sizes
        self.stem = conv(3, 12)
        self.grouped = conv(12, 12, groups=groups)
        self.head = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        b, c, h, w = y.shape
        if self.sizes == "shape":
            y = y.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).contiguous().view(b, c, h, w)
        elif self.sizes == "attribute":
            y = y.view(b, self.groups, self.width // self.groups, h, w).transpose(1, 2).reshape(b, self.width, h, w)
        else:
            y = y.view(-1, 3, 4, h, w).transpose(1, 2).reshape(-1, 12, h, w)
        return self.head(torch.relu(self.grouped(y)))


variant("channel_shuffle_attribute", ChannelShuffle, image())
variant("channel_shuffle_shape", lambda: ChannelShuffle(4, "shape"), image())
variant("channel_shuffle_literal", lambda: ChannelShuffle(3, "literal"), image())


@network(image())
class ChannelShuffleModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.shuffle = nn.ChannelShuffle(2)
        self.head = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shuffle(self.stem(x)))


@network(image())
class ShuffleUnit(nn.Module):
    """ShuffleNetV2: half of the channels pass, the others are transformed, then both are interleaved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.branch = nn.Sequential(conv(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8, groups=8), conv(8, 8, 1))
        self.head = conv(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, dim=1)
        y = torch.cat((left, self.branch(right)), dim=1)
        b, c, h, w = y.size()
        return self.head(y.view(b, 2, c // 2, h, w).transpose(1, 2).flatten(1, 2))


class Repeated(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.times = 2
        self.stem = conv(3, 9)
        self.head = conv(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        b, c, h, w = y.shape
        if self.how == "repeat":
            y = y.repeat(1, self.times, 1, 1)
        elif self.how == "interleave":
            y = y.repeat_interleave(self.times, dim=1)
        elif self.how == "interleave_literal":
            y = torch.repeat_interleave(y, 2, dim=1)
        elif self.how == "tile":
            y = torch.tile(y, (1, 2, 1, 1))
        elif self.how == "expand":
            y = y.unsqueeze(2).expand(b, c, self.times, h, w).reshape(b, c * self.times, h, w)
        elif self.how == "expand_outer":
            y = y[:, None].expand(-1, 2, -1, -1, -1).flatten(1, 2)
        else:
            y = torch.cat([y, y], 1)
        return self.head(torch.relu(y))


for _how in ("repeat", "interleave", "interleave_literal", "tile", "expand", "expand_outer", "cat_twice"):
    variant(f"repeat_by_{_how}", lambda how=_how: Repeated(how), image())  # type: ignore[misc]


class Reordered(nn.Module):
    order: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.shift = 4
        self.stem = conv(3, 11)
        self.norm = nn.BatchNorm2d(11)
        self.head = conv(11, 5)
        self.register_buffer("order", torch.randperm(11))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x))
        if self.how == "flip":
            y = y.flip(1)
        elif self.how == "flip_negative":
            y = torch.flip(y, dims=[-3])
        elif self.how == "roll_literal":
            y = y.roll(3, 1)
        elif self.how == "roll_attribute":
            y = torch.roll(y, shifts=self.shift, dims=1)
        elif self.how == "index_select":
            y = torch.index_select(y, 1, self.order)
        elif self.how == "index_buffer":
            y = y[:, self.order]
        elif self.how == "index_list":
            y = y[:, [10, 2, 4, 0, 1, 3, 9, 8, 5, 7, 6]]
        else:
            y = y.gather(1, self.order.view(1, -1, 1, 1).expand_as(y))
        return self.head(torch.relu(y))


for _how in (
    "flip", "flip_negative", "roll_literal", "roll_attribute", "index_select", "index_buffer", "index_list", "gather",
):
    variant(f"reorder_by_{_how}", lambda how=_how: Reordered(how), image())  # type: ignore[misc]


@network(image(3, 6))
class RolledSpace(nn.Module):
    """Rolled, flipped and padded in space only: the channels are free."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.head = nn.Conv2d(12, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.roll(self.stem(x), shifts=(-1, 2), dims=(2, 3)).flip(-1)
        return self.head(F.pad(y, (1, 1, 1, 1), mode="reflect"))


@network(image())
class MaxoutPairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 20)
        self.head = conv(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        b, c, h, w = y.shape
        return self.head(y.view(b, c // 2, 2, h, w).amax(dim=2))


@network(image())
class SumOfGroups(nn.Module):
    """Split attention style: channels as (radix, width), summed over the radix."""

    def __init__(self) -> None:
        super().__init__()
        self.radix = 3
        self.stem = conv(3, 18, 1)
        self.head = conv(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        b, c = y.shape[:2]
        return self.head(y.view(b, self.radix, c // self.radix, *y.shape[2:]).sum(dim=1))


@network(tokens(6, 9))
class MixerBlock(nn.Module):
    """MLP-Mixer without norms: Linear layers over tokens and over channels; the token axis itself is not prunable."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(9, 16)
        self.token_up = nn.Linear(6, 10)
        self.token_down = nn.Linear(10, 6)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        y = y + self.token_down(F.gelu(self.token_up(y.mT))).mT
        y = y + self.down(F.gelu(self.up(y)))
        return self.head(y.mean(dim=1))


@network(image(3, 8))
class SpaceToDepthSlices(nn.Module):
    """YOLO's focus: four strided views of the feature map concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 5)
        self.head = conv(20, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        corners = [y[..., ::2, ::2], y[..., 1::2, ::2], y[..., ::2, 1::2], y[..., 1::2, 1::2]]
        return self.head(torch.cat(corners, 1))
