"""Run one batch through a network again and again without computing again what is settled.

Refitting visits a network layer by layer. Between two visits everything before the fitted layers is the same as it was.
The first run notes which call reads the results of which; later runs start from the tensors at the border of what is
settled, and calls before it return placeholders of the right shape, at no cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...tracing.example import flatten_tensors

# Calls whose result depends on shapes and types alone, so that a placeholder serves.
_SHAPES = frozenset(
    "size dim ndimension numel nelement __get__ __len__ stride is_contiguous is_floating_point is_complex element_size "
    "get_device type data_ptr storage_offset is_same_size".split()
)


@dataclasses.dataclass
class _Note:
    """One call: the calls it reads from, the form of its result, and what else matters for skipping it."""

    inputs: tuple[int, ...]
    result: tuple[tuple[int, ...], torch.dtype, torch.device] | None
    many: tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...] | None
    kind: type | None
    writes: bool
    opaque: bool
    reader: str | None


class Replay:
    """The memory of one batch in one network.

    `levels`: reader -> number of the wave that refits it. `names`: the readers' weights, by the id of the parameter.
    """

    def __init__(self, levels: Mapping[str, int], names: Mapping[int, str]) -> None:
        self.levels, self.names = levels, names
        self.notes: list[_Note] = []
        self.usable = True
        self.recorded = False
        self.held: dict[int, Tensor] = {}
        self._token = object()
        self._settled: list[int] = []

    # -- one run

    def start(self, wave: int, names: frozenset[str]) -> None:
        """Prepare the run that looks at the readers `names` of this wave."""
        self._token = object()
        self._next = 0
        self._made: dict[int, Tensor] = {}
        self._wave, self._names = wave, names
        self._needed: set[int] | None = None
        self._left: set[int] = set()
        self._store: set[int] = set()
        if self.recorded and self.usable:
            self._plan()

    def _plan(self) -> None:
        self._store = self._border(self._wave)
        targets = set(self._store)
        for k, note in enumerate(self.notes):
            if note.reader in self._names:
                targets.add(k)
                targets.update(c for c in self._readers_of[k] if len(self.notes[c].inputs) == 2)
            elif note.opaque:
                targets.add(k)
        needed: set[int] = set()
        stack = list(targets)
        while stack:
            k = stack.pop()
            if k in needed:
                continue
            needed.add(k)
            if k not in self.held:
                stack.extend(self.notes[k].inputs)
        self._needed = needed
        self._left = set(needed)

    def _border(self, wave: int) -> set[int]:
        """Calls that are settled before `wave` is refitted, and read by calls that are not."""
        return {
            k
            for k, note in enumerate(self.notes)
            if note.result is not None
            and self._settled[k] < wave
            and any(self._settled[c] >= wave for c in self._readers_of[k])
        }

    @property
    def done(self) -> bool:
        """Nothing that is needed is still to come."""
        return self._needed is not None and not self._left

    def enter(self, args: Any, kwargs: Any) -> tuple[int, bool, Any]:
        """A call begins: its number, whether its result is known without running it, and that result."""
        k = self._next
        self._next += 1
        if self._needed is None:
            return k, False, None
        note = self.notes[k] if k < len(self.notes) else None
        if note is None:  # the network took another way than before
            self.usable = False
            return k, False, None
        if k in self.held:
            self._left.discard(k)
            out = self.held[k].clone()
            if k in self._store:
                self._made[k] = self.held[k]
            return k, True, out
        if k not in self._needed and not (note.result is None and note.many is None):
            return k, True, self._placeholder(note, args)
        return k, False, None

    def _placeholder(self, note: _Note, args: Any) -> Any:
        if note.writes:
            return args[0]
        if note.result is not None:
            return _blank(note.result)
        assert note.many is not None
        items = [_blank(m) for m in note.many]
        return items if note.kind is list else tuple(items)

    def leave(self, k: int, name: str, args: Any, kwargs: Any, out: Any, reader: str | None) -> None:
        """A call has run."""
        if self._needed is None:
            if not self.recorded and self.usable:
                self._note(name, args, kwargs, out, reader)
            return
        self._left.discard(k)
        if k in self._store and isinstance(out, Tensor):
            self._made[k] = out.detach().clone()

    def finish(self) -> None:
        """The run is over: what is needed next time stays."""
        if not self.recorded:
            self.recorded = True
            if self.usable:
                self._link()
            return
        if self._needed is not None:
            if self._store <= self._made.keys():
                self.held = self._made
            else:
                self.usable = False
        if not self.usable:
            self.held = {}
        self._made = {}

    @property
    def bytes_held(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.held.values())

    def drop(self) -> None:
        """Hold nothing any more: every run computes everything."""
        self.usable, self.held = False, {}

    # -- the first run

    def _note(self, name: str, args: Any, kwargs: Any, out: Any, reader: str | None) -> None:
        tensors = flatten_tensors((args, kwargs))
        sources = [t.__dict__["_graphprune_call"] for t in tensors if "_graphprune_call" in t.__dict__]
        inputs = tuple(dict.fromkeys(k for token, k in sources if token is self._token))
        writes = _in_place(name) or "out" in kwargs
        k = len(self.notes)
        if writes and not self._writable(args, kwargs, out):
            self.usable = False
            return
        made = [out] if isinstance(out, Tensor) else list(out) if _tensors(out) else []
        forms = tuple((tuple(t.shape), t.dtype, t.device) for t in made)
        single = isinstance(out, Tensor)
        opaque = not made and name not in _SHAPES
        many = None if single or not made else forms
        self.notes.append(_Note(inputs, forms[0] if single else None, many, type(out), writes, opaque, reader))
        for tensor in made:
            base = tensor._base
            if base is not None:
                base.__dict__["_graphprune_viewed"] = self._token
            if type(tensor) is Tensor:
                tensor.__dict__["_graphprune_call"] = (self._token, k)

    def _writable(self, args: Any, kwargs: Any, out: Any) -> bool:
        """The written tensor is a whole one made in this run, and nothing else looks at its memory."""
        target = args[0] if args else None
        if "out" in kwargs or not isinstance(target, Tensor) or out is not target or target._base is not None:
            return False
        made = target.__dict__.get("_graphprune_call", (None, 0))[0] is self._token
        return made and target.__dict__.get("_graphprune_viewed") is not self._token

    def _link(self) -> None:
        """Who reads each call, and after which wave each call is settled (-1: from the beginning)."""
        self._readers_of: list[list[int]] = [[] for _ in self.notes]
        for k, note in enumerate(self.notes):
            level = self.levels.get(note.reader, -1) if note.reader is not None else -1
            for i in note.inputs:
                self._readers_of[i].append(k)
                level = max(level, self._settled[i])
            self._settled.append(level)


def _blank(form: tuple[tuple[int, ...], torch.dtype, torch.device]) -> Tensor:
    shape, dtype, device = form
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def _tensors(out: Any) -> bool:
    return isinstance(out, (tuple, list)) and bool(out) and all(isinstance(t, Tensor) for t in out)


def _in_place(name: str) -> bool:
    if name.startswith("__") and name.endswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__index__", "__int__", "__invert__"))
    return name.endswith("_") and not name.startswith("_")
