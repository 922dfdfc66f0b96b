"""Normalisations, activations with parameters, reparametrised weights, and functions that look across channels."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import weight_norm as hooked_weight_norm

from .registry import conv, image, network, signal, tokens, variant, vector


class Normalised(nn.Module):
    """A convolution, some layer in its middle, and a head that reads it."""

    def __init__(self, layer: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.stem = conv(3, width)
        self.layer = layer
        self.head = conv(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.layer(self.stem(x))))


def _layer(name: str, make: Callable[[], nn.Module], statistics: bool = False, width: int = 16) -> None:
    variant(name, lambda: Normalised(make(), width), image(3, 6), statistics=statistics)


_layer("conv_bn_relu", lambda: nn.BatchNorm2d(16))
_layer("batch_norm_without_affine", lambda: nn.BatchNorm2d(16, affine=False))
_layer("instance_norm", lambda: nn.InstanceNorm2d(16))
_layer("instance_norm_affine", lambda: nn.InstanceNorm2d(16, affine=True))
_layer("instance_norm_tracking", lambda: nn.InstanceNorm2d(16, affine=True, track_running_stats=True))
_layer("group_norm", lambda: nn.GroupNorm(4, 24), statistics=True, width=24)
_layer("group_norm_one_group", lambda: nn.GroupNorm(1, 16), statistics=True)
_layer("group_norm_per_channel", lambda: nn.GroupNorm(16, 16))
_layer("group_norm_without_affine", lambda: nn.GroupNorm(2, 16, affine=False), statistics=True)
_layer("layer_norm_whole_image", lambda: nn.LayerNorm([16, 6, 6]), statistics=True)
_layer("layer_norm_of_rows", lambda: nn.LayerNorm(6))
_layer("local_response_norm", lambda: nn.LocalResponseNorm(3))
_layer("prelu_per_channel", lambda: nn.PReLU(16))
_layer("prelu_shared", lambda: nn.PReLU())
_layer("softmax_over_channels", lambda: nn.Softmax(dim=1), statistics=True)
_layer("softmax2d", lambda: nn.Softmax2d(), statistics=True)
_layer("channel_dropout", lambda: nn.Dropout2d(0.3))
_layer("activation_mix", lambda: nn.Sequential(nn.Hardswish(), nn.LeakyReLU(0.2), nn.Softplus(), nn.Tanh()))


@network(image(3, 6))
class BatchNormOfTheBatch(nn.Module):
    """No running statistics: evaluation normalises by the batch too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.norm = nn.BatchNorm2d(12, track_running_stats=False)
        self.head = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.stem(x))))


@network(image(3, 6), statistics=True)
class GroupNormsMixed(nn.Module):
    """Four groups on one side of an addition, eight on the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 32), conv(3, 32, 1)
        self.four, self.eight = nn.GroupNorm(4, 32), nn.GroupNorm(8, 32)
        self.head = conv(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.four(self.left(x)) + self.eight(self.right(x))))


@network(image(3, 6), statistics=True)
class GroupNormsUnaligned(nn.Module):
    """Three groups against four: no common block but a single channel of twelve."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 12), conv(3, 12, 1)
        self.three, self.four = nn.GroupNorm(3, 12), nn.GroupNorm(4, 12)
        self.head = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.three(self.left(x)) * self.four(self.right(x)))


@network(image(3, 6), statistics=True)
class GroupNormGroupedConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.norm = nn.GroupNorm(4, 16)
        self.body = conv(16, 16, groups=2)
        self.after = nn.GroupNorm(2, 16)
        self.head = conv(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.body(torch.relu(self.norm(self.stem(x))))))


