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


def _generators(data: Any) -> list[torch.Generator]:
    """Generators of a DataLoader and of its samplers, each once."""
    batches = getattr(data, "batch_sampler", None)
    holders = (data, getattr(data, "sampler", None), batches, getattr(batches, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
