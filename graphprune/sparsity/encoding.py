"""One tensor as two compressed streams: where its values are, and the values. See docs/sparse-format.md."""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import GraphPruneError

Bytes = npt.NDArray[np.uint8]
Layout = Literal["dense", "bitmap", "gaps"]
LAYOUTS: tuple[Layout, ...] = ("dense", "bitmap", "gaps")
# Names in the file; all are types whose zero is all bits zero.
DTYPES: dict[str, torch.dtype] = {
    str(t).removeprefix("torch."): t
    for t in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.complex64, torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
_LONGEST_GAP = 255
_FEWEST = 8  # gaps are used for less than one value in so many elements
_LEVEL = 9


class DamagedError(GraphPruneError):
    """The file is no sparse file of graphprune, or is damaged."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the header says of one tensor.

    `dtype`: of the tensor; `stored`: of the values in the file. `count`: how many values are stored. `places` and
    `values`: lengths of the two compressed streams in bytes. `raw`: length of the first one before compression.
    `masked`: the stored places are a mask, so that some of the values may be zero.
    """

    name: str
    dtype: str
    stored: str
    shape: tuple[int, ...]
    layout: Layout
    count: int
    raw: int
    places: int
    values: int
    masked: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        """Memory of the tensor once loaded."""
        return self.size * DTYPES[self.dtype].itemsize


def encode(name: str, tensor: Tensor, mask: Tensor | None, half: bool) -> tuple[Entry, bytes, bytes]:
    """The header entry and the two streams of a tensor. `mask`: true where it stays; None takes what is not zero."""
    stored = tensor.detach().cpu().contiguous()
    if half:
        stored = _as_half(name, stored)
    raw = _rows_of_bytes(stored)
    keep = (stored != 0).reshape(-1).numpy() if mask is None else mask.detach().cpu().reshape(-1).numpy()
    layout, places, coded = _places(keep, raw.shape[1])
    kept = raw if layout == "dense" else raw[keep]
    values = zlib.compress(np.ascontiguousarray(kept.T).tobytes(), _LEVEL)
    entry = Entry(
        name, _name_of(name, tensor.dtype), _name_of(name, stored.dtype), tuple(tensor.shape), layout, len(kept),
        len(coded), len(places), len(values), mask is not None and layout != "dense",
    )  # fmt: skip
    return entry, places, values


def _places(keep: npt.NDArray[np.bool_], width: int) -> tuple[Layout, bytes, bytes]:
    """The shortest way to say which elements are stored: layout, compressed and raw bytes."""
    count = int(np.count_nonzero(keep))
    if count == keep.size:
        return "dense", b"", b""
    options: list[tuple[Layout, bytes]] = [("bitmap", np.packbits(keep, bitorder="little").tobytes())]
    if count < -(-keep.size // _FEWEST):
        options.append(("gaps", _gaps(keep).tobytes()))
    found = [(layout, zlib.compress(raw, _LEVEL), raw) for layout, raw in options]
    best = min(found, key=lambda option: len(option[1]))
    dropped = (keep.size - count) * width
    return best if len(best[1]) < dropped else ("dense", b"", b"")


def _gaps(keep: npt.NDArray[np.bool_]) -> Bytes:
    """How many elements are skipped before each stored one: a byte 255 skips 255 and goes on, any other ends at one."""
    places = np.flatnonzero(keep)
    skipped = np.diff(places, prepend=-1) - 1
    full = skipped // _LONGEST_GAP
    out = np.full(int(full.sum()) + len(places), _LONGEST_GAP, np.uint8)
    out[np.cumsum(full + 1) - 1] = skipped % _LONGEST_GAP
    return out


def _as_half(name: str, tensor: Tensor) -> Tensor:
    half = tensor.to(torch.float16)
    if bool((half.isfinite() != tensor.isfinite()).any()):
        raise GraphPruneError(
            f"{name}: a value of {float(tensor[tensor.isfinite()].abs().max()):.6g} does not fit float16 (at most "
            f"65504); save without values='float16'"
        )
    return half


def _name_of(name: str, dtype: torch.dtype) -> str:
    short = str(dtype).removeprefix("torch.")
    if short not in DTYPES:
        raise GraphPruneError(f"{name}: tensors of type {dtype} cannot be stored; expected one of {', '.join(DTYPES)}")
    return short


def _rows_of_bytes(tensor: Tensor) -> Bytes:
    """(elements, bytes of an element), little endian."""
    flat = tensor.reshape(-1)
    if not flat.numel():
        return np.zeros((0, tensor.dtype.itemsize), np.uint8)
    array: Bytes = flat.view(torch.uint8).numpy().reshape(-1, tensor.dtype.itemsize)
    return array


# -- back


def decode(entry: Entry, places: bytes, values: bytes) -> tuple[Tensor, Tensor | None]:
    """The tensor, and its mask where the file has one. Needs memory in proportion to the declared shape.

    Raises DamagedError where the streams do not hold what the entry declares.
    """
    width = DTYPES[entry.stored].itemsize
    planes = _inflate(values, entry.count * width, entry.name)
    kept = np.frombuffer(planes, np.uint8).reshape(width, entry.count).T
    if entry.layout == "dense":
        if places or entry.count != entry.size:
            raise DamagedError(f"{entry.name}: the file declares a dense tensor and stores another number of values")
        return _tensor(kept.copy(order="C"), entry), None
    keep = _kept_places(entry, _inflate(places, entry.raw, entry.name))
    full = np.zeros((entry.size, width), np.uint8)
    full[keep] = kept
    mask = torch.from_numpy(keep).reshape(entry.shape) if entry.masked else None
    return _tensor(full, entry), mask


def _kept_places(entry: Entry, raw: bytes) -> npt.NDArray[np.bool_]:
    coded = np.frombuffer(raw, np.uint8)
    if entry.layout == "bitmap":
        if len(coded) != -(-entry.size // 8):
            raise DamagedError(f"{entry.name}: the bitmap has another length than the tensor")
        bits = np.unpackbits(coded, bitorder="little")
        keep, rest = bits[: entry.size].astype(bool), bits[entry.size :]
        if rest.any():
            raise DamagedError(f"{entry.name}: the bitmap is longer than the tensor")
    else:
        # Each byte moves on by at most 256, so that the sum cannot overflow.
        ends = coded != _LONGEST_GAP
        where = np.cumsum(coded.astype(np.int64) + ends)[ends] - 1
        if len(coded) and (not ends[-1] or where[-1] >= entry.size):
            raise DamagedError(f"{entry.name}: the stored places lie outside of the tensor")
        keep = np.zeros(entry.size, bool)
        keep[where] = True
    if int(np.count_nonzero(keep)) != entry.count:
        raise DamagedError(f"{entry.name}: the file stores another number of values than of places")
    return keep


def _tensor(rows: Bytes, entry: Entry) -> Tensor:
    stored = DTYPES[entry.stored]
    if stored == torch.bool and rows.size and int(rows.max()) > 1:
        raise DamagedError(f"{entry.name}: a boolean is neither 0 nor 1")
    out = torch.from_numpy(rows.reshape(-1)).view(stored) if rows.size else torch.empty(0, dtype=stored)
    return out.reshape(entry.shape).to(DTYPES[entry.dtype])


def _inflate(data: bytes, expected: int, name: str) -> bytes:
    return inflate(data, expected, expected, name)


def inflate(data: bytes, least: int, most: int, what: str) -> bytes:
    """The whole zlib stream `data`, of `least` to `most` bytes; never makes more than one byte too many."""
    if not data and most == 0:
        return b""
    reader = zlib.decompressobj()
    try:
        out = reader.decompress(data, most + 1)
    except zlib.error as error:
        raise DamagedError(f"{what}: the file is damaged: {error}") from error
    if not least <= len(out) <= most or not reader.eof or reader.unused_data:
        raise DamagedError(f"{what}: the file is damaged: a compressed part has another length than declared")
    return out


def entry_to_list(entry: Entry) -> list[Any]:
    """Plain data for the header."""
    return [
        entry.name, entry.dtype, entry.stored, list(entry.shape), entry.layout, entry.count, entry.raw, entry.places,
        entry.values, entry.masked,
    ]  # fmt: skip


def entry_from_list(data: Any) -> Entry:
    """The inverse, with every field checked by itself and against the others. Raises DamagedError."""
    if not isinstance(data, list) or len(data) != 10:
        raise DamagedError("the header is damaged: an entry has another form than expected")
    name, dtype, stored, shape, layout, count, raw, places, values, masked = data
    numbers = [count, raw, places, values]
    texts = all(isinstance(text, str) for text in (name, dtype, stored, layout))
    if not texts or not isinstance(masked, bool) or not isinstance(shape, list) or len(shape) > 64:
        raise DamagedError("the header is damaged: an entry has fields of wrong types")
    if not all(type(n) is int and 0 <= n < 2**62 for n in [*numbers, *shape]) or math.prod(shape) >= 2**62:
        raise DamagedError(f"{name!r}: the header is damaged: a size is no number in range")
    if dtype not in DTYPES or stored not in DTYPES or layout not in LAYOUTS:
        raise DamagedError(f"{name!r}: the header names an unknown type or layout")
    entry = Entry(name, dtype, stored, tuple(shape), layout, count, raw, places, values, masked)
    floating = DTYPES[dtype].is_floating_point and stored == "float16"
    if stored != dtype and not floating:
        raise DamagedError(f"{name!r}: values of type {stored} cannot make a tensor of type {dtype}")
    fewer = layout != "gaps" or count < -(-entry.size // _FEWEST)  # otherwise a bitmap is shorter
    if count > entry.size or not fewer or raw > max(-(-entry.size // 8), count + entry.size // _LONGEST_GAP):
        raise DamagedError(f"{name!r}: the header declares more values or places than the tensor has")
    return entry
