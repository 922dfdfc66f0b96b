"""Reading and writing safetensors files with our document in their metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ...errors import GraphPruneError
from ...support.files import replacing
from ...support.types import PathLike
from .document import KEY, Document


def write_file(path: PathLike, tensors: Mapping[str, Tensor], document: Document) -> Path:
    """Write under a temporary name, then give the file its own. Raises GraphPruneError when that fails."""
    metadata = {"format": "pt", KEY: document.to_json()}
    try:
        with replacing(path) as temporary:
            safetensors.torch.save_file(dict(tensors), temporary, metadata)
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise GraphPruneError(f"the model cannot be written to {path}: {error}") from error
    return Path(path)


class ModelFile:
    """An open file whose header has been read and checked; tensors are read one by one.

    Raises GraphPruneError, naming the file, when it cannot be read or is not what it should be.
    """

    def __init__(self, path: PathLike) -> None:
        try:
            self.path = Path(path)
        except TypeError as error:
            raise GraphPruneError(f"expected the path of a file, got {type(path).__name__}") from error
        try:
            if not self.path.is_file():
                raise GraphPruneError(f"cannot read {self.path}: there is no such file")
            self._file = safetensors.safe_open(self.path, framework="pt", device="cpu")
            self.names = tuple(self._file.keys())
            metadata = self._file.metadata() or {}
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise GraphPruneError(f"{self.path} is no safetensors file, or damaged: {error}") from error
        if KEY not in metadata:
            raise GraphPruneError(
                f"{self.path} holds weights, but does not say how they were pruned: graphprune.save did not write it"
            )
        try:
            self.document = Document.from_json(metadata[KEY])
        except GraphPruneError as error:
            raise GraphPruneError(f"{self.path}: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return tuple(self._file.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """A tensor with memory of its own, not that of the file."""
        try:
            found: Tensor = self._file.get_tensor(name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError,
                safetensors.SafetensorError) as error:  # fmt: skip
            raise GraphPruneError(f"{self.path}: {name} cannot be read: {error}") from error
        return found.clone(memory_format=torch.contiguous_format)
