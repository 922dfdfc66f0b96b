#!/usr/bin/env bash
# After torch.nn.utils.prune, `module.weight` is a leftover of the last forward pass (torch 2.14.1)
#
# prune.* turns `weight` from a parameter into a plain tensor that a forward pre-hook renews.
# Until the next forward pass it is out of date:
#
# - after optimizer.step() or load_state_dict(), reading module.weight gives the old values;
# - right after pruning, or after any forward pass with gradients, copy.deepcopy() of the module
#   raises RuntimeError, since a tensor with a history cannot be copied, and so does
#   torch.optim.swa_utils.AveragedModel. After a forward pass under no_grad both work.
#
# Expected: that masking a module neither changes what `module.weight` means nor whether the
# module can be copied.
#
# Why it matters: the next tool looks at `module.weight`, for magnitudes, for the number of
# zeros, for the next round of pruning; and copies are everywhere in pruning: keeping the best
# network, averaging weights, comparing before and after.
#
# Seen (x86-64 Linux, Python 3.11):
#
#     deepcopy before pruning: works
#     deepcopy after pruning: RuntimeError: Only Tensors created explicitly by the user (graph leave...
#     AveragedModel after pruning: RuntimeError: Only Tensors created explicitly by the user (graph leave...
#     deepcopy after a forward pass without gradients: works
#     weight is off by 0.841 after a step, by 0.0 after one more forward pass
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1

python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check \
    torch==2.14.1 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }

venv/bin/python -W ignore - <<'PY'
import copy

import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel


def attempt(make, net):
    try:
        make(net)
        return "works"
    except RuntimeError as error:
        return f"RuntimeError: {str(error)[:56]}..."


torch.manual_seed(0)
net, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)
before = attempt(copy.deepcopy, net)
prune.l1_unstructured(net[0], "weight", 0.5)
after, averaged = attempt(copy.deepcopy, net), attempt(AveragedModel, net)
with torch.no_grad():
    net(x)
later = attempt(copy.deepcopy, net)
print("deepcopy before pruning:", before)
print("deepcopy after pruning:", after)
print("AveragedModel after pruning:", averaged)
print("deepcopy after a forward pass without gradients:", later)

optimizer = torch.optim.SGD(net.parameters(), 0.1)
net(x).square().sum().backward()
optimizer.step()
true = net[0].weight_orig * net[0].weight_mask
stale = float((net[0].weight - true).abs().max())
with torch.no_grad():
    net(x)
renewed = float((net[0].weight - true).abs().max())
print(f"weight is off by {stale:.3f} after a step, by {renewed} after one more forward pass")

assert before == later == "works", "changed: these copies fail"
assert "RuntimeError" in after and "RuntimeError" in averaged, "changed: masked modules can be copied"
assert stale > 0.01 and renewed == 0, "changed: module.weight is up to date"
PY
