"""From a module to an ONNX program in memory: the exporter called in eval mode, quietly, with readable errors."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraphPruneError
from ..support.restoring import restored
from ..tracing.state import evaluating
from .arguments import FlatArguments, named_outputs
from .dynamic import FreeAxes

_PACKAGE = Path(__file__).parents[1]
_NOISY = ("torch", "onnxscript", "onnx_ir", "onnx")
# What torch.export says when a size that was to stay free got tied to the example's.
_SPECIALISED = re.compile(
    r"Dim\.DYNAMIC|Constraints violated|inferred a static shape|specializ|conflicts between user-specified",
    re.IGNORECASE,
)


class Flattened(nn.Module):
    """`model` called with a flat list of tensors, returning a flat tuple of tensors.

    It shares `model`'s tables of parameters, buffers and submodules instead of having `model` as a submodule, so that
    the names in the file are those of `model`. What runs is `model`'s own `__call__`, hooks included.
    """

    def __init__(self, model: nn.Module, arguments: FlatArguments) -> None:
        super().__init__()
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[table] = model.__dict__[table]
        self.__dict__["training"] = False
        self.__dict__["_call"] = (model, arguments)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the model; what it returns twice, or returns unchanged, becomes a value of its own."""
        model, arguments = self.__dict__["_call"]
        _, outputs = named_outputs(arguments.rebuild(tensors).call(model))
        seen = {id(t) for t in (*tensors, *self.parameters(), *self.buffers())}
        distinct = []
        for output in outputs:
            distinct.append(output.clone() if id(output) in seen else output)
            seen.add(id(output))
        return tuple(distinct)


@contextlib.contextmanager
def inference_state(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; afterwards random state and all that the model holds are as before, also on an error.

    torch's exporter runs the model with tensors that have no values. What its code keeps of them (features for a loss,
    say) must not stay behind, and the exporter itself puts copies in the place of lists that it has seen change.
    Fused attention kernels are turned off, because they have no counterpart in ONNX.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with restored(model, closures=True), evaluating(model):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress lines, log records and warnings of the exporter from the user. Exceptions pass."""
    known = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in _NOISY]
    loggers = [logging.getLogger(name) for name in (*_NOISY, *known)]
    levels = [logger.level for logger in loggers]
    swallow = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(swallow), contextlib.redirect_stderr(swallow):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            # Backwards: the same logger may be listed twice, and its first entry has the true level.
            for logger, level in reversed(list(zip(loggers, levels, strict=True))):
                logger.setLevel(level)


def run_model(model: nn.Module, arguments: FlatArguments, where: str | None = None) -> Any:
    """The model's own result, on copies of the arguments. Call inside `inference_state`.

    `where`: at which sizes, for the message.

    Raises:
        GraphPruneError: the model raised; its own message and line are shown.
    """
    try:
        return arguments.example.clone().call(model)
    except Exception as error:
        if where is None:
            where = "" if arguments.batch_size is None else f" at batch size {arguments.batch_size}"
        raise GraphPruneError(
            f"{type(model).__name__} cannot be run on example_input{where}: {reason_of(error)}"
        ) from error


def reason_of(error: BaseException) -> str:
    """The kind and the first lines of an error, and the line of the user's code."""
    return f"{type(error).__name__}: {_first_lines(str(error))}{_raised_at(error)}"


def capture(
    model: nn.Module,
    arguments: FlatArguments,
    output_names: Sequence[str],
    *,
    opset: int | None,
    free: FreeAxes,
) -> Any:
    """A `torch.onnx.ONNXProgram` of `model`, not optimised yet. Call inside `inference_state`.

    Raises:
        FixedAxesError: the axes that were asked for cannot all be dynamic.
        GraphPruneError: the model cannot be captured (with its line), an operator has no ONNX form (with its module),
            the batch cannot be dynamic, or `opset` cannot be reached.
    """
    dynamic_batch = free.any and not free.asked
    name = type(model).__name__
    try:
        with quiet():
            program = torch.onnx.export(
                Flattened(model, arguments),
                tuple(t.detach().clone() for t in arguments.tensors),
                dynamo=True,
                verbose=False,
                optimize=False,
                input_names=list(arguments.names),
                output_names=list(output_names),
                opset_version=opset,
                dynamic_shapes=(free.names(),) if free.any else None,
            )
    except Exception as error:
        if free.asked and (places := _specialised(error, free)):
            raise FixedAxesError(places) from error
        raise GraphPruneError(explain(name, error, arguments, dynamic_batch)) from error
    if program is None or len(program.model.graph.inputs) != len(arguments.tensors):
        raise GraphPruneError(f"{name} cannot be exported: the exporter lost an input")
    fixed = _came_out_fixed(program, free)
    if fixed and free.asked:
        raise FixedAxesError(fixed)
    if fixed:
        reason = f"the first size of input {arguments.names[fixed[0][0]]!r} came out fixed"
        raise GraphPruneError(_fixed_batch(name, arguments, reason))
    written = program.model.opset_imports.get("")
    if opset is not None and written != opset:
        raise GraphPruneError(
            f"opset {opset} cannot be written for {name}: the exporter got no further than opset {written}; "
            f"ask for opset 18 or later"
        )
    return program


