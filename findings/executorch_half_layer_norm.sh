#!/usr/bin/env bash
# executorch 1.5.1 computes something else than a layer norm in float16 and bfloat16 from 256 values on
#
# XNNPACK has no layer norm, so ExecuTorch's own kernel runs it. In float32 it is right. In float16
# and bfloat16 it is as good as PyTorch's up to 255 values in a row, and with 256 and more (every
# transformer) its result has nothing to do with the right one. No error, no warning; the values are
# finite and of a likely size.
#
# Expected: rounding to float16, 2e-4 as PyTorch in float16 itself has it, whatever the length.
#
# Why it matters: a transformer exported in half precision answers at random, and one that was made
# narrower by pruning, or a small one for a test, is right: the error is looked for elsewhere.
#
# Seen (x86-64 Linux, Python 3.11), largest error relative to the largest value:
#
#     float32, 256 values: ExecuTorch 1e-07, PyTorch 9e-08
#     float16, 255 values: ExecuTorch 2e-04, PyTorch 2e-04
#     float16, 256 values: ExecuTorch 2e+00, PyTorch 2e-04
#     float16, 384 values: ExecuTorch 3e+00, PyTorch 2e-04
#     bfloat16, 255 values: ExecuTorch 2e-03, PyTorch 2e-03
#     bfloat16, 256 values: ExecuTorch 6e-01, PyTorch 3e-03
#     bfloat16, 384 values: ExecuTorch 6e-01, PyTorch 2e-03
set -euo pipefail

if [ "$(uname -m)" != x86_64 ]; then
    echo "seen on x86-64 alone, not tried here"
    exit 0
fi

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1

python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check \
    torch==2.14.1 executorch==1.5.1 torchao==0.18.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }

venv/bin/python -W ignore - 2>log.txt <<'PY' || { tail -n 3 log.txt >&2; exit 1; }
import torch
from executorch.exir import to_edge_transform_and_lower
from executorch.extension.pybindings.portable_lib import _load_for_executorch_from_buffer
from torch import nn


def executorch(model, x):
    program = to_edge_transform_and_lower(torch.export.export(model, (x,))).to_executorch()
    return _load_for_executorch_from_buffer(program.buffer).forward([x])[0]


def error(found, right):
    return float((found.double() - right).abs().max() / right.abs().max())


torch.manual_seed(0)
for dtype, sizes, limit in (
    (torch.float32, (256,), 1e-5),
    (torch.float16, (255, 256, 384), 5e-3),
    (torch.bfloat16, (255, 256, 384), 5e-2),
):
    for size in sizes:
        x = torch.randn(1, 50, size).to(dtype)
        right = nn.functional.layer_norm(x.double(), (size,))
        norm = nn.LayerNorm(size).to(dtype).eval()
        with torch.no_grad():
            found, own = error(executorch(norm, x), right), error(norm(x), right)
        kind = str(dtype).removeprefix("torch.")
        print(f"{kind}, {size} values: ExecuTorch {found:.0e}, PyTorch {own:.0e}")
        assert own < limit, "PyTorch is wrong"
        wrong = dtype != torch.float32 and size >= 256
        assert (found > 0.1) == wrong, f"changed: {kind}, {size} values"
PY
