"""A network as the source that an adapter writes from, and what comes out of its file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from graphprune.runtimes import export_onnx
from graphprune.runtimes.adapters import Adapter, Opening
from graphprune.runtimes.adapters.source import Source, write_batches
from graphprune.runtimes.arguments import FlatArguments, named_outputs
from graphprune.runtimes.capture import inference_state
from graphprune.runtimes.programs import save_program


def made(model: nn.Module, inputs: tuple[Tensor, ...], adapter: Adapter, folder: Path, any_batch: bool) -> Source:
    """`any_batch`: where the adapter can."""
    arguments = FlatArguments.of(inputs, model)
    free = any_batch and adapter.any_batch
    with inference_state(model), torch.no_grad():
        names, _ = named_outputs(model(*inputs), arguments.names)
        program = graph = None
        if adapter.form == "program":
            program = save_program(model, arguments, folder / "source.pt2", any_batch=free)
    if adapter.form == "onnx":
        graph = export_onnx(model, inputs, folder / "source.onnx", dynamic_batch=free, check=False).path
    example = write_batches(folder / "example", [arguments.tensors])
    return Source(arguments.names, tuple(names), example, graph, program, None, free)


def written(
    model: nn.Module, inputs: tuple[Tensor, ...], adapter: Adapter, folder: Path, precision: str = "fp32", *,
    any_batch: bool = False,
) -> Path:  # fmt: skip
    """The file, in a folder with nothing else in it."""
    own = folder / f"made-{precision}"
    own.mkdir()
    path = own / f"network{adapter.suffix}"
    adapter.write(made(model.eval(), inputs, adapter, folder, any_batch), precision, path)
    return path


def ran(
    path: Path, model: nn.Module, inputs: tuple[Tensor, ...], adapter: Adapter, precision: str = "fp32"
) -> list[Tensor]:
    """What the file gives."""
    names = FlatArguments.of(inputs, model).names
    session = adapter.open(path, Opening(names, inputs, precision))
    session.run()
    return session.outputs()


def error(actual: Sequence[Tensor], model: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """max|actual - model| / max|model|, the largest over outputs, computed plainly."""
    with torch.no_grad():
        wanted = model(*inputs)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    assert [a.shape for a in actual] == [w.shape for w in wanted]
    return max(float((a - w).abs().max() / w.abs().max()) for a, w in zip(actual, wanted, strict=True))
