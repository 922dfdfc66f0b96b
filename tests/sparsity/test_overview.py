from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from graphprune import sparsity

from .networks import Tied, mlp


def test_counts_layer_by_layer_and_as_a_whole() -> None:
    model = mlp()
    torch.nn.init.zeros_(model[5].bias)
    sparsity.magnitude(model, 0.5, "layer", ignore="5")
    report = sparsity.report(model)
    rows = {layer.name: layer for layer in report.layers}
    assert set(rows) == {name for name, _ in mlp().named_parameters()}
    assert (rows["0.weight"].zeros, rows["0.weight"].size, rows["0.weight"].masked) == (120, 240, 120)
    assert rows["0.weight"].sparsity == 0.5 and rows["0.weight"].shape == (20, 12)
    assert rows["5.bias"].zeros == 3 and rows["5.bias"].masked is None and not rows["5.bias"].weight
    assert report.parameters == sum(p.numel() for p in mlp().parameters())
    assert report.zeros == 120 + 160 + 3 + 20  # 20: the norm's initial bias
    assert report.sparsity == report.zeros / report.parameters
    assert report.weight_sparsity == pytest.approx(280 / 608)
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["name"] in rows
    assert "all weights" in str(report) and "50.00 %" in str(report)


def test_shared_parameters_count_once_and_empty_models_count_nothing() -> None:
    assert sparsity.report(Tied()).parameters == sum(p.numel() for p in Tied().parameters())
    empty = sparsity.report(nn.ReLU())
    assert (empty.parameters, empty.sparsity, empty.weight_sparsity) == (0, 0.0, 0.0)
