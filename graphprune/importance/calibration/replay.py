"""Run one batch through a network again and again without computing again what is settled.

Refitting visits a network layer by layer. Between two visits everything before the fitted layers is the same as it was.
The first run notes, operator by operator, which memory is read and which is written; later runs start from the values
at the border of what is settled, and operators before it hand out memory of the right form without filling it.

What is noted are ATen operators, whose schemas say which arguments they write to, and values are versions of a storage.
So views, calls that hand back their own argument, and writes in place need no care of their own: views always run, and
whoever looks at a storage sees the version that is there. A layer that is fitted counts as one operator, since it may
gain a bias. Whatever does not depend on tensors alone always runs: operators that tell the code a number, whose
results' shapes depend on values, that draw random numbers, and those of others than torch.

Repairs run this way, of pruned and of masked networks; criteria look at each batch in one plain run.

A run that does not do what the first one did raises `Diverged`, and is done again without memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ...tracing.cloning import PLAIN
from .operations import dense, operation, parts_of, tensors_of

# Functions that ask for shapes and types alone.
_FORMS = frozenset(
    "size dim ndimension numel nelement __get__ __len__ stride is_contiguous is_floating_point is_complex element_size "
    "get_device type storage_offset is_same_size __hash__ is_inference is_signed is_conj is_neg has_names".split()
)
# Functions that open a way past the operators to a tensor's memory.
_MEMORY = frozenset(
    "numpy __array__ __dlpack__ data_ptr untyped_storage storage _typed_storage __deepcopy__ __reduce_ex__".split()
)


_NEVER = 1 << 30  # the wave after which random numbers are settled


class Diverged(BaseException):
    """A run went another way than the first one."""


class _Kind(enum.Enum):
    VIEW = "looks at memory that is there"
    MAKES = "fills new memory"
    WRITES = "writes into memory of this run"
    ALWAYS = "has to run"


@dataclasses.dataclass(frozen=True)
class _Form:
    """What it takes to make memory of the form of a result."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Form:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def blank(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@dataclasses.dataclass
class _Note:
    """One operator of the first run. `inputs`: the operators whose values it reads; `level`: the wave after which its
    value is settled, -1 from the beginning; `readers`: the fitted layers whose call it is; `result`: forms of new
    results, with the container they came in; `rewritten`: a later operator writes into what it made."""

    function: Any
    given: Any
    shapes: tuple[torch.Size, ...]
    kind: _Kind
    inputs: tuple[int, ...]
    level: int
    readers: frozenset[str] = frozenset()
    result: Any = None
    rewritten: bool = False


