#!/usr/bin/env bash
# onnxruntime 1.31.1: 4-bit quantization does nothing for a Linear on 2-D input (torch 2.14.1)
#
# torch writes nn.Linear as Gemm where the input is (batch, features), and as MatMul and Add
# where it is (batch, tokens, features). MatMulNBitsQuantizer only looks at MatMul: the first
# file comes back as it was, all in float32, and process() returns without a word. The same
# network on 3-D input gets its 4 bits.
#
# Expected: the same layer to be quantized in both cases, or at least a message "0 of 2 layers".
#
# Why it matters: classifiers' heads, MLPs and recommenders run on 2-D input. Somebody who
# compares pruned, 4-bit, and pruned 4-bit networks compares two of them twice.
#
# Seen (x86-64 Linux, Python 3.11):
#
#     input (4, 256): {'Gemm': 2, 'Relu': 1}, file 100% of the one in float
#     input (2, 4, 256): {'MatMulNBits': 2, 'Add': 2, 'Relu': 1}, file 17% of the one in float
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
import os
from collections import Counter

import onnx
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import nn

logging.disable(logging.CRITICAL)
found = {}
for shape in ((4, 256), (2, 4, 256)):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval()
    torch.onnx.export(
        net, (torch.randn(*shape),), "net.onnx", dynamo=True, verbose=False, external_data=False
    )
    quantizer = MatMulNBitsQuantizer(onnx.load("net.onnx"), block_size=32, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file("int4.onnx")
    kinds = Counter(n.op_type for n in onnx.load("int4.onnx").graph.node)
    share = os.path.getsize("int4.onnx") / os.path.getsize("net.onnx")
    found[len(shape)] = kinds["MatMulNBits"], share
    print(f"input {shape}: {dict(kinds)}, file {share:.0%} of the one in float")

assert found[3][0] == 2 and found[3][1] < 0.3, "changed: 3-D input is not quantized"
assert found[2][0] == 0 and found[2][1] > 0.95, "changed: 2-D input is quantized"
PY
