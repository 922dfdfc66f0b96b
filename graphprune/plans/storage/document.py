"""What the file says beside the weights: a JSON document in the metadata of a safetensors file, and its checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...errors import GraphPruneError
from ...support.documents import from_json, to_json
from ...support.versions import running_versions
from ..fields import indices, listed, table, whole
from ..fields import text as text_of
from ..history import Applied
from ..plan import Plan

FORMAT = "graphprune.model/1"
KEY = "graphprune"
# Readers of safetensors refuse headers of 100 MB and more; names, shapes and this document share it.
LARGEST = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Document:
    """`histories`: module path -> the plans that were applied to it, in order. `aliases`: name -> the name under which
    the same tensor is stored. `transient`: buffers that are in no state dict -> their type. `repairs`: module path ->
    how what each of its plans lost was repaired, where any was; only told, never acted on."""

    histories: Mapping[str, tuple[Applied, ...]]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    transient: Mapping[str, torch.dtype] = dataclasses.field(default_factory=dict)
    repairs: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """The document as text. Raises GraphPruneError when it is too long for a header."""
        shared: dict[tuple[int, ...], int] = {}
        history = [
            {"module": path, "plans": [_compact(plan, shared) for plan in plans], **self._repaired(path)}
            for path, plans in self.histories.items()
        ]
        text = to_json(
            {
                "format": FORMAT,
                "versions": running_versions(),
                "aliases": dict(self.aliases),
                "transient": {name: str(dtype).removeprefix("torch.") for name, dtype in self.transient.items()},
                "indices": [list(found) for found in shared],
                "history": history,
            }
        )
        if len(text) > LARGEST:
            raise GraphPruneError(f"the plans of the model take {len(text)} bytes, more than the {LARGEST} of a header")
        return text

    def _repaired(self, path: str) -> dict[str, list[str]]:
        found = self.repairs.get(path, ())
        return {"repairs": list(found)} if any(found) else {}

    @classmethod
    def from_json(cls, text: str) -> Document:
        """The inverse of `to_json`. Raises GraphPruneError for anything that is not one."""
        if len(text) > LARGEST:
            raise GraphPruneError(f"its description takes {len(text)} bytes, more than {LARGEST}")
        try:
            data = from_json(text)
        except GraphPruneError as error:
            raise GraphPruneError(f"its description cannot be read: {error}") from error
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        if found != FORMAT:
            raise GraphPruneError(f"its description has the format {str(found)[:60]!r}, expected {FORMAT!r}")
        try:
            shared = tuple(map(indices, listed(data["indices"])))
            entries = [(text_of(e["module"]), tuple(_plan(p, shared) for p in e["plans"])) for e in data["history"]]
            told = {text_of(e["module"]): e["repairs"] for e in data["history"] if "repairs" in e}
            repairs = {name: tuple(map(text_of, listed(found))) for name, found in told.items()}
            aliases = {name: text_of(of) for name, of in table(data["aliases"]).items()}
            transient = {name: _dtype(dtype) for name, dtype in table(data["transient"]).items()}
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise GraphPruneError(f"its description is damaged ({type(error).__name__}: {str(error)[:80]})") from error
        if len(dict(entries)) != len(entries):
            raise GraphPruneError("its description is damaged (a module has two histories)")
        return cls(dict(entries), aliases, transient, repairs)


def _compact(plan: Applied, shared: dict[tuple[int, ...], int]) -> dict[str, Any]:
    """A plan without what is for people only; the same indices, which many axes lose, are listed once."""
    data = {**plan.to_dict(), "frozen": [], "groups": [], "unsettled": []}
    data["removed"] = {
        name: {str(axis): shared.setdefault(tuple(gone), len(shared)) for axis, gone in axes.items()}
        for name, axes in plan.removed.items()
    }
    return data


def _plan(data: Any, shared: Sequence[tuple[int, ...]]) -> Plan:
    """The plan, in which axes share the lists that the file names once: however often it names one, there is one."""
    removed = {
        name: {axis: shared[_place(number)] for axis, number in table(axes).items()}
        for name, axes in table(data["removed"]).items()
    }
    return Plan.from_dict({**data, "removed": removed})


def _place(value: Any) -> int:
    if whole(value) < 0:
        raise ValueError(f"{value} is no place in a list")
    return whole(value)


def _dtype(value: Any) -> torch.dtype:
    found = getattr(torch, text_of(value), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{value[:40]!r} is no data type")
    return found
