#!/usr/bin/env bash
# torch.onnx.export(opset_version=17) returns a file of opset 18 (torch 2.14.1, dynamo=True)
#
# The exporter builds opset 18 and converts downwards. Where ONNX's version converter cannot do
# it, the failure is a line in the log and the file of opset 18 is written all the same: no
# exception. One x.mean((2, 3)) is enough, since ReduceMean took its axes as an attribute until
# 17 and takes them as an input from 18. Without the mean the same call gives 17.
#
# Expected: an error, as somebody who asks for an opset has a runtime that needs it.
#
# Why it matters: global average pooling is in nearly every image network, and devices with old
# runtimes or converters are the reason to ask for 17. They then refuse the file, far away from
# the export, so read `opset_import` of the file after every export.
#
# Seen (x86-64 Linux, Python 3.11):
#
#     asked 17, got 17: ['Conv', 'Relu']
#     asked 17, got 18: ['Conv', 'Relu', 'ReduceMean']
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1

python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check \
    torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }

venv/bin/python -W ignore - <<'PY'
import logging

import onnx
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, mean):
        super().__init__()
        self.conv, self.mean = nn.Conv2d(3, 4, 3), mean

    def forward(self, x):
        x = self.conv(x).relu()
        return x.mean((2, 3)) if self.mean else x


logging.disable(logging.CRITICAL)
found = {}
for mean in (False, True):
    torch.manual_seed(0)
    net, x = Net(mean).eval(), torch.randn(1, 3, 8, 8)
    torch.onnx.export(
        net, (x,), "net.onnx", dynamo=True, opset_version=17, verbose=False, external_data=False
    )
    model = onnx.load("net.onnx")
    found[mean] = model.opset_import[0].version
    print(f"asked 17, got {found[mean]}:", [n.op_type for n in model.graph.node])

assert found[False] == 17, "changed: not even a convolution alone comes out as opset 17"
assert found[True] == 18, "changed: the file with a mean is no longer of opset 18"
PY
