"""ExecuTorch with its XNNPACK delegate: .pte files, in float32, float16 and (static, PT2E) int8."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...errors import GraphPruneError
from .base import Adapter, Opening, Session
from .naming import first_lines
from .places import layer, layers_named, listed
from .source import Source

# A method of the file that says what it computes in: a constant, as ExecuTorch keeps other facts about a program.
_ARITHMETIC = "arithmetic"
_PRODUCTS = ("convolution", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "addmm", "mm", "bmm", "matmul")


class ExecuTorch(Adapter):
    """See `base.Adapter`."""

    name = "executorch"
    title = "ExecuTorch (XNNPACK)"
    suffix = ".pte"
    form: ClassVar[Literal["onnx", "program"]] = "program"
    packages = (("executorch.exir", "executorch"), ("torchao", "torchao"))
    extra = "executorch"
    offered: ClassVar[Mapping[str, str]] = {
        "fp32": "as exported",
        "fp16": "weights and activations in float16, layer norms, inputs and outputs in float32",
        "int8": "static, by PT2E and XNNPACKQuantizer: weights per channel, activations calibrated from data",
    }
    refused: ClassVar[Mapping[str, str]] = {
        "bf16": "XNNPACK has bfloat16 for Linear layers only; use fp16 or int8",
    }

    def unable(self) -> str | None:
        if not _runtime()._is_available("XnnpackBackend"):
            return "its build has no XNNPACK delegate: install executorch from PyPI"
        return None

    def layout(self, precision: str) -> str:
        return "NHWC inside the delegate, NCHW outside"

    def write(self, source: Source, precision: str, path: Path) -> Sequence[str]:
        try:
            program, arithmetic = _PREPARED[precision](source)
        except Exception as error:
            raise _refusal(source, f"{precision}: {first_lines(error)}") from error
        lowered = _lowered(source, program, arithmetic)
        note = _delegated(lowered.exported_program().graph_module)
        try:
            written = lowered.to_executorch()
        except Exception as error:
            raise _refusal(source, first_lines(error)) from error
        _check_kernels(source, written)
        with path.open("wb") as file:
            written.write_to_file(file)
        return (note,)

    def open(self, path: Path, opening: Opening) -> Session:
        return _Opened(path, opening)


class _Opened(Session):
    def __init__(self, path: Path, opening: Opening) -> None:
        runtime = _runtime()
        # One pool of threads for the process: a program takes those that are there when it is loaded.
        runtime._unsafe_reset_threadpool(opening.threads)
        try:
            self._program = runtime._load_program(
                str(path), program_verification=runtime.Verification.InternalConsistency
            )
            self._method = self._program.load_method("forward")
        except Exception as error:
            raise GraphPruneError(
                f"ExecuTorch cannot load {path.name}: {first_lines(error)}; is it a .pte file of this version?"
            ) from error
        _check_inputs(path, self._method.method_meta(), opening)
        names = [self._program.get_method_name(index) for index in range(self._program.num_methods())]
        self._said = str(self._program.load_method(_ARITHMETIC).call([])[0]) if _ARITHMETIC in names else ""
        self.load(opening.tensors)

    def load(self, tensors: Sequence[Tensor]) -> None:
        self._inputs = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors]

    def run(self) -> None:
        # Inputs go in each time: their memory may be used again for what is computed later.
        self._outputs = self._method.call(self._inputs, clone_outputs=False)

    def outputs(self) -> list[Tensor]:
        return [output.clone() for output in self._outputs]

    def in_force(self) -> str:
        return self._said


def _runtime() -> Any:
    from executorch.extension.pybindings import portable_lib

    return portable_lib


def _check_inputs(path: Path, meta: Any, opening: Opening) -> None:
    """The runtime says no more than an error number."""
    from executorch.exir.tensor import scalar_type_enum

    if meta.num_inputs() != len(opening.tensors):
        raise GraphPruneError(f"{path.name} takes {meta.num_inputs()} inputs, given are {len(opening.tensors)}")
    for index, (name, tensor) in enumerate(zip(opening.names, opening.tensors, strict=True)):
        info = meta.input_tensor_meta(index)
        if tuple(info.sizes()) != tuple(tensor.shape):
            raise GraphPruneError(
                f"{path.name} takes input {name!r} of shape {tuple(info.sizes())} only, got {tuple(tensor.shape)}: its "
                f"batch and sizes are fixed, so export with an example of the shape that it is to run on"
            )
        if int(info.dtype()) != int(scalar_type_enum(tensor.dtype)):
            raise GraphPruneError(f"{path.name}: input {name!r} has another type than {tensor.dtype}")


def _as_exported(source: Source) -> tuple[Any, str]:
    return source.exported, "float32"


def _in_float16(source: Source) -> tuple[Any, str]:
    # A copy: the program, which the source keeps, has the same parameters as its module.
    module = copy.deepcopy(source.exported.module(check_guards=False))
    kept = _layer_norms_in_float32(module)
    said = f"float16, {_counted(kept, 'layer norm')} in float32" if kept else "float16"
    return torch.export.export(_Float16(module), source.tensors), said


def _layer_norms_in_float32(module: Any) -> int:
    """Have the layer norms of a program that is to be in float16 computed in float32; how many there are.

    XNNPACK has no layer norm, and ExecuTorch's own kernel for float16 computes something else where a row is longer
    than some 200 values (seen on x86). Its group norms are right, and so is what other norms are made of.
    """
    aten = torch.ops.aten
    found = [n for n in module.graph.nodes if n.op == "call_function" and _short(n.target) == "layer_norm"]
    for node in found:
        for given in node.all_input_nodes:
            with module.graph.inserting_before(node):
                node.replace_input_with(given, module.graph.call_function(aten.to.dtype, (given, torch.float32)))
        with module.graph.inserting_after(node):
            back = module.graph.call_function(aten.to.dtype, (node, torch.float16))
        node.replace_all_uses_with(back, delete_user_cb=lambda user, back=back: user is not back)
    module.recompile()
    return len(found)


class _Float16(nn.Module):
    """A network computed in float16, with its inputs and outputs as they were."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.half()
        self.__dict__["training"] = False

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Cast, run, cast back."""
        results = self.network(*(t.half() if t.dtype == torch.float32 else t for t in tensors))
        return tuple(t.float() if t.dtype == torch.float16 else t for t in results)


def _in_int8(source: Source) -> tuple[Any, str]:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(source.exported.module(check_guards=False), quantizer)
    for batch in source.batches():
        prepared(*batch)
    converted = convert_pt2e(prepared)
    return torch.export.export(converted, source.tensors), _quantized(converted.graph)


_PREPARED: Mapping[str, Callable[[Source], tuple[Any, str]]] = {
    "fp32": _as_exported, "fp16": _in_float16, "int8": _in_int8,
}  # fmt: skip


def _quantized(graph: Any) -> str:
    """How many layers that multiply read int8."""
    products = [node for node in graph.nodes if node.op == "call_function" and _short(node.target) in _PRODUCTS]
    quantized = [node for node in products if all(_dequantizes(arg) for arg in node.all_input_nodes[:2])]
    return f"int8 in {len(quantized)} of {len(products)} layers that multiply"


def _dequantizes(node: Any) -> bool:
    return node.op == "call_function" and "dequantize" in _short(node.target)


def _short(target: Any) -> str:
    """An operator's name without namespace and overload."""
    schema = getattr(target, "_schema", None)
    return str(getattr(target, "__name__", target)) if schema is None else str(schema.name).split("::")[-1]


