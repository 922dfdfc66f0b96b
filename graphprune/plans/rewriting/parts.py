"""What is recorded of one call of a module's own forward: its calls, as the user's code made them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from ...support.walking import named_tensors
from ...tracing.origin import Attribute, Expr, Literal, Operation
from ...tracing.recorder import Guard
from .contents import Contents

Path = tuple[tuple[str, int | str], ...]  # ("item", key) or ("attribute", name), from the outside in


@dataclasses.dataclass(frozen=True)
class Ref:
    """The result of the call with this number; `node` is the recorded ATen tensor behind it (never compared)."""

    index: int
    node: fx.Node | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Number:
    """A number computed from sizes or attributes, and its value in the recorded run."""

    expr: Expr
    value: int | float


@dataclasses.dataclass(frozen=True)
class Choice:
    """One value in training mode, another in eval mode."""

    training: Any
    evaluation: Any


@dataclasses.dataclass
class Call:
    """One step. `op` as in torch.fx; `nodes`: the ATen calls it became; `out`: what they returned; `module`: the
    module, relative to the recorded one, whose code made the call."""

    op: str
    target: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    nodes: list[fx.Node] = dataclasses.field(default_factory=list)
    out: Any = None
    module: str = ""

    @property
    def name(self) -> str:
        """The bare name of the function, as `tracing.sizes` knows it."""
        return self.target.rpartition(".")[2]


class Part:
    """One run of the forward of the module at `path`. `refusal`: why it cannot stand for the module's code."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path = path
        self.home = type(module).__module__
        self.calls: list[Call] = []
        self.guards: dict[Guard, int] = {}  # and before which call it was asked
        self.output: Any = None
        self.refusal = ""
        self.contents = Contents(module)
        self.modes: dict[str, Any] = {}
        self.sizes: dict[fx.Node, Ref] = {}
        self.arguments: list[tuple[Expr, Ref]] = []
        self.reads: dict[Any, tuple[Ref, str]] = {}
        self._known: Any = WeakIdKeyDictionary()
        self._tensors = {id(t): n for n, t in reversed(named_tensors(module).items())}
        self._tensors.update({id(v): n for n, v in module.__dict__.items() if isinstance(v, Tensor)})
        self._modules = {id(m): n for n, m in module.named_modules()}

    def refuse(self, why: str) -> None:
        self.refusal = self.refusal or why

    def add(self, call: Call) -> Ref:
        self.calls.append(call)
        return Ref(len(self.calls) - 1)

    def relative(self, module: nn.Module) -> str | None:
        """The path of a module below the recorded one, or None."""
        return self._modules.get(id(module))

    # -- tensors

    def learn(self, value: Any, ref: Ref, visit: Callable[[Any, Ref, Path], None] | None = None) -> None:
        """Remember where every tensor in `value`, the result of `ref`, is to be found; `visit` sees everything else."""
        self._learn(value, ref, (), visit)

    def _learn(self, value: Any, ref: Ref, path: Path, visit: Callable[[Any, Ref, Path], None] | None) -> None:
        if isinstance(value, Tensor):
            self._known[value] = (ref, path)
            return
        if visit is not None:
            visit(value, ref, path)
        if isinstance(value, dict):
            for key, item in value.items():
                self._learn(item, ref, (*path, ("item", key)), visit)
        elif isinstance(value, (tuple, list)):
            for index, item in enumerate(value):
                self._learn(item, ref, (*path, ("item", index)), visit)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                self._learn(getattr(value, field.name), ref, (*path, ("attribute", field.name)), visit)

    def follow(self, ref: Ref, path: Path) -> Ref:
        """The item at `path` of a result."""
        for kind, key in path:
            target = "operator.getitem" if kind == "item" else "builtins.getattr"
            ref = self.add(Call("call_function", target, (Ref(ref.index), key)))
        return ref

    def ref(self, tensor: Tensor) -> Ref | None:
        """The call that made `tensor`; None when it comes from somewhere else."""
        found = self._known.get(tensor)
        if found is None:
            name = self._tensors.get(id(tensor))
            if name is None:
                return None
            ref = self.add(Call("get_attr", name))
        else:
            ref = self.follow(*found)
        self._known[tensor] = (ref, ())
        return ref

    # -- numbers

    def argument(self, expr: Expr) -> Ref | None:
        """The argument that holds exactly this number."""
        return next((ref for known, ref in self.arguments if known == expr), None)

    def canonical(self, expr: Expr) -> str:
        """The expression in terms of the part's own calls, to compare two recordings."""
        ref = self.argument(expr)
        if ref is not None:
            return f"argument {ref.index}"
        if isinstance(expr, Operation):
            return f"{expr.function}({', '.join(self.canonical(a) for a in expr.args)})"
        if isinstance(expr, (Literal, Attribute)):
            return str(expr)
        ref = self.sizes.get(expr.node)
        return f"size {ref.index if ref else '?'} {expr.axis}"
