"""LiteRT (TensorFlow Lite) with XNNPACK: .tflite files, in float32, with weights in float16, and in static int8."""

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
from .naming import first_lines
from .places import layers_named, listed
from .source import Source

_SIGNATURE = "serving_default"
_DELEGATE = "DELEGATE"
_PRODUCTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "CONV_3D", "FULLY_CONNECTED", "BATCH_MATMUL")
_BETWEEN = ("QUANTIZE", "DEQUANTIZE")
# What is no more exact in int8, and no faster, in front of an operator in float32.
_FEEDING = ("MEAN", "SUM", "RESHAPE", "TRANSPOSE")


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
    ranges = _ranges(source, first)
    _quantize(first, ranges, (), path)
    kept = _better_in_float(_Graph(_interpreter(first, 1)), _Graph(_interpreter(path, 1)))
    if kept:
        path.unlink()
        _quantize(first, ranges, kept, path)


def _recipe(kept: Sequence[str]) -> Any:
    """All in int8 but inputs, outputs, and the operators that make the tensors of these names."""
    from ai_edge_quantizer import qtyping, quantizer, recipe, recipe_manager

    recipes = recipe_manager.RecipeManager()
    recipes.load_quantization_recipe(recipe.static_wi8_ai8())
    for place in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
        recipes.add_quantization_config(".*", place, algorithm_key=quantizer.AlgorithmName.NO_QUANTIZE)
    for name in kept:
        recipes.add_quantization_config(
            f"^{re.escape(name)};?$",
            qtyping.TFLOperationName.ALL_SUPPORTED,
            algorithm_key=quantizer.AlgorithmName.NO_QUANTIZE,
        )
    return recipes


def _ranges(source: Source, first: Path) -> dict[str, Any]:
    from ai_edge_quantizer import calibrator
    from ai_edge_quantizer.utils import qsv_utils

    # Ranges of all batches: by default 95 % of each range is that of the batches before, so the first one decides.
    seen = calibrator.Calibrator(str(first), num_threads=1, qsv_update_func=qsv_utils.min_max_update)
    # A list, because what can be read once only is used up by counting.
    batches = [
        {name: tensor.numpy() for name, tensor in zip(source.inputs, batch, strict=True)} for batch in source.batches()
    ]
    seen.calibrate({_SIGNATURE: batches}, _recipe(()))
    found: dict[str, Any] = seen.get_model_qsvs()
    return found


def _quantize(first: Path, ranges: dict[str, Any], kept: Sequence[str], path: Path) -> None:
    from ai_edge_quantizer import quantizer

    work = quantizer.Quantizer(str(first), _recipe(kept).get_quantization_recipe())
    work.quantize(ranges, serialize_to_path=str(path), enable_progress_report=False)


def _better_in_float(whole: _Graph, quantized: _Graph) -> list[str]:
    """Names of results that are better left in float32: XNNPACK computes them in float32 only.

    In int8 they would be done by slow kernels, and cut the delegate into pieces: a transformer gets twice slower than
    in float32. With them goes what is computed from such results alone, and sums and moves that feed them, so that a
    normalisation stays whole.
    """
    left = {quantized.result(node) for node in quantized.outside if node["op_name"] not in _BETWEEN}
    left -= {whole.result(node) for node in whole.outside}
    makers = {int(tensor): number for number, node in enumerate(whole.nodes) for tensor in node["outputs"]}
    reads = [{makers[int(t)] for t in node["inputs"] if int(t) in makers} for node in whole.nodes]
    kept = {number for number, node in enumerate(whole.nodes) if whole.result(node) in left}
    while True:
        feeds = {maker for number in kept for maker in reads[number] if whole.nodes[maker]["op_name"] in _FEEDING}
        follows = {
            number
            for number, node in enumerate(whole.nodes)
            if node["op_name"] not in _PRODUCTS and reads[number] and reads[number] <= kept
        }
        if feeds | follows <= kept:
            return [whole.result(whole.nodes[number]) for number in sorted(kept)]
        kept |= feeds | follows


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
            inputs = runner.get_input_details()
        except Exception as error:
            raise GraphPruneError(
                f"LiteRT cannot load {path.name}: {first_lines(error)}; is it a .tflite file?"
            ) from error
        self._inputs = [inputs[name] for name in _in_order(path, opening, inputs)]
        # In the order of the program, and not by the signature: that of a quantised file points at a value inside the
        # delegate where a result is returned twice.
        self._outputs = [details["index"] for details in self._interpreter.get_output_details()]
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
    """Of "args_10"; names without a number stay where they are."""
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
    """The operators of a loaded file (`nodes`), and those that XNNPACK does not run (`outside`)."""

    def __init__(self, interpreter: Any) -> None:
        nodes = interpreter._get_ops_details()
        details = interpreter.get_tensor_details()
        self._names = {entry["index"]: str(entry["name"]) for entry in details}
        self._types = {entry["index"]: entry["dtype"] for entry in details}
        self._pieces = [node for node in nodes if node["op_name"] == _DELEGATE]
        self.nodes = [node for node in nodes if node["op_name"] != _DELEGATE]
        self.outside = self._found_outside({entry["index"] for entry in interpreter.get_output_details()})

    def result(self, node: Mapping[str, Any]) -> str:
        """The name of an operator's first result."""
        return self._names.get(int(node["outputs"][0]), "")

    def _found_outside(self, results: set[int]) -> list[Any]:
        """The operators that no delegate has taken, which the interpreter does not say.

        From the end to the start: those whose result is read by a delegate or by another of them, or is the network's,
        and is no delegate's result.
        """
        given = {int(tensor) for piece in self._pieces for tensor in piece["outputs"]}
        read = {int(tensor) for piece in self._pieces for tensor in piece["inputs"]} | results
        outside = []
        for node in reversed(self.nodes):
            made = {int(tensor) for tensor in node["outputs"]}
            if made & read and not made & given:
                outside.append(node)
                read |= {int(tensor) for tensor in node["inputs"]}
        return outside[::-1]

    def delegated(self) -> str:
        """What XNNPACK runs, in words."""
        whole = [node for node in self.nodes if node["op_name"] not in _BETWEEN]
        outside = [node["op_name"] for node in self.outside if node["op_name"] not in _BETWEEN]
        pieces = f"{len(self._pieces)} piece" + ("" if len(self._pieces) == 1 else "s")
        said = f"XNNPACK runs {len(whole) - len(outside)} of {len(whole)} operators, in {pieces}"
        return said + (f"; LiteRT's own kernels run {listed([(name, '') for name in outside])}" if outside else "")

    def arithmetic(self) -> str:
        """Float32, or how many of the layers that multiply are int8."""
        products = [node for node in self.nodes if node["op_name"] in _PRODUCTS]
        integer = [node for node in products if self._types.get(int(node["outputs"][0])) is np.int8]
        if integer:
            return f"int8 in {len(integer)} of {len(products)} layers that multiply"
        return "float32, weights kept in float16" if np.float16 in self._types.values() else "float32"
