#!/usr/bin/env bash
# torch.save writes the whole dense weight of a sliced parameter (torch 2.14.1)
#
# nn.Parameter(weight[:100]) is a view, and a view is saved with all of the memory that it looks
# at: the checkpoint of a layer cut from 1000 to 100 rows is as large as before, and the removed
# rows are still in it. With an index instead of a slice, or after .clone(), the file has the
# size of the layer. safetensors writes what the shape says in each case.
#
# Expected: state_dict() shows (100, 1000), so a file for 100 000 numbers. (That views are kept
# is written in torch's notes on serialization.)
#
# Why it matters: cutting out the first or last channels by a slice is the shortest way to write
# structured pruning; the file that should show the saving shows none, and memory is not freed
# either.
#
# Seen (x86-64 Linux, Python 3.11):
#
#     slice: (100, 1000), torch.save 4001641, safetensors 400080 bytes
#     index: (100, 1000), torch.save 401641, safetensors 400080 bytes
#     slice and clone: (100, 1000), torch.save 401641, safetensors 400080 bytes
#     dense: 4001641 bytes
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1

python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check \
    torch==2.14.1 safetensors==0.8.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }

venv/bin/python -W ignore - <<'PY'
import io

import safetensors.torch
import torch
from torch import nn


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.tell()


torch.manual_seed(0)
dense = nn.Linear(1000, 1000, bias=False)
sizes = {"dense": saved(dense.state_dict())}
for name, cut in {
    "slice": lambda w: w[:100],
    "index": lambda w: w[torch.arange(100)],
    "slice and clone": lambda w: w[:100].clone(),
}.items():
    layer = nn.Linear(1000, 100, bias=False)
    layer.weight = nn.Parameter(cut(dense.weight.detach()))
    sizes[name] = saved(layer.state_dict())
    safe = len(safetensors.torch.save(layer.state_dict()))
    print(f"{name}: {tuple(layer.weight.shape)}, torch.save {sizes[name]}, safetensors {safe} bytes")
    assert 400_000 <= safe < 410_000, "changed: safetensors writes another size"
print("dense:", sizes["dense"], "bytes")

assert sizes["dense"] > 4_000_000, "changed: the dense file is small"
assert abs(sizes["slice"] - sizes["dense"]) < 1000, "changed: a slice is saved in its own size"
assert sizes["index"] < 410_000 and sizes["slice and clone"] < 410_000, "changed: copies are large"
PY
