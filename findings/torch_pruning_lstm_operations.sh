#!/usr/bin/env bash
# torch-pruning 1.6.1 counts the operations of an LSTM times its input width, and halves them
# when the batch is doubled
#
# tp.utils.count_ops_and_params reads the length of the sequence from the wrong axis (that of
# the features). For sequences of 10 steps with 16 features it reports 373 760 instead of about
# 23 000 multiply-adds; a batch of two, which is twice the work, gets half of the number; and
# input features cut from 16 to 8, which saves a quarter of the products, are reported as a
# saving of 61 %. nn.GRU is counted in the same way.
#
# Expected: hidden and input weights once per step: 10 * 4 * 16 * (16 + 16) = 20 480, plus
# biases and gates.
#
# Why it matters: this function is the usual source of "MACs before and after" for networks
# pruned with this package.
#
# Seen (x86-64 Linux, Python 3.11):
#
#     batch, steps, features (1, 10, 16): counted 373760, products 20480
#     batch, steps, features (2, 10, 16): counted 186880, products 40960
#     batch, steps, features (1, 10, 8): counted 145920, products 15360
#     batch, steps, features (1, 20, 16): counted 747520, products 40960
#     batch doubled: counted x0.5
#     features halved: counted 39%, products 75%
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1

python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check \
    torch==2.14.1 torch-pruning==1.6.1 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }

venv/bin/python -W ignore - <<'PY'
import torch
import torch_pruning as tp
from torch import nn


class Net(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.lstm = nn.LSTM(features, 16, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


counted, products = {}, {}
for batch, steps, features in ((1, 10, 16), (2, 10, 16), (1, 10, 8), (1, 20, 16)):
    key = (batch, steps, features)
    counted[key], _ = tp.utils.count_ops_and_params(Net(features), torch.randn(*key))
    products[key] = batch * steps * 4 * 16 * (16 + features)
    print(f"batch, steps, features {key}: counted {counted[key]:.0f}, products {products[key]}")

dense, twice, narrow = (1, 10, 16), (2, 10, 16), (1, 10, 8)
print(f"batch doubled: counted x{counted[twice] / counted[dense]}")
print(
    f"features halved: counted {counted[narrow] / counted[dense]:.0%},",
    f"products {products[narrow] / products[dense]:.0%}",
)

assert counted[dense] == 16 * 23360, "changed: the dense LSTM"
assert counted[twice] * 2 == counted[dense], "changed: the doubled batch"
assert counted[narrow] / counted[dense] < 0.4, "changed: the narrow LSTM"
assert products[narrow] / products[dense] == 0.75
PY
