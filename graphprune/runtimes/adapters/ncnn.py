"""ncnn on CPUs, through pnnx: a .ncnn.param with a .ncnn.bin beside it, in float32, bfloat16 and float16."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ...errors import GraphPruneError
from ..capture import quiet
from .base import Adapter, Opening, Session
from .forms import simpler
from .naming import first_lines, first_of
from .places import place_of
from .source import Source

_DTYPES = {"float32": "f32", "int64": "i64", "int32": "i32"}
# pnnx's number for a value without a batch axis.
_NO_BATCH = 233
_READS = re.compile(r'ex\.input\("(in\d+)", ncnn\.Mat\(in\d+\.numpy\(\), batch_index=(\d+)\)')
_GIVES = re.compile(r"from_numpy\((out\d+)\.numpy\(batch_index=(\d+)\)\)")
_HALVES = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_packed", "use_bf16_storage")


class Ncnn(Adapter):
    """See `base.Adapter`.

    ncnn knows neither how its inputs were shaped nor which of their axes is the batch: that lies in a third file,
    .ncnn.json, without which a file is not opened, because ncnn does not check and reads past the end of what it gets.
    """

    name = "ncnn"
    title = "ncnn"
    suffix = ".ncnn.param"
    form: ClassVar[Literal["onnx", "program"]] = "program"
    packages = (("ncnn", "ncnn"), ("pnnx", "pnnx"))
    extra = "ncnn"
    offered: ClassVar[Mapping[str, str]] = {
        "fp32": "as exported, with ncnn's half precision turned off: by default it rounds the weights of Linear layers",
        "bf16": "the file of fp32, weights and activations held in bfloat16",
        "fp16": "weights in float16, half the size; computed in float16 on ARM CPUs that have it, in float32 elsewhere",
    }
    refused: ClassVar[Mapping[str, str]] = {
        "int8": "ncnn's packages bring no tool that finds the ranges of activations; use onnxruntime, openvino, "
        "executorch or litert",
    }

    def layout(self, precision: str) -> str:
        return "NCHW, channels in groups of 4, 8 or 16"

    def files(self, path: Path) -> tuple[Path, ...]:
        return (_beside(path, ".ncnn.bin"), _beside(path, ".ncnn.json"), path)

    def write(self, source: Source, precision: str, path: Path) -> Sequence[str]:
        folder = path.parent / "pnnx"
        folder.mkdir()
        try:
            program = _check(source)
            shapes = Shapes.of(source, program, _convert(source, program, folder, half=precision == "fp16"))
            layers = [line.split() for line in (folder / "net.ncnn.param").read_text(encoding="utf-8").splitlines()[2:]]
            _check_layers(layers, source)
            _check_integers(layers, shapes)
            binary, described, _ = self.files(path)
            (folder / "net.ncnn.bin").replace(binary)
            shapes.write(described)
            (folder / "net.ncnn.param").replace(path)
        finally:
            shutil.rmtree(folder)
        # Where a layer does not take what it gets, ncnn finds out when it runs.
        try:
            self.open(path, Opening(source.inputs, source.tensors, precision)).run()
        except GraphPruneError as error:
            batch = next(t.shape[0] for t in source.tensors)
            hint = "; its layers may know no batch: give an example of batch size 1" if batch > 1 else ""
            raise GraphPruneError(f"{error}{hint}") from error
        if precision == "fp16" and not _arithmetic():
            return ("ncnn computes in float32 on this CPU: the file is half as large, and no faster",)
        return ()

    def open(self, path: Path, opening: Opening) -> Session:
        return _Opened(path, self.files(path), opening)


@dataclasses.dataclass(frozen=True)
class Value:
    """An input or output: its name, ncnn's name for it (None for an input that nothing reads), and its batch axis."""

    name: str
    blob: str | None
    shape: tuple[int, ...]
    dtype: str
    batch_axis: int | None

    @property
    def batch_index(self) -> int:
        """As ncnn wants it."""
        return _NO_BATCH if self.batch_axis is None else self.batch_axis


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a .ncnn.json says."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    @classmethod
    def of(cls, source: Source, program: Any, script: str) -> Shapes:
        """From the example, the program's results and the Python file that pnnx writes, the one place where it says
        what became of the batch.
        """
        with torch.no_grad():
            results = program(*(t.clone() for t in source.tensors))
        read, given = dict(_READS.findall(script)), dict(_GIVES.findall(script))
        if len(given) != len(source.outputs):
            raise GraphPruneError(
                f"ncnn: pnnx wrote {len(given)} outputs, the model has {len(source.outputs)}; its version may be one "
                f"that graphprune does not know: pip install -U pnnx ncnn"
            )
        inputs = tuple(
            _value(name, f"in{i}", tensor, read)
            for i, (name, tensor) in enumerate(zip(source.inputs, source.tensors, strict=True))
        )
        outputs = tuple(
            _value(name, f"out{i}", tensor, given)
            for i, (name, tensor) in enumerate(zip(source.outputs, results, strict=True))
        )
        for value in outputs:
            if value.dtype != "float32":
                raise GraphPruneError(
                    f"ncnn gives floating-point numbers alone, but output {value.name!r} of the model is "
                    f"{value.dtype}; return what it is computed from"
                )
        return cls(inputs, outputs)

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path, network: Path) -> Shapes:
        """Raises GraphPruneError where it is not what `write` wrote for that network."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(*(tuple(_read_value(item) for item in found[key]) for key in ("inputs", "outputs")))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise GraphPruneError(
                f"{network.name} cannot be opened: {path.name} beside it does not say how its inputs lie "
                f"({type(error).__name__}: {error}); write both with graphprune.export(..., runtime='ncnn')"
            ) from error


def _value(name: str, blob: str, tensor: Tensor, axes: Mapping[str, str]) -> Value:
    axis = int(axes.get(blob, _NO_BATCH))
    return Value(
        name, blob if blob in axes else None, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."),
        None if axis == _NO_BATCH else axis,
    )  # fmt: skip


def _read_value(item: Mapping[str, Any]) -> Value:
    value = Value(item["name"], item["blob"], tuple(map(int, item["shape"])), item["dtype"], item["batch_axis"])
    if not isinstance(value.batch_axis, int | None) or value.dtype not in _DTYPES or not isinstance(value.name, str):
        raise ValueError(f"{value} is not known")
    return value


def _check(source: Source) -> Any:
    """The program as a module that pnnx converts, if ncnn has types for its inputs."""
    for name, tensor in zip(source.inputs, source.tensors, strict=True):
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise GraphPruneError(f"ncnn takes inputs in {known}, but {name!r} is {kind}; convert it before")
        if not 1 <= tensor.ndim <= 5 or not tensor.numel():
            raise GraphPruneError(
                f"ncnn takes inputs of 1 to 4 axes beside the batch, but {name!r} has shape {tuple(tensor.shape)}"
            )
    return simpler(source.exported.module())


def _convert(source: Source, program: Any, folder: Path, *, half: bool) -> str:
    """Let pnnx write "net" into the folder, the many files that it leaves beside it too; its Python file."""
    import pnnx

    try:
        with quiet(), torch.no_grad():
            traced = torch.jit.trace(program, source.tensors, check_trace=False)
            torch.jit.save(traced, folder / "net.pt")
    except Exception as error:
        raise GraphPruneError(f"ncnn: the program cannot be traced for pnnx: {first_lines(error, 1)}") from error
    shapes = ",".join(
        f"[{','.join(map(str, t.shape))}]{_DTYPES[str(t.dtype).removeprefix('torch.')]}" for t in source.tensors
    )
    command = [pnnx.EXEC_PATH, "net.pt", f"inputshape={shapes}", "device=cpu", f"fp16={int(half)}"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, encoding="utf-8", errors="replace",
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    files = [folder / name for name in ("net.ncnn.param", "net.ncnn.bin", "net_ncnn.py")]
    if done.returncode or not all(file.is_file() for file in files):
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        how = f"was ended by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
        why = first_of(said[-1]) if said else "it gives no reason"
        raise GraphPruneError(f"ncnn: pnnx {how} and wrote no network: {why}")
    return files[-1].read_text(encoding="utf-8")


def _check_layers(layers: Sequence[Sequence[str]], source: Source) -> None:
    """pnnx leaves operators that ncnn does not have in the file."""
    import ncnn

    kinds = dict.fromkeys(layer[0] for layer in layers if layer)
    unknown = [kind for kind in kinds if ncnn.layer_to_index(kind) < 0]
    if unknown:
        # Expressions are what such operators are given.
        own = [kind for kind in unknown if not kind.startswith("pnnx.")] or unknown
        places = [f"{kind}{place_of(source.exported, kind)}" for kind in own]
        raise GraphPruneError(
            f"ncnn has no layer for {', '.join(places)}; replace it in the model, or use another runtime"
        )


def _check_integers(layers: Sequence[Sequence[str]], shapes: Shapes) -> None:
    """Other layers than tables take the bits of integers for those of floating-point numbers."""
    integers = {value.blob: value.name for value in shapes.inputs if value.dtype != "float32"}
    for kind, name, count, _, *blobs in layers:
        taken = [blob for blob in blobs[: int(count)] if blob in integers]
        if kind == "Split":
            integers.update(dict.fromkeys(blobs[int(count) :], integers[taken[0]]) if taken else {})
        elif taken and kind != "Embed":
            raise GraphPruneError(
                f"ncnn looks up integers in embeddings and computes with none, but input {integers[taken[0]]!r} goes "
                f"into layer {name!r} ({kind}); give it in float32"
            )


def _arithmetic() -> bool:
    """Whether ncnn computes in float16 on this CPU."""
    import ncnn

    return bool(ncnn.cpu_support_arm_asimdhp())


class _Opened(Session):
    def __init__(self, path: Path, files: Sequence[Path], opening: Opening) -> None:
        import ncnn

        binary, described, _ = files
        self._shapes = Shapes.read(described, path)
        self._precision = opening.precision
        if tuple(value.name for value in self._shapes.inputs) != opening.names:
            raise GraphPruneError(
                f"{path.name} has the inputs {[value.name for value in self._shapes.inputs]}, got {list(opening.names)}"
            )
        self._net = ncnn.Net()
        self._net.opt.num_threads = opening.threads
        for option in _HALVES:
            setattr(self._net.opt, option, opening.precision in option)
        # One after the other: where the first fails, the second would read into nothing.
        if self._net.load_param(str(path)) or self._net.load_model(str(binary)):
            raise GraphPruneError(
                f"ncnn cannot load {path.name} with {binary.name}: they are damaged, or of two networks"
            )
        self.load(opening.tensors)

    def load(self, tensors: Sequence[Tensor]) -> None:
        self._inputs = [
            (value.blob, _mat(value, tensor))
            for value, tensor in zip(self._shapes.inputs, tensors, strict=True)
            if value.blob is not None
        ]

    def run(self) -> None:
        with self._net.create_extractor() as extractor:
            for blob, mat in self._inputs:
                extractor.input(blob, mat)
            self._found = [extractor.extract(value.blob) for value in self._shapes.outputs]
        if any(failed for failed, _ in self._found):
            raise GraphPruneError(f"ncnn cannot run the network on these inputs: it fails {self._fails()}")

    def _fails(self) -> str:
        """The first layer that fails: whatever comes after it does so too."""
        with self._net.create_extractor() as extractor:
            extractor.set_light_mode(False)
            for blob, mat in self._inputs:
                extractor.input(blob, mat)
            for layer in self._net.layers():
                for top in layer.tops:
                    if extractor.extract(self._net.blobs()[top].name)[0]:
                        return f"in layer {layer.name!r} ({layer.type})"
        return "somewhere"

    def outputs(self) -> list[Tensor]:
        return list(self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        for value, (_, mat) in zip(self._shapes.outputs, self._found, strict=True):
            # A copy: the memory is ncnn's.
            array = np.array(mat.numpy(batch_index=value.batch_index))
            if array.size != np.prod(value.shape, dtype=int):
                raise GraphPruneError(
                    f"ncnn gives output {value.name!r} the shape {array.shape}, the model {value.shape}"
                )
            # Axes of length 1 get lost on the way.
            yield torch.from_numpy(array.reshape(value.shape))

    def in_force(self) -> str:
        if self._precision == "fp16":
            return "float16" if _arithmetic() else "float32, weights in float16"
        return {"fp32": "float32", "bf16": "bfloat16, weights and activations"}[self._precision]


def _mat(value: Value, tensor: Tensor) -> Any:
    import ncnn

    if tuple(tensor.shape) != value.shape or str(tensor.dtype).removeprefix("torch.") != value.dtype:
        raise GraphPruneError(
            f"the ncnn network was written for input {value.name!r} of shape {value.shape} in {value.dtype}, got "
            f"{tuple(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}; write one for it"
        )
    array = tensor.detach().cpu().contiguous().numpy()
    if array.dtype == np.int64:
        if array.min() < np.iinfo(np.int32).min or array.max() > np.iinfo(np.int32).max:
            raise GraphPruneError(f"ncnn has integers of 32 bits: input {value.name!r} holds larger ones")
        array = array.astype(np.int32)
    # A clone has its memory to itself: layers that write into their input look at how many share it.
    return ncnn.Mat(array, batch_index=value.batch_index).clone()


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name.removesuffix(".ncnn.param") + suffix)
