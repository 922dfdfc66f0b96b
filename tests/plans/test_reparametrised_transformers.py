"""Vocoders and codecs of the transformers library in small: all their convolutions wear weight_norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from tests import oracles

transformers = pytest.importorskip("transformers")


def speech_t5() -> tuple[nn.Module, Tensor]:
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8, upsample_initial_channel=32, upsample_rates=[2, 2], upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 5], resblock_dilation_sizes=[[1, 3], [1, 3]],
    )  # fmt: skip
    model = transformers.SpeechT5HifiGan(config)
    model.apply_weight_norm()
    return model, torch.randn(2, 10, 8)


def encodec() -> tuple[nn.Module, Tensor]:
    config = transformers.EncodecConfig(
        num_filters=8, hidden_size=16, codebook_dim=16, codebook_size=16, upsampling_ratios=[4, 2], num_lstm_layers=1,
    )  # fmt: skip
    return transformers.EncodecModel(config).encoder, torch.randn(2, 1, 64)


def dac() -> tuple[nn.Module, Tensor]:
    config = transformers.DacConfig(
        encoder_hidden_size=8, downsampling_ratios=[2, 4], decoder_hidden_size=32, upsampling_ratios=[4, 2],
        hidden_size=16, n_codebooks=2, codebook_size=16, codebook_dim=4,
    )  # fmt: skip
    model = transformers.DacModel(config)
    model.apply_weight_norm()
    return model.decoder, torch.randn(2, config.hidden_size, 10)


MADE: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"SpeechT5HifiGan": speech_t5, "Encodec": encodec, "DAC": dac}


def result_of(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else next(iter(found.values()))


@pytest.mark.parametrize("name", MADE)
def test_vocoders_and_codecs(name: str) -> None:
    torch.manual_seed(0)
    model, x = MADE[name]()
    model.eval()
    plan = graphprune.plan(model, x, 0.5)
    small = plan.apply(model)
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
    assert graphprune.verify(model, small, plan, x).passed
    assert oracles.parameters_match_plan(model, small, plan.removed) == []
    wanted = oracles.copy_of(model)
    oracles.make_permanent(wanted)
    assert oracles.relative_error(
        result_of(small(x)), result_of(graphprune.prune(wanted, x, 0.5, recover=None)(x))
    ) < 1e-4
    result_of(small.train()(x)).square().mean().backward()
    assert all(p.grad is not None for n, p in small.named_parameters() if "original" in n or n.endswith(("_v", "_g")))
