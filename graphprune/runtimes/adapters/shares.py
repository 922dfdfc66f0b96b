"""What the layers of a network that was opened are really computed in."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping


@dataclasses.dataclass(frozen=True)
class Share:
    """`names`: convolutions, matrix products and recurrent layers, by the type that they compute in."""

    names: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, layers: Iterable[tuple[str, str]]) -> Share:
        """From pairs of the layer's name and its type."""
        found: dict[str, list[str]] = {}
        for name, kind in layers:
            found.setdefault(kind, []).append(name)
        return cls({kind: tuple(names) for kind, names in found.items()})

    def __str__(self) -> str:
        counts = Counter({kind: len(names) for kind, names in self.names.items()}).most_common()
        if len(counts) < 2:
            return "".join(kind for kind, _ in counts)
        total = sum(count for _, count in counts)
        return ", ".join(f"{count} of {total} layers {kind}" for kind, count in counts)

    def notes(self, wanted: str) -> list[str]:
        """A line for what is not computed in the type `wanted`, if there is any."""
        others = [(name, kind) for kind, names in self.names.items() if kind != wanted for name in names]
        if not others:
            return []
        named = ", ".join(name for name, _ in others[:3]) + (", ..." if len(others) > 3 else "")
        kinds = " and ".join(dict.fromkeys(kind for _, kind in others))
        total = len(others) + len(self.names.get(wanted, ()))
        return [f"{len(others)} of {total} layers stay {kinds}: {named}"]
