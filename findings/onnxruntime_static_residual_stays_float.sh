#!/usr/bin/env bash
# onnxruntime 1.31.1: quantize_static with its defaults leaves a residual network's convolutions
# in float on x86-64
#
# By default activations are QInt8. In the file every convolution has its quantizers, but when
# it is loaded, 3 of 5 convolutions and both additions stay float32, between a dequantizer and a
# quantizer each, as soon as there are shortcuts. With activation_type=QUInt8, otherwise the
# same call, all of them become integer operators. Without shortcuts the default does as well.
#
# Expected: the same integer operators for both types, or a word from quantize_static.
#
# Why it matters: quantization is the step after pruning, and residual networks are the usual
# case. The file is four times smaller and loses the accuracy of int8, yet runs as float with
# extra conversions: the speed-up that a pruned int8 network should have is not there. Look at
# what a session makes of the file (SessionOptions.optimized_model_filepath).
#
# Seen (x86-64 Linux, Python 3.11):
#
#     shortcuts: False, defaults: 5 integer convolutions, 0 in float; 0 integer additions, 0 in float
#     shortcuts: False, QUInt8: 5 integer convolutions, 0 in float; 0 integer additions, 0 in float
#     shortcuts: True, defaults: 2 integer convolutions, 3 in float; 0 integer additions, 2 in float
#     shortcuts: True, QUInt8: 5 integer convolutions, 0 in float; 2 integer additions, 0 in float
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
import platform
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from torch import nn

if platform.machine() not in ("x86_64", "AMD64"):
    print("not checked: the behaviour is that of x86-64")
    sys.exit(0)
logging.disable(logging.CRITICAL)


class Block(nn.Module):
    def __init__(self, shortcut):
        super().__init__()
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.shortcut = shortcut

    def forward(self, x):
        y = self.second(self.first(x).relu())
        return (x + y if self.shortcut else y).relu()


class Inputs(CalibrationDataReader):
    def __init__(self):
        random = np.random.default_rng(0)
        batches = [random.standard_normal((1, 3, 16, 16), dtype=np.float32) for _ in range(8)]
        self.left = iter(batches)

    def get_next(self):
        batch = next(self.left, None)
        return None if batch is None else {"x": batch}


found = {}
for shortcut in (False, True):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), Block(shortcut), Block(shortcut))
    torch.onnx.export(
        net.eval(),
        (torch.randn(1, 3, 16, 16),),
        "net.onnx",
        dynamo=True,
        input_names=["x"],
        verbose=False,
        external_data=False,
    )
    for name, extra in (("defaults", {}), ("QUInt8", {"activation_type": QuantType.QUInt8})):
        quantize_static("net.onnx", "int8.onnx", Inputs(), **extra)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = "loaded.onnx"
        options.log_severity_level = 4
        onnxruntime.InferenceSession("int8.onnx", options, providers=["CPUExecutionProvider"])
        kinds = Counter(n.op_type for n in onnx.load("loaded.onnx").graph.node)
        found[shortcut, name] = kinds["QLinearConv"], kinds["Conv"] + kinds["FusedConv"]
        print(
            f"shortcuts: {shortcut}, {name}: {kinds['QLinearConv']} integer convolutions,",
            f"{kinds['Conv'] + kinds['FusedConv']} in float; {kinds['QLinearAdd']} integer",
            f"additions, {kinds['Add']} in float",
        )

assert found[False, "defaults"] == found[False, "QUInt8"] == (5, 0), "changed: without shortcuts"
assert found[True, "QUInt8"] == (5, 0), "changed: QUInt8 leaves convolutions in float"
assert found[True, "defaults"][1] >= 1, "changed: the defaults leave no convolution in float"
PY
