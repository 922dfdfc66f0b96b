"""Results of a sweep, kept line by line as JSON, so that a sweep can go on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ResultFile:
    """One line for each result: a dict with "tool", "fingerprint" (of the source code it depends on) and `keys`."""

    def __init__(self, path: Path, keys: tuple[str, ...]) -> None:
        self.path = path
        self.keys = keys

    def load(self, current: Mapping[str, str] | None) -> dict[Any, dict[str, Any]]:
        """The latest result for each value of the keys; only those of the `current` source code unless None."""
        found: dict[Any, dict[str, Any]] = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                result = json.loads(line)
                if current is None or result["fingerprint"] == current[result["tool"]]:
                    found[tuple(result[key] for key in self.keys)] = result
        return found

    def store(self, result: Mapping[str, Any]) -> None:
        """Append one result."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
