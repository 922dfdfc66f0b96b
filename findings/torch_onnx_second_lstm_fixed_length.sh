#!/usr/bin/env bash
# torch.onnx.export keeps the sequence length of an LSTM dynamic only once per process
# (torch 2.14.1, dynamo=True)
#
# The same call, with the same dynamic_shapes, three times in one process: the first file takes
# sequences of any length (though it declares an output of length 7), the second and the third
# have the example's length 7 built in. No exception, and nothing that says so.
#
# Expected: the same file from the same call; or, where a length asked for as dynamic cannot be
# kept, an error.
#
# Why it matters: exporting the dense and then the pruned network, in one script, to compare
# them is the usual thing to do, and the second file, the one that is deployed, refuses every
# other length. Export each in a process of its own and look at the file's input.
#
# Seen (x86-64 Linux, Python 3.11):
#
#     export 1: input ['batch', 'time', 4], output ['batch', 7, 6]; length 9 runs
#     export 2: input ['batch', 7, 4], output ['batch', 7, 6]; length 9: InvalidArgument
#     export 3: input ['batch', 7, 4], output ['batch', 7, 6]; length 9: InvalidArgument
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
        self.lstm = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


def dims(value):
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


torch.manual_seed(0)
shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("time")},)
seen = []
for attempt in range(3):
    net = Net().eval()
    torch.onnx.export(
        net,
        (torch.randn(2, 7, 4),),
        "net.onnx",
        dynamo=True,
        dynamic_shapes=shapes,
        verbose=False,
        external_data=False,
    )
    graph = onnx.load("net.onnx").graph
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        "net.onnx", options, providers=["CPUExecutionProvider"]
    )
    x = torch.randn(2, 9, 4)
    try:
        result = session.run(None, {graph.input[0].name: x.numpy()})[0]
        close = abs(result - net(x).detach().numpy()).max() < 1e-5
        says = "length 9 runs" if close else "length 9 gives something else"
    except Exception as error:
        says = f"length 9: {type(error).__name__}"
    seen.append((dims(graph.input[0])[1], says))
    print(f"export {attempt + 1}: input {dims(graph.input[0])}, output {dims(graph.output[0])};", says)

assert seen[0] == ("time", "length 9 runs"), "changed: the first export is not dynamic either"
assert all(length == 7 for length, _ in seen[1:]), "changed: later exports are dynamic"
assert all("InvalidArgument" in says for _, says in seen[1:]), "changed: later files run"
PY
