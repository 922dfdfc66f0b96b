#!/usr/bin/env bash
# onnxruntime 1.31.1: from opset 21 a GroupNorm is 29 operators instead of 5 (torch 2.14.1)
#
# Opset 21 has an operator GroupNormalization that means what torch means, and torch.onnx.export
# uses it from there on: 4 nodes in the file instead of 8. But onnxruntime has no CPU kernel for
# it and expands the definition, with casts, means and reshapes, into 29 nodes when it loads
# the file. With opset 20 the file holds InstanceNormalization between two reshapes, which
# has a kernel. The outputs agree.
#
# Expected: the newer opset with its own operator to be the better choice, or no worse.
#
# Why it matters: who raises the opset of an export, for another operator's sake, gets many more
# passes over each activation, and pruned networks are judged by their latency. Count the nodes
# that a session keeps before comparing files of different opsets.
#
# Seen (x86-64 Linux, Python 3.11):
#
#     opset 20: file ['Conv', 'Reshape', 'InstanceNormalization', 'Reshape', 'Mul', 'Add', 'Relu', 'Conv']
#         loaded: 8 nodes, {'Conv': 2, 'Reshape': 2, 'InstanceNormalization': 1, 'Mul': 1, 'Add': 1, 'Relu': 1}
#     opset 21: file ['Conv', 'GroupNormalization', 'Relu', 'Conv']
#         loaded: 32 nodes, {'Cast': 5, 'Reshape': 7, 'Conv': 2, 'Shape': 4, 'Div': 2, 'Concat': 1, 'ReduceMean': 2, 'Sub': 2, 'Mul': 3, 'Add': 2, 'Sqrt': 1, 'Relu': 1}
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1

python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check \
    torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.31.1 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }

venv/bin/python -W ignore - <<'PY'
import logging
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

logging.disable(logging.CRITICAL)
kept, outputs = {}, {}
for opset in (20, 21):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.onnx.export(
        net,
        (x,),
        "net.onnx",
        dynamo=True,
        opset_version=opset,
        verbose=False,
        external_data=False,
    )
    written = [n.op_type for n in onnx.load("net.onnx").graph.node]
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = "loaded.onnx"
    options.log_severity_level = 4
    # without changes of layout, which depend on the machine
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session = onnxruntime.InferenceSession("net.onnx", options, providers=["CPUExecutionProvider"])
    outputs[opset] = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    kept[opset] = Counter(n.op_type for n in onnx.load("loaded.onnx").graph.node)
    print(f"opset {opset}: file {written}")
    print(f"    loaded: {sum(kept[opset].values())} nodes, {dict(kept[opset])}")

assert np.allclose(outputs[20], outputs[21], atol=1e-5), "changed: the outputs differ"
assert kept[20]["InstanceNormalization"] == 1, "changed: opset 20 is written in another way"
assert not kept[21]["GroupNormalization"] and not kept[21]["InstanceNormalization"], (
    "changed: a kernel is used for opset 21"
)
assert sum(kept[21].values()) > 2 * sum(kept[20].values()), "changed: opset 21 is not longer"
PY
