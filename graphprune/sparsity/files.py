"""save() and load(): sparse models and state dicts as small files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from ..errors import GraphPruneError
from ..support.doors import door
from ..support.suggestions import check_choice
from ..support.types import PathLike
from ..support.unwrapping import checked_model, no_model
from .container import SparseFile, write_file
from .encoding import DamagedError, Entry, decode, encode
from .masks import put_in_force
from .snapshots import PlainState

_SMALLEST_LIMIT = 256 * 2**20
_EXPANSION = 1024  # what zlib itself can reach


@door()
def save(
    model: nn.Module | Mapping[str, Tensor],
    path: PathLike,
    *,
    values: Literal["exact", "float16"] = "exact",
) -> Path:
    """Write a model, or a state dict, to a file that takes little more than its non-zero values; returns the path.

    The names are those of the state dict without masks: masked weights are stored as `fc.weight`, together with
    their masks. Loading gives equal values (a negative zero becomes zero, as 0 == -0). Shared tensors are stored under
    each of their names. `values="float16"` rounds floating-point tensors with at least two axes to float16; they come
    back in their own type. Vectors (biases, norms, running statistics) stay exact.

    The format is described in docs/sparse-format.md. No pickle. A file that is already at `path` is replaced only once
    the new one is complete.

    Raises GraphPruneError for what is no tensor (extra state), for types that cannot be stored, for values beyond
    float16, and when the path cannot be written.
    """
    check_choice("values", values, ("exact", "float16"))
    if isinstance(model, nn.Module):
        state = PlainState.of(checked_model(model))
        tensors: Mapping[str, Any] = state.tensors
        masks = state.masks
    elif isinstance(model, Mapping):
        tensors, masks = model, {}
    else:
        raise no_model(model, "model", "a torch.nn.Module or a state dict")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise GraphPruneError(f"{name!r} is {type(tensor).__name__}: only tensors under names can be stored")
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            raise GraphPruneError(f"{name}: only ordinary tensors with values can be stored")
    return write_file(path, (encode(n, t, masks.get(n), _rounded(t, values)) for n, t in tensors.items()))


def _rounded(tensor: Tensor, values: str) -> bool:
    wide = tensor.is_floating_point() and tensor.dtype.itemsize > 2
    return values == "float16" and wide and tensor.dim() >= 2


@overload
def load(path: PathLike, model: None = None, *, max_bytes: int | None = None) -> dict[str, Tensor]: ...
@overload
def load(path: PathLike, model: nn.Module, *, masks: bool = True) -> nn.Module: ...
@door("model", in_place=True)
def load(
    path: PathLike,
    model: nn.Module | None = None,
    *,
    masks: bool = True,
    max_bytes: int | None = None,
) -> nn.Module | dict[str, Tensor]:
    """Read a file written by `save`: into `model`, which is changed in place and returned, or as a state dict.

    With a model: names, shapes and types must be those of the model, which is checked before anything is read. Masks
    in the file are put in force where `masks` is true (default); with false, or without masks in the file, weights are
    loaded as ordinary values and masks that the model has are made to keep them all.

    Without a model: the tensors by name, on the CPU. As a small file may declare enormous tensors, they may take at
    most `max_bytes` of memory; by default 1,024 times the size of the file, and 256 MiB in any case.

    Raises GraphPruneError for files that are missing, truncated, damaged, or made to mislead, with the model as it was.
    """
    file = SparseFile(path)
    if model is None:
        limit = max(_SMALLEST_LIMIT, _EXPANSION * file.size) if max_bytes is None else max_bytes
        needed = sum(_memory(entry) for entry in file.entries)
        if needed > limit:
            raise DamagedError(
                f"{file.path} of {file.size} bytes declares tensors of {needed} bytes, more than {limit}; if you trust "
                f"it, pass max_bytes={needed}"
            )
        return {name: tensor for name, (tensor, _) in _decoded(file).items()}
    state = PlainState.of(model)
    _check_fit(file, state)
    found = _decoded(file)
    wanted = {name: mask for name, (_, mask) in found.items() if mask is not None and masks}
    work = []
    for name, weight in state.weights.items():
        if name in wanted:
            work.append((weight, wanted[name]))
        elif weight.mask is not None:
            work.append((weight, torch.ones_like(weight.mask)))
    put_in_force(work)  # what can fail comes first
    state.write({name: tensor for name, (tensor, _) in found.items()})
    return model


def _memory(entry: Entry) -> int:
    # an element of any type, and the tensors that tell apart nothing but their names
    return max(entry.dense_bytes, 64)


def _decoded(file: SparseFile) -> dict[str, tuple[Tensor, Tensor | None]]:
    try:
        return {entry.name: decode(entry, places, values) for entry, places, values in file.streams()}
    except DamagedError as error:
        raise DamagedError(f"{file.path}: {error}") from error


def _check_fit(file: SparseFile, state: PlainState) -> None:
    entries = {entry.name: entry for entry in file.entries}
    for name, tensor in state.tensors.items():
        entry = entries.get(name)
        if entry is None:
            raise GraphPruneError(f"{file.path} is of another model: it has no {name}")
        here = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        if here != (entry.dtype, entry.shape):
            raise GraphPruneError(
                f"{file.path} is of another model: {name} is {entry.dtype} {entry.shape}, not {here[0]} {here[1]}"
            )
    for name in entries:
        if name not in state.tensors:
            raise GraphPruneError(f"{file.path} is of another model: this one has no {name}")