class Replay:
    """The memory of one batch in one network.

    `levels`: reader -> number of the wave that refits it. `weights`: the readers' weights.
    """

    def __init__(self, levels: Mapping[str, int], weights: Mapping[str, Tensor]) -> None:
        self.levels = levels
        self.names = {id(t): name for name, t in weights.items()}
        self._weights: dict[int, int] = {}
        for name, tensor in weights.items():
            if _plain(tensor):
                key = tensor.untyped_storage()._cdata
                self._weights[key] = max(self._weights.get(key, -1), levels[name])
        self.notes: list[_Note] = []
        self.usable = True
        self.recorded = False
        self.held: dict[int, list[Tensor]] = {}
        self._quiet = 0
        self._readers_of: list[list[int]] = []
        self._results: set[int] = set()

    # -- one run

    def start(self, wave: int, names: frozenset[str] | None) -> None:
        """Prepare the run that looks at the readers `names` of this wave; None: at the network's results."""
        self._next = 0
        self._made: dict[int, list[Tensor]] = {}
        self._store: set[int] = set()
        self._needed: set[int] | None = None
        self._left: set[int] = set()
        self._sources: dict[int, tuple[int, StorageWeakRef]] = {}
        self._told = -1
        if self.recorded and self.usable:
            self._plan(wave, names)

    def _plan(self, wave: int, names: frozenset[str] | None) -> None:
        self._store = self._border(wave)
        targets = set(self._store) | (self._results if names is None else set())
        for k, note in enumerate(self.notes):
            if names is not None and not note.readers.isdisjoint(names):
                targets.add(k)
                targets.update(self._readers_of[k])  # what a result is added to
        last = max(targets, default=-1)
        targets.update(k for k in range(last + 1) if self.notes[k].kind is _Kind.ALWAYS)
        needed: set[int] = set()
        stack = list(targets)
        while stack:
            k = stack.pop()
            if k not in needed:
                needed.add(k)
                if k not in self.held:
                    stack.extend(self.notes[k].inputs)
        self._needed = needed
        self._left = set(needed)

    def _border(self, wave: int) -> set[int]:
        """What is settled before `wave` is refitted, and read by what is not, or by what always runs."""

        def outside(k: int) -> bool:
            return self.notes[k].level >= wave or self.notes[k].kind is _Kind.ALWAYS

        return {
            k
            for k, note in enumerate(self.notes)
            if note.kind in (_Kind.MAKES, _Kind.WRITES)
            and note.level < wave
            and (k in self._results or any(map(outside, self._readers_of[k])))
        }

    @property
    def replaying(self) -> bool:
        """This run leaves something out."""
        return self._needed is not None

    @property
    def done(self) -> bool:
        """Nothing that is needed is still to come."""
        return self._needed is not None and not self._left

    def finish(self, results: Iterable[Tensor] = ()) -> None:
        """The run is over: what is needed next time stays. `results`: what later runs may be asked for."""
        if not self.recorded:
            self.recorded = True
            self._results = {source for t in results if (source := self._source(t)) is not None}
        elif self._needed is not None:
            if self._store <= self._made.keys():
                self.held = self._made
            else:
                self.usable = False
        if not self.usable:
            self.drop()
        self._made, self._sources = {}, {}

    def bytes_of(self, reader: str) -> int:
        """Memory of the results of a layer that is fitted, as the first run has shown it."""
        forms = (form for note in self.notes if reader in note.readers for form in _forms(note.result))
        return sum(math.prod(form.shape) * form.dtype.itemsize for form in forms)

    @property
    def bytes_held(self) -> int:
        return sum(t.numel() * t.element_size() for kept in self.held.values() for t in kept)

    def drop(self) -> None:
        """Hold nothing any more: every run computes everything."""
        self.usable, self.held, self.notes, self._readers_of = False, {}, [], []
        self._made, self._sources = {}, {}

    # -- what a run does

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around the run itself."""
        with _Operators(self):
            yield

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Operators in here are none of the network's."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    def reader_names(self, name: str, args: Any, kwargs: Any) -> frozenset[str]:
        """The readers whose weights a call computes with."""
        if name in _FORMS:
            return frozenset()
        return frozenset(self.names[id(a)] for a in (*args, *kwargs.values()) if id(a) in self.names)

    def layer(
        self,
        names: frozenset[str],
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
        run: Callable[[], Any] | None = None,
    ) -> Any:
        """The call of a layer that is fitted, as one operator. `run`: what to do in its place."""
        tensors, told = parts_of((args, kwargs))
        given = [t for t in tensors if not isinstance(t, torch.nn.Parameter)]
        # without what a new bias changes
        numbers = tuple(n for n in _flat(told) if n is not None and n is not Tensor)
        with self.aside():
            return self._step(function, run or (lambda: function(*args, **kwargs)), given, numbers, names, None)

    def told(self, function: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        """A function has run that gave the code something else than tensors."""
        if out is None or name in _FORMS or self._quiet or not self.usable:
            return
        given = list(tensors_of((args, kwargs)))
        if not given or next(tensors_of(out), None) is not None:
            return
        if name in _MEMORY:
            self._give_up()
            return
        self._step(function, lambda: None, given, (), frozenset(), None)

    def operator(self, function: Any, args: Any, kwargs: Any) -> Any:
        """An operator is about to run."""
        if self._quiet or not self.usable or (self.recorded and self._needed is None):
            return function(*args, **kwargs)
        given, numbers = parts_of((args, kwargs))
        return self._step(
            function, lambda: function(*args, **kwargs), given, numbers, frozenset(), (args, kwargs)
        )

    def picked(self, by: list[Tensor]) -> None:
        """Rows are picked by these; where that depends on what is refitted, every run has to show which."""
        if self.usable and not self.recorded:
            sources = [s for s in map(self._source, by) if s is not None]
            self.usable = self._told < 0 and all(self.notes[s].level < 0 for s in sources)

    def _give_up(self) -> None:
        self.usable = False
        if self.replaying:
            raise Diverged

    def _step(
        self, function: Any, run: Callable[[], Any], given: list[Tensor], numbers: Any, names: frozenset[str], call: Any
    ) -> Any:
        if not self.usable or (self.recorded and self._needed is None):
            return run()
        k = self._next
        self._next += 1
        if self._needed is None:
            return self._record(function, run, given, numbers, names, call)
        note = self.notes[k] if k < len(self.notes) else None
        if (
            note is None
            or note.function != function
            or note.shapes != tuple(t.shape for t in given)
            or note.given != numbers
        ):
            self._give_up()
        assert note is not None
        if note.kind is _Kind.VIEW:
            return run()
        if k in self.held:
            return self._restored(k, note, call)
        if k not in self._needed and note.kind is not _Kind.ALWAYS:
            return self._blank(note, call)
        out = run()
        self._left.discard(k)
        if k in self._store:
            self._made[k] = self._kept(note, call, out)
        return out

    # -- values of a later run

    def _blank(self, note: _Note, call: Any) -> Any:
        if note.kind is _Kind.WRITES:
            return _handed_back(note, call)
        return _shaped(note.result, iter([form.blank() for form in _forms(note.result)]))

    def _restored(self, k: int, note: _Note, call: Any) -> Any:
        kept = self.held[k]
        self._left.discard(k)
        if k in self._store:
            self._made[k] = kept
        if note.kind is _Kind.WRITES:
            written = _handed_back(note, call)
            _bytes(written).copy_(kept[0])
            return written
        return _shaped(note.result, iter([(_copy if note.rewritten else _alias)(t) for t in kept]))

    def _kept(self, note: _Note, call: Any, out: Any) -> list[Tensor]:
        if note.kind is _Kind.WRITES:
            return [_bytes(_handed_back(note, call)).clone()]
        return [(_copy if note.rewritten else _alias)(t) for t in tensors_of(out)]

    # -- the first run

    def _record(
        self, function: Any, run: Callable[[], Any], given: list[Tensor], numbers: Any, names: frozenset[str], call: Any
    ) -> Any:
        if not all(map(_plain, given)):
            self.usable = False
            return run()
        shapes = tuple(t.shape for t in given)
        written = [] if call is None else operation(function).written(*call)
        before = [(t, t.shape, t.stride(), t.untyped_storage()._cdata) for t in written]
        out = run()
        inputs = tuple(dict.fromkeys(s for t in given if (s := self._source(t)) is not None))
        level = max([self._told, *map(self._settled, given), *(self.levels[n] for n in names)])
        level = max([level, *(self.notes[i].level for i in inputs)])
        note = _Note(function, numbers, shapes, _Kind.ALWAYS, inputs, level, names)
        made = list(tensors_of(out))
        self.usable = all(map(_plain, made)) and self._classified(note, given, call, before, out, made)
        if self.usable:
            self._add(note, written, made)
        return out

    def _add(self, note: _Note, written: list[Tensor], made: list[Tensor]) -> None:
        k = len(self.notes)
        self.notes.append(note)
        self._readers_of.append([])
        if note.kind is _Kind.VIEW:
            note.inputs = ()
            return
        for i in note.inputs:
            self._readers_of[i].append(k)
        for tensor in written:
            source = self._source(tensor)
            if source is not None:
                self.notes[source].rewritten = True
        for tensor in (*written, *made):
            storage = tensor.untyped_storage()
            # the reference keeps the address from being given to other memory while this run lasts
            self._sources[storage._cdata] = k, StorageWeakRef(storage)

    def _classified(
        self, note: _Note, given: list[Tensor], call: Any, before: list[Any], out: Any, made: list[Tensor]
    ) -> bool:
        """Find the kind of a note; False where a run cannot be told from its operators."""
        there = {t.untyped_storage()._cdata for t in given}
        fresh = [t.untyped_storage()._cdata not in there and self._source(t) is None for t in made]
        if call is None:
            return self._classified_call(note, out, made, fresh)
        for tensor, shape, stride, storage in before:
            same = tensor.shape == shape and tensor.stride() == stride and tensor.untyped_storage()._cdata == storage
            if not same or self._source(tensor) is None:
                return False  # another form, or memory that outlives the run
        about = operation(note.function)
        if about.by_form:
            note.kind = _Kind.VIEW
        elif about.reads_values(*call):
            self._told = max(self._told, note.level)
        elif about.draws(*call):
            note.level = _NEVER
        elif about.known:
            note.kind = _kind_of(before, out, made, fresh)
            note.result = _form_of(out)
        return bool(before) or all(fresh) or not any(fresh)

    def _classified_call(self, note: _Note, out: Any, made: list[Tensor], fresh: list[bool]) -> bool:
        if not made:
            self._told = max(self._told, note.level)
        elif isinstance(out, Tensor) and _separate(made):
            note.kind, note.result = _Kind.MAKES, _form_of(out)
        return all(fresh)

    def _source(self, tensor: Tensor) -> int | None:
        """The operator that made what is in a tensor's memory; None for memory from outside the run."""
        found = self._sources.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[0]

    def _settled(self, tensor: Tensor) -> int:
        """The wave that changes a tensor, if it is a weight that is refitted."""
        return self._weights.get(tensor.untyped_storage()._cdata, -1)


