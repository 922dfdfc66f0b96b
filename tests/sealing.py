"""Digests of files that a test has changed on purpose, as docs/ describe them: damage becomes an attack."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any


def sealed_json(data: Any) -> str:
    """The document with the digest of what it says now; what is no object, or no strict JSON, as it is."""
    if not isinstance(data, dict):
        return json.dumps(data)
    rest = {name: value for name, value in data.items() if name != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return json.dumps({**rest, "digest": hashlib.sha256(text.encode()).hexdigest()})


def sealed(data: bytes) -> bytes:
    """A safetensors file with the digest of what it is now, where its header has a place for one."""
    length = int.from_bytes(data[:8], "little")
    place = re.search(rb'"sha256": ?"([0-9a-f]{64})"', data[8 : 8 + length])
    if place is None:
        return data
    start, end = 8 + place.start(1), 8 + place.end(1)
    blank = data[:start] + b"0" * 64 + data[end:]
    return data[:start] + hashlib.sha256(blank).hexdigest().encode() + data[end:]
