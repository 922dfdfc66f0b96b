"""Record one real run of a model into a torch.fx graph of ATen calls."""

from __future__ import annotations

import dataclasses
import linecache
import operator
import os
import sys
import threading
from collections.abc import Callable, Collection
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..support.walking import tensors_in
from .cloning import Unclonable
from .names import target_name
from .origin import Attribute, Expr, Session, TensorSize, TracedInt, plain
from .patches import Patch
from .shapes import shape_rule
from .shortcuts import ATEN, are_plain, nothing_between
from .sizes import CallSizes

aten = torch.ops.aten
_HIDDEN_DIRECTORIES = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep)
_OPAQUE = (torch.dtype, torch.device, torch.layout, torch.memory_format, complex, torch.ScriptObject)
_ATOMS = frozenset((int, float, bool, str, type(None)))
# assigning to a node's attribute also looks the node up in its graph
_set_args = fx.Node.args.fset  # type: ignore[attr-defined]
# Recurrent layers: without data they are not run as they are with data.
_WITH_STATE = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
# Values of small integer constants are kept: they may be indices.
_MAX_KEPT_VALUE = 1 << 20


def is_users_file(file: str) -> bool:
    """Neither torch's, nor ours, nor the interpreter's."""
    return not file.startswith(_HIDDEN_DIRECTORIES) and not file.startswith("<frozen")


@dataclasses.dataclass(frozen=True)
class Source:
    """A line of the user's code."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.line} in {self.function}"

    @property
    def statement(self) -> str:
        """The text of the line, and of those after it while brackets are open."""
        text = linecache.getline(self.file, self.line)
        for line in range(self.line + 1, self.line + 9):
            if text.count("(") + text.count("[") <= text.count(")") + text.count("]"):
                break
            text += linecache.getline(self.file, line)
        return text


@dataclasses.dataclass(frozen=True)
class TensorMeta:
    """What is remembered of a recorded tensor once the run is over."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Guard:
    """A comparison the model made with a size in it: `left op right` was `outcome`."""

    comparison: str
    left: Expr
    right: Expr
    outcome: bool
    source: Source | None


@dataclasses.dataclass(frozen=True, eq=False)
class Called:
    """What is always so of calls of one operator: the name that fx gives to their nodes, which it works out anew for
    every node, the operator's own name, whether it draws random numbers, writes into what it is given or keeps a state,
    and its shapes without asking torch, if that can be done."""

    target: Any
    node_name: str
    name: str
    random: bool
    writes: bool
    with_state: bool
    shape: Callable[..., Any] | None

    @classmethod
    def of(cls, target: Any) -> Called:
        """The same for every recording."""
        known = _called.get(id(target))
        if known is None:
            known = _called[id(target)] = cls._found(target)
        return known

    @classmethod
    def _found(cls, target: Any) -> Called:
        random = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
        schema = getattr(target, "_schema", None)
        writes = schema is not None and bool(schema.is_mutable)
        node_name, name = fx.Graph()._target_to_str(target), target_name(target)
        return cls(target, node_name, name, random, writes, target in _WITH_STATE, shape_rule(target))


_called: dict[int, Called] = {}  # by identity: operators take long to hash


@dataclasses.dataclass(frozen=True)
class Mark:
    """How far the recording had come."""

    nodes: int
    by_id: dict[int, fx.Node]
    guards: int
    constants: int
    left: int


