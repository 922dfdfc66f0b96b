"""Small networks with lively batch norms, as sources that adapters write from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.runtimes import export_onnx
from graphprune.runtimes.adapters import Adapter, Opening, Session
from graphprune.runtimes.adapters.source import Source, write_batches
from graphprune.runtimes.arguments import FlatArguments, named_outputs
from graphprune.runtimes.capture import inference_state
from graphprune.runtimes.programs import save_program
from tests.runtimes.nets import lively_statistics


class Residual(nn.Module):
    """A shortcut around two convolutions, a mean and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.first = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y = self.first_norm(self.first(x)).relu()
        x = (x + self.second_norm(self.second(y))).relu()
        return self.head(x.mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted bottleneck, with ReLU6 and strides."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU6(),
            nn.Conv2d(16, 16, 3, 2, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
            nn.Conv2d(16, 12, 1, bias=False), nn.BatchNorm2d(12), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(12, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class Tokens(nn.Module):
    """Attention over tokens; a second input, and a second result of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.after = nn.LayerNorm(16)
        self.up = nn.Linear(16, 40)
        self.down = nn.Linear(40, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        x = x + shift.unsqueeze(1)
        batch, length, width = x.shape
        q, k, v = self.qkv(self.before(x)).reshape(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(y)
        x = x + self.down(F.gelu(self.up(self.after(x))))
        return x, self.head(x.mean(1))


def _image(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, 12, 12, generator=generator),)


def _tokens(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return torch.randn(batch, 6, 16, generator=generator), torch.randn(batch, 16, generator=generator)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, torch.Generator], tuple[Tensor, ...]]]] = {
    "residual": (Residual, _image),
    "depthwise": (Depthwise, _image),
    "tokens": (Tokens, _tokens),
}


class Case:
    """A network, and what adapters write it from, made when it is asked for."""

    def __init__(self, name: str, folder: Path) -> None:
        kind, self._make = NETWORKS[name]
        torch.manual_seed(0)
        self.model = lively_statistics(kind().eval())
        self._folder = folder
        self._sources: dict[tuple[str, bool], Source] = {}

    def inputs(self, seed: int, batch: int = 2) -> tuple[Tensor, ...]:
        return self._make(batch, torch.Generator().manual_seed(seed))

    def expected(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return expected(self.model, tensors)

    def source(self, adapter: Adapter) -> Source:
        key = adapter.form, adapter.any_batch
        if key not in self._sources:
            folder = self._folder / f"{adapter.form}-{adapter.any_batch}"
            folder.mkdir()
            calibration = [self.inputs(seed) for seed in range(2, 10)]
            self._sources[key] = source(
                self.model, self.inputs(1), folder, calibration=calibration, form=adapter.form,
                any_batch=adapter.any_batch,
            )  # fmt: skip
        return self._sources[key]


def source(
    model: nn.Module,
    example: tuple[Tensor, ...],
    folder: Path,
    *,
    calibration: Sequence[Sequence[Tensor]] | None = None,
    form: Literal["onnx", "program"] = "onnx",
    any_batch: bool = True,
    **export: Any,
) -> Source:
    """What `graphprune.export` hands to an adapter."""
    arguments = FlatArguments.of(example, model)
    file = folder / f"network.{form}"
    if form == "onnx":
        export_onnx(model, example, file, dynamic_batch=any_batch, check=False, **export)
    else:
        with inference_state(model):
            save_program(model, arguments, file, any_batch=any_batch)
    with torch.no_grad():
        names, _ = named_outputs(model(*example), arguments.names)
    return Source(
        arguments.names,
        tuple(names),
        write_batches(folder / "example", [arguments.tensors]),
        file if form == "onnx" else None,
        file if form == "program" else None,
        None if calibration is None else write_batches(folder / "calibration", calibration),
        any_batch,
    )


def expected(model: nn.Module, tensors: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return named_outputs(model(*tensors))[1]


def open_file(adapter: Adapter, path: Path, source: Source, tensors: Sequence[Tensor], precision: str) -> Session:
    return adapter.open(path, Opening(source.inputs, tuple(tensors), precision))


def outputs(session: Session) -> list[Tensor]:
    session.run()
    return session.outputs()


def l2(actual: Tensor, wanted: Tensor) -> float:
    return float((actual.double() - wanted.double()).norm() / wanted.double().norm())
