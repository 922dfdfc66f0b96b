"""Writes into existing tensors: in-place arithmetic, assignment to slices, through views, into buffers made before."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import conv, image, network, tokens, variant


class InPlace(nn.Module):
    def __init__(self, how: str, width: int = 14) -> None:
        super().__init__()
        self.how = how
        self.kept = width // 2
        self.stem = conv(3, width)
        self.other = conv(3, width, 1)
        self.part = conv(3, self.kept, 1)
        self.head = conv(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        if self.how == "iadd":
            y += self.other(x)
        elif self.how == "chain":
            y.mul_(0.5).add_(self.other(x), alpha=2).clamp_(-2, 2)
        elif self.how == "addcmul":
            y.addcmul_(self.other(x), self.other(x), value=0.3)
        elif self.how == "slice_literal":
            y = y.clone()
            y[:, :6] = y[:, :6] * 2
        elif self.how == "slice_attribute":
            y[:, : self.kept] = y[:, : self.kept].tanh()
        elif self.how == "slice_shape":
            half = y.shape[1] // 2
            y[:, half:] += self.part(x)
        elif self.how == "slice_strided":
            y[:, ::2] = self.part(x)
        elif self.how == "view":
            view = y[:, 4:10]
            view.mul_(2.0)
            view += 1
        elif self.how == "view_of_view":
            y.view(y.shape[0], 2, -1, *y.shape[2:])[:, 1].copy_(self.part(x))
        elif self.how == "transposed_view":
            y.permute(0, 2, 3, 1).add_(torch.arange(14, dtype=y.dtype) * 0.1)
        elif self.how == "masked_fill":
            y.masked_fill_(y < -0.2, 0.1)
        elif self.how == "boolean_assignment":
            y[y < 0] = 0.0
        elif self.how == "zero_slice":
            y[:, 3:5].zero_()
        elif self.how == "copy":
            y.copy_(self.other(x))
        elif self.how == "spatial":
            y[:, :, 0] = 0
            y[..., -1] = self.other(x)[..., -1]
        elif self.how == "index_put":
            y[:, [1, 5, 2]] = y[:, [0, 3, 7]]
        elif self.how == "index_add":
            y.index_add_(1, torch.arange(7), self.part(x))
        elif self.how == "index_copy":
            y.index_copy_(1, torch.tensor([1, 3, 5, 7, 9, 11, 13]), self.part(x))
        elif self.how == "scatter":
            part = self.part(x)
            y.scatter_add_(1, torch.arange(6, -1, -1).view(1, -1, 1, 1).expand_as(part), part)
        elif self.how == "swap_halves":
            first = y[:, :7].clone()
            y[:, :7] = y[:, 7:]
            y[:, 7:] = first
        return self.head(y)


for _how in (
    "iadd", "chain", "addcmul", "slice_literal", "slice_attribute", "slice_shape", "slice_strided", "view",
    "view_of_view", "transposed_view", "masked_fill", "boolean_assignment", "zero_slice", "copy", "spatial",
    "index_put", "index_add", "index_copy", "scatter", "swap_halves",
):  # fmt: skip
    variant(f"inplace_{_how}", lambda how=_how: InPlace(how), image(3, 6))  # type: ignore[misc]


class Prefilled(nn.Module):
    """A tensor made in forward is filled piece by piece."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.widths = (5, 9)
        self.left, self.right = conv(3, 5), conv(3, 9)
        self.head = conv(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x)
        b, _, h, w = x.shape
        if self.how == "literal":
            y = x.new_zeros(b, 14, h, w)
            y[:, :5] = left
            y[:, 5:] = right
        elif self.how == "attribute":
            y = torch.zeros(b, sum(self.widths), h, w, dtype=x.dtype, device=x.device)
            y[:, : self.widths[0]] += left
            y[:, self.widths[0] :] += right
        elif self.how == "shape":
            y = x.new_empty(b, left.shape[1] + right.shape[1], h, w)
            y[:, : left.shape[1]] = left
            y[:, left.shape[1] :] = right
        else:
            y = x.new_zeros(b, 14, h, w)
            y.narrow(1, 0, 5).copy_(left)
            y.narrow(1, 5, 9).copy_(right)
        return self.head(torch.relu_(y))


for _how in ("literal", "attribute", "shape", "narrow"):
    variant(f"prefilled_{_how}", lambda how=_how: Prefilled(how), image(3, 6))  # type: ignore[misc]


@network(image(3, 6))
class InPlaceActivationAliased(nn.Module):
    """nn.ReLU(inplace=True) changes what the shortcut reads afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 12), conv(12, 12), conv(12, 5)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        z = self.body(self.act(y))
        return self.head(self.act(z + y))


@network(image(3, 6))
class InPlaceOnChunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 14), conv(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        left, right = torch.chunk(y.clone(), 2, 1)
        return self.head(torch.cat([right, (left * 0.5).mul_(3)], 1) + y)


@network(image(3, 6))
class WriteToInput(nn.Module):
    """forward changes its own argument."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 12), conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x *= 0.5
        return self.head(torch.relu(self.stem(x)))


@network(tokens())
class InPlaceRows(nn.Module):
    """Writes along the token axis leave the channels free."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(10, 12)
        self.mask_token = nn.Parameter(torch.randn(12))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        y[:, 2] = self.mask_token
        y[:, -2:] *= 0.5
        return self.head(torch.relu_(y))


@network(tokens(), temperature=True)
class PartlyZeroedBias(nn.Module):
    """The key's part of a fused bias is zeroed in a copy, as some vision transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(10, 36)
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.qkv.bias.clone()
        length = bias.numel() // 3
        bias[length : 2 * length].zero_()
        q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        return self.out(torch.softmax(q @ k.mT * 12**-0.5, -1) @ v)