class Recorder:
    """Builds the graph; the two modes feed it. `modules`: those that run, by path, clones as a rule.

    `drew`: the run drew random numbers. `initialised`: parameters into which it wrote what depends on the input.
    `doubtful`: calls that a run without data may get wrong: those that make a tensor of nothing, on a device of their
    own, or keep a state.
    """

    def __init__(self, modules: dict[str, nn.Module], inputs: list[Tensor]) -> None:
        self.modules = modules
        self.graph = fx.Graph()
        self.session = Session(lambda *told: self.guard(*told))
        self.drew = False
        self.doubtful: list[fx.Node] = []
        self._met_device = False
        self.initialised: dict[str, None] = {}
        self.guards: list[Guard] = []
        self.constants: dict[str, Tensor] = {}
        self.touched: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # what was written, its memory, and what it held
        self.escaped = ""
        self.left: list[fx.Node] = []
        self.shapes_only = False
        self.whole_depth = 0
        self.sizes: CallSizes | None = None
        self.scalars: dict[int, Expr] | None = None
        self.function_name: str | None = None
        self.module_stack: list[str] = []
        self._paths = {id(m): path for path, m in reversed(list(modules.items()))}
        self._classes = {path: type(m) for path, m in modules.items()}
        self._by_id: dict[int, fx.Node] = {}
        self._names: dict[int, str] = {}
        self._owners: dict[int, Tensor] = {}
        self._hidden: dict[int, CodeType] = {}  # by identity: code takes long to hash
        self._known: dict[str, list[fx.Node]] | None = None
        self._keep: list[Tensor] = []
        for name, tensor in tensors_in(modules).items():
            if id(tensor) not in self._names:
                self._names[id(tensor)] = name
                self._own(tensor)
        for index, tensor in enumerate(inputs):
            if id(tensor) in self._by_id or id(tensor) in self._names:
                continue
            node = self.graph.placeholder(f"input_{index}")
            node.meta["val"] = TensorMeta(tuple(tensor.shape), tensor.dtype)
            self._by_id[id(tensor)] = node
            self._keep.append(tensor)
            self._own(tensor)
        self._inputs = dict(self._by_id)

    def _own(self, tensor: Tensor) -> None:
        """What is written into the tensor's memory is written into the tensor."""
        if tensor.layout is torch.strided:
            self._owners[tensor.untyped_storage()._cdata] = tensor

    # -- tensors -> nodes

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that made `tensor`; parameters and buffers by identity, anything unknown is a constant."""
        link = getattr(tensor, "_graphprune_node", None)
        if link is not None and link[0] is self:
            made: fx.Node = link[1]
            return made if link[2] is None else self._item(tensor, made, link[2])
        node = self._by_id.get(id(tensor))
        if node is None:
            node = self._attribute_node(tensor)
        return node

    def _attribute_node(self, tensor: Tensor) -> fx.Node:
        name = self._names.get(id(tensor))
        kind = "parameter"
        if name is None:
            kind, name = "constant", f"_constant_{len(self.constants)}"
            self.constants[name] = tensor.detach()
        # fx takes long to make names of long ones, and the target says it all
        node = self.graph.create_node("get_attr", name, (), {}, name.rpartition(".")[2])
        node.meta["val"] = TensorMeta(tuple(tensor.shape), tensor.dtype)
        node.meta[kind] = name
        node.meta["constant_value"] = True
        self._keep_value(node, tensor)
        self._by_id[id(tensor)] = node
        self._keep.append(tensor)
        return node

    @staticmethod
    def _keep_value(node: fx.Node, tensor: Tensor) -> None:
        if not tensor.dtype.is_floating_point and not tensor.dtype.is_complex and tensor.numel() <= _MAX_KEPT_VALUE:
            node.meta["value"] = tensor.detach()

    @property
    def here(self) -> bool:
        """Whether the running thread is the one that records: where a model cannot be cloned, others may use it."""
        return self.session.thread == threading.get_ident()

    def release(self) -> None:
        """The run is over: numbers are plain, and writes are undone."""
        self.session.close()
        self.undo_writes()

    def _convert(self, value: Any) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            return value
        if isinstance(value, Tensor):
            return self.node_of(value)
        if kind is tuple or kind is torch.Size:
            return tuple([v if type(v) in _ATOMS else self._convert(v) for v in value])
        if isinstance(value, (list, tuple)):
            return [v if type(v) in _ATOMS else self._convert(v) for v in value]
        if isinstance(value, torch.SymInt):
            return int(value)
        if isinstance(value, _OPAQUE):
            self._met_device = self._met_device or isinstance(value, torch.device)
            return value
        return plain(value) if isinstance(value, (int, float)) else None

    def unseen(self, read: Callable[[], Any]) -> Any:
        """What `read` finds in tensors of this run, which is no part of the recording."""
        self.whole_depth += 1
        try:
            return read()
        finally:
            self.whole_depth -= 1

    def is_of_this_run(self, tensor: Tensor) -> bool:
        """Computed in this run, or a tensor that only stands in for one of the user's."""
        return self.made(tensor) or (tensor.is_meta and self.shapes_only)

    def made(self, tensor: Tensor) -> bool:
        """Computed in this run."""
        return getattr(tensor, "_graphprune_node", (None,))[0] is self

    # -- nodes

    def run(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Make an ATen call, or work out what shape its result has, and record it."""
        called = Called.of(target)
        if called.random:
            self.drew = True
        if called.writes:
            self.before_write(target, args, kwargs)
        out = called.shape(*args) if called.shape is not None and self.shapes_only and not kwargs else None
        if out is None:
            out = target(*args, **kwargs)
        if self.whole_depth == 0:
            self.record(target, args, kwargs, out)
        return out

    def run_short(self, function: Any, args: Any, kwargs: Any) -> Any:
        """What `run` returns of the ATen call that a torch function makes, without asking torch; None, and nothing is
        recorded, where torch has to be asked."""
        short = ATEN.get(function)
        if short is None or not self.shapes_only or self.whole_depth:
            return None
        if not are_plain([*args, *kwargs.values()]) or not nothing_between():
            return None
        try:
            call = short(*args, **kwargs)
        except (TypeError, ValueError):  # torch says what is wrong with such arguments
            return None
        if call is None:
            return None
        target, given = call
        called = Called.of(target)
        with torch._C._DisableTorchDispatch():
            out = called.shape(*given) if called.shape is not None else None
        if out is None:
            return None
        if called.writes:
            self.before_write(target, given, {})
        self.record(target, given, {}, out)
        return out[0] if isinstance(out, tuple) else out

    def record(self, target: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Append one call and attach its result."""
        self._met_device = False
        inputs = self._convert(tuple(args))
        named = {k: self._convert(v) for k, v in kwargs.items()}
        if self._known is not None and self._seen_before(target, inputs, named, out):
            return
        # arguments are set afterwards: create_node would walk through them first
        called = Called.of(target)
        node = self.graph.create_node("call_function", target, (), {}, called.node_name)
        _set_args(node, inputs)
        if named:
            node.kwargs = named
        meta = node.meta
        meta["operator"] = called.name
        meta["source"] = self.source()
        meta["module"] = self.module_stack[-1] if self.module_stack else ""
        meta["class"] = self._classes.get(meta["module"])
        meta["function"] = self.function_name
        meta["sizes"] = self.sizes
        if called.name == "as_strided":  # its numbers are places in the memory of a tensor that lies like this
            meta["layout"] = args[0].stride(), args[0].storage_offset()
        if self.scalars:
            meta["scalars"] = self.scalars
        operands = node.all_input_nodes
        if not operands or self._met_device or called.with_state:
            self.doubtful.append(node)
        constant = not called.random and all(a.meta.get("constant_value") for a in operands)
        meta["constant_value"] = constant
        self._attach(node, out, constant)

    # -- a second run of the same model

    def begin_second_run(self) -> Mark:
        """From here on, calls that the first run made with the same operands are not recorded again."""
        mark = Mark(len(self.graph.nodes), dict(self._by_id), len(self.guards), len(self.constants), len(self.left))
        self._by_id = {key: node for key, node in self._by_id.items() if node.op == "get_attr"} | self._inputs
        self._known = {}
        for node in self.graph.nodes:
            if node.op == "call_function" and not Called.of(node.target).random:
                self._known.setdefault(_call_key(node.target, node.args, node.kwargs), []).append(node)
        return mark

    def forget_second_run(self, mark: Mark) -> None:
        """Take everything out of the graph that was recorded since."""
        for node in reversed(list(self.graph.nodes)[mark.nodes :]):
            self.graph.erase_node(node)
        self._by_id = mark.by_id
        del self.guards[mark.guards :]
        del self.left[mark.left :]
        for name in list(self.constants)[mark.constants :]:
            del self.constants[name]

    def _seen_before(self, target: Any, inputs: Any, named: dict[str, Any], out: Any) -> bool:
        """The first run made this call: its result is that of the node from then."""
        assert self._known is not None
        for node in self._known.get(_call_key(target, inputs, named), ()):
            if node.meta.get("sizes") == self.sizes and (node.meta.get("scalars") or None) == (self.scalars or None):
                self._attach(node, out, bool(node.meta["constant_value"]))
                return True
        return False

    def _attach(self, node: fx.Node, out: Any, constant: bool) -> None:
        if isinstance(out, Tensor):
            node.meta["val"] = TensorMeta(tuple(out.shape), out.dtype)
            if constant:
                self._keep_value(node, out)
            if id(out) in self._by_id and self._is_lasting(out):
                self._by_id[id(out)] = node
            else:
                out._graphprune_node = (self, node, None)  # type: ignore[attr-defined]
        elif isinstance(out, (tuple, list)):
            node.meta["val"] = tuple(TensorMeta(tuple(o.shape), o.dtype) if isinstance(o, Tensor) else o for o in out)
            for index, item in enumerate(out):
                if isinstance(item, Tensor):  # most results of a norm or pool are never used: no node until then
                    item._graphprune_node = (self, node, index)  # type: ignore[attr-defined]
        else:
            node.meta["val"] = None

    def _item(self, tensor: Tensor, node: fx.Node, index: int) -> fx.Node:
        if self._known is not None:
            for known in self._known.get(_call_key(operator.getitem, (node, index), {}), ()):
                self._attach(known, tensor, bool(known.meta["constant_value"]))
                return known
        part = self.graph.create_node("call_function", operator.getitem, (), {}, "getitem")
        _set_args(part, (node, index))
        part.meta["operator"] = "getitem"
        part.meta.update({k: node.meta[k] for k in ("source", "module", "class", "function", "constant_value")})
        self._attach(part, tensor, node.meta["constant_value"])
        return part

    def _is_lasting(self, tensor: Tensor) -> bool:
        """Inputs, parameters and buffers: the user's own objects, on which nothing of ours is left behind."""
        return any(tensor is kept for kept in self._keep)

    def before_write(self, target: Any, args: Any, kwargs: Any) -> None:
        """Remember parameters and buffers before the model writes into them."""
        for position, argument in enumerate(target._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                base = value._base if value._base is not None else value
                strided = value.layout is torch.strided
                owner = self._owners.get(value.untyped_storage()._cdata) if strided else None
                if owner is not None:
                    base = owner
                elif self.whole_depth or self.made(base):
                    continue  # made in this run; everything else is the user's
                name = self._names.get(id(base))
                if id(base) not in self.touched:
                    self.touched[id(base)] = (base, base.detach(), base.detach().clone())
                if isinstance(base, nn.Parameter):
                    self._note_initialised(name, [*args, *kwargs.values()])

    def _note_initialised(self, name: str | None, values: list[Any]) -> None:
        """A parameter is written; in training mode that is an ordinary thing."""
        nodes = [self.node_of(value) for value in values if isinstance(value, Tensor)]
        if name is not None and self._known is None and not all(n.meta.get("constant_value") for n in nodes):
            self.initialised[name] = None

    def assign(self, tensor: Tensor, value: Tensor, assign: Callable[[], Any]) -> None:
        """`tensor.data = value`: from here on the tensor is the value, as wide as that."""
        before = self.node_of(tensor)
        name, known = self._names.get(id(tensor)), self.node_of(value)
        assign()
        if isinstance(tensor, nn.Parameter):
            self._note_initialised(name, [value])
        if before.meta["val"].shape == known.meta["val"].shape:
            self.record(aten.copy_.default, (tensor, value), {}, tensor)
        elif name is not None:
            self._by_id[id(tensor)] = known
        else:
            tensor._graphprune_node = (self, known, None)  # type: ignore[attr-defined]

    def same(self, tensor: Tensor, other: Tensor) -> None:
        """`other`, new, is another object for the values of `tensor`."""
        if id(other) not in self._by_id and id(other) not in self._names:
            other._graphprune_node = (self, self.node_of(tensor), None)  # type: ignore[attr-defined]

    def undo_writes(self) -> None:
        """The memory that was written to holds what it held; the tensor may be another's by now (`.data = ...`)."""
        with torch.no_grad():
            for tensor, memory, before in self.touched.values():
                if memory.shape == before.shape:
                    memory.copy_(before)
                else:
                    tensor.data = before

    # -- where

    def source(self) -> Source | None:
        """The innermost frame that is neither torch's nor ours."""
        frame: FrameType | None = sys._getframe(2)
        hidden = self._hidden
        while frame is not None:
            code = frame.f_code
            if id(code) not in hidden:
                if is_users_file(code.co_filename):
                    return Source(code.co_filename, frame.f_lineno, code.co_name)
                hidden[id(code)] = code
            frame = frame.f_back
        return None

    def guard(self, comparison: str, left: Expr, right: Expr, outcome: bool) -> None:
        self.guards.append(Guard(comparison, left, right, outcome, self.source()))

    def attribute(self, value: int, module: str, name: str, key: tuple[Any, ...]) -> TracedInt:
        return self.session.whole(value, Attribute(module, name, key, value))

    def traced_size(self, tensor: Tensor, size: torch.Size) -> torch.Size:
        if not size:
            return size
        node = self.node_of(tensor)
        return torch.Size([self.session.whole(n, TensorSize(node, a)) for a, n in enumerate(size)])

    def module_paths(self, forbidden: Collection[int] = ()) -> Patch:
        """Know which module is running: `nn.Module.__call__` pushes its path. Modules whose id is `forbidden` must not
        run: they are the user's own, and clones run for them."""
        stack, paths = self.module_stack, self._paths

        def tracked(original: Any) -> Any:
            def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                path = paths.get(id(module))
                if path is None:
                    if id(module) in forbidden:
                        self.escaped = f"a {type(module).__name__} of the model was reached past its clone"
                        raise Unclonable(self.escaped)  # which the model's own code may catch
                    return original(module, *args, **kwargs)
                stack.append(path)
                try:
                    return original(module, *args, **kwargs)
                finally:
                    stack.pop()

            return call

        return Patch(nn.Module, "__call__", tracked)


def _call_key(target: Any, args: Any, kwargs: dict[str, Any]) -> str:
    """Equal for calls of one operator with the same operands: nodes show as their unique names."""
    return f"{target}{args!r}{kwargs!r}"
