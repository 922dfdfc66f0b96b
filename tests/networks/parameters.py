"""Parameters and buffers used outside the modules that torch.nn offers for them."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import conv, image, network, tokens, variant, vector


class Scaled(nn.Module):
    """A parameter or buffer of some shape multiplies or is added to features of 12 channels."""

    values: Tensor

    def __init__(self, shape: tuple[int, ...], how: str = "multiply", buffer: bool = False) -> None:
        super().__init__()
        self.how = how
        self.stem = conv(3, 12)
        if buffer:
            self.register_buffer("values", torch.randn(shape))
        else:
            self.values = nn.Parameter(torch.randn(shape))
        self.head = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        if self.how == "multiply":
            y = y * self.values
        elif self.how == "add":
            y = self.values + y
        elif self.how == "view":
            y = y * self.values.view(1, -1, 1, 1)
        elif self.how == "literal_view":
            y = y - self.values.view(1, 12, 1, 1).exp()
        elif self.how == "resized":
            y = y + F.interpolate(self.values, size=y.shape[-2:], mode="bilinear", align_corners=False)
        elif self.how == "sliced":
            y = y + self.values[:, :, : y.shape[2], : y.shape[3]]
        else:  # channels last
            y = (y.permute(0, 2, 3, 1) * self.values).permute(0, 3, 1, 2)
        return self.head(torch.relu(y))


for _name, _build in {
    "scale_per_channel": lambda: Scaled((1, 12, 1, 1)),
    "scale_per_channel_three_axes": lambda: Scaled((12, 1, 1)),
    "scale_per_pixel": lambda: Scaled((1, 1, 6, 6)),
    "scale_scalar": lambda: Scaled((1,)),
    "scale_buffer": lambda: Scaled((1, 12, 1, 1), buffer=True),
    "scale_viewed": lambda: Scaled((12,), "view"),
    "scale_viewed_literal": lambda: Scaled((12,), "literal_view"),
    "scale_channels_last": lambda: Scaled((12,), "last"),
    "position_embedding_image": lambda: Scaled((1, 12, 6, 6), "add"),
    "position_embedding_resized": lambda: Scaled((1, 12, 3, 3), "resized"),
    "position_embedding_cropped": lambda: Scaled((1, 12, 9, 9), "sliced"),
}.items():
    variant(_name, _build, image(3, 6))


@network(image(3, 6))
class ChannelMask(nn.Module):
    """A 0/1 buffer multiplies the features: already half pruned, by hand."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.register_buffer("mask", (torch.arange(12) % 3 > 0).float().view(1, 12, 1, 1))
        self.head = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.stem(x)) * self.mask)


