#!/usr/bin/env bash
# litert-torch 0.10.0 writes sort and topk as an operator that ai-edge-litert 2.3.0 cannot load
#
# Both become STABLEHLO_SORT, and convert() and export() end without an error or a warning. The
# interpreter that litert-torch itself installs has no such operator and refuses the file when it is
# loaded. TensorFlow Lite has had TOPK_V2 for years. And argsort does not get that far: the
# converter complains about a comparator that it made itself.
#
# Expected: operators that the interpreter has, or an error of the converter which names the layer.
#
# Why it matters: routers of mixtures of experts, detectors and samplers have a topk. A conversion
# that passes in a build, on a machine without the interpreter, fails on the device.
#
# Seen (x86-64 Linux, Python 3.11):
#
#     sort: converted, not loaded (Didn't find op for builtin opcode 'STABLEHLO_SORT' version '1')
#     topk: converted, not loaded (Didn't find op for builtin opcode 'STABLEHLO_SORT' version '1')
#     argsort: not converted (Failed to run converter passes)
#     max: converted, loaded
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1

python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check \
    torch==2.14.1 litert-torch==0.10.0 ai-edge-litert==2.3.0 2>pip.log || { cat pip.log >&2; exit 1; }

cat > finding.py <<'PY'
import contextlib
import sys

import litert_torch
import torch
from ai_edge_litert.interpreter import Interpreter
from torch import nn


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


functions = {
    "sort": lambda x: x.sort(-1)[0],
    "topk": lambda x: x.topk(2, -1)[0],
    "argsort": lambda x: x.argsort(-1),
    "max": lambda x: x.max(-1)[0],
}
seen = {}
for name, function in functions.items():
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it tells of every step
            litert_torch.convert(Net(function).eval(), (torch.randn(2, 4),)).export(f"{name}.tflite")
    except Exception as error:
        seen[name] = f"not converted ({str(error).split(':')[0]})"
        continue
    try:
        Interpreter(f"{name}.tflite").allocate_tensors()
        seen[name] = "converted, loaded"
    except ValueError as error:
        seen[name] = f"converted, not loaded ({str(error).split('.')[0]})"
print("\n".join(f"{name}: {what}" for name, what in seen.items()))
for name in ("sort", "topk"):
    assert "not loaded" in seen[name] and "STABLEHLO_SORT" in seen[name], f"changed: {name}"
assert seen["argsort"].startswith("not converted"), "changed: argsort"
assert seen["max"] == "converted, loaded", "max is not taken either"
PY
venv/bin/python -W ignore finding.py 2>log.txt || { tail -n 3 log.txt >&2; exit 1; }
