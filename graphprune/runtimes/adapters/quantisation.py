"""ONNX files in static int8: quantise-dequantise nodes, as ONNX Runtime and OpenVINO take them.

ONNX Runtime's own defaults are slow and coarse here: signed activations leave convolutions beside shortcuts in float on
x86, weights share one scale a tensor, and operators without integer kernels are quantised too (see `layers`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import GraphPruneError
from .. import external
from ..arguments import unique
from ..capture import quiet
from ..external import named_by_contents, weights_beside
from .features import cpu_features, is_x86
from .layers import between_layers
from .naming import first_lines
from .source import Source


def write_int8(source: Source, path: Path) -> list[str]:
    """Quantise the network of `source` for this machine's CPU by its calibration inputs; notes.

    Raises:
        GraphPruneError: there is nothing to quantise, or ONNX Runtime's quantiser refuses it.
    """
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        prepared = _prepare(source.onnx_file, Path(folder) / "prepared.onnx")
        _quantise(prepared, source, path)
    for file in weights_beside(path):
        named_by_contents(path, file)
    return _range_notes()


def is_large(graph: Path) -> bool:
    """Whether a graph and the weights beside it are more than one file of the format can hold."""
    return sum(file.stat().st_size for file in (graph, *weights_beside(graph))) > external.LARGE


def _prepare(graph: Path, path: Path) -> Path:
    """Shapes inferred, constants folded, batch norms inside convolutions: the quantiser looks at nodes as they are."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    large = is_large(graph)
    last: Exception | None = None
    # Symbolic inference does not know every operator; the exporter has written most shapes down.
    for without in (False, True):
        try:
            with quiet():
                quant_pre_process(
                    str(graph), str(path), skip_symbolic_shape=without, save_as_external_data=large,
                    all_tensors_to_one_file=True,
                )  # fmt: skip
                _name_nodes(path)
            return path
        except Exception as error:
            last = error
    assert last is not None
    raise GraphPruneError(f"ONNX Runtime cannot prepare the network for int8: {first_lines(last)}") from last


def _name_nodes(path: Path) -> None:
    """The quantiser is told which nodes to take by their names, which need not be there, nor differ."""
    import onnx

    proto = onnx.load(str(path), load_external_data=False)
    for node, name in zip(proto.graph.node, unique([n.name or n.op_type for n in proto.graph.node]), strict=True):
        node.name = name
    onnx.save(proto, str(path))


def _quantise(prepared: Path, source: Source, path: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static

    layers = between_layers(onnx.load(str(prepared), load_external_data=False).graph)
    if not layers:
        raise GraphPruneError("int8: the network has no convolution and no matrix product with a weight to quantise")
    try:
        with quiet():
            quantize_static(
                str(prepared),
                str(path),
                _reader(source),
                per_channel=True,
                reduce_range=_seven_bits(),
                activation_type=QuantType.QUInt8 if is_x86() else QuantType.QInt8,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=layers,
                use_external_data_format=is_large(prepared),
                # What attention multiplies is no weight: its probabilities are smaller than a step of int8.
                extra_options={"MatMulConstBOnly": True},
            )
    except Exception as error:
        raise GraphPruneError(f"ONNX Runtime cannot quantise the network: {first_lines(error)}") from error


def _reader(source: Source) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._left: Iterator[list[Tensor]] = source.batches()

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._left, None)
            if batch is None:
                return None
            return {name: tensor.numpy() for name, tensor in zip(source.inputs, batch, strict=True)}

    return Reader()


def _seven_bits() -> bool:
    """Whether weights must stay within 7 bits: x86 kernels without VNNI add two products in 16 bits, which saturate."""
    return is_x86() and {"avx512_vnni", "avx_vnni"}.isdisjoint(cpu_features())


def _range_notes() -> list[str]:
    if not is_x86():
        return []
    if _seven_bits():
        return ["weights have 7 bits, because sums of 8 bits saturate on an x86 CPU without VNNI, as this one is"]
    return ["written for CPUs with VNNI, such as this one: on older x86 CPUs sums can saturate; quantise there"]
