"""LiteRT (TensorFlow Lite) with its XNNPACK delegate: .tflite files, in float32, with weights in float16, and static int8."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import GraphPruneError
from .base import Adapter, Opening, Session
from .naming import first_lines, layers_named, listed
from .source import Source

_SIGNATURE = "serving_default"
_DELEGATE = "DELEGATE"
_PRODUCTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "CONV_3D", "FULLY_CONNECTED", "BATCH_MATMUL")
_BETWEEN = ("QUANTIZE", "DEQUANTIZE")


class LiteRT(Adapter):
    """See `base.Adapter`."""

    name = "litert"
    title = "LiteRT (XNNPACK)"
    suffix = ".tflite"
    form: ClassVar[Literal["onnx", "program"]] = "program"
    packages = (
        ("litert_torch", "litert-torch"),
        ("ai_edge_litert.interpreter", "ai-edge-litert"),
        ("ai_edge_quantizer.quantizer", "ai-edge-quantizer"),
    )
    extra = "litert"
    offered: ClassVar[Mapping[str, str]] = {
        "fp32": "as exported",
        "fp16": "weights kept in float16 (half the file), computed in float32: no faster",
        "int8": "static: weights per channel, activations calibrated from data, inputs and outputs in float32 "
        "(int8 without data, \"dynamic range\", is not offered: it makes depthwise networks three times slower)",
    }
    refused: ClassVar[Mapping[str, str]] = {"bf16": "LiteRT has no arithmetic in bfloat16 on CPUs; use fp16 or int8"}

    def layout(self, precision: str) -> str:
        return "NHWC inside, inputs NCHW with a transpose"

    def write(self, source: Source, precision: str, path: Path) -> Sequence[str]:
        first = path if precision == "fp32" else path.with_name(f"float32-{path.name}")
        _convert(source, first)
        if precision != "fp32":
            try:
                _WRITERS[precision](source, first, path)
            except Exception as error:
                raise _refusal(source, f"{precision}: {first_lines(error)}") from error
            first.unlink()
        try:
            graph = _Graph(_interpreter(path, 1))
        except Exception as error:
            raise _refusal(source, first_lines(error)) from error
        return (graph.delegated(),)

    def open(self, path: Path, opening: Opening) -> Session:
        return _Opened(path, opening)


class _Named(nn.Module):
    """A program with inputs by name: these are the names in the file."""

    def __init__(self, program: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.program, self.names = program, tuple(names)
        self.__dict__["training"] = False

    def forward(self, /, **tensors: Tensor) -> tuple[Tensor, ...]:
        """The program on its inputs in order."""
        return tuple(self.program(*(tensors[name] for name in self.names)))


def _convert(source: Source, path: Path) -> None:
    import litert_torch

    module = _Named(source.exported.module(check_guards=False), source.inputs)
    try:
        # Types as they are: without enable_x64 integers of 64 bits would become 32.
        model = litert_torch.convert(
            module, sample_kwargs=dict(zip(source.inputs, source.tensors, strict=True)), enable_x64=True
        )
        model.export(str(path))
    except Exception as error:
        raise _refusal(source, first_lines(error)) from error


def _write_float16(source: Source, first: Path, path: Path) -> None:
    from ai_edge_quantizer import qtyping, quantizer

    work = quantizer.Quantizer(str(first))
    work.add_weight_only_config(
        ".*",
        qtyping.TFLOperationName.ALL_SUPPORTED,
        16,
        granularity=qtyping.QuantGranularity.TENSORWISE,
        algorithm_key=quantizer.AlgorithmName.FLOAT_CASTING,
    )
    work.quantize(serialize_to_path=str(path), enable_progress_report=False)


def _write_int8(source: Source, first: Path, path: Path) -> None:
    from ai_edge_quantizer import qtyping, quantizer, recipe

    work = quantizer.Quantizer(str(first), recipe.static_wi8_ai8())
    for place in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
        work.update_quantization_recipe(".*", place, algorithm_key=quantizer.AlgorithmName.NO_QUANTIZE)
    batches = [
        {name: tensor.numpy() for name, tensor in zip(source.inputs, batch, strict=True)} for batch in source.batches()
    ]
    seen = work.calibrate({_SIGNATURE: batches}, num_threads=1)
    work.quantize(seen, serialize_to_path=str(path), enable_progress_report=False)


_WRITERS = {"fp16": _write_float16, "int8": _write_int8}


def _refusal(source: Source, reason: str) -> GraphPruneError:
    return GraphPruneError(f"LiteRT does not take this network: {reason}{layers_named(source.exported, reason)}")


def _interpreter(path: Path, threads: int) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=threads)
    interpreter.allocate_tensors()
    return interpreter


class _Opened(Session):
    def __init__(self, path: Path, opening: Opening) -> None:
        try:
            self._interpreter = _interpreter(path, opening.threads)
            signatures = self._interpreter.get_signature_list()
            runner = self._interpreter.get_signature_runner(next(iter(signatures), None))
            inputs, outputs = runner.get_input_details(), runner.get_output_details()
        except Exception as error:
            raise GraphPruneError(
                f"LiteRT cannot load {path.name}: {first_lines(error)}; is it a .tflite file?"
            ) from error
        self._inputs = [inputs[name] for name in _in_order(path, opening, inputs)]
        self._outputs = [outputs[name]["index"] for name in sorted(outputs, key=_number)]
        _check_inputs(path, opening, self._inputs)
        self.load(opening.tensors)

    def load(self, tensors: Sequence[Tensor]) -> None:
        for details, tensor in zip(self._inputs, tensors, strict=True):
            self._interpreter.set_tensor(details["index"], tensor.detach().numpy())

    def run(self) -> None:
        self._interpreter.invoke()

    def outputs(self) -> list[Tensor]:
        # A result without dimensions is no array.
        found = [np.array(self._interpreter.get_tensor(index)) for index in self._outputs]
        return [torch.from_numpy(array) for array in found]

    def in_force(self) -> str:
        return _Graph(self._interpreter).arithmetic()


def _in_order(path: Path, opening: Opening, inputs: Mapping[str, Any]) -> list[str]:
    """The file's names of the inputs, in the order that they are given in: the same names, or numbered ones."""
    if len(inputs) != len(opening.names):
        raise GraphPruneError(f"{path.name} takes {len(inputs)} inputs, given are {len(opening.names)}")
    if set(inputs) == set(opening.names):
        return list(opening.names)
    return sorted(inputs, key=_number)


