"""What the steps of a plan may name. torch.fx writes names into Python code unquoted, and a plan is a file that anyone
may have written: names that are no plain names, and ways out of tensors into Python's own objects, are refused."""

from __future__ import annotations

import keyword
from typing import Any

from torch import Tensor, nn

from ...errors import GraphPruneError

_OPERATORS = frozenset(
    f"__{stem}__"
    for stem in (
        *"abs bool contains eq float ge gt int invert index le len lt ne neg pos".split(),
        *(
            f"{how}{name}"
            for name in "add and div floordiv lshift matmul mod mul or pow rshift sub truediv xor".split()
            for how in ("", "r", "i")
        ),
    )
)
# Methods of tensors that call Python objects, or hand over what is no tensor.
_NO_METHODS = frozenset(
    ("apply_", "map_", "map2_", "register_hook", "register_post_accumulate_grad_hook", "module_load")
)


def _refuse(text: str) -> GraphPruneError:
    return GraphPruneError(f"not a plan: {text}")


def plain_name(name: Any) -> bool:
    """An identifier, and nothing else."""
    return isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)


def check_argument(target: str) -> None:
    """A parameter of forward: a name, after "*" or "**" perhaps."""
    stars = len(target) - len(target.lstrip("*"))
    if stars > 2 or not plain_name(target[stars:]):
        raise _refuse(f"an argument is called {target[:60]!r}")


def check_keywords(names: Any) -> None:
    """The names of keyword arguments."""
    for name in names:
        if not plain_name(name):
            raise _refuse(f"a keyword argument is called {str(name)[:60]!r}")


def check_method(name: str) -> None:
    """A method of a tensor: no inner workings."""
    if name in _NO_METHODS or (name.startswith("_") and name not in _OPERATORS):
        raise _refuse(f"it calls the method {name[:60]!r}, which computes no tensor")


def check_read(args: tuple[Any, ...]) -> None:
    """`getattr(value, name)` reads a property of a tensor or a field of a result."""
    if len(args) != 2 or not plain_name(args[1]) or args[1].startswith("__"):
        raise _refuse(f"it reads the attribute {str(args[1:])[:60]}")


def check_path(owner: nn.Module, op: str, path: str) -> None:
    """A "get_attr" must lead to a tensor or the training flag, a "call_module" to a module, of the replaced module."""
    *steps, last = path.split(".") if path else [""]
    holder: nn.Module | None = owner
    for step in steps:
        holder = None if holder is None else holder._modules.get(step)
    if holder is not None:
        if op == "call_module":
            found = holder._modules.get(last) is not None
        else:
            tensors: tuple[Any, ...] = (holder._parameters.get(last), holder._buffers.get(last), vars(holder).get(last))
            found = last == "training" or any(isinstance(t, Tensor) for t in tensors)
        if found:
            return
    what = "module" if op == "call_module" else "tensor"
    raise _refuse(f"it uses the {what} {path[:80]!r}, which the replaced module does not have")
