"""Shapes of inputs and outputs, control flow, autograd, modes: what surrounds the channels."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from .registry import conv, image, network, tokens, variant, vector, words


@dataclasses.dataclass
class Detection:
    boxes: Tensor
    scores: Tensor
    masks: Tensor | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


class ShapedOutput(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem = conv(3, 12)
        self.box, self.score = conv(12, 4, 1), conv(12, 2, 1)

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.stem(x))
        boxes, scores = self.box(y), self.score(y)
        if self.how == "dict":
            return {"boxes": [boxes], "scores": (scores, None), "name": "detector"}
        if self.how == "dataclass":
            return Detection(boxes, scores, extra={"mean": scores.mean(), "none": None})
        if self.how == "namedtuple":
            return Pair(boxes, None)
        if self.how == "with_input":
            return boxes, x.mean(), x
        if self.how == "with_features":
            return scores, y  # the features are an output: their channels stay
        if self.how == "with_pooled_features":
            return scores, y.mean((0, 2, 3))
        if self.how == "with_channel_sum":
            return scores, y.sum(1)  # a sum over the channels names none of them
        if self.how == "with_slice":
            return scores, y[:, :3]
        if self.how == "stacked":
            return torch.stack([boxes, boxes * scores[:, :1]])
        if self.how == "numbers":
            return scores, float(x.shape[-1]), [3, "text"]
        return scores.sum()


for _how in (
    "dict", "dataclass", "namedtuple", "with_input", "with_features", "with_pooled_features", "with_channel_sum",
    "with_slice", "stacked", "numbers", "scalar",
):  # fmt: skip
    variant(f"output_{_how}", lambda how=_how: ShapedOutput(how), image(3, 6))  # type: ignore[misc]


@network(lambda: {"image": torch.randn(2, 3, 6, 6), "context": torch.randn(2, 5)})
class KeywordInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.condition, self.head = conv(3, 12), nn.Linear(5, 24), conv(12, 5)

    def forward(self, *, image: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        scale, shift = self.condition(context).view(-1, 24, 1, 1).chunk(2, dim=1)
        y = self.stem(image) * (1 + scale) + shift
        return self.head(torch.relu(y if mask is None else y * mask))


@network(lambda: ([torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)], 2.0))
class ListAndNumberInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 12), conv(24, 5)

    def forward(self, images: list[Tensor], factor: float) -> Tensor:
        return self.head(torch.cat([torch.relu(self.stem(image)) * factor for image in images], 1))


@network(lambda: (torch.randint(0, 20, (2, 6)), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])))
class MaskedMeanOfWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(20, 12), nn.Linear(12, 18), nn.Linear(18, 4)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        y = torch.relu(self.up(self.embed(words)))
        weights = mask.unsqueeze(-1).expand(y.size()).to(y.dtype)
        return self.head((y * weights).sum(1) / weights.sum(1).clamp(min=1e-9))


@network(image(3, 6))
class AssertedSizes(nn.Module):
    """forward checks its widths against attributes, as careful users do."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.width = width
        self.hidden = 2 * self.width
        self.stem, self.up = conv(3, self.width), conv(self.width, self.hidden, 1)
        self.head = conv(self.hidden, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        b, c, h, w = y.shape
        assert c == self.width, f"expected {self.width} channels, got {c}"
        y = torch.relu(self.up(y))
        torch._assert(y.shape[1] == self.hidden, "hidden width is wrong")
        return self.head(y.reshape(b, self.hidden, h * w).view(b, self.hidden, h, w))


@network(tokens())
class DerivedAttributes(nn.Module):
    """Three attributes that depend on each other, all of them used in forward."""

    def __init__(self, heads: int = 4, width: int = 24) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.features = self.width // self.heads
        self.embed, self.mix, self.head = nn.Linear(10, width), nn.Linear(6, 6), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = self.embed(x).view(b, n, self.heads, self.features)
        y = y * torch.sigmoid(y.mean(dim=1, keepdim=True))
        return self.head(torch.relu(y.reshape(b, n, self.width)))


@network(tokens())
class SharedConfiguration(nn.Module):
    """Sizes live in a dictionary and in a small configuration object, not in attributes of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"heads": 3, "features": 5}
        self.options = Options(heads=3, features=5)
        self.embed, self.head = nn.Linear(10, 15), nn.Linear(15, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = self.embed(x).view(b, n, self.config["heads"], self.config["features"]).tanh()
        return self.head(y.reshape(b, n, self.options.heads * self.options.features))


@dataclasses.dataclass
class Options:
    heads: int
    features: int


@network(image(3, 6))
class CheckpointedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 12), conv(12, 5)
        self.block = nn.Sequential(conv(12, 16), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 12))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(torch.relu(y + torch.utils.checkpoint.checkpoint(self.block, y, use_reentrant=False)))


class StraightThroughSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * (x.abs() < 1)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 2


@network(image(3, 6))
class CustomFunctions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 12), conv(12, 10), conv(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(StraightThroughSign.apply(self.body(Doubled.apply(self.stem(x)))))


@network(image(3, 6))
class StemWithoutGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 12), conv(12, 14), conv(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = torch.relu(self.stem(x))
        return self.head(torch.relu(self.body(y)))


@network(image(3, 6))
class DetachedBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.main, self.probe = conv(3, 12), conv(12, 5), conv(12, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.stem(x))
        return self.main(y), self.probe(y.detach())


@network(image(3, 6))
class BranchOnSize(nn.Module):
    """Python decides by a size that pruning would change."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 12), conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = torch.relu(y) if y.shape[1] > 10 else torch.tanh(y)
        return self.head(y)


@network(image(3, 6))
class MixedModes(nn.Module):
    """Some parts are in training mode, some are not, and all must stay so."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, 12), nn.BatchNorm2d(12)
        self.drop = nn.Dropout(0.5)
        self.body, self.head = nn.Sequential(conv(12, 10), nn.BatchNorm2d(10), nn.ReLU()), conv(10, 5)

    def prepare(self) -> None:
        self.train()
        self.norm.eval()
        self.body[0].eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.drop(torch.relu(self.norm(self.stem(x))))))


@network(image(3, 6))
class NothingToPrune(nn.Module):
    """The only layer reads the input and makes the output."""

    def __init__(self) -> None:
        super().__init__()
        self.only = conv(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.only(x))


@network(image(3, 6))
class NoParameters(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) * 2


@network(image(3, 6))
class SingleChannelLayers(nn.Module):
    """Every hidden layer has one channel: none can go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 1), conv(1, 1), conv(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


@network(image(3, 6))
class HookedModule(nn.Module):
    """Forward hooks change inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 12), conv(12, 5)
        self.stem.register_forward_hook(_double)
        self.head.register_forward_pre_hook(_rectify)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))


def _double(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


def _rectify(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (torch.relu(inputs[0]),)


@network(image(3, 6))
class IgnoredLayer(nn.Module):
    """The caller asks for one layer's outputs to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 12), conv(12, 14), conv(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(torch.relu(self.stem(x)))))


variant("ignored_layer_named", IgnoredLayer, image(3, 6), ignore=("body",))


class Spectral(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem, self.head = conv(3, 10), conv(10, 5)
        self.filter = nn.Parameter(torch.randn(1, 10, 6, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        if self.how == "space":
            spectrum = torch.fft.rfft2(y) * torch.view_as_complex(self.filter)
            y = torch.fft.irfft2(spectrum, s=y.shape[-2:])
        elif self.how == "low_pass":
            y = torch.fft.ifft2(torch.fft.fft2(y)[..., :3, :3], s=(6, 6)).real
        else:  # FNet: along the channels too
            y = torch.fft.fft(torch.fft.fft(y, dim=1), dim=3).real * 0.1
        return self.head(torch.relu(y))


for _how in ("space", "low_pass", "channels"):
    variant(f"fourier_{_how}", lambda how=_how: Spectral(how), image(3, 6))  # type: ignore[misc]


@network(words())
class OneHotInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.head = nn.Linear(20, 12, bias=False), nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(F.one_hot(x, 20).to(self.embed.weight.dtype))
        return self.head(torch.relu(self.up(y)))


@network(vector())
class NestedContainers(nn.Module):
    """ModuleDict, nested Sequential, functions between, a layer replaced by Identity."""

    def __init__(self) -> None:
        super().__init__()
        body = nn.Sequential(nn.Linear(10, 14), nn.Sequential(nn.ReLU(), nn.Linear(14, 12)), nn.Identity())
        self.parts = nn.ModuleDict({"body": body, "first": nn.Linear(12, 3), "second": nn.Linear(12, 4)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.relu(self.parts["body"](x))
        return {name: self.parts[name](y) for name in ("first", "second")}


@network(tokens(6, 10))
class PairwiseDistances(nn.Module):
    """Distances between tokens are sums over the features: absent and zero features are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(10, 12), nn.Linear(10, 12)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.left(x), self.right(x)
        distance = (a.unsqueeze(2) - b.unsqueeze(1)).pow(2).sum(-1)
        return self.head(distance * 0.1 + (a * b).sum(-1, keepdim=True) * 0.1 + torch.cdist(a, b) * 0.1)