class FixedAxesError(GraphPruneError):
    """Axes, as (tensor, axis), that were to be free and that torch has found to be of one size only."""

    def __init__(self, places: Sequence[tuple[int, int]]) -> None:
        super().__init__(f"fixed: {places}")
        self.places = tuple(places)


def _specialised(error: BaseException, free: FreeAxes) -> list[tuple[int, int]]:
    """The axes of which torch.export says that they have one size, as far as it names them."""
    while error.__cause__ is not None:
        error = error.__cause__
    found = re.findall(r"static shape of \d+ for dimension inputs((?:\[\d+\])+)\.shape\[(\d+)\]", str(error))
    places = [(int(re.findall(r"\d+", path)[-1]), int(axis)) for path, axis in found]
    return [(i, axis) for i, axis in dict.fromkeys(places) if i < len(free.axes) and axis in free.axes[i]]


def _came_out_fixed(program: Any, free: FreeAxes) -> list[tuple[int, int]]:
    """The free axes that are numbers in the program."""
    shapes = [value.shape for value in program.model.graph.inputs]
    return [
        (i, axis)
        for i, (own, shape) in enumerate(zip(free.axes, shapes, strict=True))
        for axis in own
        if shape is None or isinstance(shape[axis], int)
    ]


def optimise(program: Any, name: str) -> None:
    """Fold constants and drop what is not needed, in place.

    Raises:
        GraphPruneError: onnxscript's optimiser fails on the program of the model `name`.
    """
    try:
        with quiet():
            program.optimize()
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
        raise GraphPruneError(
            f"{name} cannot be exported: the optimiser of onnxscript fails with {type(cause).__name__}: {reason}"
        ) from error


def explain(name: str, error: Exception, arguments: FlatArguments, dynamic_batch: bool) -> str:
    """The reason for a failed export in a few lines; the exporter's own text has hundreds."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__
    root = chain[-1]
    operator = next((m for e in chain if (m := re.search(r"op='([\w:.]+)', overload='(\w+)'", str(e)))), None)
    node = next((found for e in reversed(chain) if (found := _node(e)) is not None), None)
    if operator is not None and any("No ONNX function found" in str(e) for e in chain):
        return (
            f"{name} cannot be exported: the operator {operator[1]}.{operator[2]} has no ONNX form{_where(node)}; "
            f"replace it in the model, or export with another opset"
        )
    message = _first_lines(str(root)).rstrip(".")
    reason = f"{type(root).__name__}: {message}{_user_line(str(root)) or _raised_at(root)}"
    if dynamic_batch and any(_SPECIALISED.search(str(e)) for e in chain):
        return _fixed_batch(name, arguments, reason)
    hint = " If the model works at one batch size only, pass dynamic_batch=False." if dynamic_batch else ""
    return f"{name} cannot be exported{_where(node)}: {reason}.{hint}"


def _fixed_batch(name: str, arguments: FlatArguments, reason: str) -> str:
    return (
        f"{name} cannot be exported with a dynamic batch ({reason}). Use the size of the input instead of a number in "
        f"the model, or pass dynamic_batch=False to write a file for batch size {arguments.batch_size} only"
    )


def _node(error: BaseException) -> torch.fx.Node | None:
    """The fx node that the exporter was translating: the innermost frame that has one."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("node")
        if isinstance(node, torch.fx.Node):
            found = node
    return found


def _where(node: torch.fx.Node | None) -> str:
    """The module and the line of the user's source that made `node`."""
    if node is None:
        return ""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    text = ""
    if stack:
        path, kind = stack[-1]
        kind = kind if isinstance(kind, str) else kind.__name__
        path = str(path).removeprefix("L['self'].")
        text = f" (in module {path!r}, {kind.rsplit('.', 1)[-1]})" if path else " (in the forward of the model itself)"
    return text + _user_line(node.meta.get("stack_trace") or "")


def _user_line(text: str) -> str:
    """The innermost 'File ..., line ..., in ...' of a formatted stack outside torch, on one line."""
    places = re.findall(r'File "([^"]+)", line (\d+), in (\w+)(?:\n\s+([^\n]+))?', text)
    own = [place for place in places if not _is_library(place[0])]
    if not own:
        return ""
    file, line, function, code = own[-1]
    return f" [{file}:{line} in {function}: {code.strip()}]"


def _raised_at(error: BaseException) -> str:
    """The innermost frame of a traceback that is neither torch's nor graphprune's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not _is_library(f.filename) and not Path(f.filename).is_relative_to(_PACKAGE)]
    if not own:
        return ""
    return f" [{own[-1].filename}:{own[-1].lineno} in {own[-1].name}: {(own[-1].line or '').strip()}]"


def _is_library(path: str) -> bool:
    parts = path.replace("\\", "/").split("/")
    exporter = not {"torch", "onnxscript", "onnx_ir"}.isdisjoint(parts)
    return path.startswith("<") or ("site-packages" in parts and exporter)


def _first_lines(text: str, lines: int = 3) -> str:
    """The first lines of a message that say something, joined, without colour codes."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    kept = [line.strip() for line in plain.splitlines() if line.strip()]
    return " ".join(kept[:lines])
