"""Models by name, as the command line knows them: `module:function`, shapes of example inputs, safetensors files."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import GraphPruneError
from ..runtimes.adapters import RUNTIMES
from ..support.files import check_source
from ..support.types import PathLike
from ..support.unwrapping import checked_model
from ..synthesis import Synthetic

_DTYPES = {
    name: getattr(torch, name)
    for name in "float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64".split()
}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a factory made. `example` is None where it made only a model."""

    spec: str
    model: nn.Module
    example: Any

    def input(self, shapes: Sequence[InputShape], seed: int = 0) -> Any:
        """The example input: of the given shapes, else the factory's own.

        Raises:
            GraphPruneError: there is neither.
        """
        if shapes:
            return tuple(shape.tensor(self.model, seed + i) for i, shape in enumerate(shapes))
        if self.example is None:
            raise GraphPruneError(
                f"{self.spec} returns a model without an example input; add --input-shape, such as 1,3,224,224, "
                "or let it return (model, example_input)"
            )
        return self.example


@dataclasses.dataclass(frozen=True)
class InputShape:
    """The shape of one input tensor, and its data type; None for that of the model's parameters."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None

    @classmethod
    def parse(cls, text: str) -> InputShape:
        """From "1,3,224,224" or "1,128:int64". Raises ValueError for anything else."""
        sizes, _, name = text.partition(":")
        if name and name not in _DTYPES:
            raise ValueError(f"{name!r} is no data type; known are {', '.join(_DTYPES)}")
        try:
            shape = tuple(int(size) for size in sizes.split(","))
        except ValueError:
            raise ValueError(f"{text!r} is no shape; write 1,3,224,224, or 1,128:int64 for integers") from None
        if any(size < 1 for size in shape):
            raise ValueError(f"{text!r} is no shape; every size must be at least 1")
        return cls(shape, _DTYPES[name] if name else None)

    def tensor(self, model: nn.Module | None = None, seed: int = 0) -> Tensor:
        """Normal random numbers drawn from `seed`; zeros for integers, which are valid indices of any table."""
        first = next((p for p in model.parameters() if p.is_floating_point()), None) if model is not None else None
        device = first.device if first is not None else torch.device("cpu")
        dtype = self.dtype or (first.dtype if first is not None else torch.float32)
        if device.type == "meta":
            return torch.empty(self.shape, dtype=dtype, device=device)
        if not (dtype.is_floating_point or dtype.is_complex):
            return torch.zeros(self.shape, dtype=dtype, device=device)
        wide = torch.complex64 if dtype.is_complex else torch.float32
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.shape, generator=generator, dtype=wide).to(device=device, dtype=dtype)


def load_data(spec: str, *, seed: int = 0) -> tuple[Any, Any]:
    """Training batches and held-out batches (None without) that a function makes; see `load_factory` for `spec`.
    "synthetic" and "synthetic:64": that many inputs (512) made from the model itself.

    The function returns an iterable of batches (inputs, targets), or a tuple of two of them.

    Raises:
        GraphPruneError: there is no such function, or it fails or returns something else.
    """
    if spec.partition(":")[0] == "synthetic":
        return _synthetic(spec, seed), None
    made = _made(spec, "data", "my_data:loaders", seed)
    pair = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    for part in pair:
        if part is not None and (isinstance(part, (str, Mapping)) or not isinstance(part, Iterable)):
            raise GraphPruneError(f"{spec} returned {type(part).__name__}; expected batches, or (training, held-out)")
    return pair


def _synthetic(spec: str, seed: int) -> Synthetic:
    text = spec.partition(":")[2] or "512"
    if not text.isdecimal():
        raise GraphPruneError(f"{spec!r}: write synthetic, or synthetic:64 for so many inputs made from the model")
    return Synthetic(int(text), seed=seed)


def load_factory(spec: str, *, weights: PathLike | None = None, seed: int = 0) -> Loaded:
    """Import `module`, call `function` without arguments, and load `weights` into the model that it returns.

    `spec`: "module:function". The current directory is searched first. The function (or class, or attribute of one:
    "module:Class.method") returns a module, or a pair (module, example input); a module itself is taken as it is. The
    random state is seeded before, so that the same spec and seed give the same random weights.

    Raises:
        GraphPruneError: the module cannot be imported, has no such function, the function fails or returns something
            else, or the weights do not fit.
    """
    made = _made(spec, "model", "torchvision.models:resnet18", seed)
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    try:
        model = checked_model(model, f"what {spec} returned")
    except GraphPruneError as error:
        raise GraphPruneError(f"{error}; the function returns a model, or a pair (model, example input)") from error
    if weights is not None:
        load_weights(model, weights)
    return Loaded(spec, model, example)


def _made(spec: str, what: str, example: str, seed: int) -> Any:
    """What the function of that name returns; a module of that name as it is."""
    module_name, _, path = spec.partition(":")
    if not module_name or not path:
        raise GraphPruneError(f"{spec!r} names no {what}; write module:function, such as {example}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    torch.manual_seed(seed)
    module = _import(module_name)
    torch.manual_seed(seed)  # the module may have drawn numbers, but only if this was its first import
    try:
        made = functools.reduce(getattr, path.split("."), module)
    except AttributeError as error:
        raise GraphPruneError(f"{spec}: {error}") from error
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise GraphPruneError(f"{spec} is no function but {type(made).__name__}")
        try:
            made = made()
        except Exception as error:
            raise GraphPruneError(f"{spec}: calling it without arguments failed: {_told(error)}") from error
    return made


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise GraphPruneError(
                f"there is no module {error.name!r}, neither installed nor in {os.getcwd()}"
            ) from error
        raise GraphPruneError(f"importing {name} failed: {_told(error)}") from error
    except Exception as error:
        raise GraphPruneError(f"importing {name} failed: {_told(error)}") from error


def _told(error: BaseException) -> str:
    """Type, message and the last line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def common_input(loaded: Sequence[Loaded], files: Sequence[str], shapes: Sequence[InputShape], seed: int = 0) -> Any:
    """One example input for several models: of the given shapes, else the first that a factory made, else what the
    first ONNX file says (its batch size 1 where that is free).

    Raises:
        GraphPruneError: there is none, or a file leaves sizes other than the batch open or is no ONNX file.
    """
    if not shapes:
        for made in loaded:
            if made.example is not None:
                return made.example
    if loaded:
        return loaded[0].input(shapes, seed)
    if shapes:
        return tuple(shape.tensor(None, seed + i) for i, shape in enumerate(shapes))
    others = tuple(kind.suffix for kind in RUNTIMES.values() if kind.suffix != ".onnx")
    named = [path for path in files if not str(path).endswith(others)]
    if not named:
        raise GraphPruneError(f"{files[0]} does not say what its inputs are; add --input-shape")
    return _file_input(named[0], seed)


