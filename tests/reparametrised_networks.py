"""Small networks whose weights are computed: a vocoder, a codec, a discriminator, and parametrisations of a user's."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.nn.utils import weight_norm as hooked_weight_norm

Norm = Callable[[nn.Module], nn.Module]


def weight_norms() -> dict[str, Norm]:
    """Weight norm by both of torch's functions, along every kind of axis."""
    found: dict[str, Norm] = {}
    for name, function in (("hook", hooked_weight_norm), ("parametrisation", parametrizations.weight_norm)):
        for dim in (0, 1, 2, None):
            found[f"{name}, dim {dim}"] = lambda m, function=function, dim=dim: function(m, dim=dim)  # type: ignore[misc]
    return found


SPECTRAL_NORMS: dict[str, Norm] = {"hook": hooked_spectral_norm, "parametrisation": parametrizations.spectral_norm}


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters that are not as they were initialised: lengths of directions, gains and biases mean something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + torch.rand(parameter.shape, generator=generator))
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


class _Residual(nn.Module):
    def __init__(self, width: int, dilation: int, norm: Norm) -> None:
        super().__init__()
        self.first = norm(nn.Conv1d(width, width, 3, dilation=dilation, padding=dilation))
        self.second = norm(nn.Conv1d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.leaky_relu(self.first(F.leaky_relu(x, 0.1)), 0.1))


class Vocoder(nn.Module):
    """Mel bands to samples: transposed convolutions, the mean of residual blocks behind each."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.before = norm(nn.Conv1d(8, 32, 7, padding=3))
        self.up = nn.ModuleList(
            [norm(nn.ConvTranspose1d(32, 16, 4, 2, 1)), norm(nn.ConvTranspose1d(16, 8, 4, 2, 1))]
        )
        self.blocks = nn.ModuleList([_Residual(width, d, norm) for width in (16, 8) for d in (1, 3)])
        self.after = norm(nn.Conv1d(8, 1, 7, padding=3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for i, up in enumerate(self.up):
            x = up(F.leaky_relu(x, 0.1))
            x = (self.blocks[2 * i](x) + self.blocks[2 * i + 1](x)) / 2
        return torch.tanh(self.after(F.leaky_relu(x)))


class Snake(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.rand(1, width, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.alpha * x).square() / self.alpha


class Codec(nn.Module):
    """Samples to latents and back: strided encoder, residual stack with a learned periodic activation, decoder."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()

        def block(width: int) -> nn.Sequential:
            wide, narrow = norm(nn.Conv1d(width, width, 7, padding=3)), norm(nn.Conv1d(width, width, 1))
            return nn.Sequential(Snake(width), wide, Snake(width), narrow)

        self.start = norm(nn.Conv1d(1, 8, 7, padding=3))
        self.encode = nn.ModuleList([block(8), block(8)])
        self.down = nn.Sequential(Snake(8), norm(nn.Conv1d(8, 16, 4, 2, 1)))
        self.latent = norm(nn.Conv1d(16, 6, 3, padding=1))
        wide, longer = norm(nn.Conv1d(6, 16, 7, padding=3)), norm(nn.ConvTranspose1d(16, 8, 4, 2, 1))
        self.up = nn.Sequential(wide, Snake(16), longer)
        self.decode = nn.ModuleList([block(8), block(8)])
        self.end = nn.Sequential(Snake(8), norm(nn.Conv1d(8, 1, 7, padding=3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for block in self.encode:
            x = x + block(x)
        x = self.up(self.latent(self.down(x)))
        for block in self.decode:
            x = x + block(x)
        return torch.tanh(self.end(x))


class Discriminator(nn.Module):
    """Images to a score, and the features on the way, as GANs match them."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [norm(nn.Conv2d(3, 16, 3, 2, 1)), norm(nn.Conv2d(16, 32, 3, 2, 1)), norm(nn.Conv2d(32, 32, 3, padding=1))]
        )
        self.score = norm(nn.Linear(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
        return self.score(x.mean((2, 3)))


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """After so many power iterations that spectral norms are what they say."""
    with torch.no_grad():
        for _ in range(300):
            model.train()(x)
        model.eval()(x)
    return model


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


class LowRank(nn.Module):
    """A weight with an adapter of rank 2."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up @ self.down


class Gained(nn.Module):
    """A gain for every output and a buffer of the weight's shape."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(outputs) + 0.5)
        self.register_buffer("base", torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.base) * self.gain[:, None]


class Standardised(nn.Module):
    """Every row of mean 0 and length 1: what it reads cannot go without changing the rest of the row."""

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        return x / x.square().sum(1, keepdim=True).sqrt()


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).T


class Drawn(nn.Module):
    """Another weight each time."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def perceptron(step: nn.Module, width: int = 16, inputs: int = 8) -> nn.Sequential:
    """Three hidden layers, the weight of the middle one computed by `step`."""
    middle = nn.Linear(inputs, width)
    parametrize.register_parametrization(middle, "weight", step)
    return nn.Sequential(
        nn.Linear(6, inputs), nn.ReLU(), middle, nn.ReLU(), nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 3)
    ).eval()
