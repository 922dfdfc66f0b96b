"""Random networks in another style than `random.py`: functions on bare parameters instead of layers.

A program is a list of steps on values of shape (batch, nodes, channels): einsum, `functional_call`, scatters along
nodes, fold and unfold, weights shared with their transposes, complex numbers, writes into views, parametrisations, and
results in any container. Sizes are read from tensors, as such code does. Nothing takes a statistic over channels, and
what is zero stays zero until it is multiplied away, so zeroed channels are an exact reference.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from .random_blocks import Rng, pick
from .registry import BATCH

NODES = (2, 3)  # as an image; 6 in a row
WIDEST = 20
Weights = Mapping[str, Any]
Function = Callable[..., Tensor]


class Squashed(nn.Module):
    """A parametrisation that leaves zeros where they are."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.8 * torch.tanh(weight)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclasses.dataclass
class Record:
    value: Tensor
    more: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Step:
    kind: str
    sources: tuple[int, ...]
    key: str
    factor: float


class Program(nn.Module):
    """Steps, each on some of the values before it; the input is value 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.inner = nn.ParameterDict(), nn.ModuleDict()
        self.register_buffer("targets", torch.tensor([2, 0, 1, 2, 5, 0]))
        self.steps: list[Step] = []
        self.results: list[int] = []
        self.form = "tensor"

    def of(self, key: str) -> Weights:
        """The weights of one step, by their short names."""
        found = {n.rpartition("_")[2]: w for n, w in self.weights.items() if n.startswith(f"{key}_")}
        if key in self.inner:
            found["inner"] = self.inner[key]
        return {**found, "targets": self.targets}

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for step in self.steps:
            made = STEPS[step.kind](self.of(step.key), *[values[i] for i in step.sources])
            values.append(made * step.factor if step.factor != 1 else made)
        first, *others = [values[i] for i in self.results]
        if self.form == "tuple":
            return (first, *others)
        if self.form == "pair":
            return Pair(first, others[0] if others else first.mean(1))
        if self.form == "record":
            return Record(first, {f"more{i}": value for i, value in enumerate(others)})
        if self.form == "nest":
            return {"a": [first, {"b": tuple(others)}]}
        return first


def _weight(rng: Rng, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / np.sqrt(max(1, shape[-2] if len(shape) > 1 else 1)))


# Each: from the weights of a step and its values to a value.


def _einsum(w: Weights, x: Tensor) -> Tensor:
    return torch.einsum("bnc,cd->bnd", x, w["w"]) + w["b"]


def _ellipsis(w: Weights, x: Tensor) -> Tensor:
    return torch.einsum("...c,dc->...d", x, w["w"]).relu()


def _heads(w: Weights, x: Tensor) -> Tensor:
    return torch.einsum("bhnd,hdc->bnc", torch.einsum("bnc,hcd->bhnd", x, w["w"]).relu(), w["v"])


def _attention(w: Weights, x: Tensor) -> Tensor:
    q, k, v = torch.einsum("bnc,shcd->sbhnd", x, w["w"]).unbind(0)
    share = (0.3 * torch.einsum("bhnd,bhmd->bhnm", q, k)).softmax(-1)
    return torch.einsum("bhnm,bhmd,hdc->bnc", share, v, w["v"])


def _trilinear(w: Weights, x: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("bnc,bnd,cde->bne", x, y, w["w"])


def _tied(w: Weights, x: Tensor) -> Tensor:
    return (x @ w["w"] + w["b"]).relu() @ w["w"].T


def _tied_linear(w: Weights, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, w["w"]).tanh(), w["w"].t(), w["b"])


def _called(w: Weights, x: Tensor) -> Tensor:
    inner = w["inner"]
    return functional_call(inner, {name: 0.9 * weight for name, weight in inner.named_parameters()}, (x,))


def _replaced(w: Weights, x: Tensor) -> Tensor:
    """Weights from elsewhere in the place of a layer's own."""
    return functional_call(w["inner"], {"weight": w["w"].T, "bias": w["b"]}, (x,))


def _parametrised(w: Weights, x: Tensor) -> Tensor:
    return w["inner"](x).relu()


def _scatter_add(w: Weights, x: Tensor) -> Tensor:
    to = w["targets"][None, :, None].expand_as(x)
    return torch.zeros_like(x).scatter_add(1, to, x) + x