class ImageLayerNorm(nn.Module):
    """Over the channels of an image, written by hand or by permuting."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.shape = (width,)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "by_hand":
            mean = x.mean(1, keepdim=True)
            variance = (x - mean).pow(2).mean(1, keepdim=True)
            return self.weight[:, None, None] * ((x - mean) / torch.sqrt(variance + 1e-6)) + self.bias[:, None, None]
        return F.layer_norm(x.permute(0, 2, 3, 1), self.shape, self.weight, self.bias, 1e-6).permute(0, 3, 1, 2)


_layer("image_layer_norm_by_hand", lambda: ImageLayerNorm(16, "by_hand"), statistics=True)
_layer("image_layer_norm_permuted", lambda: ImageLayerNorm(16, "permuted"), statistics=True)


class HandRmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class NormalisedTokens(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(10, 14)
        self.norm = norm
        self.up = nn.Linear(14, 20)
        self.down = nn.Linear(20, 14)
        self.head = nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        return self.head(y + self.down(F.gelu(self.up(self.norm(y)))))


variant("rms_norm", lambda: NormalisedTokens(nn.RMSNorm(14, eps=1e-6)), tokens(), statistics=True)
variant("rms_norm_by_hand", lambda: NormalisedTokens(HandRmsNorm(14)), tokens(), statistics=True)
variant("layer_norm_tokens", lambda: NormalisedTokens(nn.LayerNorm(14)), tokens(), statistics=True)
variant("layer_norm_without_bias", lambda: NormalisedTokens(nn.LayerNorm(14, bias=False)), tokens(), statistics=True)
variant("layer_norm_plain", lambda: NormalisedTokens(nn.LayerNorm(14, elementwise_affine=False)), tokens(),
        statistics=True)


@network(tokens())
class BatchNormOfTokens(nn.Module):
    """LeViT: BatchNorm1d over flattened tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(10, 14, bias=False)
        self.norm = nn.BatchNorm1d(14)
        self.head = nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        return self.head(F.hardswish(self.norm(y.flatten(0, 1)).reshape_as(y)))


@network(signal())
class BatchNormOfSignals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(6, 15, 5, padding=2)
        self.norm = nn.BatchNorm1d(15)
        self.pool = nn.AvgPool1d(2)
        self.head = nn.Conv1d(15, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(F.elu(self.norm(self.stem(x)))))


@network(vector())
class BatchNormOfVectors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(10, 18), nn.BatchNorm1d(18), nn.ReLU(), nn.Dropout(0.2), nn.Linear(18, 12), nn.BatchNorm1d(12),
            nn.SELU(), nn.Linear(12, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@network(image(3, 6))
class PreActivation(nn.Module):
    """The normalisation stands before the convolution and reads a sum that others read too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.first, self.second = nn.BatchNorm2d(12), nn.BatchNorm2d(16)
        self.up, self.down = conv(12, 16, bias=False), conv(16, 12, bias=False)
        self.last = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y + self.down(torch.relu(self.second(self.up(torch.relu(self.first(y))))))
        return self.head(torch.relu(self.last(y)).mean((2, 3)))


@network(image(3, 6))
class NormSharedByTwo(nn.Module):
    """One BatchNorm after two convolutions: it can be folded into neither alone."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 12), conv(3, 12, 1)
        self.norm = nn.BatchNorm2d(12)
        self.head = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.left(x))) + torch.relu(self.norm(self.right(x))))