@network(image(3, 6))
class MaskedWeight(nn.Module):
    """Unstructured sparsity kept as a mask of the weight's shape."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.weight = nn.Parameter(0.2 * torch.randn(14, 12, 3, 3))
        self.register_buffer("mask", (torch.rand(14, 12, 3, 3) > 0.3).to(torch.uint8))
        self.head = conv(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(torch.relu(self.stem(x)), self.weight * self.mask, padding=1)
        return self.head(torch.relu(y))


@network(image(3, 6))
class FunctionalConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(0.3 * torch.randn(12, 3, 3, 3))
        self.bias = nn.Parameter(torch.randn(12))
        self.grouped = nn.Parameter(0.3 * torch.randn(12, 4, 3, 3))
        self.transposed = nn.Parameter(0.3 * torch.randn(12, 9, 2, 2))
        self.gamma, self.beta = nn.Parameter(torch.ones(9)), nn.Parameter(torch.zeros(9))
        self.register_buffer("mean", torch.randn(9))
        self.register_buffer("variance", torch.rand(9) + 0.5)
        self.last = nn.Parameter(0.3 * torch.randn(4, 9, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(F.conv2d(x, self.first, self.bias, padding=1))
        y = torch.relu(F.conv2d(y, self.grouped, padding=1, groups=3))
        y = F.conv_transpose2d(y, self.transposed, stride=2)
        y = F.batch_norm(y, self.mean, self.variance, self.gamma, self.beta)  # type: ignore[arg-type]
        return F.conv2d(torch.relu(y), self.last)


@network(tokens())
class FunctionalLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.bias = nn.Parameter(0.3 * torch.randn(14, 10)), nn.Parameter(torch.randn(14))
        self.down = nn.Parameter(0.3 * torch.randn(14, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(F.gelu(F.linear(x, self.up, self.bias)), self.down)


class EinsumProducts(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed = nn.Linear(10, 12)
        self.weight = nn.Parameter(0.3 * torch.randn(12, 14))
        self.heads = nn.Parameter(0.3 * torch.randn(3, 12, 5))
        self.join = nn.Parameter(0.3 * torch.randn(3, 5, 7))
        self.head = nn.Linear(14 if how == "plain" else 7, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.embed(x))
        if self.how == "plain":
            z = torch.einsum("bnc,cd->bnd", y, self.weight)
        elif self.how == "heads":
            z = torch.einsum("bnhd,hde->bne", torch.einsum("bnc,hcd->bnhd", y, self.heads).relu(), self.join)
        else:
            z = torch.tensordot(torch.tensordot(y, self.heads, dims=([2], [1])), self.join, dims=2)
        return self.head(z)


for _how in ("plain", "heads", "tensordot"):
    variant(f"einsum_{_how}", lambda how=_how: EinsumProducts(how), tokens())  # type: ignore[misc]


@network(vector())
class MatmulChain(nn.Module):
    """mm, addmm, baddbmm and bmm with bare matrices; one matrix is used as its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(0.4 * torch.randn(10, 12))
        self.b = nn.Parameter(0.4 * torch.randn(9, 12))
        self.c = nn.Parameter(0.4 * torch.randn(9, 11))
        self.shift = nn.Parameter(torch.randn(11))
        self.stack = nn.Parameter(0.4 * torch.randn(2, 11, 8))
        self.offset = nn.Parameter(torch.randn(2, 1, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(torch.mm(x, self.a) @ self.b.t())
        y = torch.tanh(torch.addmm(self.shift, y, self.c))
        y = torch.baddbmm(self.offset, y.expand(2, -1, -1), self.stack)
        return self.head(torch.relu(y).sum(0))


@network(lambda: (torch.randn(2, 7), torch.randn(2, 6)))
class BilinearForms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(7, 9), nn.Linear(6, 8)
        self.module = nn.Bilinear(9, 8, 10)
        self.weight = nn.Parameter(0.2 * torch.randn(10, 9, 8))
        self.head = nn.Linear(10, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = torch.relu(self.left(a)), torch.relu(self.right(b))
        return self.head(torch.tanh(self.module(a, b)) + F.bilinear(a, b, self.weight))


@network(vector())
class LowRankWeight(nn.Module):
    """The weight is a product of two parameters, plus an update of rank two beside a frozen Linear (LoRA)."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(0.4 * torch.randn(12, 3)), nn.Parameter(0.4 * torch.randn(3, 10))
        self.frozen = nn.Linear(12, 13)
        self.frozen.requires_grad_(False)
        self.down, self.up = nn.Linear(12, 2, bias=False), nn.Linear(2, 13, bias=False)
        self.head = nn.Linear(13, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(F.linear(x, self.u @ self.v))
        return self.head(torch.relu(self.frozen(y) + 0.5 * self.up(self.down(y))))


@network(image(3, 5))
class WeightFromNetwork(nn.Module):
    """A hypernetwork: a Linear layer makes the kernel of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.code = nn.Parameter(torch.randn(4))
        self.make = nn.Linear(4, 10 * 8 * 9)
        self.head = conv(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.make(self.code).view(10, 8, 3, 3)
        return self.head(torch.relu(F.conv2d(self.stem(x), kernel, padding=1)))


@network(image(3, 5))
class ReparametrisedBranches(nn.Module):
    """RepVGG by hand: a 1x1 kernel is padded, added to a 3x3 kernel, and both act as one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.large = nn.Parameter(0.2 * torch.randn(11, 8, 3, 3))
        self.small = nn.Parameter(0.2 * torch.randn(11, 8, 1, 1))
        self.head = conv(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.large + F.pad(self.small, (1, 1, 1, 1))
        return self.head(torch.relu(F.conv2d(self.stem(x), kernel, padding=1)))


@network(vector())
class ParameterContainers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([0.4 * torch.randn(12, 10), 0.4 * torch.randn(9, 12)])
        self.offsets = nn.ParameterDict({"first": torch.randn(12), "second": torch.randn(9)})
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        for weight, offset in zip(self.weights, self.offsets.values(), strict=True):
            x = torch.relu(x @ weight.T + offset)
        return self.head(x)


@network(image(3, 6))
class LayerScaleAndDropPath(nn.Module):
    """A residual branch scaled per channel; in training whole samples of it are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = 0.2
        self.stem = conv(3, 12)
        self.up, self.down = conv(12, 20, 1), conv(20, 12, 1)
        self.gamma = nn.Parameter(torch.full((12,), 0.5))
        self.head = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        branch = self.gamma[:, None, None] * self.down(F.gelu(self.up(y)))
        if self.training and self.drop > 0:
            keep = torch.rand(y.shape[0], 1, 1, 1, device=y.device) >= self.drop
            branch = branch * keep / (1 - self.drop)
        return self.head(y + branch)


@network(tokens(5, 8), temperature=True)
class LearnedQueries(nn.Module):
    """Learned tokens attend to the input and are flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 3, 12))
        self.key, self.value = nn.Linear(8, 12), nn.Linear(8, 10)
        self.head = nn.Linear(30, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.queries @ self.key(x).transpose(1, 2), dim=-1)
        return self.head((weights @ self.value(x)).flatten(1))


@network(vector())
class OrthogonalWeight(nn.Module):
    """A matrix exponential makes the weight: nothing may be cut out of it, all around it may."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(10, 8)
        self.turn = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8), orthogonal_map="matrix_exp")
        self.up = nn.Linear(8, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.up(self.turn(torch.relu(self.embed(x))))))
