"""ONNX files that are known to compute what the model computes before they get their name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..dependency.reparametrised import plain
from ..errors import GraphPruneError
from ..support.doors import door
from ..support.files import check_target, workspace
from ..support.numbers import check_number
from ..support.types import PathLike
from ..support.walking import named_tensors
from . import external
from .arguments import FlatArguments, named_outputs
from .capture import inference_state, optimise, quiet, run_model
from .dynamic import FreeAxes
from .exported import ExportReport
from .external import named_by_contents, put_network_in_place
from .freeing import Call, Captured, capture_batched, capture_free
from .initializers import Removal, check_captured, check_file, planned_shapes
from .parity import check_parity, default_tolerance


@door("model", exact=True)
def export_onnx(
    model: nn.Module,
    example_input: Any,
    path: PathLike,
    *,
    opset: int | None = None,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    plan: Removal | None = None,
    check: bool = True,
    tolerance: float | None = None,
    provider: str = "cpu",
    external_data: bool | None = None,
) -> ExportReport:
    """Write `model` as an ONNX file, and prove it in ONNX Runtime before the file gets its name.

    The model is exported in eval mode (`torch.onnx.export(dynamo=True)`, constants folded, weights that it computes by
    weight norm, spectral norm or another parametrisation as they are); its training flags and the
    random state are as before afterwards, also after an error. Inputs get the names of the model's own arguments,
    outputs the keys of a dict or dataclass, or "output", "output_0"...; None and numbers in the result are left out.
    Until all checks have passed the file lies in a temporary folder beside `path`; after an error nothing is left
    behind and a file that was already there is untouched.

    Args:
        example_input: a tensor, a tuple of positional arguments or a dict of keyword arguments, on the model's device.
            Values that are no tensors are constants of the file. Tensors may lie in tuples, lists, dicts, caches and
            classes that are registered with `torch.utils._pytree`; the file has each as an input of its own, such as
            "past_key_values_0_1". An output of the name of an input of "past..." is called "present...".
        opset: the ONNX operator set; the exporter's own choice if None. 18 or later always works.
        dynamic_batch: the first dimension of every tensor that is as long as that of the first one is free. A model
            whose code fixes it is an error, not a file that works for one size only: pass False for such a file.
        dynamic_shapes: further axes that are free, in the form of `torch.export`: a dict by the names of arguments (or
            of inputs of the file) or a tuple by position, nested as the inputs are, of {axis: dim}; what is not named
            is fixed. A dim is a name, a sum such as "past + length", a `torch.export.Dim` (with `min` and `max`, or
            made of another as in `8 * Dim("n")`), `Dim.DYNAMIC`, `Dim.AUTO` (free if torch can have it so) or None.
            {axis: dim} in the place of a tuple, list, dict or cache stands for every tensor in it. Where it says
            nothing of the first axis of any tensor that shares the batch, `dynamic_batch` decides over that.
        plan: the plan that the model was pruned by; parameters and initializers must have the shapes it leaves.
        check: compare with the model in ONNX Runtime at the example's batch size and, if dynamic, at another one; with
            `dynamic_shapes` at the example's sizes, at larger ones and at the smallest, and at 1 and 0 where the model
            takes that and answers (there a difference is a note). Inputs of these sizes are made from the example.
            Costs two or three forward passes, with `dynamic_shapes` about ten.
        tolerance: largest allowed relative error, max|onnx - torch| / max|torch| of each output; integer outputs
            must be equal. None: 1e-4, or 1e-2 where float16 and 5e-2 where bfloat16 is involved.
        provider: where to check, "cpu" unless said (see `resolve_provider`). Half precision may need "cuda".
        external_data: put the weights into a second file beside `path`, whose name is that of `path`, 12 digits of
            the SHA-256 of what is in it, and ".data"; that of an earlier export to `path` is removed. None: only where
            a single file would be larger than the 2 GiB that the format allows.

    Raises:
        GraphPruneError: the path cannot be written; the model does not run, cannot be captured or has an operator
            without an ONNX form; the batch or another axis cannot be dynamic (with the axis, its size and the reason),
            or `dynamic_shapes` names what is not there; the opset cannot be reached; a shape is not the plan's;
            ONNX Runtime cannot run the file or computes something else.
    """
    target = check_target(path)
    _check_arguments(model, opset, tolerance)
    planned = {} if plan is None else planned_shapes(model, plan)
    model = plain(model)  # which has no tensors that weights are computed from
    planned = {name: shape for name, shape in planned.items() if name in named_tensors(model)}
    arguments = FlatArguments.of(example_input, model)
    free = _free_axes(arguments, dynamic_shapes, dynamic_batch)

    with workspace(target) as folder:
        with inference_state(model):
            with _Assignments() as assigned:
                first_outputs = run_model(model, arguments)
            assigned.check(model)
            taken = [*arguments.names, *(name for name, _ in (*model.named_parameters(), *model.named_buffers()))]
            output_names, output_tensors = named_outputs(first_outputs, taken)
            make = capture_free if free.asked else capture_batched
            captured = make(model, arguments, output_names, opset=opset, free=free)
            program = captured.program
            used = check_captured(program, model, planned)
            optimise(program, type(model).__name__)
            temporary = folder / target.name
            data = _save(program, temporary, external_data)
        found, nodes, written_opset = _inspect(temporary, [*arguments.names], output_names)
        initializers = check_file(found, model, used, planned)
        if tolerance is None:
            tolerance = default_tolerance([*arguments.tensors, *output_tensors, *model.parameters()])
        calls, error, notes = captured.calls if check else (), None, [*captured.notes]
        if check:
            calls, error, notes = _compare(temporary, model, captured, tolerance, provider)
        size = sum(file.stat().st_size for file in (temporary, data) if file is not None)
        data = put_network_in_place(temporary, data, target)
    return ExportReport(
        path=target,
        opset=written_opset,
        dynamic_batch=captured.free.frees_batch(arguments),
        batch_size=arguments.batch_size,
        inputs=arguments.names,
        outputs=tuple(output_names),
        nodes=nodes,
        size=size,
        external_data=data,
        max_relative_error=error,
        tolerance=tolerance,
        checked_batch_sizes=tuple(call.arguments.batch_size for call in calls),
        initializers=initializers,
        notes=tuple(notes),
        dynamic_axes=captured.free.described(arguments),
        checked_sizes=tuple(call.sizes for call in calls if call.sizes),
    )


def _free_axes(arguments: FlatArguments, dynamic_shapes: Any, dynamic_batch: bool) -> FreeAxes:
    if dynamic_shapes is not None:
        return FreeAxes.of(dynamic_shapes, arguments, dynamic_batch=dynamic_batch)
    if dynamic_batch and arguments.batch_size is None:
        raise GraphPruneError("no tensor of example_input has a batch dimension; pass dynamic_batch=False")
    return FreeAxes.batch(arguments) if dynamic_batch else FreeAxes.none(arguments)


def _compare(
    path: Path, model: nn.Module, captured: Captured, tolerance: float, provider: str
) -> tuple[tuple[Call, ...], float, list[str]]:
    """The calls at which file and model agree, the largest relative error, and notes.

    Raises:
        GraphPruneError: they differ; but at sizes of 0 and 1 that torch does not promise, which is a note.
    """

    def compare(calls: Sequence[Call]) -> tuple[float, list[str]]:
        given = [(call.where, call.arguments) for call in calls]
        return check_parity(path, model, given, tolerance=tolerance, provider=provider)

    error, told = compare(captured.calls)
    calls, notes = [*captured.calls], [*captured.notes, *told]
    for call in captured.perhaps:
        try:
            error = max(error, compare([call])[0])
            calls.append(call)
        except GraphPruneError:
            notes.append(f"not to be used{call.where}, where the model runs and the file fails or differs")
    return tuple(calls), error, notes


class _Assignments(TorchFunctionMode):
    """Notes the tensors whose `.data` forward sets, which the exporter does not follow."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            self.tensors.append(args[0])
        return func(*args, **(kwargs or {}))

    def check(self, model: nn.Module) -> None:
        """Raise GraphPruneError where a parameter or buffer is among them."""
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if any(tensor is assigned for assigned in self.tensors):
                raise GraphPruneError(
                    f"{name}: forward sets its .data, which torch's exporter cannot record; let forward compute with "
                    f"the value itself, or set it once and leave that code out of the model that is exported"
                )


