"""Values of Python as a checkpoint holds them: JSON without code, with tensors beside it.

A number, a text, a flag or None is itself; all else is an object with one key, which says what it is: "tensor" and
"array" name what lies beside, containers hold values, generators of random numbers hold their state, and "stays" stands
for an object that is no data: it is left as it is, and must be there when the value is put back.
"""

from __future__ import annotations

import collections
import math
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

PLAIN = (bool, int, float, str, type(None))
_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "deque": collections.deque, "set": set}
_TABLES = (dict, collections.OrderedDict, collections.defaultdict, collections.Counter)
_DRAWING = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
# What a run may have made, or have set anew.
DATA = (Tensor, np.ndarray, np.generic, *PLAIN, *_SEQUENCES.values(), dict, *_DRAWING)
Naming = Callable[[str, Tensor, bool], str | None]
Written = Any


def written(
    value: Any,
    place: str,
    naming: Naming,
    above: tuple[int, ...] = (),
    staying: Callable[[str], Any] = lambda where: None,
) -> Written:
    """A value as JSON. `naming(place, tensor, own)` takes a tensor, which is the value's own or a copy of what is no
    tensor, and gives the name that it has, None where it stays. `staying`: is told the places of what is no data.
    `above`: the containers that it is in."""
    kind = type(value)

    def inside(item: Any, where: str = place) -> Written:
        return written(item, where, naming, (*above, id(value)), staying)

    def stays() -> Written:
        staying(f"{place}: {kind.__name__}")
        return {"stays": kind.__name__}

    if kind is float and not math.isfinite(value):
        return {"float": str(value)}
    if kind is int and value.bit_length() > 63:
        return {"int": hex(value)}
    if kind in PLAIN:
        return value
    if isinstance(value, Tensor):
        name = naming(place, value, True)
        return stays() if name is None else {"tensor": name}
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc":
        return {"array" if kind is np.ndarray else "scalar": naming(place, torch.from_numpy(np.array(value)), False)}
    if isinstance(value, _DRAWING):
        return {"random": inside(_state(value))}
    if id(value) in above:
        return stays()
    if isinstance(value, tuple) or kind in _SEQUENCES.values():
        if isinstance(value, tuple) and kind is not tuple:  # of a class of the user's
            stays()
        items = sorted(value, key=repr) if kind is set else value
        label = "tuple" if isinstance(value, tuple) else kind.__name__
        return {label: [inside(item, f"{place}/{i}") for i, item in enumerate(items)]}
    if kind in _TABLES and all(map(_is_key, value)):
        return {"dict": [[inside(k), inside(v, f"{place}/{i}")] for i, (k, v) in enumerate(value.items())]}
    return stays()