def _number(name: str) -> int:
    """Of "args_10" or "output_2"; those without a number stay where they are."""
    found = re.search(r"(\d+)$", name)
    return int(found[1]) if found else 0


def _check_inputs(path: Path, opening: Opening, inputs: Sequence[Mapping[str, Any]]) -> None:
    for name, tensor, details in zip(opening.names, opening.tensors, inputs, strict=True):
        shape = tuple(int(size) for size in details["shape"])
        if shape != tuple(tensor.shape):
            raise GraphPruneError(
                f"{path.name} takes input {name!r} of shape {shape} only, got {tuple(tensor.shape)}: its batch and "
                f"sizes are fixed, so export with an example of the shape that it is to run on"
            )
        if details["dtype"] != tensor.detach().numpy().dtype:
            wanted = np.dtype(details["dtype"]).name
            raise GraphPruneError(f"{path.name} takes input {name!r} as {wanted}, got {tensor.dtype}")


class _Graph:
    """The operators of a loaded file, and which of them XNNPACK runs."""

    def __init__(self, interpreter: Any) -> None:
        nodes = interpreter._get_ops_details()
        self._types = {details["index"]: details["dtype"] for details in interpreter.get_tensor_details()}
        self._pieces = [node for node in nodes if node["op_name"] == _DELEGATE]
        self._nodes = [node for node in nodes if node["op_name"] != _DELEGATE]
        self._outside = self._found_outside({details["index"] for details in interpreter.get_output_details()})

    def _found_outside(self, results: set[int]) -> list[Any]:
        """The operators that no delegate has taken, which the interpreter does not say: from the end to the start, those
        whose result is read by a delegate or by another of them, or is the network's, and is no delegate's result.
        """
        given = {int(tensor) for piece in self._pieces for tensor in piece["outputs"]}
        read = {int(tensor) for piece in self._pieces for tensor in piece["inputs"]} | results
        outside = []
        for node in reversed(self._nodes):
            made = {int(tensor) for tensor in node["outputs"]}
            if made & read and not made & given:
                outside.append(node)
                read |= {int(tensor) for tensor in node["inputs"]}
        return outside[::-1]

    def delegated(self) -> str:
        """What XNNPACK runs, in words."""
        whole = [node for node in self._nodes if node["op_name"] not in _BETWEEN]
        outside = [node["op_name"] for node in self._outside if node["op_name"] not in _BETWEEN]
        pieces = f"{len(self._pieces)} piece" + ("" if len(self._pieces) == 1 else "s")
        said = f"XNNPACK runs {len(whole) - len(outside)} of {len(whole)} operators, in {pieces}"
        return said + (f"; LiteRT's own kernels run {listed([(name, '') for name in outside])}" if outside else "")

    def arithmetic(self) -> str:
        """Float32, or how many of the layers that multiply are int8."""
        products = [node for node in self._nodes if node["op_name"] in _PRODUCTS]
        integer = [node for node in products if self._types.get(int(node["outputs"][0])) is np.int8]
        if integer:
            return f"int8 in {len(integer)} of {len(products)} layers that multiply"
        return "float32, weights kept in float16" if np.float16 in self._types.values() else "float32"
