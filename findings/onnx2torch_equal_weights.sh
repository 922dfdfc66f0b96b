#!/usr/bin/env bash
# onnx2torch 1.5.15 reads a network or not, depending on whether two of its weights are equal
# (torch 2.14.1, dynamo=False, opset 17)
#
# torch.onnx.export(dynamo=False) stores equal weights once and names the copies by Identity
# nodes. onnx2torch looks the weight up by name among the initializers: KeyError. So a freshly
# made torchvision resnet18, whose batch norms are alike, is not read, and the same network with
# random statistics is, exactly. Both files are valid.
#
# Expected: that a file is read whatever numbers are in it; or an error that names the node.
#
# Why it matters: reading a file back to prune it, or to compare it with the original. Weights
# are equal in networks that were just built, and in layers that pruning or a penalty set to
# zero. (Files of the default exporter are no way round: as soon as they hold a mean or a
# flatten, onnx2torch has no converter for ReduceMean 18 or Reshape 19.)
#
# Seen (x86-64 Linux, Python 3.11):
#
#     equal batch norms: True; Identity nodes: 16; onnx2torch: KeyError
#     equal batch norms: False; Identity nodes: 0; onnx2torch: read, exact
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1

python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check \
    torch==2.14.1 torchvision==0.29.1 onnx==1.23.2 onnx2torch==1.5.15 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }

venv/bin/python -W ignore - <<'PY'
import warnings

warnings.simplefilter("ignore")

import onnx
import onnx2torch
import torch
import torchvision
from torch import nn

results = {}
for equal in (True, False):
    torch.manual_seed(0)
    net, x = torchvision.models.resnet18(num_classes=10).eval(), torch.randn(1, 3, 32, 32)
    if not equal:
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                for values in (layer.weight, layer.bias, layer.running_mean):
                    values.data.normal_()
                layer.running_var.uniform_(0.5, 2)
    torch.onnx.export(net, (x,), "net.onnx", dynamo=False, opset_version=17)
    model = onnx.load("net.onnx")
    onnx.checker.check_model(model, full_check=True)
    copies = sum(n.op_type == "Identity" for n in model.graph.node)
    try:
        with torch.no_grad():
            error = float((onnx2torch.convert("net.onnx")(x) - net(x)).abs().max())
        results[equal] = "read, exact" if error < 1e-4 else f"read, off by {error}"
    except Exception as error:
        results[equal] = type(error).__name__
    print(f"equal batch norms: {equal}; Identity nodes: {copies}; onnx2torch: {results[equal]}")

assert results[True] == "KeyError", "changed: the fresh network"
assert results[False] == "read, exact", "changed: the network with random statistics"
PY