def _file_input(path: str, seed: int) -> dict[str, Tensor]:
    import onnx

    try:
        graph = onnx.load(check_source(path), load_external_data=False).graph
    except Exception as error:
        raise GraphPruneError(f"{path} cannot be read as an ONNX file: {error}") from error
    weights = {tensor.name for tensor in graph.initializer}
    example = {}
    for i, value in enumerate(entry for entry in graph.input if entry.name not in weights):
        kind = value.type.tensor_type
        sizes = [dim.dim_value for dim in kind.shape.dim]
        if sizes and sizes[0] < 1:
            sizes[0] = 1
        name = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
        dtype = _DTYPES.get({"float": "float32"}.get(name, name))
        if dtype is None or any(size < 1 for size in sizes):
            raise GraphPruneError(f"{path} does not fix the shape of its input {value.name!r}; add --input-shape")
        example[value.name] = InputShape(tuple(sizes), dtype).tensor(None, seed + i)
    return example


def load_weights(model: nn.Module, path: PathLike) -> None:
    """Load the tensors of a safetensors file into `model`. Tied tensors need to be in the file once.

    Raises:
        GraphPruneError: no such file, no safetensors file, or a name or shape that does not fit.
    """
    try:
        found = safetensors.torch.load_file(check_source(path))
    except (OSError, GraphPruneError, safetensors.SafetensorError) as error:
        raise GraphPruneError(f"the weights {path} cannot be read: {error}") from error
    wanted = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    for name, tensor in found.items():
        if name not in wanted:
            raise GraphPruneError(f"the weights {path} do not fit: the model has no {name!r}")
        if tensor.shape != wanted[name].shape:
            raise GraphPruneError(
                f"the weights {path} do not fit: {name!r} has shape {tuple(tensor.shape)} in the file and "
                f"{tuple(wanted[name].shape)} in the model"
            )
    there = {id(wanted[name]) for name in found}
    for name, tensor in wanted.items():
        if id(tensor) not in there:
            raise GraphPruneError(f"the weights {path} do not fit: {name!r} is not in the file")
        if tensor.is_meta:
            raise GraphPruneError(f"weights cannot be loaded: {name!r} is on the meta device; build a real model")
    model.load_state_dict(found, strict=False)


__all__ = ["InputShape", "Loaded", "load_factory", "load_weights"]
