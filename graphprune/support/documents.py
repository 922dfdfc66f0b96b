"""JSON that others may have written: read with care, and with a digest that tells whether it was damaged."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import GraphPruneError
from .files import read_bytes, replacing
from .types import PathLike

DIGEST = "digest"
# Nested deeper than anything that is written here, and not so deep that reading it takes the interpreter's stack.
DEEPEST = 100
LARGEST = 256 * 2**20
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
# What may hold a number out of range; everything else is read without a look at each number.
_SUSPECT = re.compile(r"\d{19}|[eE]\+?\d{3}")
_LEAST, _MOST = -(2**63), 2**64
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def to_json(data: Any, indent: int | None = None) -> str:
    """Plain data as JSON text.

    Raises:
        GraphPruneError: it holds what `from_json` would refuse: infinities, and lists nested too deep.
    """
    try:
        text = json.dumps(data, indent=indent, allow_nan=False, separators=None if indent else (",", ":"))
    except (ValueError, TypeError, RecursionError) as error:
        raise GraphPruneError(f"this cannot be written as JSON: {type(error).__name__}: {error}") from error
    _check_depth(text.encode())
    return text


def from_json(text: str | bytes) -> Any:
    """What a JSON text says. Numbers are finite, integers of at most 64 bits, and no name appears twice in an object.

    Raises:
        GraphPruneError: anything else, saying what; nothing deep, long or large is built before.
    """
    try:
        raw = text.encode() if isinstance(text, str) else text
        _check_depth(raw)
        plain = raw.decode()
        careful = {"parse_int": _integer, "parse_float": _float} if _SUSPECT.search(plain) else {}
        return json.loads(plain, parse_constant=_constant, object_pairs_hook=_object, **careful)  # type: ignore[arg-type]
    except UnicodeError as error:
        raise GraphPruneError("it is no JSON: it is no text in UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise GraphPruneError(f"it is no JSON ({error})") from error


def _check_depth(text: bytes) -> None:
    brackets = np.frombuffer(_STRING.sub(b"", text).translate(None, _NO_BRACKETS), np.uint8)
    steps = np.where((brackets == ord("[")) | (brackets == ord("{")), 1, -1)
    if len(steps) and int(np.cumsum(steps).max()) > DEEPEST:
        raise GraphPruneError(f"it is no JSON that is read here: its lists are nested more than {DEEPEST} deep")


def _integer(text: str) -> int:
    if len(text) > 20 or not _LEAST <= (number := int(text)) < _MOST:
        raise ValueError(f"{text[:24]}... is no number of 64 bits")
    return number


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:24]} is no finite number")
    return number


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice in one object")
    return found


# -- with a digest


def digest_of(data: Mapping[str, Any]) -> str:
    """SHA-256 of the JSON of all entries but the digest: names sorted, no white space, ASCII."""
    rest = {name: value for name, value in data.items() if name != DIGEST}
    text = json.dumps(rest, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_document(path: PathLike, data: Mapping[str, Any], indent: int | None = None) -> Path:
    """Write plain data with its digest as JSON, to a temporary name first.

    Raises:
        GraphPruneError: the path cannot be written.
    """
    text = to_json({**data, DIGEST: digest_of(data)}, indent)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return Path(path)


def read_document(path: PathLike, what: str, *, edited: bool = False) -> Any:
    """What `write_document` wrote, without the digest; `what`: it is called in errors. Of anything but an object the
    caller must say what is wrong with it.

    `edited`: people may change it and remove the digest.

    Raises:
        GraphPruneError: there is no such file, it is no JSON, it was changed since it was written, or has no digest.
    """
    try:
        raw = read_bytes(path, LARGEST)
    except GraphPruneError as error:
        raise GraphPruneError(f"the {what} {path}: cannot be read: {error}") from error
    try:
        data = from_json(raw)
    except GraphPruneError as error:
        raise GraphPruneError(f"the {what} {path} {str(error).removeprefix('it ')}") from error
    try:
        if isinstance(data, dict):
            check_digest(data, edited=edited)
            data.pop(DIGEST, None)
    except GraphPruneError as error:
        raise GraphPruneError(f"the {what} {path} is damaged: {error}") from error
    return data


def check_digest(data: Mapping[str, Any], *, edited: bool = False) -> None:
    """Raise GraphPruneError unless the digest in `data` is that of the rest; `edited`: or there is none."""
    if DIGEST not in data:
        if not edited:
            raise GraphPruneError("it has no digest; make it again with this version")
        return
    try:
        found = digest_of(data)
    except (TypeError, ValueError, RecursionError) as error:
        raise GraphPruneError(f"it has a digest, and is no JSON: {error}") from error
    if data[DIGEST] != found:
        raise GraphPruneError(
            "it was changed since it was written (its contents do not match its digest); "
            + (f'whoever changed it on purpose removes the entry "{DIGEST}"' if edited else "make it again")
        )
