"""Token sequences that a causal language model says itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import GraphPruneError
from ..support.progress import stage
from ..tracing.example import ExampleInput, result_tensors
from ..tracing.trace import run_model
from .form import Form
from .running import device_of, seeded

MOST = 32  # sequences of a batch
# Heads may be padded: how much longer or shorter than the table of tokens logits may be.
_PADDING = 0.1


class _Lookups(TorchFunctionMode):
    """While inside, on this thread, gathers which integers are looked up in tables of how many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, int]] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        given = dict(kwargs or {})
        if function is F.embedding:
            ids, table = (*args, *(given[n] for n in ("input", "weight") if n in given))[:2]
            self.found.append((ids, len(table)))
        return function(*args, **given)


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A causal language model. `place`: of the token sequences (samples, length) among the form's tensors; `result`: of
    the logits among the tensors that it returns; `tokens`: how many there are. `grows`: it takes shorter sequences."""

    model: nn.Module
    form: Form
    place: int
    result: int
    tokens: int
    grows: bool

    @property
    def length(self) -> int:
        """Tokens of a sequence: as many as the example's have."""
        return self.form.tensors[self.place].shape[1]

    def batch(self, seed: int, number: int, samples: int) -> list[Tensor]:
        """The form's tensors with sequences whose first token is drawn from all, and each other from what the model
        makes of those before: a function of `seed` and `number`."""
        generator = seeded(seed, number)
        tensors = [t.to(device_of(self.model)) for t in self.form.repeated(samples)]
        ids = torch.zeros_like(tensors[self.place])
        ids[:, 0] = torch.randint(self.tokens, (samples,), generator=generator).to(ids)
        tensors[self.place] = ids
        with stage("saying tokens", self.length - 1, "tokens") as now, torch.no_grad():
            for place in range(1, self.length):
                said = self._logits(tensors, place)[:, place - 1].float().softmax(1).cpu()
                ids[:, place] = torch.multinomial(said, 1, generator=generator)[:, 0].to(ids)
                now.advance()
        return tensors

    def _logits(self, tensors: list[Tensor], length: int) -> Tensor:
        """Of the first `length` tokens at least."""
        shown = [_cut(t, self.length, length) for t in tensors] if self.grows else tensors
        return _results(self.model, self.form.filled(shown))[self.result][..., : self.tokens]

    def looks_ahead(self) -> bool:
        """Whether a token changes the logits of one before it."""
        tensors = [t.to(device_of(self.model)) for t in self.form.repeated(1)]
        whole = self._logits(tensors, self.length)
        other = list(tensors)
        other[self.place] = other[self.place].clone()
        other[self.place][:, -1] = (other[self.place][:, -1] + 1) % self.tokens
        changed = self._logits(other, self.length)
        return not _same(whole[:, :-1], changed[:, :-1])

    def takes_shorter(self) -> bool:
        """Whether a beginning alone gives the same logits."""
        tensors = [t.to(device_of(self.model)) for t in self.form.repeated(1)]
        whole = self._logits(tensors, self.length)
        for length in {1, self.length // 2 or 1}:
            try:
                part = dataclasses.replace(self, grows=True)._logits(tensors, length)
            except (GraphPruneError, IndexError):
                return False
            if part.shape[1] != length or not _same(whole[:, :length], part):
                return False
        return True


def speaker_of(model: nn.Module, form: Form) -> Speaker | str:
    """The language model, or why it is none; inside `model_at_rest`."""
    with torch.no_grad(), _Lookups() as lookups:
        tensors = [t.to(device_of(model)) for t in form.repeated(max(form.batch_size, 1))]
        results = _results(model, form.filled(tensors))
    looked_up = [
        (place, rows)
        for ids, rows in lookups.found
        for place, t in enumerate(tensors)
        if t.dim() == 2 and not t.is_floating_point() and form.batched(form.tensors[place]) and _same_memory(ids, t)
    ]
    if not looked_up:
        return "no integer input of shape (samples, tokens) is looked up in a table of embeddings"
    place, rows = looked_up[0]
    for result, logits in enumerate(results):
        if logits.dim() != 3 or logits.shape[:2] != tensors[place].shape:
            continue
        if abs(logits.shape[2] / rows - 1) > _PADDING:
            continue
        if tensors[place].shape[1] < 2:
            return "the example is one token long; pass one as long as the sequences should be"
        found = Speaker(model, form, place, result, min(rows, logits.shape[2]), False)
        if found.looks_ahead():
            return "it is no causal one: what it says of a token changes with those behind it"
        return dataclasses.replace(found, grows=found.takes_shorter())
    return f"it returns no logits of shape (samples, tokens, {rows}), for each token of its table of embeddings"


def _results(model: nn.Module, inputs: ExampleInput) -> list[Tensor]:
    with torch.no_grad():
        return [t for t in result_tensors(run_model(model, inputs, "synthesize")) if t.is_floating_point()]


def _same_memory(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


def _same(one: Tensor, other: Tensor) -> bool:
    near = 1e3 * torch.finfo(one.dtype).eps * float(one.abs().amax())
    return float((one - other).abs().amax()) <= near


def _cut(tensor: Tensor, whole: int, length: int) -> Tensor:
    return tensor[:, :length] if tensor.dim() == 2 and tensor.shape[1] == whole else tensor