def _scatter_mean(w: Weights, x: Tensor) -> Tensor:
    to = w["targets"].view(1, -1, 1).expand(x.shape)
    return x.new_zeros(x.shape).scatter_reduce(1, to, x, "mean", include_self=False)


def _index_add(w: Weights, x: Tensor) -> Tensor:
    return torch.zeros_like(x).index_add_(1, w["targets"], x).index_select(1, w["targets"])


def _gather(w: Weights, x: Tensor) -> Tensor:
    return x.gather(1, w["targets"][None, :, None].expand(x.shape[0], -1, x.shape[2])) - 0.5 * x


def _windows(w: Weights, x: Tensor) -> Tensor:
    return torch.einsum("bnck,ckd->bnd", F.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1), w["w"])


def _columns(w: Weights, x: Tensor) -> Tensor:
    image = x.transpose(1, 2).unflatten(2, NODES)
    columns = w["w"] @ F.unfold(image, 3, padding=1)
    return columns.relu().transpose(1, 2)


def _fold(w: Weights, x: Tensor) -> Tensor:
    return F.fold(w["w"] @ x.transpose(1, 2), NODES, 3, padding=1).flatten(2).transpose(1, 2)


def _wide(x: Tensor) -> Tensor:
    """In a precision that has complex numbers."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rotated(w: Weights, x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(_wide(x).unflatten(-1, (-1, 2)).contiguous())
    angles = torch.arange(x.shape[1], device=x.device, dtype=pairs.real.dtype)[:, None] * 0.7
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(2).to(x.dtype)


def _spectrum(w: Weights, x: Tensor) -> Tensor:
    wave = torch.fft.rfft(_wide(x), dim=1) * torch.view_as_complex(_wide(w["w"]))
    return torch.fft.irfft(wave, n=x.shape[1], dim=1).to(x.dtype)


def _written(w: Weights, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:] += 0.5 * x[:, :-1]
    y[:, 0].mul_(w["g"])
    return y


def _halves(w: Weights, x: Tensor) -> Tensor:
    y = x * w["g"]
    half = y.shape[-1] // 2
    first = y[..., :half]
    first.mul_(-0.5)
    y[..., half:].add_(first)
    return y


def _filled(w: Weights, x: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], x.shape[1], w["w"].shape[1])
    y.copy_(x @ w["w"])
    y.view(-1, y.shape[-1])[0].zero_()
    return y.relu_()


def _convolved(w: Weights, x: Tensor) -> Tensor:
    return F.conv1d(x.mT, w["w"], w["b"], padding=1).mT


def _depthwise(w: Weights, x: Tensor) -> Tensor:
    return F.conv1d(x.mT, w["w"], padding=1, groups=x.shape[2]).mT + x


def _tensordot(w: Weights, x: Tensor) -> Tensor:
    return torch.tensordot(x, w["w"], dims=([2], [0])).tanh()


def _addmm(w: Weights, x: Tensor) -> Tensor:
    return torch.addmm(w["b"], x.flatten(0, 1), w["w"]).unflatten(0, x.shape[:2])


def _gated(w: Weights, x: Tensor) -> Tensor:
    return x * torch.sigmoid(x.mean(1, keepdim=True) @ w["w"])


def _moved(w: Weights, x: Tensor) -> Tensor:
    return x.roll(1, 1).cumsum(1).flip(1)


def _joined(w: Weights, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, y], -1)


def _added(w: Weights, x: Tensor, y: Tensor) -> Tensor:
    return torch.add(x, y @ w["w"], alpha=0.5)


def _times(w: Weights, x: Tensor, y: Tensor) -> Tensor:
    return torch.addcmul(x, x, torch.einsum("bnd,dc->bnc", y, w["w"]).sigmoid())


STEPS: dict[str, Function] = {
    function.__name__[1:]: function
    for function in (
        _einsum, _ellipsis, _heads, _attention, _trilinear, _tied, _tied_linear, _called, _replaced, _parametrised,
        _scatter_add, _scatter_mean, _index_add, _gather, _windows, _columns, _fold, _rotated, _spectrum, _written,
        _halves, _filled, _convolved, _depthwise, _tensordot, _addmm, _gated, _moved, _joined, _added, _times,
    )
}  # fmt: skip
_OF_TWO = ("trilinear", "joined", "added", "times")
_EVEN = ("rotated", "halves")


def _weights(rng: Rng, kind: str, c: int, d: int, other: int) -> tuple[dict[str, nn.Parameter], nn.Module | None]:
    """What a step of this kind has, from `c` channels (and `other` of the second value) to `d`."""
    heads = int(rng.integers(2, 4))
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "einsum": {"w": (c, d), "b": (d,)}, "ellipsis": {"w": (d, c)},
        "heads": {"w": (heads, c, 4), "v": (heads, 4, d)},
        "attention": {"w": (3, heads, c, 4), "v": (heads, 4, d)}, "trilinear": {"w": (c, other, d)},
        "tied": {"w": (c, d), "b": (d,)}, "tied_linear": {"w": (d, c), "b": (c,)}, "replaced": {"w": (c, d), "b": (d,)},
        "windows": {"w": (c, 3, d)}, "columns": {"w": (d, 9 * c)}, "fold": {"w": (9 * d, c)},
        "spectrum": {"w": (NODES[0] * NODES[1] // 2 + 1, c, 2)}, "written": {"g": (c,)}, "halves": {"g": (c,)},
        "filled": {"w": (c, d)}, "convolved": {"w": (d, c, 3), "b": (d,)}, "depthwise": {"w": (c, 1, 3)},
        "tensordot": {"w": (c, d)}, "addmm": {"w": (c, d), "b": (d,)}, "gated": {"w": (c, c)},
        "added": {"w": (other, c)}, "times": {"w": (other, c)},
    }  # fmt: skip
    inner: nn.Module | None = None
    if kind == "called":
        inner = nn.Sequential(nn.Linear(c, d), pick(rng, [nn.GELU(), nn.SiLU()]), nn.Linear(d, c))
    elif kind == "replaced":
        inner = nn.Linear(c, d)
    elif kind == "parametrised":
        inner = nn.Linear(c, d)
        parametrize.register_parametrization(inner, "weight", Squashed())
    return {name: _weight(rng, *shape) for name, shape in shapes.get(kind, {}).items()}, inner


def random_program(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Program, Tensor]:
    """A program of 4 to 11 steps, in eval mode and this precision, and an example of two samples."""
    rng = np.random.default_rng([seed, 2])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Program()
        example = torch.randn(BATCH, NODES[0] * NODES[1], int(rng.integers(3, 8)))
        values = [example]
        _step(rng, model, values, pick(rng, ["einsum", "tensordot", "ellipsis", "convolved"]), 0)
        for _ in range(int(rng.integers(2, 9))):
            recent = len(values) - 1 if rng.random() < 0.8 else int(rng.integers(1, len(values)))
            _step(rng, model, values, pick(rng, list(STEPS)), recent)
        _finish(rng, model, values)
    return model.to(dtype).eval(), example.to(dtype)


def _step(rng: Rng, model: Program, values: list[Tensor], kind: str, at: int, wide: int = 0) -> None:
    """Append a step, and a value; one of another kind where this takes no such value."""
    sources: tuple[int, ...] = (at,)
    c = values[at].shape[-1]
    if kind in _OF_TWO:
        sources = (at, int(rng.integers(1, len(values))))
    if (kind in _EVEN and c % 2) or (kind == "joined" and sum(values[i].shape[-1] for i in sources) > WIDEST):
        kind, sources = "einsum", (at,)
    d, key = wide or int(rng.integers(4, 17)), f"s{len(model.steps)}"
    d += d % 2 if rng.random() < 0.5 and not wide else 0
    weights, inner = _weights(rng, kind, c, d, values[sources[-1]].shape[-1])
    model.weights.update({f"{key}_{name}": weight for name, weight in weights.items()})
    if inner is not None:
        model.inner[key] = inner
    made = STEPS[kind](model.of(key), *[values[i].clone() for i in sources])
    spread = float(made.std())
    factor = 1.0 if 0.2 < spread < 4 else round(1 / max(spread, 1e-3), 3)
    model.steps.append(Step(kind, sources, key, factor))
    values.append(made * factor)


def _finish(rng: Rng, model: Program, values: list[Tensor]) -> None:
    """Results from the last value and some that nobody reads."""
    read = {i for step in model.steps for i in step.sources}
    loose = [i for i in range(1, len(values) - 1) if i not in read]
    for at in [len(values) - 1, *loose[:2]]:
        _step(rng, model, values, pick(rng, ["einsum", "addmm"]), at, wide=3)
        model.results.append(len(values) - 1)
    model.form = pick(rng, ["tuple", "record", "nest", "pair"] if len(model.results) > 1 else ["tensor", "pair"])
