#!/usr/bin/env bash
# torch-pruning 1.6.1 loses track of channels behind a channel shuffle or a flatten in NHWC order
#
# Removed channels are followed through reshapes by counting, not by where the values went:
#
# - shuffle (view, transpose, reshape): the next convolution loses the same numbers 1 and 5, but
#   behind the shuffle these channels are 2 and 3;
# - permute(0, 2, 3, 1) and flatten: the Linear loses the 16 columns in a row that a channel has
#   in NCHW order, though they are every 8th column here. NCHW itself is right.
#
# check_pruning_group() says True, the network runs, nothing is warned about, and it computes
# something else, although a right choice of columns exists in each of the three networks.
#
# Expected: the pruned network equals the original with the same filters set to zero, or an
# error.
#
# Why it matters: shuffles are what ShuffleNets are made of, and NHWC order comes with networks
# ported from TensorFlow. The damage passes for the usual loss of accuracy by pruning.
#
# Seen (x86-64 Linux, Python 3.11):
#
#     Net: check True, output off by 0 of 0.28
#     Nhwc: check True, output off by 0.36 of 0.48
#     Shuffle: check True, output off by 0.83 of 0.62
#     Shuffle, columns 2 and 3 cut by hand: off by 0
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1

python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check \
    torch==2.14.1 torch-pruning==1.6.1 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }

venv/bin/python -W ignore - <<'PY'
import copy

import torch
import torch_pruning as tp
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8 * 4 * 4, 5)

    def forward(self, x):
        return self.head(self.first(x).relu().flatten(1))


class Nhwc(Net):
    def forward(self, x):
        return self.head(self.first(x).relu().permute(0, 2, 3, 1).flatten(1))


class Shuffle(Net):
    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(8, 5, 3, padding=1)

    def forward(self, x):
        x = self.first(x).relu()
        n, c, h, w = x.shape
        return self.head(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


gone = [1, 5]  # the same place in both groups of the shuffle
differ = {}
for kind in (Net, Nhwc, Shuffle):
    torch.manual_seed(0)
    net, x = kind().eval(), torch.randn(2, 3, 4, 4)
    zeroed = copy.deepcopy(net)
    with torch.no_grad():
        zeroed.first.weight[gone] = 0
        zeroed.first.bias[gone] = 0

    graph = tp.DependencyGraph().build_dependency(net, example_inputs=x)
    group = graph.get_pruning_group(net.first, tp.prune_conv_out_channels, idxs=gone)
    allowed = graph.check_pruning_group(group)
    group.prune()
    with torch.no_grad():
        differ[kind] = float((net(x) - zeroed(x)).abs().max())
        scale = float(zeroed(x).abs().max())
    print(f"{kind.__name__}: check {allowed}, output off by {differ[kind]:.2g} of {scale:.2g}")
    assert allowed, "changed: the group is refused"

# what the right columns are: the same weights, cut by hand
torch.manual_seed(0)
net, x = Shuffle().eval(), torch.randn(2, 3, 4, 4)
zeroed, kept = copy.deepcopy(net), [c for c in range(8) if c not in gone]
with torch.no_grad():
    zeroed.first.weight[gone] = 0
    zeroed.first.bias[gone] = 0
    net.first.weight = nn.Parameter(net.first.weight[kept])
    net.first.bias = nn.Parameter(net.first.bias[kept])
    net.head.weight = nn.Parameter(net.head.weight[:, [0, 1, 4, 5, 6, 7]])
    by_hand = float((net(x) - zeroed(x)).abs().max())
print(f"Shuffle, columns 2 and 3 cut by hand: off by {by_hand:.2g}")

assert differ[Net] < 1e-5 and by_hand < 1e-5, "changed: the references do not hold"
assert differ[Nhwc] > 0.05, "changed: NHWC is right"
assert differ[Shuffle] > 0.05, "changed: the shuffle is right"
PY
