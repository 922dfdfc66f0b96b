"""Randomness as a function of (seed, epoch): what was drawn before, or in a run that was stopped, does not matter."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def random_state_kept(data: Any = None) -> Iterator[None]:
    """The random state of torch (all devices), numpy, python and the loader's own generators as before afterwards."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    own = [(generator, generator.get_state()) for generator in _generators(data)]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
            for generator, state in own:
                generator.set_state(state)


def seed_epoch(seed: int, epoch: int, data: Any = None) -> None:
    """Seed torch, numpy, python and the loader's own generators for one epoch, and tell its sampler the epoch."""
    first, second = (int(n) for n in np.random.SeedSequence((seed, epoch)).generate_state(2, np.uint64))
    torch.manual_seed(first >> 1)
    np.random.seed(second & 0xFFFFFFFF)
    random.seed(second)
    for generator in _generators(data):
        generator.manual_seed(first >> 1)
    set_epoch = getattr(getattr(data, "sampler", None), "set_epoch", None)
    if callable(set_epoch):
        set_epoch(epoch)


class Repeated:
    """Reads what can be iterated several times so that every pass is the same one: what it draws from torch, numpy,
    python and its own generators is what it drew in the first pass, and nobody else's draws change or see that."""

    def __init__(self, data: Any) -> None:
        self._data, self._start = data, _State(data)

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[Any]:
        own, items = self._start, None
        while True:
            outside = _State(self._data)
            own.put()
            try:
                items = iter(self._data) if items is None else items
                item = next(items)
            except StopIteration:
                return
            finally:
                own = _State(self._data)
                outside.put()
            yield item


class _State:
    """What is drawn next, on the processor: of torch, numpy, python and the loader's own generators."""

    def __init__(self, data: Any) -> None:
        self._torch, self._numpy, self._python = torch.get_rng_state(), np.random.get_state(), random.getstate()
        self._own = [(generator, generator.get_state()) for generator in _generators(data)]

    def put(self) -> None:
        torch.set_rng_state(self._torch)
        np.random.set_state(self._numpy)
        random.setstate(self._python)
        for generator, state in self._own:
            generator.set_state(state)


def _generators(data: Any) -> list[torch.Generator]:
    """Generators of a DataLoader and of its samplers, each once."""
    batches = getattr(data, "batch_sampler", None)
    holders = (data, getattr(data, "sampler", None), batches, getattr(batches, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
