"""Reading and writing safetensors files with our document in their metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ...errors import GraphPruneError
from ...support.containers import TensorFile, write_tensors
from ...support.types import PathLike
from .document import KEY, Document


def write_file(path: PathLike, tensors: Mapping[str, Tensor], document: Document) -> Path:
    """Write under a temporary name, then give the file its own. Raises GraphPruneError when that fails."""
    return write_tensors(path, tensors, KEY, document.to_json())


class ModelFile(TensorFile):
    """An open file that is whole, with its document.

    Raises GraphPruneError, naming the file, when it cannot be read or is not what it should be.
    """

    def __init__(self, path: PathLike) -> None:
        super().__init__(
            path, KEY, "holds weights, but does not say how they were pruned: graphprune.save did not write it"
        )
        try:
            self.description = Document.from_json(self.document)
        except GraphPruneError as error:
            raise GraphPruneError(f"{self.path}: {error}") from error
