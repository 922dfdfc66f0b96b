#!/usr/bin/env bash
# MNN 3.6.1 computes 3x3 convolutions in fp32 to 1e-3 only, at "high" precision
#
# From a certain size of the layer on MNN takes Winograd transforms with large tiles, whose
# rounding errors are a thousand times those of a direct product. precision="high" has no
# influence on it. A 1x1 convolution is good to 1e-6, and so is the 3x3 one when the hint
# WINOGRAD_MEMORY_LEVEL (3) is set to 0, which allows small tiles only. Errors are relative to the
# largest output.
#
# Expected: fp32 with "high" precision to be good to 1e-5, as in torch and onnxruntime; a hint
# about memory to have nothing to do with accuracy.
#
# Why it matters: the check of an exported network against torch fails with the usual tolerance,
# though not on small examples, since the tile follows from the size of the image and the number
# of channels. Pruning therefore changes the error: 64 channels are off by 1e-3 and 32 by 5e-6, so
# here it is the dense network that seems to be broken.
# (Lines that MNN itself prints are left out below.)
#
# Seen (x86-64 Linux, Python 3.11):
#
#     3x3: 16 channels: 5e-06, 32 channels: 5e-06, 64 channels: 1e-03, 128 channels: 2e-03; torch at most 5e-07
#     1x1: 16 channels: 1e-07, 32 channels: 2e-07, 64 channels: 3e-07, 128 channels: 4e-07; torch at most 5e-07
#     3x3, level 0: 16 channels: 5e-07, 32 channels: 6e-07, 64 channels: 8e-07, 128 channels: 1e-06; torch at most 5e-07
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1

python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check \
    torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2 MNN==3.6.1 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }

venv/bin/python -W ignore - <<'PY'
import logging
import subprocess

import MNN
import MNN.expr as expr
import numpy as np
import torch
from torch import nn

logging.disable(logging.CRITICAL)

WINOGRAD_MEMORY_LEVEL = 3


def error(net, x, level=None):
    net = net.eval()
    torch.onnx.export(
        net,
        (x,),
        "net.onnx",
        dynamo=True,
        opset_version=18,
        input_names=["x"],
        output_names=["y"],
        verbose=False,
        external_data=False,
    )
    subprocess.run(
        ["venv/bin/mnnconvert", "-f", "ONNX", "--modelFile", "net.onnx", "--MNNModel", "net.mnn"]
        + ["--bizCode", "finding"],
        check=True,
        capture_output=True,
    )
    manager = MNN.nn.create_runtime_manager(
        ({"backend": "CPU", "precision": "high", "numThread": 1},)
    )
    if level is not None:
        manager.set_hint(WINOGRAD_MEMORY_LEVEL, level)
    module = MNN.nn.load_module_from_file("net.mnn", ["x"], ["y"], runtime_manager=manager)
    value = expr.placeholder(list(x.shape), expr.NCHW, expr.float)
    value.write(x.numpy())
    result = expr.convert(module.forward([expr.convert(value, expr.NC4HW4)])[0], expr.NCHW)
    with torch.no_grad():
        exact = net.double()(x.double()).numpy()
        single = net.float()(x).numpy()
    got = np.array(result.read()).reshape(exact.shape)
    return tuple(float(abs(y - exact).max() / abs(exact).max()) for y in (got, single))


def errors(kernel, level=None):
    found = {}
    for channels, size in ((16, 28), (32, 28), (64, 28), (128, 28)):
        torch.manual_seed(0)
        net = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        found[channels, size] = error(net, torch.randn(1, channels, size, size), level)
    return found


rows = {"3x3": errors(3), "1x1": errors(1), "3x3, level 0": errors(3, 0)}
worst = {}
for name, found in rows.items():
    worst[name] = max(e for e, _ in found.values())
    text = ", ".join(f"{c} channels: {e:.0e}" for (c, s), (e, _) in found.items())
    print(f"{name}: {text}; torch at most {max(t for _, t in found.values()):.0e}")
    assert all(t < 2e-6 for _, t in found.values()), "torch itself is not exact"

assert worst["3x3"] > 2e-4, "changed: 3x3 is precise"
assert worst["1x1"] < 5e-6, "changed: 1x1 is not precise"
assert worst["3x3, level 0"] < 1e-5, "changed: the hint does not help"
PY