def _check_arguments(model: nn.Module, opset: int | None, tolerance: float | None) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta":
            raise GraphPruneError(f"{name!r} is on the meta device and has no values; load the weights first")
    if opset is not None:
        import onnx

        newest = onnx.defs.onnx_opset_version()
        if isinstance(opset, bool) or not isinstance(opset, int) or not 1 <= opset <= newest:
            raise GraphPruneError(
                f"opset must be an integer up to {newest} (what onnx {onnx.__version__} knows), got {opset!r}"
            )
    check_number("tolerance", tolerance, optional=True)


def _save(program: Any, path: Path, external_data: bool | None) -> Path | None:
    """Write the program; the file of external data, if there is one."""
    if external_data is None:
        weights = program.model.graph.initializers.values()
        external_data = sum(v.const_value.nbytes for v in weights if v.const_value is not None) > external.LARGE
    try:
        with quiet():
            program.save(path, external_data=external_data)
        others = sorted(file for file in path.parent.iterdir() if file != path)
        return named_by_contents(path, others[0]) if others else None
    except OSError as error:
        raise GraphPruneError(f"cannot write {path.name}: {error.strerror or error}") from error


def _inspect(path: Path, inputs: list[str], outputs: list[str]) -> tuple[dict[str, tuple[int, ...]], int, int]:
    """Shapes of the initializers, number of nodes and opset of a file that passes ONNX's own checker."""
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise GraphPruneError(f"the exporter made an invalid file: {str(error).splitlines()[0]}") from error
    proto = onnx.load(str(path), load_external_data=False)
    written = [[value.name for value in values] for values in (proto.graph.input, proto.graph.output)]
    if written != [inputs, outputs]:
        raise GraphPruneError(f"the exporter wrote other inputs and outputs {written} than {[inputs, outputs]}")
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    return shapes, len(proto.graph.node), opset
