"""What every public function that takes a model does first, in one place."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from .modes import kept_modes
from .unwrapping import check_changeable, checked_model
from .walking import walked_anew, walked_once

P = ParamSpec("P")
R = TypeVar("R")


def door(
    *names: str, keep_wrapper: bool = False, in_place: bool = False, exact: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a public function whose arguments of these names are models.

    The function sees the modules inside `torch.compile`'s and the data-parallel wrappers (with `keep_wrapper`, what was
    handed over), after `checked_model`; None where that is the default. A function that returns the very module it was
    given, since it works in place, returns it in its wrapper; `in_place`: the first of the models is such a one, and
    must not consist of tensors that cannot be changed. Under `torch.inference_mode()` it works as outside:
    tensors made there could not be trained, and many of torch's operators are invisible. `exact`: so it does under
    `torch.autocast`, as sums over data in half precision are none. Modes of the thread are as
    before, however it ends (`kept_modes`).
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters
        order = list(parameters)
        places = {name: order.index(name) for name in names}

        @functools.wraps(function)
        def entered(*args: P.args, **kwargs: P.kwargs) -> R:
            values, named = list(args), dict(kwargs)
            given: list[tuple[Any, nn.Module]] = []
            inferring = torch.is_inference_mode_enabled()
            outside = torch.inference_mode(False) if inferring else contextlib.nullcontext()
            with kept_modes(), _looked_at() as known, outside, _not_cast() if exact else contextlib.nullcontext():
                for name, place in places.items():
                    found: Any = named.get(name) if name in named else values[place] if place < len(values) else None
                    if found is None and (parameters[name].default is None or not _passed(name, place, values, named)):
                        continue  # not given: optional, or python's own error says so
                    module = found if id(found) in known else checked_model(found, name, keep_wrapper=keep_wrapper)
                    if not keep_wrapper:
                        known.append(id(module))
                    if in_place and not given:
                        check_changeable(module, name)
                    given.append((found, module))
                    if name in named:
                        named[name] = module
                    else:
                        values[place] = module
                changing = in_place or keep_wrapper
                with walked_anew() if changing else walked_once(model for _, model in given):
                    result = function(*values, **named)  # type: ignore[arg-type]
            return next((whole for whole, module in given if module is result), result)

        return entered

    return decorated


@contextlib.contextmanager
def _not_cast() -> Iterator[None]:
    """Without `torch.autocast`, where it is on."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


_running = threading.local()


@contextlib.contextmanager
def _looked_at() -> Iterator[list[int]]:
    """The modules that the doors around this one, on this thread, have looked at."""
    known: list[int] = _running.__dict__.setdefault("known", [])
    before = len(known)
    try:
        yield known
    finally:
        del known[before:]


def _passed(name: str, place: int, values: list[Any], named: dict[str, Any]) -> bool:
    return name in named or place < len(values)

