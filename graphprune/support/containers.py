"""Tensors with a document beside them, as a safetensors file whose metadata hold the SHA-256 of all of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import GraphPruneError
from .files import check_source, replacing
from .types import PathLike

DIGEST = "sha256"
_BLANK = "0" * 64
_CHUNK = 2**20
# Readers of safetensors refuse longer headers.
_LONGEST_HEADER = 100_000_000


def write_tensors(path: PathLike, tensors: Mapping[str, Tensor], key: str, document: str) -> Path:
    """Write tensors, and `document` as the entry `key` of the metadata, to a temporary name first. No tensor may share
    its memory with another.

    Raises:
        GraphPruneError: the path cannot be written, or a tensor cannot be stored.
    """
    metadata = {"format": "pt", key: document, DIGEST: _BLANK}
    with replacing(path) as temporary:
        try:
            safetensors.torch.save_file(dict(tensors), temporary, metadata)
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise GraphPruneError(f"cannot write {path}: {error}") from error
        seal(temporary)
    return Path(path)


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values, each contiguous and with memory of its own; a tensor that is so already is not copied."""
    out: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().contiguous()
        storage = value.untyped_storage().data_ptr()
        out[name] = value.clone() if storage in storages else value
        storages.add(storage)
    return out


def seal(path: Path) -> None:
    """Put the digest of a file into the place for it in its header, whatever stands there."""
    with path.open("r+b") as file:
        start = file.read(8)
        header = file.read(int.from_bytes(start, "little"))
        place = re.search(rb'"%b": ?"([0-9a-f]{64})"' % DIGEST.encode(), header)
        if place is None:
            raise GraphPruneError(f"{path} has no place for a digest")
    digest = _digest_of(path, header[place.start(1) : place.end(1)])
    with path.open("r+b") as file:
        file.seek(8 + place.start(1))
        file.write(digest.encode())


def _digest_of(path: Path, noted: bytes) -> str:
    """SHA-256 of a file in whose header zeros stand for the digest that is noted there."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if length > _LONGEST_HEADER:
            raise GraphPruneError("its header is too long")
        found.update(start)
        found.update(file.read(length).replace(noted, _BLANK.encode()))
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


class TensorFile:
    """An open file whose digest is right; `document` is what was written beside the tensors, which are read one by one.

    Raises GraphPruneError, naming the file, when it cannot be read or is not what it should be.
    """

    def __init__(self, path: PathLike, key: str, stranger: str) -> None:
        """`stranger`: what to say of a safetensors file that has no such document."""
        self.path = check_source(path)
        try:
            self._file = safetensors.safe_open(self.path, framework="pt", device="cpu")
            self.names = tuple(self._file.keys())
            metadata = self._file.metadata() or {}
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise GraphPruneError(f"{self.path} is no safetensors file, or damaged: {error}") from error
        if key not in metadata:
            raise GraphPruneError(f"{self.path} {stranger}")
        self.document = metadata[key]
        self._check(metadata.get(DIGEST))

    def _check(self, noted: str | None) -> None:
        if noted is None or not re.fullmatch("[0-9a-f]{64}", noted):
            raise GraphPruneError(
                f"{self.path} has no digest: it is damaged, or was not written by this version of graphprune"
            )
        try:
            found = _digest_of(self.path, noted.encode())
        except OSError as error:
            raise GraphPruneError(f"cannot read {self.path}: {error.strerror or error}") from error
        if found != noted:
            raise GraphPruneError(
                f"{self.path} is damaged, or was changed since it was written: its contents do not match its digest; "
                f"fetch or save it again"
            )

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
