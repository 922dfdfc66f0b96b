#!/usr/bin/env bash
# MNN 3.6.1 computes GELU by its approximation, and loses the sign of determinants
#
# ONNX's Gelu without `approximate` is x * P(X <= x), by erf. MNN computes the formula with tanh
# instead, at precision "high" too, off by 5e-4. Its converter has a switch, --useGeluApproximation,
# on unless set to 0; that works where GELU is written out with Erf (opset 19 and before), and does
# nothing for the operator Gelu (opset 20, what torch's exporter writes). And Det exchanges two rows
# where it meets a zero on the diagonal, and forgets that this turns the sign around.
#
# Expected: fp32 with "high" precision to be good to 1e-6 in an elementwise function, as in
# onnxruntime; a switch to work for both ways to write the same; a determinant to be the determinant.
#
# Why it matters: the error of a converted transformer is that of GELU, whatever was pruned; and
# a normalizing flow's likelihood changes with the sign.
# (Lines that MNN itself prints are left out below.)
#
# Seen (x86-64 Linux, Python 3.11):
#
#     GELU, largest error: Gelu 5e-04, with the switch off 5e-04; Erf 5e-04, with the switch off 2e-07
#     Det of [[1, 3], [0, 2]]: 2, MNN 2; of the same with its rows exchanged: -2, MNN 2
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1

python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check \
    MNN==3.6.1 numpy==2.4.6 onnx==1.23.2 onnxruntime==1.31.1 2>pip.log || { cat pip.log >&2; exit 1; }

cat > finding.py <<'PY'
import contextlib
import os
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper


@contextlib.contextmanager
def quiet():
    """MNN writes to the process's own output."""
    sys.stdout.flush()
    keep = os.dup(1), os.dup(2)
    with open("mnn.log", "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(keep[0], 1)
        os.dup2(keep[1], 2)


with quiet():
    import _tools
    import MNN
    import MNN.expr as expr


def save(nodes, constants, shape, result):
    values = [helper.make_tensor_value_info(n, 1, s) for n, s in (("x", shape), ("y", result))]
    inits = [numpy_helper.from_array(np.float32(v), name) for name, v in constants.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], inits)
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), "net.onnx")


def outputs(x, *switches):
    """Of onnxruntime and of MNN."""
    session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
    right = session.run(None, {"x": x})[0]
    options = "-f ONNX --modelFile net.onnx --MNNModel net.mnn --bizCode finding".split()
    with quiet():
        _tools.mnnconvert(["mnnconvert", *options, *switches])
        settings = {"backend": "CPU", "precision": "high", "numThread": 1}
        manager = MNN.nn.create_runtime_manager((settings,))
        module = MNN.nn.load_module_from_file("net.mnn", ["x"], ["y"], runtime_manager=manager)
        value = expr.placeholder(list(x.shape), expr.NCHW, expr.float)
        value.write(x)
        found = np.array(expr.convert(module.forward([value])[0], expr.NCHW).read())
    return right, found.reshape(right.shape)


node = helper.make_node
ways = {
    "Gelu": ([node("Gelu", ["x"], ["y"])], {}),
    "Erf": (
        [
            node("Div", ["x", "root"], ["a"]),
            node("Erf", ["a"], ["b"]),
            node("Add", ["b", "one"], ["c"]),
            node("Mul", ["x", "c"], ["d"]),
            node("Mul", ["d", "half"], ["y"]),
        ],
        {"root": 2**0.5, "one": 1.0, "half": 0.5},
    ),
}
x = np.linspace(-4, 4, 64, dtype=np.float32)[None]
errors = {}
for name, (nodes, constants) in ways.items():
    save(nodes, constants, [1, 64], [1, 64])
    for switch in ((), ("--useGeluApproximation", "0")):
        right, found = outputs(x, *switch)
        errors[name, bool(switch)] = float(abs(right - found).max())
told = [f"{n} {errors[n, False]:.0e}, with the switch off {errors[n, True]:.0e}" for n in ways]
print("GELU, largest error: " + "; ".join(told))

save([node("Det", ["x"], ["y"])], {}, [2, 2, 2], [2])
matrix = np.array([[1, 3], [0, 2]], dtype=np.float32)
right, found = outputs(np.stack([matrix, matrix[::-1]]))
print(
    f"Det of [[1, 3], [0, 2]]: {right[0]:.0f}, MNN {found[0]:.0f}; "
    f"of the same with its rows exchanged: {right[1]:.0f}, MNN {found[1]:.0f}"
)

assert errors["Gelu", False] > 1e-4, "changed: Gelu is exact"
assert errors["Gelu", True] > 1e-4, "changed: the switch works for Gelu"
assert errors["Erf", False] > 1e-4, "changed: Erf is left as it is"
assert errors["Erf", True] < 1e-5, "changed: the switch does not work for Erf"
assert np.allclose(right, [2, -2], atol=1e-5), "onnxruntime is wrong"
assert not np.allclose(found, right, atol=1e-3), "changed: determinants are right"
PY
venv/bin/python -W ignore finding.py
