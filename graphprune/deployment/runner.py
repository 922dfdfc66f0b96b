"""A file in a runtime, called as the model is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import GraphPruneError
from ..runtimes.adapters.workers import RemoteSession
from ..runtimes.arguments import FlatArguments
from ..runtimes.sources import Answers
from ..tracing.example import ExampleInput
from .calibrating import flat_like


class Outputs(dict[str, Tensor]):
    """Results by name, also as attributes: `run(x)["logits"]`, `run(x).logits`."""

    def __getattr__(self, name: str) -> Tensor:
        if name in self:
            return self[name]
        raise AttributeError(f"there is no output {name!r}; there are {', '.join(self)}")


class Runner:
    """What `evaluate` gets: called with the arguments of the model, it returns what the runtime computes.

    A tensor where the model returns one, a tuple for a tuple or list, else `Outputs` by name. Any number of samples:
    they are cut into batches as long as the example's, the last one filled up. Other sizes are the example's.
    """

    def __init__(self, session: RemoteSession, arguments: FlatArguments, answers: Answers) -> None:
        self._session, self._arguments, self._answers = session, arguments, answers
        batch = arguments.batch_size
        self._batched = [batch is not None and t.ndim > 0 and t.shape[0] == batch for t in answers.tensors]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises GraphPruneError for other tensors than those of the example, in number, shape or dtype."""
        if not args and not kwargs:
            raise GraphPruneError("run: no inputs; call it as you would call the model")
        tensors = flat_like(ExampleInput(args, kwargs), self._arguments, "run")
        size = self._arguments.batch_size
        places = [i for i, batched in enumerate(self._arguments.batched) if batched]
        if size is None:
            return self._as_given(self._session.run(tensors))
        lengths = {len(tensors[i]) for i in places}
        if len(lengths) != 1 or not (length := lengths.pop()):
            raise GraphPruneError(f"run: inputs of {sorted(len(tensors[i]) for i in places)} samples; expected as many")
        rows = torch.arange(-(-length // size) * size).clamp(max=length - 1)
        batches = [
            [t[rows[start : start + size]] if i in places else t for i, t in enumerate(tensors)]
            for start in range(0, len(rows), size)
        ]
        found = self._session.run_all(batches)
        if len(batches) > 1 and not all(self._batched):
            single = ", ".join(name for name, b in zip(self._answers.names, self._batched, strict=True) if not b)
            raise GraphPruneError(
                f"run: output {single} does not count samples, so that batches cannot be joined; pass {size} at a time"
            )
        joined = [torch.cat(parts) for parts in zip(*found, strict=True)] if len(batches) > 1 else found[0]
        return self._as_given([t[:length] if b else t for t, b in zip(joined, self._batched, strict=True)])

    def _as_given(self, tensors: list[Tensor]) -> Any:
        result = self._answers.result
        if isinstance(result, Tensor):
            return tensors[0]
        if isinstance(result, (tuple, list)) and not isinstance(result, Mapping) and not hasattr(result, "_fields"):
            if all(isinstance(item, Tensor) for item in result):
                return tuple(tensors)
        return Outputs(zip(self._answers.names, tensors, strict=True))
