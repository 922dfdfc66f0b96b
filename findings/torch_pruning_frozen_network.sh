#!/usr/bin/env bash
# torch-pruning 1.6.1 prunes nothing of a network whose parameters need no gradients
#
# Dependencies are found by way of autograd, so after requires_grad_(False) no layer is seen: the
# pruner is built, step() returns, every width is as before. No error and no warning. (Under
# torch.no_grad(), the same situation, an assertion says what is wrong.) With only the first
# layer frozen that layer stays dense and the rest is pruned.
#
# Expected: whether a parameter is trained has nothing to do with whether it can be removed; if
# it has to, then an error, as under no_grad().
#
# Why it matters: networks loaded for inference, teachers and frozen backbones come with
# requires_grad_(False). Speed and accuracy of "the pruned network" are then those of the dense
# one.
#
# Seen (x86-64 Linux, Python 3.11):
#
#     trainable: widths 8, 8 become [4, 4]
#     first layer frozen: widths 8, 8 become [8, 4]
#     all frozen: widths 8, 8 become [8, 8]
#     warnings about gradients: []
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1

python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check \
    torch==2.14.1 torch-pruning==1.6.1 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }

venv/bin/python -W ignore - <<'PY'
import warnings

import torch
import torch_pruning as tp
from torch import nn


def pruned(freeze):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    freeze(net)
    pruner = tp.pruner.BasePruner(
        net,
        torch.randn(2, 3, 8, 8),
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[net[5]],
    )
    pruner.step()
    return [net[0].out_channels, net[2].out_channels]


found = {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found["trainable"] = pruned(lambda net: None)
    found["first layer frozen"] = pruned(lambda net: net[0].requires_grad_(False))
    found["all frozen"] = pruned(lambda net: net.requires_grad_(False))
spoken = [str(w.message) for w in caught if "grad" in str(w.message).lower()]
for name, widths in found.items():
    print(f"{name}: widths 8, 8 become {widths}")
print("warnings about gradients:", spoken)

assert found["trainable"] == [4, 4], "changed: the trainable network"
assert found["first layer frozen"] == [8, 4], "changed: one frozen layer"
assert found["all frozen"] == [8, 8], "changed: the frozen network is pruned"
assert not spoken, "changed: a warning is given"
PY
