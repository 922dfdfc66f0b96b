"""Modes of the running thread, put back as they were: an interrupt can come between a mode's `__exit__` and its first
line, and then it stays on."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch

from .interrupts import shielded


@contextlib.contextmanager
def kept_modes() -> Iterator[None]:
    """Gradients, torch's modes for functions and calls, and the garbage collector are afterwards as before, and no
    interrupt gets through before they are."""
    with shielded() as shield:
        gradients, collecting = torch.is_grad_enabled(), gc.isenabled()
        functions, calls = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
        try:
            with shield.lifted():
                yield
        finally:
            while torch._C._len_torch_function_stack() > functions:
                torch._C._pop_torch_function_stack()
            while torch._C._len_torch_dispatch_stack() > calls:
                torch._C._pop_torch_dispatch_stack()
            if torch.is_grad_enabled() is not gradients:
                torch._C._set_grad_enabled(gradients)
            if collecting and not gc.isenabled():
                gc.enable()
