"""Convolutions of all kinds, and how networks join them: residuals, branches, pyramids, sampling."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from .norms import Normalised
from .registry import conv, image, network, signal, variant, vector

for _name, _layer, _width in (
    ("grouped_convolution", lambda: conv(16, 16, groups=4), 16),
    ("grouped_convolution_wider", lambda: nn.Sequential(conv(12, 24, groups=3), nn.ReLU(), conv(24, 12, 1)), 12),
    ("grouped_convolution_chain", lambda: nn.Sequential(conv(12, 12, groups=3), nn.ReLU(), conv(12, 12, groups=4)), 12),
    ("grouped_convolution_nested",
     lambda: nn.Sequential(conv(16, 16, groups=2), nn.ReLU(), conv(16, 16, groups=8)), 16),
    ("depthwise", lambda: conv(14, 14, groups=14), 14),
    ("depthwise_multiplier", lambda: nn.Sequential(conv(7, 21, groups=7), nn.ReLU(), conv(21, 7, 1)), 7),
    ("depthwise_divider", lambda: nn.Sequential(conv(12, 6, groups=6), nn.ReLU(), conv(6, 12, 1)), 12),
    ("depthwise_twice", lambda: nn.Sequential(conv(6, 12, groups=6), conv(12, 24, groups=12), conv(24, 6, 1)), 6),
    ("transposed", lambda: nn.ConvTranspose2d(13, 13, 2, stride=2), 13),
    ("transposed_padded", lambda: nn.ConvTranspose2d(10, 10, 3, stride=2, padding=1, output_padding=1), 10),
    ("transposed_grouped", lambda: nn.ConvTranspose2d(12, 12, 3, padding=1, groups=3), 12),
    ("transposed_grouped_wider",
     lambda: nn.Sequential(nn.ConvTranspose2d(8, 16, 2, stride=2, groups=4), nn.ReLU(), conv(16, 8)), 8),
    ("transposed_depthwise", lambda: nn.ConvTranspose2d(11, 11, 4, stride=2, padding=1, groups=11), 11),
    ("transposed_depthwise_multiplier",
     lambda: nn.Sequential(nn.ConvTranspose2d(6, 12, 3, padding=1, groups=6), conv(12, 6)), 6),
    ("dilated", lambda: nn.Conv2d(12, 12, 3, padding=2, dilation=2), 12),
    ("circular_padding", lambda: conv(12, 12, padding_mode="circular"), 12),
    ("same_padding", lambda: nn.Conv2d(12, 12, (3, 5), padding="same"), 12),
    ("asymmetric_kernels",
     lambda: nn.Sequential(nn.Conv2d(10, 14, (1, 3), padding=(0, 1)), nn.Conv2d(14, 10, (3, 1), padding=(1, 0))), 10),
    ("separable", lambda: nn.Sequential(conv(9, 9, 5, groups=9, bias=False), conv(9, 9, 1, bias=False)), 9),
    ("max_pooled", lambda: nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Upsample(scale_factor=2, mode="bilinear")), 10),
    ("fractionally_resized", lambda: nn.Upsample((5, 9), mode="bicubic", align_corners=True), 10),
    ("one_channel_middle", lambda: nn.Sequential(conv(8, 1), nn.ReLU(), conv(1, 8)), 8),
):  # fmt: skip
    variant(_name, lambda layer=_layer, width=_width: Normalised(layer(), width), image(3, 6))  # type: ignore[misc]


@network(image(3, 6))
class GroupedAfterConcatenation(nn.Module):
    """The border between the two producers is the border between the groups."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 8), conv(3, 8)
        self.body = conv(16, 12, groups=2)
        self.head = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(torch.cat([self.left(x), self.right(x)], 1))))


@network(image(3, 6))
class GroupedAcrossConcatenation(nn.Module):
    """The border between the producers lies inside a group."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 5), conv(3, 7)
        self.body = conv(12, 16, groups=2)
        self.head = conv(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(torch.cat([self.left(x), self.right(x)], 1))))


@network(image(3, 6))
class GroupedBesidesPlain(nn.Module):
    """One tensor read by a grouped convolution, a depthwise one and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.grouped, self.depthwise, self.plain = conv(12, 12, groups=4), conv(12, 12, groups=12), conv(12, 12, 1)
        self.head = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(torch.relu(self.grouped(y) + self.depthwise(y) * self.plain(y)))


@network(image(3, 6))
class DeformableConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.offset, self.mask = conv(12, 18), conv(12, 9)
        self.body = DeformConv2d(12, 10, 3, padding=1)
        self.head = conv(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        return self.head(torch.relu(self.body(y, self.offset(y), self.mask(y).sigmoid())))


@network(image(3, 6))
class SpatialTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 10)
        self.locate = nn.Linear(10, 6)
        self.head = conv(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        theta = self.locate(y.mean((2, 3))).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(y.shape), align_corners=False)
        return self.head(F.grid_sample(y, grid, align_corners=False))


