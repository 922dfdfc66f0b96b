"""Change what layers return, by hooks: the way to leave a layer out that needs no surgery."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...support.walking import all_modules
from .blocks import Block

# (the stream that a layer was given, the stream that it made) -> another one.
Change = Callable[[Tensor, Tensor], Tensor]


def left_out(block: Block) -> Change:
    """What becomes of the result of a layer that does nothing: its input, or nothing to add."""
    return (lambda x, y: torch.zeros_like(y)) if block.branch else (lambda x, y: x)


@contextlib.contextmanager
def changed(model: nn.Module, changes: Sequence[tuple[Block, Change]]) -> Iterator[None]:
    """Hooks that replace the results of layers while the context lasts. A layer that writes into its input is read
    as it was before."""
    modules = all_modules(model)
    handles = []
    try:
        for block, change in changes:
            last = block.pieces[-1]
            layer = _Layer(last, change)
            handles.append(modules[last.module].register_forward_pre_hook(layer.enter, with_kwargs=True))
            handles.append(modules[last.module].register_forward_hook(layer.leave, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Layer:
    """The hooks of one layer: an object each, as a closure over a loop's name would see the last layer only."""

    def __init__(self, block: Block, change: Change) -> None:
        self.block, self.change = block, change
        self.given: Tensor | None = None

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        stream = self.block.stream
        self.given = (args[stream] if isinstance(stream, int) else kwargs[stream]).clone()

    def leave(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        given, self.given = self.given, None
        assert given is not None
        new = self.change(given, out[0] if self.block.form else out)
        return type(out)((new, *out[1:])) if self.block.form else new


__all__ = ["Change", "changed", "left_out"]
