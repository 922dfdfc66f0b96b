#!/usr/bin/env bash
# torch.utils.flop_counter counts nothing for a transformer in eval mode, nor for an LSTM
# (torch 2.14.1)
#
# FlopCounterMode looks at operators and adds 0, silently, for one that it has no formula for.
# In eval mode under no_grad, nn.TransformerEncoderLayer runs as one fused operator
# (aten::_transformer_encoder_layer_fwd), so the same layer on the same input has 47 360
# operations in training mode and 0 when it is measured as it is deployed. In eval mode with
# gradients the products of queries, keys and values are missing (the fused attention operator
# for CPUs has no formula). nn.LSTM (oneDNN's operator, on CPUs) counts 0 in each mode, nn.GRU as
# it should.
#
# Expected: the same number in each mode, or a warning about operators that were not counted.
#
# Why it matters: operations before and after are what structured pruning is judged by. With
# zeros in it a network's ratio is that of its other layers alone.
#
# Seen (x86-64 Linux, Python 3.11):
#
#     TransformerEncoderLayer {'training': 47360, 'eval': 40960, 'eval, no_grad': 0}
#     LSTM {'training': 0, 'eval': 0, 'eval, no_grad': 0}
#     GRU {'training': 30720, 'eval': 30720, 'eval, no_grad': 30720}
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1

python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check \
    torch==2.14.1 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }

venv/bin/python -W ignore - <<'PY'
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

torch.manual_seed(0)
x = torch.randn(1, 10, 16)
nets = {
    "TransformerEncoderLayer": nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
    "LSTM": nn.LSTM(16, 16, batch_first=True),
    "GRU": nn.GRU(16, 16, batch_first=True),
}
counts = {}
for name, net in nets.items():
    for mode, training, gradients in (
        ("training", True, True),
        ("eval", False, True),
        ("eval, no_grad", False, False),
    ):
        net.train(training)
        counter = FlopCounterMode(display=False)
        with torch.set_grad_enabled(gradients), counter:
            net(x)
        counts[name, mode] = counter.get_total_flops()
    print(name, {mode: n for (of, mode), n in counts.items() if of == name})

# two matrix products per step, 2 operations per multiplication
assert {counts["GRU", m] for m in ("training", "eval", "eval, no_grad")} == {2 * 10 * 2 * 16 * 48}
assert all(n == 0 for (name, _), n in counts.items() if name == "LSTM"), "changed: LSTM counts"
encoder = [n for (name, _), n in counts.items() if name == "TransformerEncoderLayer"]
assert encoder[0] == 2 * (4 * 10 * 256 + 2 * 10 * 10 * 16 + 2 * 10 * 16 * 32), "changed: training"
assert encoder[2] == 0, "changed: the fused encoder layer counts"
PY