@network(image(3, 6))
class ConditionalConvolution(nn.Module):
    """CondConv: each sample has a kernel mixed from experts, applied as one grouped convolution over the batch."""

    def __init__(self, experts: int = 3, inputs: int = 8, outputs: int = 12) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.stem = conv(3, inputs)
        self.route = nn.Linear(inputs, experts)
        self.kernels = nn.Parameter(0.2 * torch.randn(experts, outputs * inputs * 9))
        self.head = conv(outputs, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        b, c, h, w = y.shape
        kernels = (self.route(y.mean((2, 3))).sigmoid() @ self.kernels).view(b * self.outputs, self.inputs, 3, 3)
        y = F.conv2d(y.reshape(1, b * c, h, w), kernels, padding=1, groups=b)
        return self.head(y.view(b, self.outputs, h, w).relu())


@network(lambda: torch.randn(2, 2, 4, 4, 4))
class VolumeConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(2, 10, 3, padding=1)
        self.norm = nn.BatchNorm3d(10)
        self.body = nn.Conv3d(10, 10, (3, 1, 1), padding=(1, 0, 0), groups=2)
        self.up = nn.ConvTranspose3d(10, 6, 2, stride=2)
        self.head = nn.Conv3d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.up(self.body(torch.relu(self.norm(self.stem(x)))))))


@network(signal())
class WaveNetLayers(nn.Module):
    """Causal dilated convolutions with gated activations, residual and skip outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(6, 10, 1)
        self.dilated = nn.ModuleList(nn.Conv1d(10, 24, 2, dilation=d) for d in (1, 2))
        self.residual = nn.ModuleList(nn.Conv1d(12, 10, 1) for _ in range(2))
        self.skip = nn.ModuleList(nn.Conv1d(12, 9, 1) for _ in range(2))
        self.up = nn.ConvTranspose1d(9, 8, 2, stride=2)
        self.head = nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        total: Tensor | None = None
        for past, (dilated, residual, skip) in enumerate(zip(self.dilated, self.residual, self.skip, strict=True), 1):
            signal_part, gate = dilated(F.pad(y, (past, 0))).chunk(2, 1)
            z = signal_part.tanh() * gate.sigmoid()
            y = y + residual(z)
            total = skip(z) if total is None else total + skip(z)
        assert total is not None
        return self.head(torch.relu(self.up(total)))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + identity)


@network(image())
class ResidualStages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.layer1 = nn.Sequential(Residual(8, 8), Residual(8, 8))
        self.layer2 = nn.Sequential(Residual(8, 12, 2), Residual(12, 12))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer2(self.layer1(self.stem(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(y, (1, 1)), 1))


@network(image(3, 6))
class ResidualOfTheInput(nn.Module):
    """The last features are added to the image itself: three channels that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = conv(3, 12), conv(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


@network(image(3, 6))
class BroadcastResidual(nn.Module):
    """A one-channel map and a one-pixel vector are added to the features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.plane, self.pool = conv(3, 11), conv(3, 1), conv(3, 11, 1)
        self.head = conv(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x) + self.plane(x) + self.pool(F.adaptive_avg_pool2d(x, 1))
        return self.head(torch.relu(y))


@network(image(3, 6))
class InvertedResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU6())
        self.block = nn.Sequential(
            conv(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6(),
            conv(24, 24, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU6(),
            conv(24, 8, 1, bias=False), nn.BatchNorm2d(8),
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(y + self.block(y))


@network(image(3, 6))
class GhostModule(nn.Module):
    """Half of the channels are cheap depthwise copies of the other half; the surplus is cut off by a slice."""

    def __init__(self, outputs: int = 15) -> None:
        super().__init__()
        self.outputs = outputs
        self.primary = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU())
        self.cheap = nn.Sequential(conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.ReLU())
        self.head = conv(outputs, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return self.head(torch.cat([y, self.cheap(y)], dim=1)[:, : self.outputs])


@network(image(3, 6))
class CrossStagePartial(nn.Module):
    """CSP: one projection, two halves, residual bottlenecks in one of them, and both concatenated."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.hidden = width // 2
        self.stem = nn.Sequential(conv(3, width), nn.BatchNorm2d(width), nn.SiLU())
        self.bottlenecks = nn.ModuleList(nn.Sequential(conv(8, 6, 1), nn.SiLU(), conv(6, 8)) for _ in range(2))
        self.join = nn.Sequential(conv(4 * self.hidden, 12, 1), nn.BatchNorm2d(12))
        self.head = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.stem(x).split((self.hidden, self.hidden), 1))
        for bottleneck in self.bottlenecks:
            parts.append(parts[-1] + bottleneck(parts[-1]))
        return self.head(F.silu(self.join(torch.cat(parts, 1))))


