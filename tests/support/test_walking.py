"""Tensors of a model by name, one by one and all at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphprune.support.walking import named_tensors, tensor_named


def test_one_tensor_is_that_of_a_walk() -> None:
    shared = nn.Linear(3, 3, bias=False)
    net = nn.Sequential(shared, nn.Sequential(nn.BatchNorm1d(3), shared), nn.Linear(3, 2))
    net.register_buffer("own", torch.zeros(2))
    found = named_tensors(net)
    assert {"own", "0.weight", "1.1.weight", "1.0.running_mean", "2.bias"} <= found.keys()
    assert all(tensor_named(net, name) is tensor for name, tensor in found.items())
    for name in ("0.bias", "2.other", "3.weight", "1.0.weight.x"):
        with pytest.raises(KeyError):
            tensor_named(net, name)
