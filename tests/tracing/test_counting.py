"""Counts against a second count that shares no code with ours, and against formulas worked out by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import graphprune
from graphprune import GraphPruneError
from tests.tracing.counting_reference import Calls, independent_macs


def check_sums(found: graphprune.Count, model: nn.Module) -> None:
    assert sum(layer.macs for layer in found.per_layer.values()) == found.macs
    assert sum(layer.parameters for layer in found.per_layer.values()) == found.parameters
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert set(found.per_layer) <= {name for name, _ in model.named_modules()}


NETWORKS: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
    "convolutions": (
        nn.Sequential(
            nn.Conv2d(4, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, (1, 5), groups=4, dilation=(1, 2), padding="same", bias=False),
            nn.Conv2d(12, 12, 3, groups=12),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 5),
        ),
        (torch.randn(2, 4, 17, 13),),
    ),
    "transposed": (
        nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
            nn.ConvTranspose2d(6, 9, (2, 4), groups=3, padding=1),
        ),
        (torch.randn(3, 4, 5, 6),),
    ),
    "one and three axes": (
        Calls(lambda m, x: (m[0](x), m[1](x[..., None, None])), nn.Conv1d(4, 6, 3), nn.Conv3d(4, 2, (3, 1, 1))),
        (torch.randn(2, 4, 9),),
    ),
    "unbatched": (nn.Conv2d(3, 4, 3), (torch.randn(3, 8, 8),)),
    "functional": (
        Calls(lambda m, x: F.linear(F.conv1d(x, x[:2, :, :3]).mean(-1), x[0, 0, :2].expand(7, 2))),
        (torch.randn(4, 3, 9),),
    ),
    "matrix products": (
        Calls(
            lambda m, x, y: (
                x @ y.mT,
                torch.matmul(x[:, :1], other=y[0, 0].T),
                torch.mm(y[0, 0], x[0, 0].T),
                torch.bmm(x[0], mat2=y[0].mT),
                torch.baddbmm(x[0, :, :, :1], x[0], y[0].mT),
                torch.addmm(x[0, 0, :, :1], x[0, 0], y[0, 0].T),
                torch.einsum("abij,abkj->abik", x, y),
                torch.einsum("abij,acij->bc", x, x),
                torch.tensordot(x, y, dims=([3], [3])),
                torch.linalg.multi_dot([x[0, 0], y[0, 0].T, y[0, 0]]),
            )
        ),
        (torch.randn(2, 3, 7, 4), torch.randn(2, 3, 5, 4)),
    ),
    "attention": (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False),
        (torch.randn(2, 5, 8),),
    ),
    "attention with weights": (
        Calls(lambda m, x, y: m[0](x, y, y), nn.MultiheadAttention(8, 4, kdim=6, vdim=6, batch_first=True)),
        (torch.randn(2, 5, 8), torch.randn(2, 3, 6)),
    ),
    "cells": (
        Calls(lambda m, x: (m[0](x), m[1](x), m[2](x)), nn.LSTMCell(3, 4), nn.GRUCell(3, 4), nn.RNNCell(3, 4)),
        (torch.randn(5, 3),),
    ),
    "shared and repeated": (
        Calls(lambda m, x: m[0](m[0](x)) + F.linear(x, m[0].weight) + m[1](x), nn.Linear(4, 4), nn.Linear(4, 4)),
        (torch.randn(3, 4),),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_small_networks_against_an_independent_count(name: str) -> None:
    model, inputs = NETWORKS[name]
    found = graphprune.count(model, inputs)
    assert found.macs == independent_macs(model, *inputs) > 0
    assert found.batch_size == inputs[0].shape[0] and not found.uncounted
    check_sums(found, model)


TORCHVISION = {"resnet18": 64, "mobilenet_v2": 64, "shufflenet_v2_x0_5": 64, "swin_t": 64, "vit_b_16": 224}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_on_the_meta_device(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
        image = torch.empty(2, 3, TORCHVISION[name], TORCHVISION[name])
    found = graphprune.count(model, image)
    assert found.macs == independent_macs(model, image)
    check_sums(found, model)


def test_published_numbers() -> None:
    torchvision = pytest.importorskip("torchvision")
    published = {
        "resnet18": (11_689_512, 1.814e9),
        "resnet50": (25_557_032, 4.089e9),
        "mobilenet_v2": (3_504_872, 0.301e9),
        "vit_b_16": (86_567_656, 17.56e9),
    }
    for name, (parameters, macs) in published.items():
        with torch.device("meta"):
            model, image = getattr(torchvision.models, name)(), torch.empty(1, 3, 224, 224)
        found = graphprune.count(model, image)
        assert found.parameters == parameters
        assert found.macs == pytest.approx(macs, rel=2e-3)


def test_real_and_meta_agree_and_layers_agree_with_the_independent_count() -> None:
    torchvision = pytest.importorskip("torchvision")
    model, image = torchvision.models.resnet18().eval(), torch.randn(1, 3, 33, 47)
    found = graphprune.count(model, image)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    by_module = counter.get_flop_counts()
    for path, layer in found.per_layer.items():
        flops = by_module.get(f"ResNet.{path}")
        assert layer.macs == (sum(flops.values()) // 2 if flops else 0), path
    meta = graphprune.count(model.to("meta"), image.to("meta"))
    assert meta == found


def test_shared_and_repeated_modules() -> None:
    model, inputs = NETWORKS["shared and repeated"]
    layers = graphprune.count(model, inputs).per_layer
    assert layers["parts.0"] == graphprune.LayerCount("Linear", 20, 2 * 3 * 16)
    assert layers["parts.1"] == graphprune.LayerCount("Linear", 20, 3 * 16)
    assert layers[""] == graphprune.LayerCount("Calls", 1, 3 * 16)


def test_tied_parameters_count_once_and_idle_modules_are_listed() -> None:
    tied = nn.Linear(6, 4, bias=False)
    model = Calls(lambda m, x: m[1](m[0](x)), nn.Embedding(4, 6), tied, nn.Linear(3, 3))
    tied.weight = model.parts[0].weight  # type: ignore[assignment]
    found = graphprune.count(model, torch.tensor([[0, 1, 2]]))
    assert found.parameters == 24 + 12 + 1
    assert found.per_layer["parts.0"].parameters == 24 and found.per_layer["parts.1"].parameters == 0
    assert found.per_layer["parts.1"].macs == 3 * 24 and found.per_layer["parts.2"].macs == 0
    check_sums(found, model)


def test_unknown_work_is_said_not_hidden() -> None:
    found = graphprune.count(Calls(lambda m, x: torch.fft.rfft(x).abs() + torch.cdist(x, x).sum()), torch.randn(7, 4))
    assert found.macs == 0 and found.uncounted == {"aten::_fft_r2c": 1, "aten::_cdist_forward": 1}
    assert "not counted: aten::_fft_r2c (1)" in str(found)


def test_custom_operator_is_uncounted() -> None:
    with torch.library._scoped_library("graphprune_counting_test", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CPU")
        twice = torch.ops.graphprune_counting_test.twice
        model = Calls(lambda m, x: twice(twice(x)))
        assert graphprune.count(model, torch.randn(2)).uncounted == {"graphprune_counting_test::twice": 2}


def test_batch_size_and_keyword_arguments() -> None:
    model = nn.Linear(3, 4)
    one, many = graphprune.count(model, {"input": torch.randn(1, 3)}), graphprune.count(model, (torch.randn(5, 3),))
    assert (one.batch_size, many.batch_size) == (1, 5) and many.macs == 5 * one.macs
    assert many.macs_per_sample == one.macs == 12
    scalar = graphprune.count(Calls(lambda m, x: m[0].weight @ m[0].weight.T * x, model), torch.tensor(1.0))
    assert scalar.batch_size is None and scalar.macs_per_sample is None and scalar.macs == 4 * 4 * 3


def test_table_and_dict() -> None:
    model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 2))
    found = graphprune.count(model, torch.randn(10, 300))
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "kind", "parameters", "MACs"]
    rows = [line.split() for line in lines if line and not line.startswith("─")]
    assert ["0", "Linear", "120,400", "1,200,000"] in rows and ["2", "Linear", "802", "8,000"] in rows
    assert ["total", "121,202", "1,208,000"] in rows
    assert "MACs of one forward pass at batch size 10" in str(found)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["macs"] == 1_208_000 and data["macs_per_sample"] == 120_800 and data["parameters"] == 121_202
    assert data["per_layer"]["0"] == {"kind": "Linear", "parameters": 120_400, "macs": 1_200_000}
    assert "total" in str(graphprune.count(nn.ReLU(), torch.randn(2)))


def test_the_model_is_left_alone_and_pruned_models_count_less() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    image = torch.randn(2, 3, 8, 8)
    found = graphprune.count(model, image)
    assert model.training and all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    small = graphprune.count(graphprune.prune(model, image, 0.5), image)
    assert small.macs * 2 == found.macs and small.parameters < found.parameters


def test_errors() -> None:
    with pytest.raises(GraphPruneError, match=r"expected a torch\.nn\.Module, got an int"):
        graphprune.count(3, torch.randn(2))  # type: ignore[arg-type]
    with pytest.raises(GraphPruneError, match="example_input is empty"):
        graphprune.count(nn.Linear(2, 2), ())
    with pytest.raises(GraphPruneError, match=r"shape \(2, 3\)"):
        graphprune.count(nn.Linear(2, 2), torch.randn(2, 3))
    with pytest.raises(GraphPruneError, match="weight has no shape yet; run the model once"):
        graphprune.count(nn.LazyLinear(2), torch.randn(2, 3))