@network(image(3, 6))
class HierarchicalSplit(nn.Module):
    """Res2Net: each group of channels is convolved after adding the previous group's result."""

    def __init__(self, scales: int = 4, width: int = 4) -> None:
        super().__init__()
        self.width = width
        self.scales = scales
        self.reduce = nn.Sequential(conv(3, width * scales, 1), nn.BatchNorm2d(width * scales), nn.ReLU())
        self.convs = nn.ModuleList(conv(width, width) for _ in range(scales - 1))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(scales - 1))
        self.head = conv(width * scales, 5)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.reduce(x), self.width, 1)
        results = [parts[0]]
        for i in range(self.scales - 1):
            part = parts[i + 1] if i == 0 else results[-1] + parts[i + 1]
            results.append(torch.relu(self.norms[i](self.convs[i](part))))
        return self.head(torch.cat(results, 1))


@network(image())
class ResolutionFusion(nn.Module):
    """HRNet: two resolutions exchange features by strided convolutions and by upsampling, twice."""

    def __init__(self, high: int = 6, low: int = 9) -> None:
        super().__init__()
        self.stem, self.down = conv(3, high), conv(high, low, stride=2)
        self.to_low = nn.ModuleList(conv(high, low, stride=2) for _ in range(2))
        self.to_high = nn.ModuleList(conv(low, high, 1) for _ in range(2))
        self.head = conv(high + low, 5)

    def forward(self, x: Tensor) -> Tensor:
        high = torch.relu(self.stem(x))
        low = torch.relu(self.down(high))
        for to_low, to_high in zip(self.to_low, self.to_high, strict=True):
            lifted = F.interpolate(to_high(low), size=high.shape[-2:], mode="bilinear", align_corners=False)
            high, low = torch.relu(high + lifted), torch.relu(low + to_low(high))
        return self.head(torch.cat([high, F.interpolate(low, scale_factor=2.0)], 1))


@network(image())
class SmallUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = conv(3, 7), conv(7, 12, stride=2)
        self.middle = conv(12, 14, stride=2)
        self.up2 = nn.ConvTranspose2d(14, 12, 2, stride=2)
        self.merge2 = conv(24, 10)
        self.up1 = nn.ConvTranspose2d(10, 6, 2, stride=2)
        self.merge1 = conv(13, 8)
        self.head = conv(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.down1(x))
        b = torch.relu(self.down2(a))
        y = torch.relu(self.merge2(torch.cat([b, self.up2(torch.relu(self.middle(b)))], 1)))
        return self.head(torch.relu(self.merge1(torch.cat([self.up1(y), a], 1))))


@network(image())
class FeaturePyramid(nn.Module):
    """Several outputs from one shared head over levels that were added together."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = conv(3, 6, stride=2), conv(6, 9, stride=2), conv(9, 12, stride=2)
        self.laterals = nn.ModuleList(conv(n, 8, 1) for n in (6, 9, 12))
        self.shared = nn.Sequential(conv(8, 10), nn.ReLU(), conv(10, 4, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = [torch.relu(self.c1(x))]
        levels.append(torch.relu(self.c2(levels[-1])))
        levels.append(torch.relu(self.c3(levels[-1])))
        merged = [lateral(level) for lateral, level in zip(self.laterals, levels, strict=True)]
        for i in (1, 0):
            merged[i] = merged[i] + F.interpolate(merged[i + 1], size=merged[i].shape[-2:], mode="nearest")
        return [self.shared(level) for level in merged]


@network(image(3, 6))
class DilatedPyramidPooling(nn.Module):
    """ASPP: parallel dilations and an image-level branch that is resized and concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 10)
        self.branches = nn.ModuleList(nn.Conv2d(10, 6, 3, padding=d, dilation=d) for d in (1, 2, 3))
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(10, 7, 1), nn.ReLU())
        self.project = nn.Sequential(conv(25, 11, 1), nn.BatchNorm2d(11), nn.ReLU())
        self.head = conv(11, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        parts = [torch.relu(branch(y)) for branch in self.branches]
        parts.append(F.interpolate(self.pooled(y), size=y.shape[2:], mode="bilinear", align_corners=False))
        return self.head(self.project(torch.cat(parts, 1)))


@network(vector(9))
class ImageGenerator(nn.Module):
    """DCGAN: a vector seen as a one-pixel image grows by transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(9, 12, 4, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
            nn.ConvTranspose2d(12, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.ConvTranspose2d(8, 3, 3, 1, 1), nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z[:, :, None, None])
