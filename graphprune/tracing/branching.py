"""Does code do another thing in training mode? Read off its bytecode, once per function.

`dropout(x, p, self.training)` and `0.0 if not self.training else self.p` change numbers; everything else that reads the
flag may change what a module returns.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

_FLAG = "training"
# Names of functions, and ends of names, that take the flag and change numbers only.
_RANDOM = frozenset("dropout path depth drop attention norm dropout1d dropout2d dropout3d".split())
# How many functions are followed from one.
_MOST = 64
_Conditions = frozenset[str]
_ALWAYS = ""
_known: weakref.WeakKeyDictionary[type, _Conditions] = weakref.WeakKeyDictionary()
# Between the flag and the jump that it decides, and in a branch that does nothing but choose a number.
_IDLE = frozenset(
    "CACHE EXTENDED_ARG NOP RESUME TO_BOOL UNARY_NOT COPY SWAP POP_TOP LOAD_CONST LOAD_ATTR LOAD_SMALL_INT COMPARE_OP "
    "IS_OP CONTAINS_OP JUMP_FORWARD JUMP_BACKWARD NOT_TAKEN LOAD_GLOBAL PUSH_NULL".split()
)
_JUMPS = ("POP_JUMP_", "JUMP_IF_")
_SILENT = frozenset("CACHE EXTENDED_ARG NOP TO_BOOL NOT_TAKEN PRECALL PUSH_NULL".split())


def branches_on_training(modules: Iterable[nn.Module]) -> bool:
    """Whether the code of one of these modules does more in one mode than in the other. torch.nn's does not.

    Code is that of its class and of the functions of the user's that this names, its hooks, and a `forward` of its own.
    A branch behind an attribute that is off (`if self.gradient_checkpointing and self.training`) is none.
    """
    return any(
        condition == _ALWAYS or getattr(module, condition, True)
        for module in modules
        for condition in (*_class_branches(type(module)), *_own_branches(module))
    )


def _own_branches(module: nn.Module) -> set[str]:
    """Of functions that the module itself holds, and not its class."""
    own = [module.__dict__.get("forward"), *module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return {condition for value in own if value is not None for condition in _branches_of(value)}


def _class_branches(kind: type) -> _Conditions:
    """The attributes that have to be on for the code of a class to branch on its mode; `_ALWAYS` where none."""
    found = _known.get(kind)
    if found is None:
        values = [inspect.getattr_static(kind, name, None) for name in ("forward", "__call__")]
        found = _known[kind] = frozenset(condition for value in values for condition in _branches_of(value, kind))
    return found


def _foreign(module: str | None) -> bool:
    return module is None or module.startswith(("torch.", "builtins"))


def _branches_of(value: Any, kind: type | None = None) -> set[str]:
    """Of a function, however it is wrapped, and of those of the user's that it calls by name: methods of its class
    `kind`, and functions of its file (of a library's others there are too many)."""
    found: set[str] = set()
    seen: set[types.CodeType] = set()
    waiting: list[Any] = [value]
    while waiting and len(seen) < _MOST:
        value = waiting.pop()
        if isinstance(value, property):
            waiting.append(value.fget)
        elif isinstance(value, functools.partial):
            waiting.append(value.func)
        elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
            waiting.append(value.__func__)
        elif isinstance(value, types.FunctionType) and value.__code__ not in seen and not _foreign(value.__module__):
            code = value.__code__
            seen.add(code)
            found |= _branches(code)
            waiting.append(getattr(value, "__wrapped__", None))
            named = (value.__globals__.get(name) for name in code.co_names)
            waiting += [f for f in named if isinstance(f, types.FunctionType) and f.__module__ == value.__module__]
            if kind is not None:
                waiting += [inspect.getattr_static(kind, name, None) for name in code.co_names]
    return found


def _branches(code: types.CodeType) -> set[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    found = {condition for c in inner for condition in _branches(c)}
    if _FLAG in code.co_consts:  # getattr(self, "training")
        found.add(_ALWAYS)
    if _FLAG in code.co_names:
        steps = list(dis.get_instructions(code))
        places = [i for i, step in enumerate(steps) if step.opname == "LOAD_ATTR" and _is_flag(step)]
        known = any(name in _RANDOM or name.rpartition("_")[2] in _RANDOM for name in code.co_names)
        found |= {_condition(steps, i) for i in places if _decides(steps, i, known)}
    return found


def _condition(steps: Sequence[dis.Instruction], place: int) -> str:
    """X in `self.X and self.training` and `getattr(self, "X", False) and self.training`."""
    before = [step for step in steps[max(0, place - 12) : place] if step.opname not in _SILENT]
    if len(before) < 4 or not (_is_self(before[-1]) and _stops(before[-2])):
        return _ALWAYS
    if before[-3].opname == "LOAD_ATTR" and _is_self(before[-4]):
        return str(before[-3].argval)
    if before[-3].opname == "CALL" and len(before) > 6 and _is_self(before[-6]) and before[-7].argval == "getattr":
        return str(before[-5].argval)
    return _ALWAYS


def _is_self(step: dis.Instruction) -> bool:
    return step.opname.startswith("LOAD_FAST") and bool(step.argval == "self")


def _stops(step: dis.Instruction) -> bool:
    """The jump past an `and` whose left side is false."""
    return step.opname.startswith("POP_JUMP") and "IF_FALSE" in step.opname


def _is_flag(step: dis.Instruction) -> bool:
    return bool(step.argval == _FLAG)


def _decides(steps: Sequence[dis.Instruction], place: int, known: bool) -> bool:
    """The flag read here may choose what is returned. `known`: the code calls a function that takes the flag to drop
    something or not, and changes numbers only."""
    after = place + 1
    while steps[after].opname in _IDLE and steps[after].opname != "POP_TOP":
        after += 1
    if steps[after].opname.startswith("STORE_"):  # training = self.training: who knows
        return True
    if not steps[after].opname.startswith(_JUMPS):
        return not known
    target = steps[after].argval
    first = next((i for i, step in enumerate(steps) if step.offset == target), len(steps))
    arm = steps[after + 1 : first]
    end = first
    if arm and arm[-1].opname == "JUMP_FORWARD":
        end = next((i for i, step in enumerate(steps) if step.offset == arm[-1].argval), len(steps))
    return not all(_idle(step) for step in (*arm, *steps[first:end]))


def _idle(step: dis.Instruction) -> bool:
    if step.opname.startswith("LOAD_FAST"):
        names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        return all(name == "self" for name in names)
    return step.opname in _IDLE or step.opname.startswith(_JUMPS)
