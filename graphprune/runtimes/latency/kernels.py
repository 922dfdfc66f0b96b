"""The computations whose time is looked up in a table, as data: what is fixed about them, and their lengths."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from ...errors import GraphPruneError

# Names of the lengths that vary, per operation.
LENGTHS = {
    "conv": ("inputs", "outputs"),
    "depthwise": ("channels",),
    "grouped": ("groups", "inputs per group", "outputs per group"),
    "linear": ("rows", "inputs", "outputs"),
    "matmul": ("batch", "rows", "inner", "columns"),
}
_CONVOLUTIONS = ("conv", "depthwise", "grouped")
_TEXT = re.compile(r"(\w+)\[([^\]]*)\]")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A computation with free lengths.

    `op`: "conv" (all input channels with all output channels), "depthwise" (one input channel per group), "grouped",
    "linear" (x W^T + b with a constant W) or "matmul" (two activations). `shape`: batch and spatial sizes of a
    convolution's input, () otherwise. `kernel`, `stride`, `padding`, `dilation`: of convolutions, one number per axis;
    `output_padding` where it is transposed. `multiplier`: output channels per input channel of "depthwise".
    """

    op: str
    shape: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    multiplier: int = 1

    @property
    def convolution(self) -> bool:
        return self.op in _CONVOLUTIONS

    @property
    def lengths(self) -> tuple[str, ...]:
        """What the numbers in `Sample.lengths` are."""
        return LENGTHS[self.op]

    @property
    def pointwise(self) -> bool:
        """A convolution that looks at one position at a time."""
        return self.convolution and math.prod(self.kernel) == 1

    def __str__(self) -> str:
        """A text that `parse` reads; the key of files."""
        fields = [f.name for f in dataclasses.fields(self) if f.name != "op"]
        shown = []
        for name in fields:
            value = getattr(self, name)
            if value != Kernel.__dataclass_fields__[name].default:
                shown.append(f"{name}={'x'.join(map(str, value)) if isinstance(value, tuple) else int(value)}")
        return f"{self.op}[{' '.join(shown)}]"

    @classmethod
    def parse(cls, text: str) -> Kernel:
        """The kernel of a text made by `str`. Raises GraphPruneError for anything else."""
        match = _TEXT.fullmatch(text)
        if not match or match[1] not in LENGTHS:
            raise GraphPruneError(f"latency table: {text!r} is no computation that graphprune measures")
        values: dict[str, Any] = {}
        for part in match[2].split():
            name, _, value = part.partition("=")
            field = cls.__dataclass_fields__.get(name)
            if field is None or not re.fullmatch(r"\d+(x\d+)*", value):
                raise GraphPruneError(f"latency table: {text!r} is no computation that graphprune measures")
            numbers = tuple(int(v) for v in value.split("x"))
            scalar = not isinstance(field.default, tuple)
            values[name] = (bool(numbers[0]) if name == "transposed" else numbers[0]) if scalar else numbers
        return cls(match[1], **values)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One kernel at given lengths: something that can be run."""

    kernel: Kernel
    lengths: tuple[int, ...]

    @property
    def work(self) -> float:
        """Multiply-accumulates, roughly: to order and to limit what is measured at once."""
        n = math.prod(self.lengths) * math.prod(self.kernel.kernel or (1,))
        sites = math.prod(self.kernel.shape or (1,))
        return n * sites / (1 if self.kernel.transposed else math.prod(self.kernel.stride or (1,)))

    @property
    def weights(self) -> int:
        """Elements of its weights."""
        k, n = math.prod(self.kernel.kernel or (1,)), self.lengths
        if self.kernel.op == "linear":
            return n[1] * n[2]
        if self.kernel.op == "matmul":
            return n[0] * n[3] * n[2]
        return k * math.prod(n) * (self.kernel.multiplier if self.kernel.op == "depthwise" else 1)
