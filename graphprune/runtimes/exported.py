"""What an export has written, checked and found."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from .initializers import Initializers
from .sizes import in_words


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What `export_onnx` wrote. Can be used wherever a path can.

    `inputs`, `outputs`: the names in the file. `dynamic_batch`: whether the first dimension of the inputs that share
    the batch is free. `batch_size`: that of the example. `dynamic_axes`: the names of the free axes of each input, by
    number. `checked_sizes`: the sizes of these in each comparison, by name. `nodes`: in the graph, before ONNX Runtime
    optimises it.
    `size`: bytes on disk, `external_data` (the file beside `path` with the weights, None if they are inside) included.
    `max_relative_error`: max|onnx - torch| / max|torch|, the largest over outputs and `checked_batch_sizes`; None with
    check=False. `initializers`: where the parameters went. `notes`: what weakens the parity check, if anything does.
    """

    path: Path
    opset: int
    dynamic_batch: bool
    batch_size: int | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: int
    size: int
    external_data: Path | None
    max_relative_error: float | None
    tolerance: float
    checked_batch_sizes: tuple[int | None, ...]
    initializers: Initializers
    notes: tuple[str, ...] = ()
    dynamic_axes: Mapping[str, Mapping[int, str]] = dataclasses.field(default_factory=dict)
    checked_sizes: tuple[Mapping[str, int], ...] = ()

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        facts = [f"opset {self.opset}", self._free(), f"{self.nodes} nodes", f"{self.size / 2**20:.2f} MiB"]
        return f"{self.path}: {', '.join([*facts, self._parity()])}" + "".join(f"; {note}" for note in self.notes)

    def _free(self) -> str:
        if not self._only_batch():
            named = {name: ", ".join(f"{a}: {d}" for a, d in own.items()) for name, own in self.dynamic_axes.items()}
            return f"free axes {', '.join(f'{name}[{axes}]' for name, axes in named.items())}"
        return "dynamic batch" if self.dynamic_batch else f"batch size {self.batch_size}"

    def _parity(self) -> str:
        if self.max_relative_error is None:
            return "parity not checked"
        parity = f"relative error {self.max_relative_error:.2g} (allowed {self.tolerance:.2g})"
        if not self._only_batch():
            return f"{parity} at {' and at '.join(in_words(sizes) for sizes in self.checked_sizes)}"
        sizes = ", ".join(str(size) for size in self.checked_batch_sizes if size is not None)
        return parity + (f" at batch size {sizes}" if sizes else "")

    def _only_batch(self) -> bool:
        return all(axes == {0: "batch"} for axes in self.dynamic_axes.values())
