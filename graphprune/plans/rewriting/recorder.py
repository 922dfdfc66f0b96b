"""Record the calls of modules' own code, beside the ATen recording of the same run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ...tracing.example import flatten_tensors
from ...tracing.origin import Expr, Literal, is_traced, plain
from ...tracing.patches import patched
from ...tracing.recorder import Guard, Recorder
from .functions import name_of
from .loops import watched_ranges
from .parts import Call, Number, Part, Path, Ref

# Methods that ask about a tensor's form, not about its values or sizes
_FORM = frozenset(
    "dim ndimension is_floating_point is_complex is_contiguous is_signed element_size get_device is_inference "
    "stride storage_offset requires_grad_ is_conj is_neg".split()
)
_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_STARS = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}


class Unrecordable(Exception):
    """A value that a recorded graph cannot hold; the message completes "its forward ..."."""


def is_own_code(module: nn.Module) -> bool:
    """A module whose forward is the user's (not one of torch.nn's building blocks)."""
    return not type(module).__module__.startswith(("torch.nn.", "torch.ao.", "torch.jit"))


def is_container(module: nn.Module) -> bool:
    """A module that only calls others, or whose forward is the user's."""
    return isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) or is_own_code(module)


def _has_hooks(module: nn.Module) -> bool:
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or torch.nn.modules.module._has_any_global_hook()