def _lowered(source: Source, program: Any, arithmetic: str) -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    try:
        return to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner(configs=_configurations())],
            constant_methods={_ARITHMETIC: arithmetic},
        )
    except Exception as error:
        raise _refusal(source, first_lines(error)) from error


def _configurations() -> list[type]:
    """What XNNPACK is given: all that it takes, but no copy that is an output of the network.

    XNNPACK drops copies, and its delegate then fails: the value has become the same as another output, or an input.
    """
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.generic_node_configs import CloneConfig, CloneDimOrderConfig

    class Clone(CloneConfig):  # type: ignore[misc, unused-ignore]
        def check_constraints(self, node: Any, ep: Any) -> bool:
            return not _is_output(node) and bool(super().check_constraints(node, ep))

    class CloneDimOrder(CloneDimOrderConfig):  # type: ignore[misc, unused-ignore]
        def check_constraints(self, node: Any, ep: Any) -> bool:
            return not _is_output(node) and bool(super().check_constraints(node, ep))

    replaced = {CloneConfig: Clone, CloneDimOrderConfig: CloneDimOrder}
    return [replaced.get(kind, kind) for kind in ALL_PARTITIONER_CONFIGS]


def _is_output(node: Any) -> bool:
    return any(user.op == "output" or ("clone" in _short(user.target) and _is_output(user)) for user in node.users)


def _check_kernels(source: Source, written: Any) -> None:
    """Raise GraphPruneError where the runtime has no kernel for an operator: it would say no more than a number."""
    known = set(_runtime()._get_operator_names())
    for plan in written.executorch_program.execution_plan:
        for used in plan.operators:
            full = f"{used.name}.{used.overload}" if used.overload else used.name
            if full not in known:
                raise _refusal(source, f"its runtime has no kernel for {full}")


def _refusal(source: Source, reason: str) -> GraphPruneError:
    return GraphPruneError(f"ExecuTorch does not take this network: {reason}{layers_named(source.exported, reason)}")


def _delegated(graph_module: Any) -> str:
    """What XNNPACK runs, and what is left to kernels that run on one thread and mostly without vectors."""
    from executorch.exir.lowered_backend_module import get_lowered_submodules

    pieces = [module for _, module, _ in get_lowered_submodules(graph_module)]
    inside = sum(len(_operators(piece.original_module.graph_module)) for piece in pieces)
    outside = _operators(graph_module)
    said = f"XNNPACK runs {inside} of {inside + len(outside)} operators, in {_counted(len(pieces), 'piece')}"
    return said + (f"; ExecuTorch's own kernels run {listed(outside)}" if outside else "")


def _operators(graph_module: Any) -> list[tuple[str, str]]:
    """(name, layer) of what computes: no delegates, no changes between float and int8."""
    found = []
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            name = _short(node.target)
            if "quantize_per" not in name and name != "executorch_call_delegate":
                found.append(("copy" if "clone" in name else name.removesuffix("_copy"), layer(node)))
    return found


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
