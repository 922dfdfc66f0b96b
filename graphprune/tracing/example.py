"""Example inputs and outputs: one form inside, whatever the caller passes."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, ItemsView, KeysView, Mapping, Set, ValuesView
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraphPruneError
from ..support.reach import slots
from .containers import is_cache, is_holder, opened, remade


@dataclasses.dataclass(frozen=True)
class ExampleInput:
    """Arguments of one call of a model.

    Accepted by every public function as a tensor (one positional argument), a tuple or list (positional
    arguments) or a dict (keyword arguments); `ExampleInput.of` turns all of them into this form.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, value: Any) -> ExampleInput:
        if isinstance(value, ExampleInput):
            return value
        if isinstance(value, Tensor):
            example = cls((value,), {})
        elif isinstance(value, (tuple, list)):
            example = cls(tuple(value), {})
        elif isinstance(value, Mapping):
            if not all(isinstance(key, str) for key in value):
                raise GraphPruneError("example_input: a dict must map names of keyword arguments to values")
            example = cls((), dict(value))
        else:
            raise GraphPruneError(
                f"example_input: expected a tensor, a tuple of positional arguments or a dict of keyword "
                f"arguments, got {type(value).__name__}"
            )
        if not example.args and not example.kwargs:
            raise GraphPruneError("example_input is empty: pass what you would pass to model(...)")
        return example.map(ordinary) if any(map(_restricted, example.tensors())) else example

    def call(self, model: Callable[..., Any]) -> Any:
        """`model(*args, **kwargs)`."""
        return model(*self.args, **self.kwargs)

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, in order."""
        return flatten_tensors((self.args, dict(self.kwargs)))

    @property
    def batch_size(self) -> int | None:
        """Length of the first axis of the first tensor; None without one."""
        return next((int(t.shape[0]) for t in self.tensors() if t.dim()), None)

    @property
    def samples(self) -> int:
        """How many samples a batch holds; 1 where no axis counts them."""
        return 1 if self.batch_size is None else self.batch_size

    def map(self, function: Callable[[Tensor], Tensor]) -> ExampleInput:
        """The same arguments with every tensor replaced by `function(tensor)`."""
        return ExampleInput(_map(self.args, function), _map(dict(self.kwargs), function))

    def clone(self) -> ExampleInput:
        """Detached copies of the tensors, so that a model may write into its inputs."""
        return self.map(lambda t: t.detach().clone())

    def to(self, device: torch.device | str) -> ExampleInput:
        return self.map(lambda t: t.to(device))


def _restricted(tensor: Tensor) -> bool:
    """Made under `torch.inference_mode()`: outside it cannot be written to, and no gradient goes through it."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that was made under `torch.inference_mode()`, which backward passes refuse."""
    return tensor.clone() if _restricted(tensor) else tensor


def flatten_tensors(value: Any) -> list[Tensor]:
    """Tensors inside nested tuples, lists, dicts, dataclasses and plain objects, in a fixed order."""
    found: list[Tensor] = []
    _flatten(value, found, 0)
    return found


def result_tensors(value: Any) -> list[Tensor]:
    """`flatten_tensors` of what a model returned, without the caches among it.

    A cache - an object of a class whose name, or a base's name, ends in "Cache" - is state that the same model reads
    again in its next step (the keys and values of a decoder), not an answer: its widths are the model's own affair.
    """
    found: list[Tensor] = []
    _flatten(value, found, 0, caches=False)
    return found


def _flatten(value: Any, found: list[Tensor], depth: int, caches: bool = True) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif value is None or isinstance(
        value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, nn.Module)
    ):
        return
    elif depth > 16 or (not caches and is_cache(value)):
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            _flatten(item, found, depth + 1, caches)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _flatten(item, found, depth + 1, caches)
    elif isinstance(value, (Set, KeysView, ValuesView, ItemsView, deque)):
        for item in value:
            _flatten(item, found, depth + 1, caches)
    elif (parts := opened(value)) is not None:  # in the order in which `map` sees them
        for item in parts.parts:
            _flatten(item, found, depth + 1, caches)
    elif not isinstance(value, type):
        for item in (*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in slots(value))):
            _flatten(item, found, depth + 1, caches)


def _map(value: Any, function: Callable[[Tensor], Tensor], inside: bool = False) -> Any:
    """`inside`: a cache, whose parts are copied too, as a model changes them while it runs."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        items = [_map(item, function, inside) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_map(item, function, inside) for item in value]
    if isinstance(value, dict):
        return {key: _map(item, function, inside) for key, item in value.items()}
    parts = opened(value)
    if parts is not None:
        return parts.rebuild([_map(item, function, inside) for item in parts.parts])
    if is_holder(value, inside):
        return remade(value, lambda item: _map(item, function, True))
    return value