def fits(stored: Written, now: Any, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a stored value can be put where `now` is; whatever JSON it is."""
    if type(stored) in PLAIN:
        return not isinstance(now, nn.Parameter)
    if not isinstance(stored, dict) or len(stored) != 1:
        return False
    ((kind, held),) = stored.items()
    if isinstance(now, nn.Parameter):
        tensor = tensors.get(held) if kind == "tensor" and isinstance(held, str) else None
        return tensor is not None and bool(is_lazy(now) or same_form(now, tensor))
    if kind == "float":
        return held in ("inf", "-inf", "nan")
    if kind == "int":
        return isinstance(held, str) and re.fullmatch("-?0x[0-9a-f]{16,64}", held) is not None
    if kind == "stays":
        return bool(type(now).__name__ == held)
    if kind in ("tensor", "array", "scalar"):
        return isinstance(held, str) and held in tensors
    if kind == "random":
        return isinstance(now, _DRAWING) and fits(held, None, tensors) and _goes_on(now, taken(held, None, tensors))
    if not isinstance(held, list):
        return False
    if kind == "dict":
        pairs = all(isinstance(pair, list) and len(pair) == 2 and _is_written_key(pair[0]) for pair in held)
        return pairs and all(fits(v, _at(now, taken(k, None, {})), tensors) for k, v in held)
    if kind == "set" and not all(map(_is_written_key, held)):
        return False
    if kind == "tuple" and hasattr(now, "_make") and len(now) != len(held):
        return False
    return kind in _SEQUENCES and all(fits(item, _item(now, i), tensors) for i, item in enumerate(held))


def taken(stored: Written, now: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that is stored, in the place of `now`: what can be written to is, so that all who know it see it."""
    if type(stored) in PLAIN:
        return stored
    ((kind, held),) = stored.items()
    if kind == "float":
        return float(held)
    if kind == "int":
        return int(held, 16)
    if kind == "stays":
        return now
    if kind == "tensor":
        return _tensor(tensors[held], now)
    if kind in ("array", "scalar"):
        return _array(tensors[held].cpu().numpy(), now if kind == "array" else None, kind)
    if kind == "random":
        _go_on(now, taken(held, None, tensors))
        return now
    if kind == "dict":
        keys = [taken(k, None, tensors) for k, _ in held]
        values = [taken(v, _at(now, k), tensors) for k, (_, v) in zip(keys, held, strict=True)]
        table = now if isinstance(now, dict) else {}
        table.clear()
        table.update(zip(keys, values, strict=True))
        return table
    items = [taken(item, _item(now, i), tensors) for i, item in enumerate(held)]
    return _sequence(kind, items, now)


def same_form(own: Tensor, stored: Any) -> bool:
    """Whether one can be copied into the other without loss."""
    return isinstance(stored, Tensor) and own.shape == stored.shape and own.dtype == stored.dtype


def _is_key(key: Any) -> bool:
    return type(key) in PLAIN or (type(key) is tuple and all(map(_is_key, key)))


def _is_written_key(stored: Written) -> bool:
    return fits(stored, None, {}) and _is_key(taken(stored, None, {}))


def _item(now: Any, index: int) -> Any:
    return now[index] if isinstance(now, (list, tuple, collections.deque)) and index < len(now) else None


def _at(now: Any, key: Any) -> Any:
    return now.get(key) if isinstance(now, dict) and _is_key(key) else None


def _tensor(stored: Tensor, now: Any) -> Tensor:
    if is_lazy(now):
        now.materialize(stored.shape, dtype=stored.dtype)
    if isinstance(now, Tensor) and same_form(now, stored):
        with torch.no_grad():
            return now.copy_(stored)
    return stored.to(now.device) if isinstance(now, Tensor) else stored


def _array(stored: Any, now: Any, kind: str) -> Any:
    if isinstance(now, np.ndarray) and now.shape == stored.shape and now.dtype == stored.dtype and now.flags.writeable:
        now[...] = stored
        return now
    return stored[()] if kind == "scalar" else stored.copy()


def _sequence(kind: str, items: list[Any], now: Any) -> Any:
    if kind == "tuple":
        return type(now)._make(items) if isinstance(now, tuple) and hasattr(now, "_make") else tuple(items)
    if type(now) is not _SEQUENCES[kind]:
        return _SEQUENCES[kind](items)
    held: Any = now
    held.clear()
    (held.update if kind == "set" else held.extend)(items)
    return held


def _state(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    return value.bit_generator.state if isinstance(value, np.random.Generator) else value.get_state(legacy=False)


def _goes_on(value: Any, state: Any) -> bool:
    """Whether it is a state of this generator, which is as before afterwards."""
    before = _state(value)
    try:
        _go_on(value, state)
    except Exception:
        return False
    finally:
        _go_on(value, before)
    return True


def _go_on(value: Any, state: Any) -> None:
    """Raises what the generator raises for a state that is none."""
    if isinstance(value, np.random.Generator):
        value.bit_generator.state = state
    elif isinstance(value, random.Random):
        value.setstate(state)
    else:
        value.set_state(state)


__all__ = ["DATA", "PLAIN", "Naming", "Written", "fits", "same_form", "taken", "written"]
