#!/usr/bin/env bash
# torch.onnx.export drops the projections of an LSTM (torch 2.14.1, dynamo=True)
#
# nn.LSTM(proj_size=3) keeps 6 cells and projects each output down to 3 values. The exporter
# writes an ordinary LSTM of hidden size 3: half of the gates' weights are cut away and
# weight_hr, the projection, is not in the file at all. Nothing is raised or warned about, and
# onnx.checker with full_check passes, because shapes of the output agree by accident. Only a
# runtime notices, and it speaks of the initial cell state.
#
# Expected: an error at export ("projections cannot be written as an ONNX LSTM"), or a file
# that computes the projection.
#
# Why it matters: a projection is the usual way to make an LSTM smaller, and whoever trusts
# "exported and checked" ships a file that cannot run, or, with a runtime that overlooks the
# initial state, one that computes something else.
#
# Seen (x86-64 Linux, Python 3.11):
#
#     export and checker: no complaint
#     network: {'lstm.weight_ih_l0': (24, 4), 'lstm.weight_hh_l0': (24, 3), 'lstm.bias_ih_l0': (24,), 'lstm.bias_hh_l0': (24,), 'lstm.weight_hr_l0': (3, 6)}
#     file: hidden_size 3, W (1, 12, 4), R (1, 12, 3)
#     weight_hr in the file: False
#     onnxruntime: Input initial_c must have shape {1,2,3}. Actual:{1,2,6}
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

import onnx
import onnxruntime
import torch
from torch import nn

logging.disable(logging.CRITICAL)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 6, proj_size=3)

    def forward(self, x):
        return self.lstm(x)[0]


torch.manual_seed(0)
net, x = Net().eval(), torch.randn(5, 2, 4)
torch.onnx.export(net, (x,), "net.onnx", dynamo=True, verbose=False, external_data=False)
model = onnx.load("net.onnx")
onnx.checker.check_model(model, full_check=True)
print("export and checker: no complaint")

(node,) = [n for n in model.graph.node if n.op_type == "LSTM"]
hidden = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}["hidden_size"]
shapes = {i.name: tuple(i.dims) for i in model.graph.initializer}
weight = shapes[node.input[1]]
ours = {n: tuple(p.shape) for n, p in net.named_parameters()}
print("network:", ours)
print(f"file: hidden_size {hidden}, W {weight}, R {shapes[node.input[2]]}")
print("weight_hr in the file:", ours["lstm.weight_hr_l0"] in shapes.values())

try:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession("net.onnx", options, providers=["CPUExecutionProvider"])
    session.run(None, {session.get_inputs()[0].name: x.numpy()})
    failed = ""
except Exception as error:
    failed = str(error)
print("onnxruntime:", failed[failed.find("Input initial") :] if failed else "runs")

assert hidden == 3 and weight == (1, 12, 4), "changed: the file's LSTM has another size"
assert ours["lstm.weight_hr_l0"] not in shapes.values(), "changed: the projection is in the file"
assert failed, "changed: onnxruntime runs the file"
PY
