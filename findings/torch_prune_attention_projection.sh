#!/usr/bin/env bash
# torch.nn.utils.prune on the output projection of nn.MultiheadAttention freezes its weights
# (torch 2.14.1)
#
# prune.* replaces `weight` by a plain tensor that a forward pre-hook of the module renews from
# weight_orig * weight_mask. MultiheadAttention never calls its out_proj, it only reads
# out_proj.weight, so the hook never runs and the tensor of the moment of pruning stays:
#
# - load_state_dict() reports that all keys matched, and the loaded weights are not used;
# - the second step of training raises "Trying to backward through the graph a second time".
#
# With a Linear that is called, both work.
#
# Expected: an error when out_proj is pruned, or a weight that follows weight_orig.
#
# Why it matters: out_proj is an ordinary Linear by type, so loops of the form "prune every
# nn.Linear" reach it in every transformer; a masked checkpoint then evaluates with weights that
# were never trained, without any message.
#
# Seen (x86-64 Linux, Python 3.11):
#
#     Called: <All keys matched successfully>, outputs differ by 0; steps: 3
#     Attention: <All keys matched successfully>, outputs differ by 0.65; steps: 1 Trying to backward through the graph a second time...
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
from torch.nn.utils import prune


class Called(nn.Module):
    def __init__(self):
        super().__init__()
        self.out_proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.out_proj(x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out_proj = self.attention.out_proj

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def masked(kind, seed):
    torch.manual_seed(seed)
    net = kind()
    prune.l1_unstructured(net.out_proj, "weight", 0.5)
    return net


x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2))
differ, steps = {}, {}
for kind in (Called, Attention):
    trained, fresh = masked(kind, 0), masked(kind, 1)
    report = fresh.load_state_dict(trained.state_dict())
    with torch.no_grad():
        differ[kind] = float((trained.eval()(x) - fresh.eval()(x)).abs().max())
    net, steps[kind] = masked(kind, 0).train(), 0
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    try:
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
            steps[kind] += 1
        says = ""
    except RuntimeError as error:
        says = str(error)[:50] + "..."
    print(f"{kind.__name__}: {report}, outputs differ by {differ[kind]:.2g}; steps: {steps[kind]} {says}")

assert differ[Called] == 0 and steps[Called] == 3, "changed: a called Linear does not work either"
assert differ[Attention] > 0.1, "changed: the loaded weights are used"
assert steps[Attention] == 1, "changed: training goes on"
PY
