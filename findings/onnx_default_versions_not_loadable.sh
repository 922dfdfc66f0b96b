#!/usr/bin/env bash
# A file of onnx.helper.make_model does not load in onnxruntime (onnx 1.23.2, onnxruntime 1.31.1)
#
# Without versions given, make_model writes the newest that the package knows: IR version 14 and
# opset 28. The current onnxruntime reads IR versions to 13 and opsets to 26, so a network of a
# single Relu, which has not changed in meaning for years, passes onnx.checker and is refused.
# Both have to be lowered; either alone is not enough.
#
# Expected: that the defaults of the two packages, each in its newest release, go together.
#
# Why it matters: tools that cut channels in ONNX files, extract a layer to measure it, or put
# pre- and postprocessing around a network build models this way. Give `ir_version` and
# `opset_imports` explicitly, e.g. those of the file at hand.
#
# Seen (x86-64 Linux, Python 3.11):
#
#     IR 14, opset 28: Fail: ...Unsupported model IR version: 14, max supported IR version: 13
#     IR 10, opset 28: Fail: ... Current official support for domain ai.onnx is till opset 26.
#     IR 14, opset 21: Fail: ...Unsupported model IR version: 14, max supported IR version: 13
#     defaults: IR 14, opset 28, loads: False
#     only IR: IR 10, opset 28, loads: False
#     only opset: IR 14, opset 21, loads: False
#     both: IR 10, opset 21, loads: True
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1

python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check \
    onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }

venv/bin/python -W ignore - <<'PY'
import onnx
import onnxruntime
from onnx import TensorProto, helper


def attempt(**versions):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "net", [ends[0]], [ends[1]]
    )
    model = helper.make_model(graph, **versions)
    onnx.checker.check_model(model, full_check=True)
    what = f"IR {model.ir_version}, opset {model.opset_import[0].version}"
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return what, True
    except Exception as error:
        said = str(error).strip().rpartition(") ")[2]
        print(f"{what}: {type(error).__name__}: ...{said[-62:]}")
        return what, False


older = [helper.make_opsetid("", 21)]
tries = {
    "defaults": attempt(),
    "only IR": attempt(ir_version=10),
    "only opset": attempt(opset_imports=older),
    "both": attempt(ir_version=10, opset_imports=older),
}
for name, (what, loads) in tries.items():
    print(f"{name}: {what}, loads: {loads}")

assert not tries["defaults"][1], "changed: the defaults load"
assert not tries["only IR"][1] and not tries["only opset"][1], "changed: one is enough"
assert tries["both"][1], "changed: IR 10 with opset 21 does not load"
PY
