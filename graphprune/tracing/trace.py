"""`record_run`: the recorder, its modes and the clean-up, put together."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import traceback
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import GraphPruneError
from ..support.interrupts import from_signal, interruptible, shielded
from ..support.restoring import restored
from ..support.walking import all_modules, first_names, tensors_in
from .cloning import INTERNAL, PLAIN, Bare, SameMemory, Unclonable, clone_modules
from .example import ExampleInput, result_tensors
from .leftovers import without_leftovers
from .matching import OtherNames
from .modes import DispatchMode, FunctionMode
from .operators import Kind, Operator, Product, calls_by_kind, lines_by_call, products_by_call
from .recorder import Guard, Recorder, Source, is_users_file
from .state import RandomState, trace_attributes, unfused
from .training import record_training_paths
from .work import Term, work_by_call

# A recording, and whether one without data may differ from one with data though it holds no constant.
Recorded = tuple["Trace", bool]
Observe = Callable[[Recorder], contextlib.AbstractContextManager[None]]


@dataclasses.dataclass(frozen=True)
class Trace:
    """One recorded run.

    `graph` holds `placeholder` nodes for the input tensors, `get_attr` nodes for parameters, buffers (meta "parameter")
    and constant tensors (meta "constant"), one `call_function` node per ATen call, and one `output` node with the
    tensors of the model's output. Node meta: "val" (TensorMeta, or a tuple of them), "source" (the user's line),
    "module" (path of the running module), "class" (its class), "function" (torch function as the user called it),
    "sizes" (CallSizes), "scalars", "value" (small integer constants), "layout" (strides and offset of what as_strided
    looks at).

    `caches`: (module path, attribute) of dicts in which the run kept tensors it had computed. What lies in them follows
    from the parameters, so a copy with other parameters must not inherit it. `outputs`: how many of the output node's
    tensors, the first ones, the model returns in eval mode; the others come from paths that only training takes.
    `initialised`: parameters that the run set to values computed from its input: the model has not seen data yet.
    `sources`: names of tensors of the user's model -> the weight that it computes from them, a parameter here.
    """

    graph: fx.Graph
    parameters: dict[str, fx.Node]
    aliases: dict[str, str]
    constants: dict[str, Tensor]
    guards: tuple[Guard, ...]
    modules: dict[str, str]
    caches: tuple[tuple[str, str], ...] = ()
    outputs: int = 0
    initialised: tuple[str, ...] = ()
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def unready(self) -> str:
        """What to tell a user whose model has parameters that its first run on data sets; "" where it has none."""
        if not self.initialised:
            return ""
        names = ", ".join(self.initialised[:3]) + (" and others" if len(self.initialised) > 3 else "")
        return (
            f"{names}: set by the model itself from the data of its first run, so their values are not there yet; run "
            f"the model once on a representative batch before it is pruned"
        )

    # What the table says of all calls, found out when first asked for

    @functools.cached_property
    def lines(self) -> Mapping[fx.Node, Operator]:
        """The line of each call in the table of operators, in graph order, for those that have one."""
        return lines_by_call(self.graph.nodes)

    @functools.cached_property
    def calls(self) -> Mapping[Kind, tuple[fx.Node, ...]]:
        """The calls of each kind in the table of operators, in graph order."""
        return calls_by_kind(self.lines)

    @functools.cached_property
    def products(self) -> Mapping[fx.Node, tuple[Product, ...]]:
        """What each call multiplies with what, for those that do."""
        return products_by_call(self.lines)

    @functools.cached_property
    def work(self) -> Mapping[fx.Node, tuple[Term, ...]]:
        """The multiply-accumulates of each call of the run in eval mode, for those that have some."""
        return work_by_call(self.lines)

    def canonical(self, name: str) -> str:
        """The first name of a shared parameter; of the tensors that a weight is computed from, the weight's."""
        name = self.sources.get(name, name)
        return self.aliases.get(name, name)


def _user_line(error: BaseException) -> str:
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_users_file(frame.filename):
            source = Source(frame.filename, frame.lineno or 0, frame.name)
            return f" at {source}: {(frame.line or '').strip()}"
    return ""


def run_model(model: nn.Module, example: ExampleInput, what: str) -> Any:
    """Call the model; its own error becomes a GraphPruneError that shows it, with the line."""
    try:
        return example.call(model)
    except GraphPruneError:
        raise
    except Exception as error:
        if from_signal(error):
            raise
        shapes = ", ".join(str(tuple(t.shape)) for t in example.tensors()) or "no tensors"
        raise GraphPruneError(
            f"{what}: the model raised {type(error).__name__}{_user_line(error)}\n  {error}\n"
            f"example_input held tensors of shape {shapes}; pass what model(...) accepts"
        ) from error


