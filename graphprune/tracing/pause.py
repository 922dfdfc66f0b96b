"""Pause the cyclic garbage collector."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from ..support.interrupts import shielded


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """Tracing and planning make many objects that live on; collecting in between finds nothing and takes long."""
    with shielded() as shield:
        enabled = gc.isenabled()
        gc.disable()
        try:
            with shield.lifted():
                yield
        finally:
            if enabled:
                gc.enable()
