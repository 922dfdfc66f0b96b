"""The sparse file: magic, header, streams, digest. docs/sparse-format.md describes it for other programs."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import GraphPruneError
from ..support.documents import from_json
from ..support.files import as_path, read_bytes, replacing
from ..support.types import PathLike
from .encoding import DamagedError, Entry, entry_from_list, entry_to_list, inflate

MAGIC = b"\x89GPSPARSE\x01\r\n"
_LENGTHS = struct.Struct("<QQ")  # the compressed header, and the header
_DIGEST = hashlib.sha256
_DIGEST_SIZE = 32
_LARGEST_HEADER = 16 * 2**20

Encoded = tuple[Entry, bytes, bytes]


def write_file(path: PathLike, tensors: Iterable[Encoded]) -> Path:
    """Write a sparse file under a temporary name, then give it its own."""
    parts = list(tensors)
    header = json.dumps([entry_to_list(entry) for entry, _, _ in parts], separators=(",", ":")).encode()
    if len(header) > _LARGEST_HEADER:
        raise GraphPruneError(f"cannot write {path}: the names and shapes of {len(parts)} tensors exceed 16 MiB")
    packed = zlib.compress(header, 9)
    with replacing(path) as temporary, temporary.open("wb") as file:
        digest = _DIGEST()
        for part in (MAGIC, _LENGTHS.pack(len(packed), len(header)), packed, *(s for _, a, b in parts for s in (a, b))):
            file.write(part)
            digest.update(part)
        file.write(digest.digest())
    return Path(path)


class SparseFile:
    """A sparse file in memory, checked but not expanded: its digest, its header, and that the lengths add up.

    Raises GraphPruneError when it cannot be read and DamagedError, which is one, when it is not what it should be.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = as_path(path)
        self._data = memoryview(read_bytes(self.path))
        self.size = len(self._data)
        try:
            self.entries = self._read_header()
        except DamagedError as error:
            raise DamagedError(f"{self.path}: {error}") from error

    def _read_header(self) -> list[Entry]:
        data, start = self._data, len(MAGIC) + _LENGTHS.size
        if bytes(data[: len(MAGIC)]) != MAGIC:
            raise DamagedError("this is no sparse file of graphprune (or of a later version)")
        if len(data) < start + _DIGEST_SIZE:
            raise DamagedError("the file is damaged: it ends early")
        if _DIGEST(data[:-_DIGEST_SIZE]).digest() != bytes(data[-_DIGEST_SIZE:]):
            raise DamagedError("the file is damaged: its contents do not match its digest; fetch or save it again")
        packed, length = _LENGTHS.unpack(data[len(MAGIC) : start])
        if length > _LARGEST_HEADER or packed > len(data) - start - _DIGEST_SIZE:
            raise DamagedError("the header is damaged: it is longer than the file, or than 16 MiB")
        header = inflate(bytes(data[start : start + packed]), length, length, "header")
        try:
            listed = from_json(header)
        except GraphPruneError as error:
            raise DamagedError(f"the header is damaged: {error}") from error
        if not isinstance(listed, list):
            raise DamagedError("the header is damaged: it is no list")
        entries = [entry_from_list(item) for item in listed]
        names = {entry.name for entry in entries}
        if len(names) != len(entries):
            raise DamagedError("the header is damaged: a name appears twice")
        self._start = start + packed
        if self._start + sum(e.places + e.values for e in entries) != len(data) - _DIGEST_SIZE:
            raise DamagedError("the header is damaged: its lengths do not add up to the file's")
        return entries

    def streams(self) -> Iterator[tuple[Entry, bytes, bytes]]:
        """Every entry with its compressed places and values."""
        at = self._start
        for entry in self.entries:
            middle, end = at + entry.places, at + entry.places + entry.values
            yield entry, bytes(self._data[at:middle]), bytes(self._data[middle:end])
            at = end
