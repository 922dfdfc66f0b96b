"""Run a network on the same inputs again and again, as its layers get other values one after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...errors import GraphPruneError
from ...tracing.operators import function_name
from .replay import Diverged, Replay

# Memory for what stands before the layers that change, of all inputs together; what does not fit is computed again.
HELD = 256 << 20


class Reruns:
    """The network's results on `count` inputs. What stands before the first layer with other values is computed once,
    as long as layers are asked for in their order.

    `levels`: weight -> the step in which it gets other values; `weights`: these.
    """

    def __init__(self, count: int, levels: Mapping[str, int], weights: Mapping[str, Tensor]) -> None:
        self._memories = [Replay(levels, weights) for _ in range(count)]
        self._at = 0

    def results(self, first: int, index: int, run: Callable[[Replay | None], list[Tensor]]) -> list[Tensor]:
        """What `run` finds with this input, where nothing has changed since the last time that is settled before the
        step `first`. `run` calls the network, and tells the memory that it gets of everything (`Telling`)."""
        if first < self._at:  # what is held is of later layers
            for memory in self._memories:
                memory.held = {}
        self._at = first
        memory = self._memories[index]
        if not memory.usable:
            return run(None)
        memory.start(first, None)
        try:
            found = run(memory)
            memory.finish(found)
        except (Diverged, GraphPruneError):
            if not memory.replaying:
                raise
            memory.drop()
            return run(None)
        if sum(held.bytes_held for held in self._memories) > HELD:
            memory.held = {}
        return found


class Telling(TorchFunctionMode):
    """Tells a memory of all calls; `made` makes the result of one."""

    def __init__(self, memory: Replay | None) -> None:
        super().__init__()
        self.memory = memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.memory is None:
            return self.made(func, args, kwargs)
        name = function_name(func)
        readers = self.memory.reader_names(name, args, kwargs)
        if readers:
            return self.memory.layer(readers, func, args, kwargs, functools.partial(self.made, func, args, kwargs))
        out = func(*args, **kwargs)
        self.memory.told(func, name, args, kwargs, out)
        return out

    def made(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of a call, of a layer that may get other values where there is a memory."""
        return func(*args, **kwargs)
