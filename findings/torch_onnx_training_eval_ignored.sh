#!/usr/bin/env bash
# torch.onnx.export(training=TrainingMode.EVAL) exports an active dropout
# (torch 2.14.1, dynamo=True, which is the default by now)
#
# With dynamo=False the exporter puts a network into eval mode for the export, and
# training=TrainingMode.EVAL says so explicitly. With dynamo=True the same argument is accepted
# and ignored: a network that is in training mode comes out with a Dropout that drops, so the
# same input gives another answer each time. It is not even training mode throughout: batch
# normalization in the same file is folded into the convolution with its running statistics.
# The only sign is a UserWarning about the network's mode, which does not speak of the argument.
#
# Expected: an inference file, or an error that the argument has no effect any more.
#
# Why it matters: an export right after the fine-tuning of a pruned network meets it in
# training mode. Comparing the file with network.eval() then looks like damage by pruning.
#
# Seen (x86-64 Linux, Python 3.11):
#
#     dynamo=False: ['Conv'], two runs equal: True, as the network in eval mode: True, zeros: 0%
#     dynamo=True: ['Conv', 'Dropout'], two runs equal: False, as the network in eval mode: False, zeros: 48%
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

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

logging.disable(logging.CRITICAL)
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)).train()
x = torch.randn(2, 3, 8, 8) * 3 + 1
operators, repeatable, right = {}, {}, {}
for dynamo in (False, True):
    extra = {"verbose": False, "external_data": False} if dynamo else {}
    mode = torch.onnx.TrainingMode.EVAL
    torch.onnx.export(net.train(), (x,), "net.onnx", dynamo=dynamo, training=mode, **extra)
    operators[dynamo] = [n.op_type for n in onnx.load("net.onnx").graph.node]
    session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    first, second = (session.run(None, feed)[0] for _ in range(2))
    with torch.no_grad():
        wanted = net.eval()(x).numpy()
    repeatable[dynamo] = bool(np.array_equal(first, second))
    right[dynamo] = bool(np.allclose(first, wanted, atol=1e-4))
    print(
        f"dynamo={dynamo}: {operators[dynamo]}, two runs equal: {repeatable[dynamo]},",
        f"as the network in eval mode: {right[dynamo]}, zeros: {(first == 0).mean():.0%}",
    )

assert right[False] and repeatable[False], "changed: dynamo=False no longer exports eval mode"
assert "Dropout" in operators[True], "changed: no dropout in the file"
assert "BatchNormalization" not in operators[True], "changed: batch normalization is not folded"
assert not repeatable[True] and not right[True], "changed: the file's dropout is inactive"
PY
