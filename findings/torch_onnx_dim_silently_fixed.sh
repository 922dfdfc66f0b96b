#!/usr/bin/env bash
# torch.onnx.export with a named Dim writes a fixed axis where the model fixes it, and says nothing
# (torch 2.14.1, dynamo=True)
#
# A network adds a table of 12 positions, so that its sequence length is 12. Asked for a dynamic
# length, torch.export.export refuses: "You marked length as dynamic but your code specialized it
# to be a constant (12)". torch.onnx.export, given the same Dim, returns a file whose input is
# 12 long: no exception, no warning. Given Dim.AUTO it writes the opposite, an input that is
# declared to be of any length ('s27') and works at 12 only. Given a name as a string it raises.
#
# Expected: the error of torch.export.export for a Dim, and a fixed axis for Dim.AUTO.
#
# Why it matters: a Dim is what torch.export asks for, and the file is found to be fixed when the
# first text of another length arrives. Give names as strings, or look at the file's input.
#
# Seen (x86-64 Linux, Python 3.11):
#
#     torch.export.export with Dim('length'): refused
#     torch.onnx.export with Dim('length'): [2, 12, 4]
#     torch.onnx.export with Dim.AUTO: [2, 's27', 4]
#     torch.onnx.export with 'length': TorchExportError
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1

python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check \
    torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }

venv/bin/python - <<'PY'
import onnx
import torch
from torch import nn
from torch.export import Dim


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.randn(12, 4))

    def forward(self, x):
        return x + self.places


torch.manual_seed(0)
net, x = Net().eval(), torch.randn(2, 12, 4)
try:
    torch.export.export(net, (x,), dynamic_shapes=({1: Dim("length")},))
    refused = False
except Exception as error:
    refused = "length" in str(error)
print("torch.export.export with Dim('length'):", "refused" if refused else "passed")
assert refused, "changed: torch.export.export takes it"

seen = {}
for name, dim in (("Dim('length')", Dim("length")), ("Dim.AUTO", Dim.AUTO), ("'length'", "length")):
    try:
        torch.onnx.export(net, (x,), "net.onnx", dynamo=True, dynamic_shapes=({1: dim},), verbose=False)
        shape = onnx.load("net.onnx", load_external_data=False).graph.input[0].type.tensor_type.shape
        seen[name] = [d.dim_param or d.dim_value for d in shape.dim]
    except Exception as error:
        seen[name] = type(error).__name__
    print(f"torch.onnx.export with {name}: {seen[name]}")

assert seen["Dim('length')"] == [2, 12, 4], "changed: a Dim is not fixed silently"
assert isinstance(seen["Dim.AUTO"], list) and isinstance(seen["Dim.AUTO"][1], str), "changed: Dim.AUTO is fixed"
assert isinstance(seen["'length'"], str), "changed: a name as a string is taken"
PY