class _Operators(TorchDispatchMode):
    def __init__(self, memory: Replay) -> None:
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.memory.operator(func, args, kwargs or {})


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN and tensor.layout is torch.strided


def _kind_of(before: list[Any], out: Any, made: list[Tensor], fresh: list[bool]) -> _Kind:
    if before:
        return _Kind.WRITES if len(before) == 1 and out is before[0][0] else _Kind.ALWAYS
    if not any(fresh):
        return _Kind.VIEW
    return _Kind.MAKES if all(fresh) and _separate(made) else _Kind.ALWAYS


def _separate(made: list[Tensor]) -> bool:
    """Each result has memory of its own, and fills it."""
    storages = {t.untyped_storage()._cdata for t in made}
    return len(storages) == len(made) and all(map(dense, made))


def _form_of(out: Any) -> Any:
    if isinstance(out, Tensor):
        return _Form.of(out)
    if isinstance(out, (tuple, list)):
        return [type(out), *map(_form_of, out)]
    return out


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _forms(result: Any) -> Iterator[_Form]:
    if isinstance(result, _Form):
        yield result
    elif isinstance(result, list):
        for item in result[1:]:
            yield from _forms(item)


def _shaped(result: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(result, _Form):
        return next(tensors)
    if isinstance(result, list):
        items = [_shaped(item, tensors) for item in result[1:]]
        return items if result[0] is list else tuple(items)
    return result


def _handed_back(note: _Note, call: Any) -> Any:
    """An operator that writes hands back the one tensor it wrote to."""
    (tensor,) = operation(note.function).written(*call)
    return tensor


def _bytes(tensor: Tensor) -> Tensor:
    """All of a tensor's memory."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)


def _alias(tensor: Tensor) -> Tensor:
    """Another tensor of the same memory, that torch does not see as a view: factories would hand out a view of that."""
    made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return made.set_(tensor.untyped_storage(), 0, tensor.shape, tensor.stride())


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)
