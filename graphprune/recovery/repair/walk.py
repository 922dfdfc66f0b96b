"""Walk the layers of a pruned network in order and refit each to what the dense network makes at that place."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ...dependency.reparametrised import forms_in
from ...importance.calibration import Call, Moments, Reader, observe, rows_of
from ...importance.calibration.observe import refuse_infinite_call
from ...importance.calibration.picks import common
from ...importance.calibration.replay import Replay
from ...importance.calibration.statistics import MAX_FEATURES, MEMORY
from ...plans.plan import Plan
from ...support.cutting import keep_indices
from ...support.walking import named_tensors, tensor_named
from ...tracing.example import ExampleInput

# Intermediate results held between passes, so that nothing is computed twice; beyond this, everything is.
CACHE = 2 << 30
# Results of the dense network that are held for waves to come, so that one run of it serves many of them.
AHEAD = 256 << 20


@dataclasses.dataclass(frozen=True)
class Target:
    """What becomes of one layer of the dense network: which of its outputs stay, and factors they are multiplied by."""

    kept: Tensor
    factors: Tensor | None

    def of(self, y: Tensor, axis: int) -> Tensor:
        """The wanted results, from those of the dense layer."""
        if len(self.kept) != y.shape[axis]:
            y = y.index_select(axis, self.kept)
        if self.factors is None:
            return y
        view = [1] * y.dim()
        view[axis] = -1
        return y * self.factors.to(y.dtype).reshape(view)


def target_of(plan: Plan, reader: Reader, device: torch.device) -> Target:
    """See `Target`; outputs are those of the whole weight."""
    if not reader.separable:  # the weight counts outputs inside one group, the bias all of them
        removed = plan.removed.get(reader.bias, {}).get(0, ())
        return Target(torch.from_numpy(keep_indices(plan.structure[reader.bias][0], removed)).to(device), None)
    length = plan.structure[reader.weight][reader.out_axis]
    removed = plan.removed.get(reader.weight, {}).get(reader.out_axis, ())
    kept = torch.from_numpy(keep_indices(length, removed)).to(device)
    factors = np.ones(length)
    for scale in plan.rescales:
        if scale.parameter == reader.weight and scale.axis == reader.out_axis:
            factors[list(scale.indices)] *= scale.factor
    return Target(kept, torch.from_numpy(factors).to(device)[kept] if (factors != 1).any() else None)


def waves(readers: Sequence[Reader], needed: Callable[[Reader], int]) -> list[list[Reader]]:
    """Readers that can be fitted at the same time: none depends on another of its wave. In order.

    `needed`: bytes of one reader's moments; a wave that needs more than `MEMORY` is cut.
    """
    level: dict[str, int] = {}
    for reader in readers:
        level[reader.weight] = 1 + max((level[w] for w in reader.after if w in level), default=-1)
    out: list[list[Reader]] = []
    for number in range(1 + max(level.values(), default=-1)):
        used = 0
        out.append([])
        for reader in (r for r in readers if level[r.weight] == number):
            if out[-1] and used + needed(reader) > MEMORY:
                out.append([])
                used = 0
            out[-1].append(reader)
            used += needed(reader)
    return out


class Inputs(Protocol):
    """Batches that can be read again and again."""

    def inputs(self) -> Iterator[ExampleInput]: ...


class Pair:
    """The dense and the pruned network, run side by side on every batch, wave after wave of readers."""

    def __init__(
        self, dense: nn.Module, small: nn.Module, data: Inputs, order: Sequence[Sequence[Reader]]
    ) -> None:
        self.dense, self.small, self.data, self.order = dense, small, data, order
        self.levels = {r.weight: i for i, wave in enumerate(order) for r in wave}
        self.weights = [
            {n: t for n, t in named_tensors(net).items() if n in self.levels} for net in (dense, small)
        ]
        self.memories: list[tuple[Replay, Replay]] = []
        self.prints: list[tuple[Any, ...]] = []
        self.remember = True
        self.left_out: dict[str, str] = {}
        self._ahead: list[dict[str, list[Call]]] = []  # of the dense network, for every batch

    def begin(self) -> None:
        """From the first wave, where layers of the pruned network have got other values since the last time."""
        for _, memory in self.memories:
            memory.held = {}

    def gather(
        self,
        wave: Sequence[Reader],
        targets: dict[str, Target],
        take: Callable[[Reader, Call, Tensor, int], None],
    ) -> None:
        """One pass over the data: `take(reader, call of the pruned network, wanted results, samples seen before)`.

        Wanted is what the dense layer makes. Where its result is added to another tensor (a residual stream), wanted
        is what makes the sum right: the error that this tensor has collected so far is part of the target.
        """
        seen = 0
        coming = self._coming(wave)
        for index, example in enumerate(self.data.inputs()):
            memory = self._memory(index, example, wave)
            wanted = self._wanted(index, example, wave, coming, memory[0])
            options: dict[str, Any] = {"inputs": True, "outputs": True, "additions": True}
            found = observe(self.small, wave, example, **options, replay=memory[1])
            for reader in wave:
                if len(wanted[reader.weight]) != len(found[reader.weight]):
                    self._leave(
                        reader,
                        f"called {len(wanted[reader.weight])} times in the model and {len(found[reader.weight])} times "
                        f"in the pruned one on batch {index} of data",
                    )
                    continue
                for theirs, mine in zip(wanted[reader.weight], found[reader.weight], strict=True):
                    refuse_infinite_call(reader, theirs, index)
                    refuse_infinite_call(reader, mine, index, "the pruned network")
                    pair = _paired(reader, theirs, mine)
                    if pair is None:
                        self._leave(reader, f"the two networks pick different rows for it on batch {index} of data")
                    elif pair[0].y is not None and pair[0].y.numel():
                        take(reader, pair[1], self._target(reader, targets[reader.weight], *pair), seen)
            seen += example.samples

    def _coming(self, wave: Sequence[Reader]) -> list[Reader]:
        """The readers of this wave, and of those after it as far as their results can be held."""
        first = next((i for i, other in enumerate(self.order) if other is wave), len(self.order))
        coming, used = list(wave), 0
        for later in self.order[first:] if self.memories else ():
            used += self._bytes(later)
            if used > AHEAD:
                break
            coming += later if later is not wave else ()
        return coming

    def _bytes(self, wave: Sequence[Reader]) -> int:
        """Memory of the results of a wave for all batches; twice, as what they are added to is held too."""
        return sum(2 * memory.bytes_of(r.weight) for memory, _ in self.memories for r in wave)

    def _wanted(
        self, index: int, example: ExampleInput, wave: Sequence[Reader], coming: Sequence[Reader], memory: Replay | None
    ) -> dict[str, list[Call]]:
        """The calls of the dense network, which stays as it is: one run shows those of waves to come as well."""
        if memory is None:
            self._ahead = []
            return observe(self.dense, wave, example, outputs=True, additions=True)
        held = self._ahead[index] if index < len(self._ahead) else {}
        if all(r.weight in held for r in wave):
            return held
        self._ahead = self._ahead[:index]
        memory.start(self.levels[wave[0].weight], frozenset(r.weight for r in coming))
        calls = observe(self.dense, coming, example, outputs=True, additions=True, replay=memory)
        if len(coming) > len(wave) and memory.usable:
            self._ahead.append(calls)
        return calls

    def _leave(self, reader: Reader, why: str) -> None:
        """Some of what a layer reads has no counterpart; the first reason is kept."""
        self.left_out.setdefault(reader.weight, why)

    def note(self, weight: str) -> str:
        """What was left out of a layer's data."""
        why = self.left_out.get(weight)
        return "" if why is None else f"{why}, which was left out"

    def _target(self, reader: Reader, target: Target, theirs: Call, mine: Call) -> Tensor:
        assert theirs.y is not None and mine.y is not None
        axis = channel_axis(reader, mine.y)
        y = target.of(theirs.y, axis)
        if theirs.other is not None and mine.other is not None and mine.other.shape == y.shape:
            y = y + target.of(theirs.other, axis) - mine.other
        return y

    def _memory(self, index: int, example: ExampleInput, wave: Sequence[Reader]) -> tuple[Replay | None, Replay | None]:
        """The batch's memories, begun for this wave; none where the data are not the same again, or take too much."""
        if not self.remember:
            return None, None
        if index == len(self.memories):
            made = Replay(self.levels, self.weights[0]), Replay(self.levels, self.weights[1])
            self.memories.append(made)
            self.prints.append(_print(example))
        elif self.prints[index] != _print(example) or self._held() > CACHE:
            self.remember, self.memories = False, []
            return None, None
        pair = self.memories[index]
        if not all(memory.usable for memory in pair):
            return None, None  # both or none, so that both show which rows they pick
        pair[1].start(self.levels[wave[0].weight], frozenset(r.weight for r in wave))
        return pair

    def _held(self) -> int:
        return sum(m.bytes_held for pair in self.memories for m in pair)