class PartRecorder(TorchFunctionMode):
    """Collects `parts`: for each module of the user's own, the calls of every run of its forward.

    With `inline`, only the model itself is recorded, and the user's modules inside it are recorded as if their code
    stood in the model's forward - but for those in `whole`, which stay calls of modules. `training` names modules whose
    training flag is on in this run.
    """

    def __init__(
        self, modules: dict[str, nn.Module], inline: bool, training: Sequence[str] = (), whole: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.modules = modules
        self.inline = inline
        self.training = training
        self._whole_paths = whole
        self._whole: set[int] = set()
        self.parts: dict[str, list[Part]] = {}
        self.guard_owners: dict[Guard, set[str]] = {}
        self._stack: list[tuple[Part | None, nn.Module]] = []
        self._calling = False

    # -- setting up

    @contextlib.contextmanager
    def observing(self, recorder: Recorder) -> Iterator[None]:
        """Record parts while `recorder` records the run, of the modules that it runs."""
        self.recorder, self.modules = recorder, recorder.modules
        self._whole = {id(self.modules[path]) for path in self._whole_paths}
        self.parts.clear()
        self.guard_owners.clear()
        self._stack.clear()
        self._watch_guards()
        targets = [("", self.modules[""])] if self.inline else list(self.modules.items())
        for path, module in targets:
            if is_own_code(module) or (self.inline and is_container(module)):
                module.__dict__["forward"] = self._forward(path, module, module.forward)
        for path in self.training:
            self.modules[path].training = True
        asks = "asks for the length of a tensor as a plain number"
        custom = "calls a custom autograd function, whose backward a recording cannot see"
        with (
            patched(nn.Module, "__call__", self._call),
            patched(torch.Tensor, "__len__", functools.partial(self._refusing, asks)),
            patched(torch.autograd.Function, "apply", functools.partial(self._refusing, custom)),
            patched(nn.Module, "__setattr__", self._setting_flags),
            self._watched_seeds(),
            self,
            watched_ranges(self._unrolled),
        ):
            yield

    def _refusing(self, why: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._part is not None:
                self._part.refuse(why)
            return original(*args, **kwargs)

        return call

    def _setting_flags(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Refuse forwards that set training flags: `train()` and `eval()` do it, too."""

        def write(module: nn.Module, name: str, value: Any) -> None:
            if name == "training" and self._part is not None:
                self._part.refuse("switches a training flag")
            original(module, name, value)

        return write

    @contextlib.contextmanager
    def _watched_seeds(self) -> Iterator[None]:
        """Refuse forwards that set the state of torch's random numbers."""
        refusing = functools.partial(self._refusing, "sets the state of the random numbers")
        with contextlib.ExitStack() as stack:
            for name in ("manual_seed", "set_rng_state", "seed"):
                for space in (torch, torch.random):
                    stack.enter_context(patched(space, name, refusing))
            yield

    def _watch_guards(self) -> None:
        recorder = self.recorder
        original = recorder.guard

        def guard(comparison: str, left: Expr, right: Expr, outcome: bool) -> None:
            before = len(recorder.guards)
            original(comparison, left, right, outcome)
            if len(recorder.guards) > before:
                made, part = recorder.guards[-1], self._part
                self.guard_owners.setdefault(made, set()).add(part.path if part is not None else "<none>")
                if part is not None and not self._calling:
                    part.guards.setdefault(made, len(part.calls))

        recorder.guard = guard  # type: ignore[method-assign]

    def _unrolled(self, bound: Any) -> None:
        """The body of a loop is recorded once for each turn: the number of turns must stay."""
        if self._part is not None and not self._calling:
            turns = Guard("eq", bound.origin, Literal(plain(bound)), True, self.recorder.source())
            self._part.guards.setdefault(turns, len(self._part.calls))

    @property
    def _part(self) -> Part | None:
        """The part that is being recorded at this moment."""
        part = self._stack[-1][0] if self._stack else None
        return None if part is None or part.refusal else part

    # -- modules

    def _call(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            part = self._part
            if part is not None and self._is_inlined(module):
                if part.relative(module) is None:
                    part.refuse("calls a module that is not one of its own")
                return self._within(part, module, functools.partial(original, module, *args, **kwargs))
            ref: Ref | None = None
            if part is not None:
                ref = self._module_call(part, module, args, kwargs)
            self._stack.append((None, module))
            try:
                out = original(module, *args, **kwargs)
            finally:
                self._stack.pop()
            if part is not None and ref is not None:
                part.contents.note(module)  # what that module's own code has changed, it will change again
                self._note_result(part, ref, out)
            return out

        return call

    def _is_inlined(self, module: nn.Module) -> bool:
        return self.inline and is_container(module) and id(module) not in self._whole and not _has_hooks(module)

    def _within(self, part: Part, module: nn.Module, run: Callable[[], Any]) -> Any:
        """Run a module's own code as a piece of `part`."""
        self._stack.append((part, module))
        try:
            return run()
        finally:
            self._stack.pop()

    def _check_contents(self, part: Part) -> None:
        """Refuse a forward that has changed what its modules hold, or drawn numbers that are none of torch's."""
        changed = "" if part.refusal else part.contents.difference(self.modules[part.path])
        if changed:
            part.refuse(f"changes self.{changed}, which a recorded graph would not do")
        elif not part.refusal and part.contents.drew_numbers():
            part.refuse(_RANDOM)

    def _module_call(self, part: Part, module: nn.Module, args: Any, kwargs: Any) -> Ref | None:
        path = part.relative(module)
        if path is None:
            part.refuse("calls a module that is not one of its own")
            return None
        changed = part.contents.difference(module)
        if changed:
            part.refuse(f"calls {path} with {changed} replaced, which a recorded graph would not do")
            return None
        if part.contents.drew_numbers():
            part.refuse(_RANDOM)
            return None
        try:
            self._check_modes(part)
            encoded = self._encode(part, tuple(args)), {k: self._encode(part, v) for k, v in kwargs.items()}
        except Unrecordable as error:
            part.refuse(str(error))
            return None
        return part.add(Call("call_module", path, *encoded))

    def _forward(self, path: str, module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.recorder.here:
                return original(*args, **kwargs)
            if not self._stack or self._stack[-1][0] is not None or self._stack[-1][1] is not module:
                return original(*args, **kwargs)  # called by other code, not as a module
            part = Part(path, module)
            self.parts.setdefault(path, []).append(part)
            self._arguments(part, original, args, kwargs)
            part.modes = _modes()
            out = self._within(part, module, lambda: original(*args, **kwargs))
            self._check_contents(part)
            if not part.refusal:
                try:
                    part.output = self._encode(part, out, output=True)
                except Unrecordable as error:
                    part.refuse(str(error))
            return out

        return forward

    def _arguments(self, part: Part, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """One placeholder per parameter of the forward, with its default; what is no tensor is checked or followed."""
        signature = inspect.signature(forward)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            part.refuse(f"is called in a way its signature does not allow ({error})")
            return
        bound.apply_defaults()
        refs = {}
        for name, parameter in signature.parameters.items():
            stars = _STARS.get(parameter.kind.name, "")
            default = () if parameter.default is inspect.Parameter.empty else (parameter.default,)
            if default and not (isinstance(default[0], _CONSTANTS) and not isinstance(default[0], torch.device)):
                part.refuse(f"has a default for {name} that a recorded graph cannot hold")
                return
            refs[name] = part.add(Call("placeholder", stars + name, default))
        for name, ref in refs.items():
            part.learn(bound.arguments[name], ref, functools.partial(self._argument, part, name))

    def _argument(self, part: Part, name: str, value: Any, ref: Ref, path: Path) -> None:
        if is_traced(value) and not isinstance(value.origin, Literal):
            part.arguments.append((value.origin, part.follow(ref, path)))
        elif isinstance(value, _CONSTANTS):
            checked = part.follow(ref, path)
            part.add(Call("call_function", "graphprune.expect_value", (checked, plain(value), name)))
        elif isinstance(value, (tuple, list, dict)):
            checked = part.follow(ref, path)
            part.add(Call("call_function", "graphprune.expect_length", (checked, len(value), name)))
        elif not dataclasses.is_dataclass(value):
            part.refuse(f"takes a {type(value).__name__} as {name}, which a recorded graph cannot check")

    # -- calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        part = self._part
        if part is None:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._property(part, func, args)
        if name == "device" or (name == "_assert" and not isinstance(args[0], Tensor)):
            return func(*args, **kwargs)  # no computation
        if name in ("size", "numel", "nelement"):
            self._note_size(part, args[0])
            return func(*args, **kwargs)
        return self._record(part, name, func, args, kwargs)

    def _record(self, part: Part, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        call: Call | None = None
        target = name_of(func)
        try:
            if name == "_set_grad_enabled":
                raise Unrecordable("switches gradients on or off")
            self._check_modes(part)
            if target is None:
                raise Unrecordable(f"calls {name or func}, which a recorded graph cannot hold")
            if name not in _FORM:
                encoded = self._encode(part, tuple(args)), {k: self._encode(part, v) for k, v in kwargs.items()}
                where = part.relative(self._stack[-1][1]) or ""
                call = Call(*target, *encoded, module=where)
        except Unrecordable as error:
            part.refuse(str(error))
        last = next(iter(reversed(self.recorder.graph.nodes)), None)
        self._calling = True
        try:
            out = func(*args, **kwargs)
        finally:
            self._calling = False
        if call is not None and not part.refusal:
            if out is not None and not flatten_tensors(out):
                part.refuse(f"turns tensor values into plain numbers ({name})")
                return out
            call.nodes = _after(self.recorder.graph, last)
            self._note_result(part, part.add(call), out)
        return out

    def _note_result(self, part: Part, ref: Ref, out: Any) -> None:
        if isinstance(out, Tensor):
            part.calls[ref.index].out = self._node_of(out)
        elif type(out) in (tuple, list) and part.calls[ref.index].op != "call_module":
            part.calls[ref.index].out = [tuple(t.shape) if isinstance(t, Tensor) else None for t in out]
            if part.calls[ref.index].name == "unbind":  # a loop over the items was unrolled
                part.add(Call("call_function", "graphprune.expect_length", (ref, len(out), "a loop over a tensor")))
        part.learn(out, ref)

    def _property(self, part: Part, func: Any, args: Any) -> Any:
        out = func(*args)
        name = func.__self__.__name__
        if name == "shape":
            self._note_size(part, args[0])
        elif isinstance(out, Tensor):
            ref = part.ref(args[0])
            if ref is None:
                part.refuse(_FOREIGN)
                return out
            part.learn(out, part.add(Call("call_function", "builtins.getattr", (ref, name))))
        elif name in ("dtype", "device"):
            ref = part.ref(args[0])
            if ref is not None:
                part.reads.setdefault(out, (ref, name))
        return out

    def _note_size(self, part: Part, tensor: Tensor) -> None:
        ref = part.ref(tensor)
        if ref is None:
            part.refuse(_FOREIGN)
        else:
            part.sizes.setdefault(self._node_of(tensor), ref)

    def _node_of(self, tensor: Tensor) -> fx.Node:
        with torch._C.DisableTorchFunction():  # what the recorder reads of a tensor is no call of the user's
            return self.recorder.node_of(tensor)

    def _check_modes(self, part: Part) -> None:
        now = _modes()
        for name, value in part.modes.items():
            if now[name] != value:
                raise Unrecordable(f"switches {name} on or off")

    # -- values

    def _encode(self, part: Part, value: Any, output: bool = False) -> Any:
        """A value as part of a call: tensors by the call that made them, numbers with their history."""
        if isinstance(value, Tensor):
            ref = part.ref(value)
            if ref is None:
                raise Unrecordable(_FOREIGN)
            return Ref(ref.index, self._node_of(value))
        if is_traced(value):
            return plain(value) if isinstance(value.origin, Literal) else Number(value.origin, plain(value))
        if isinstance(value, (torch.dtype, torch.device)) and value in part.reads:
            ref, name = part.reads[value]
            return part.add(Call("call_function", "builtins.getattr", (ref, name)))
        if isinstance(value, _CONSTANTS) or value is Ellipsis:
            return value
        if isinstance(value, slice):
            return slice(*(self._encode(part, v) for v in (value.start, value.stop, value.step)))
        named = isinstance(value, tuple) and hasattr(value, "_fields")
        if named or (output and dataclasses.is_dataclass(value) and not isinstance(value, type)):
            return self._structure(part, value)
        if isinstance(value, (tuple, list)):
            items = [self._encode(part, v, output) for v in value]
            return items if type(value) is list else tuple(items)
        if type(value) is dict and all(isinstance(k, (str, int)) for k in value):
            return {k: self._encode(part, v, output) for k, v in value.items()}
        raise Unrecordable(f"passes on a {type(value).__name__}, which a recorded graph cannot hold")

    def _structure(self, part: Part, value: Any) -> Ref:
        """A named tuple or dataclass in the output is made anew by its class."""
        kind = type(value)
        names = value._fields if hasattr(value, "_fields") else [f.name for f in dataclasses.fields(value) if f.init]
        fields = {name: self._encode(part, getattr(value, name), True) for name in names}
        return part.add(Call("build", f"{kind.__module__}:{kind.__qualname__}", (), fields))


_RANDOM = "draws random numbers that are not torch's, which a recorded graph would not do"
_FOREIGN = "works with a tensor that is neither an argument nor a parameter nor a result of its own calls"


def _modes() -> dict[str, Any]:
    """What a block of code may switch that a recorded graph knows nothing of."""
    devices = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    return {
        "autocast": [(device, torch.get_autocast_dtype(device)) for device in devices],
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
    }


def _after(graph: fx.Graph, last: fx.Node | None) -> list[fx.Node]:
    """The nodes recorded since `last`."""
    found: list[fx.Node] = []
    for node in reversed(graph.nodes):
        if node is last:
            break
        found.append(node)
    return found[::-1]