@network(image(3, 6))
class ConvolutionReadTwice(nn.Module):
    """A convolution feeds its BatchNorm and something else: not foldable."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.norm = nn.BatchNorm2d(12)
        self.head = conv(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(torch.cat([self.norm(y), y], 1).relu())


@network(image(3, 6))
class NormAfterConcatenation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 7), conv(3, 9)
        self.norm = nn.BatchNorm2d(16, eps=1e-3)
        self.head = conv(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu6(self.norm(torch.cat([self.left(x), self.right(x)], 1))))


class StandardisedConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        deviation = self.weight.std((1, 2, 3), keepdim=True) + 1e-5
        return F.conv2d(input, (self.weight - mean) / deviation, self.bias, self.stride, self.padding)


class ReparametrisedWeight(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem = conv(3, 14)
        body: nn.Module
        if how == "weight_norm":
            body = parametrizations.weight_norm(conv(14, 12))
        elif how == "weight_norm_hook":
            body = hooked_weight_norm(conv(14, 12))
        elif how == "weight_norm_inputs":
            body = parametrizations.weight_norm(conv(14, 12), dim=1)
        elif how == "weight_norm_stem":
            self.stem = parametrizations.weight_norm(self.stem)
            body = conv(14, 12)
        elif how == "spectral":
            body = parametrizations.spectral_norm(conv(14, 12))
        elif how == "spectral_hook":
            body = nn.utils.spectral_norm(conv(14, 12))
        else:
            body = StandardisedConv2d(14, 12, 3, padding=1)
        self.body = body
        self.head = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(torch.relu(self.stem(x)))))


for _how in ("weight_norm", "weight_norm_hook", "weight_norm_inputs", "weight_norm_stem", "spectral", "spectral_hook"):
    variant(f"reparametrised_{_how}", lambda how=_how: ReparametrisedWeight(how), image(3, 6))  # type: ignore[misc]
variant("weight_standardisation", lambda: ReparametrisedWeight("standardised"), image(3, 6), statistics=True)


class AcrossChannels(nn.Module):
    """A function of the features that sees all channels of a pixel at once."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem = conv(3, 12)
        self.norm = nn.BatchNorm2d(12)
        self.head = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x))
        if self.how == "cumsum":
            y = y.cumsum(1) * 0.2
        elif self.how == "cumprod":
            y = (1 + 0.1 * y.tanh()).cumprod(dim=1)
        elif self.how == "sort":
            y = y.sort(dim=1)[0]
        elif self.how == "topk":
            y = torch.cat([y.topk(4, dim=1).values, y[:, :8]], 1)
        elif self.how == "argmax":
            y = y * (y.argmax(1, keepdim=True) % 3 == 0).to(y.dtype)
        elif self.how == "max":
            y = y - y.amax(1, keepdim=True)
        elif self.how == "max_with_indices":
            y = y * y.max(1, keepdim=True).values
        elif self.how == "mean":
            y = y - y.mean(dim=1, keepdim=True)
        elif self.how == "deviation":
            y = y / (y.std(1, keepdim=True) + 0.5)
        elif self.how == "logsumexp":
            y = y - y.logsumexp(1, keepdim=True)
        elif self.how == "log_softmax":
            y = F.log_softmax(y, dim=1)
        elif self.how == "sum":
            y = y * torch.sigmoid(y.sum(1, keepdim=True) * 0.2)
        elif self.how == "product":
            y = y * torch.sigmoid(y).prod(1, keepdim=True)
        elif self.how == "euclidean":
            y = F.normalize(y, dim=1)
        elif self.how == "euclidean_norm":
            y = y / (1e-3 + torch.linalg.vector_norm(y, dim=1, keepdim=True))
        else:  # a difference of neighbouring channels
            y = torch.cat([y[:, :1], y[:, 1:] - y[:, :-1]], 1)
        return self.head(torch.relu(y))


for _how in ("cumsum", "cumprod", "sort", "topk", "argmax", "sum", "euclidean", "euclidean_norm", "neighbours"):
    variant(f"across_channels_{_how}", lambda how=_how: AcrossChannels(how), image(3, 6))  # type: ignore[misc]
for _how in ("max", "max_with_indices", "mean", "deviation", "logsumexp", "log_softmax", "product"):
    variant(f"across_channels_{_how}", lambda how=_how: AcrossChannels(how),  # type: ignore[misc]
            image(3, 6), statistics=True)


@network(image(3, 6))
class CosineClassifier(nn.Module):
    """Features and class vectors are divided by their lengths: absent and zero coordinates are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.classes = nn.Parameter(torch.randn(5, 12))
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x)).mean((2, 3))
        return self.scale * F.linear(F.normalize(y), F.normalize(self.classes))


@network(vector())
class ScaledByWidth(nn.Module):
    """The transformer's sqrt(d_model): a size used as a value must keep its value."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 16
        self.embed = nn.Linear(10, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x) * self.width**0.5
        return self.head(torch.relu(y) / y.shape[-1])