def _print(example: ExampleInput) -> tuple[Any, ...]:
    """Tells whether a loader yields the same batch again (it may shuffle or augment)."""
    return tuple((tuple(t.shape), t.dtype, _digest(t)) for t in example.tensors())


def _digest(tensor: Tensor) -> bytes:
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(memoryview(values.numpy())).digest()  # type: ignore[arg-type]


def _paired(reader: Reader, theirs: Call, mine: Call) -> tuple[Call, Call] | None:
    """The two calls with the rows that both have; None where these cannot be told."""
    assert theirs.y is not None and mine.y is not None
    a, b = theirs.rows, mine.rows
    lengths = [y.shape[: y.dim() + reader.result_axis] for y in (theirs.y, mine.y)]
    if a is None or b is None or a.same(b):
        return (theirs, mine) if lengths[0] == lengths[1] else None
    places = common(a, b)
    if places is None or mine.again is not None or a.numbers is None or b.numbers is None:
        return None
    axes = a.numbers.dim()
    if axes != b.numbers.dim() or axes > len(lengths[0]) or (axes > 1 and reader.convolution):
        return None
    return _with_rows(theirs, axes, places[0]), _with_rows(mine, axes, places[1])


def _with_rows(call: Call, axes: int, places: Tensor) -> Call:
    def chosen(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.flatten(0, axes - 1)[places]

    return dataclasses.replace(call, x=chosen(call.x), y=chosen(call.y), other=chosen(call.other))


def channel_axis(reader: Reader, y: Tensor) -> int:
    """The axis of a layer's result that counts its outputs."""
    return y.dim() + reader.result_axis


class Constant:
    """Where a change of a layer's constant term goes: its bias, the mean of the batch norm behind it, or a new bias, if
    it may be given one (`new_bias`)."""

    def __init__(
        self, small: nn.Module, reader: Reader, batch_norm: nn.Module | None, new_bias: bool = True
    ) -> None:
        path, _, last = reader.weight.rpartition(".")
        owner = small.get_submodule(path)
        form = forms_in(small).get(reader.bias)
        self.bias = tensor_named(small, reader.bias) if reader.bias and (form is None or form.changeable) else None
        self.mean = getattr(batch_norm, "running_mean", None) if self.bias is None else None
        plain = isinstance(owner, (nn.Linear, _ConvNd)) and last == "weight" and owner.bias is None
        usual = new_bias and type(owner).forward.__module__.startswith("torch.nn")
        self.owner = owner if self.bias is None and self.mean is None and plain and usual else None

    @property
    def possible(self) -> bool:
        return self.bias is not None or self.mean is not None or self.owner is not None

    def add(self, change: Tensor) -> None:
        """Add `change`, one number per output."""
        if self.bias is not None:
            self.bias.data.copy_((self.bias.detach().double() + change).to(self.bias.dtype))
        elif self.mean is not None:  # y = (z - mean) * scale + shift
            self.mean.data.copy_((self.mean.detach().double() - change).to(self.mean.dtype))
        elif self.owner is not None:
            weight: Tensor = self.owner.weight  # type: ignore[assignment]
            bias = nn.Parameter(change.to(weight.dtype), requires_grad=weight.requires_grad)
            self.owner.register_parameter("bias", bias)


def bytes_needed(reader: Reader, weight: Tensor) -> int:
    """Memory of a reader's moments; those of transposed convolutions of several groups are never taken."""
    if not reader.separable:
        return 0
    outputs = weight.shape[reader.out_axis] // reader.groups
    return Moments.bytes_needed(reader.groups, weight.numel() // (outputs * reader.groups), outputs)


__all__ = [
    "MAX_FEATURES",
    "Constant",
    "Pair",
    "Target",
    "bytes_needed",
    "channel_axis",
    "rows_of",
    "target_of",
    "waves",
]
