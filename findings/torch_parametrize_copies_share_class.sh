#!/usr/bin/env bash
# torch 2.14.1: remove_parametrizations on a deep copy of a module breaks the module that it was copied from
#
# register_parametrization gives a module a class of its own ("ParametrizedLinear"), in which the computed
# weight is a property, so that, as its code says, other instances of the class are not affected. A deep
# copy has that very class too. remove_parametrizations takes the property off the class, not off the
# module: of the copy the weight is an ordinary parameter again, and the original, which still has its
# parametrization and the tensors that the weight is computed from, has no weight any more.
#
# Expected: the original gives what it gave before.
#
# Why it matters: models are copied before they are changed for deployment (an exponential moving average, a
# pruned or quantised copy), and vocoders take weight_norm off before export. The model in training then
# fails at its next step, far from the cause. copy.deepcopy(model) after remove_parametrizations is safe, or
# a class of its own for the copy: copy.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__)).
#
# Seen (x86-64 Linux, Python 3.11):
#
#     one class: True
#     the copy afterwards: Linear; the original: ParametrizedLinear
#     the original's forward: AttributeError: 'ParametrizedLinear' object has no attribute 'weight'
#     with a class of its own for the copy, the original's outputs are as before: True
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"

python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check torch==2.14.1 numpy 2>pip.log || { cat pip.log >&2; exit 1; }

venv/bin/python -W ignore - <<'PY'
import copy

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations


def made() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model, x = weight_norm(nn.Linear(3, 2)), torch.randn(4, 3)
    return model, x, model(x).detach()


model, x, before = made()
other = copy.deepcopy(model)
print("one class:", type(other) is type(model))
remove_parametrizations(other, "weight")
print(f"the copy afterwards: {type(other).__name__}; the original: {type(model).__name__}")
assert torch.equal(other(x), before)
try:
    model(x)
except AttributeError as error:
    print(f"the original's forward: {type(error).__name__}: {error}")
else:
    raise SystemExit("changed: the original still has its weight")

model, x, before = made()
other = copy.deepcopy(model)
cls = type(other)
other.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
remove_parametrizations(other, "weight")
kept = torch.equal(model(x), before)
print("with a class of its own for the copy, the original's outputs are as before:", kept)
assert kept and torch.allclose(other(x), before)
PY