def record_run(
    model: nn.Module, example_input: Any, training_paths: bool = False, observe: Observe | None = None
) -> Trace:
    """Run `model` once in eval mode without gradients and record it. The model is left exactly as it was.

    What runs are shallow clones of the model's modules (`cloning`), so that other threads may use the model meanwhile.
    A model that cannot be cloned runs itself, one at a time, and is put back before any interrupt gets through.

    `training_paths`: where training mode may compute or return something else, run once more with the training flags
    set and add what only that run does (auxiliary heads).

    The run needs shapes only, so it is first tried on the meta device, without arithmetic. A model that looks at its
    values (`if x.mean() > 0`) cannot run there; it is then recorded on its own device.

    `observe`: a context around the run, made for each attempt from its recorder, whose `modules` are those that run.

    Raises GraphPruneError when the model is no nn.Module or fails on the example input.
    """
    if not isinstance(model, nn.Module):
        raise GraphPruneError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    example = ExampleInput.of(example_input)
    paths = all_modules(model)
    run = _Run(model, paths, first_names(paths), example, training_paths, observe)
    tensors = [*tensors_in(paths).values(), *example.tensors()]
    if all(type(t) in PLAIN and t.layout is torch.strided and not t.is_meta for t in tensors):
        try:
            recorded, doubtful = run.on_clones(data=False)
            if not recorded.constants and not doubtful:
                return recorded
        except Exception as error:  # whatever went wrong without data, the run with data decides
            if from_signal(error):
                raise
    try:
        return run.on_clones(data=True)[0]
    except Exception as error:  # whatever went wrong on clones, the run on the model itself decides
        if from_signal(error):
            raise
        return run.on_model()[0]


# One run at a time on modules of the user's that cannot be cloned.
_users_modules = threading.RLock()


@dataclasses.dataclass(frozen=True)
class _Run:
    """What is asked of a recording, and the ways to do it."""

    model: nn.Module
    paths: Mapping[str, nn.Module]  # with the second paths of shared modules
    modules: dict[str, nn.Module]
    example: ExampleInput
    training_paths: bool
    observe: Observe | None

    def on_clones(self, data: bool) -> Recorded:
        """On clones; with `data` false their tensors have no values."""
        with shielded():
            convert = SameMemory(tensors_in(self.modules).values()) if data else Bare()
            clones = clone_modules(self.modules, convert)
            example = self.example if data else self.example.map(convert)
            own = {id(module) for module in self.modules.values()}
            kept = restored(clones.shared, closures=True) if clones.shared else contextlib.nullcontext()
            with kept:
                return self._record(clones.modules, example, data, own)

    def on_model(self) -> Recorded:
        """On the model itself."""
        with shielded(), _users_modules, restored(self.model, closures=True):
            return self._record(self.modules, self.example, True, ())

    def _record(
        self, modules: dict[str, nn.Module], example: ExampleInput, data: bool, forbidden: Collection[int]
    ) -> Recorded:
        model = modules[""]
        tensors = tensors_in(modules).values()
        random = RandomState(tensors)
        recorder = Recorder(modules, example.tensors())
        recorder.shapes_only = not data or any(t.is_meta and isinstance(t, nn.Parameter) for t in tensors)
        try:
            for module in modules.values():
                if module.training:
                    module.training = False
            trace_attributes(modules, recorder.attribute)
            watched = self.observe(recorder) if self.observe is not None else contextlib.nullcontext()
            with (
                unfused(recorder.module_paths(forbidden)),
                torch.no_grad(),
                DispatchMode(recorder),
                FunctionMode(recorder),
            ):
                with watched, without_leftovers(modules.values(), recorder.is_of_this_run), interruptible():
                    out = run_model(model, example, "tracing")
                if recorder.escaped:
                    raise Unclonable(recorder.escaped)
                outputs = tuple(dict.fromkeys(recorder.node_of(t) for t in result_tensors(out)))
                caches = _caches(recorder, modules)
                extra = record_training_paths(recorder, model, example, outputs) if self.training_paths else ()
            others = dict.fromkeys((*recorder.left, *extra))
            recorder.graph.output((*outputs, *(node for node in others if node not in outputs)))
        finally:
            recorder.release()
            random.put_back(recorder.drew)
        first = {id(module): path for path, module in self.modules.items()}
        aliases = {path: modules[first[id(module)]] for path, module in self.paths.items()}
        found = _finish(aliases, recorder, modules, caches, len(outputs))
        doubtful = any(node.users for node in recorder.doubtful)
        return dataclasses.replace(found, sources=OtherNames.of(self.model).tensors), doubtful


def _caches(recorder: Recorder, modules: dict[str, nn.Module]) -> tuple[tuple[str, str], ...]:
    """Dicts among the modules' attributes to which the run added tensors of its own making."""
    return tuple(
        (path, name)
        for path, module in modules.items()
        for name, value in module.__dict__.items()
        if type(value) is dict and name not in INTERNAL
        if any(isinstance(v, Tensor) and recorder.made(v) for v in value.values())
    )


def _finish(
    paths: Mapping[str, nn.Module],
    recorder: Recorder,
    modules: dict[str, nn.Module],
    caches: tuple[tuple[str, str], ...],
    outputs: int,
) -> Trace:
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors_in(paths).items():
        aliases[name] = first.setdefault(id(tensor), name)
    parameters = {n.meta["parameter"]: n for n in recorder.graph.nodes if n.op == "get_attr" and "parameter" in n.meta}
    return Trace(
        graph=recorder.graph,
        parameters=parameters,
        aliases=aliases,
        constants=recorder.constants,
        guards=tuple(dict.fromkeys(recorder.guards)),
        modules={path: type(m).__name__ for path, m in modules.items()},
        caches=caches,
        outputs=outputs,
        initialised=tuple(recorder.initialised),
    )


__all__ = ["Guard", "Source", "Trace", "record_run", "run_model"]
