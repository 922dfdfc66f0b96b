"""Does code do another thing in training mode? Read off its bytecode, once per function.

`dropout(x, p, self.training)` and `0.0 if not self.training else self.p` change numbers; a branch that calls, stores or
returns something may change what a module returns.
"""

from __future__ import annotations

import dis
import inspect
import types
import weakref
from collections.abc import Iterable, Sequence

from torch import nn

_FLAG = "training"
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

    A branch behind an attribute of its own that is off (`if self.gradient_checkpointing and self.training`) is none.
    """
    return any(
        condition == _ALWAYS or getattr(module, condition, True)
        for module in modules
        for condition in _class_branches(type(module))
    )


def _class_branches(kind: type) -> _Conditions:
    """The attributes that have to be on for the code of a class to branch on its mode; `_ALWAYS` where none."""
    found = _known.get(kind)
    if found is None:
        own = [k for k in kind.__mro__ if k is not nn.Module and not k.__module__.startswith(("torch.", "builtins"))]
        functions = [inspect.unwrap(f) for k in own for f in vars(k).values() if isinstance(f, types.FunctionType)]
        functions += [f for k in own for f in vars(k).values() if hasattr(f, "__wrapped__")]
        codes = {code for f in functions if (code := getattr(f, "__code__", None)) is not None}
        found = _known[kind] = frozenset(condition for code in codes for condition in _branches(code))
    return found


def _branches(code: types.CodeType) -> set[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    found = {condition for c in inner for condition in _branches(c)}
    if _FLAG in code.co_consts:  # getattr(self, "training")
        found.add(_ALWAYS)
    if _FLAG in code.co_names:
        steps = list(dis.get_instructions(code))
        places = [i for i, step in enumerate(steps) if step.opname == "LOAD_ATTR" and _is_flag(step)]
        found |= {_condition(steps, i) for i in places if _decides(steps, i)}
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


def _decides(steps: Sequence[dis.Instruction], place: int) -> bool:
    """The flag read here chooses between two courses, one of which is more than a number."""
    after = place + 1
    while steps[after].opname in _IDLE and steps[after].opname != "POP_TOP":
        after += 1
    if steps[after].opname.startswith("STORE_"):  # training = self.training: who knows
        return True
    if not steps[after].opname.startswith(_JUMPS):
        return False
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
