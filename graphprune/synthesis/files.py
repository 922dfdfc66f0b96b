"""Inputs that were made, batch by batch in a safetensors file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraphPruneError
from ..support.files import check_target
from ..support.runs import counted, read_run, score, write_run
from ..support.types import PathLike
from ..support.walking import named_tensors
from .form import Form
from .made import Batch, unique_tensors

_KEY = "graphprune.inputs/1"
_MOST = 2**31


def fingerprint(model: nn.Module, form: Form) -> str:
    """SHA-256 of all that a network holds, of what stays of the example, and of the shapes of the rest."""
    digest = hashlib.sha256()
    for name, tensor in named_tensors(model).items():
        digest.update(name.encode())
        _add(digest, tensor, True)
    for place, tensor in enumerate(form.tensors):
        _add(digest, tensor, place not in form.free)
    return digest.hexdigest()


def _add(digest: Any, tensor: Tensor, contents: bool) -> None:
    digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    if contents and not tensor.is_meta and tensor.layout is torch.strided:
        flat = tensor.detach().cpu().contiguous().flatten()
        values: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
        digest.update(values)


class Store:
    """The file of a run with these settings; without a path, none.

    Raises GraphPruneError where the path cannot be written, or holds something else, or inputs of another model or of
    other settings.
    """

    def __init__(self, path: PathLike | None, settings: Mapping[str, Any], form: Form) -> None:
        self._path = None if path is None else check_target(path)
        self._settings, self._form = dict(settings), form

    def read(self, lengths: Sequence[int]) -> list[Batch]:
        """The batches that are there, of those of these lengths."""
        found = None if self._path is None else read_run(self._path, _KEY, self._settings)
        if found is None:
            return []
        about, tensors = found
        try:
            done = zip(about["batches"], lengths, strict=False)
            return [self._batch(number, length, one, tensors) for number, (one, length) in enumerate(done)]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise GraphPruneError(f"{self._path} is damaged: {error}; delete it to make its inputs again") from error

    def write(self, batches: Sequence[Batch]) -> None:
        """Replace the file by one of these batches."""
        if self._path is None:
            return
        about = [{"before": _told(b.before), "after": _told(b.after), "steps": b.steps} for b in batches]
        tensors = {
            f"{number}/{place}": tensor
            for number, batch in enumerate(batches)
            for place, tensor in enumerate(unique_tensors(batch.inputs))
        }
        write_run(self._path, _KEY, {"settings": self._settings, "batches": about}, tensors)

    def _batch(self, number: int, length: int, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Batch:
        found = [tensors[f"{number}/{place}"] for place in range(len(self._form.tensors))]
        for one, wanted in zip(found, self._form.tensors, strict=True):
            shape = (length, *wanted.shape[1:]) if self._form.batched(wanted) else wanted.shape
            if one.dtype != wanted.dtype or one.shape != shape:
                raise ValueError(f"batch {number} has a tensor of shape {tuple(one.shape)}")
        figures = [math.nan if (value := score(about[name])) is None else value for name in ("before", "after")]
        placed = [one.to(like.device) for one, like in zip(found, self._form.tensors, strict=True)]
        return Batch(self._form.filled(placed), figures[0], figures[1], counted(about["steps"], _MOST))


def _told(value: float) -> float | None:
    return value if math.isfinite(value) else None
