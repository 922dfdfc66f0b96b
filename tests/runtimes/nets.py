"""Small networks for the tests of export and benchmark."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn


def lively_statistics(model: nn.Module) -> nn.Module:
    """BN statistics and scales as after training: with those of a new network, folding errors would not show."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
            ):
                assert tensor is not None
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model


class ConvNet(nn.Module):
    """conv-bn-relu twice, pooled, and a Linear that nothing uses."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6, 4)
        self.spare = nn.Linear(5, 5)
        lively_statistics(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.fc(self.drop(x.mean((2, 3))))


class TokenNet(nn.Module):
    """Keyword arguments, integers, nested inputs; a nested dict with None, numbers and repeated tensors as result."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.fc = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, *, extra: dict[str, Tensor] | None = None, flag: bool = True
    ) -> dict[str, object]:
        hidden = self.fc(self.embed(ids)) * self.scale
        if mask is not None:
            hidden = hidden * mask.unsqueeze(-1)
        if extra is not None:
            hidden = hidden + extra["bias"]
        return {
            "hidden": hidden,
            "none": None,
            "steps": 3,
            "pair": (hidden, hidden.argmax(-1)),
            "mask": mask,
            "scale": self.scale,
        }


@dataclasses.dataclass
class Result:
    logits: Tensor
    aux: list[Tensor | None]


class DataclassNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Result:
        return Result(self.fc(x + y), [None, x.sum(-1)])


class Attention(nn.Module):
    """What the exporter transposes (3-d Linear), packs (qkv) and ties (one weight, two names)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.layer(x)))


class Singular(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svd(x @ x.transpose(-1, -2))[1]


class Unsupported(nn.Module):
    """An operator without an ONNX form, in the submodule `inner`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.inner = Singular()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.fc(x))


class FixedBatch(nn.Module):
    """The batch size is written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).reshape(2, 2, 2)


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 0 else x


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class RightForTwo(nn.Module):
    """Takes another path while it is exported, which is right for a batch of two only."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if torch.compiler.is_exporting() else x * x.shape[0]
