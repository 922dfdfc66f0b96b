from __future__ import annotations

import pytest
import torch
from torch import nn

from graphprune import GraphPruneError, sparsity
from graphprune.sparsity.semi_structured import is_two_of_four


def test_what_is_two_of_four() -> None:
    dense = torch.randn(8, 16)
    assert not is_two_of_four(dense) and is_two_of_four(torch.zeros(8, 16)) and not is_two_of_four(torch.zeros(8, 6))
    layer = sparsity.n_m(nn.Linear(16, 8))
    assert is_two_of_four(layer.weight)
    shifted = torch.roll(layer.weight.detach(), 1, 1)
    groups = shifted.unflatten(1, (-1, 4))
    assert is_two_of_four(shifted) == bool(((groups != 0).sum(-1) <= 2).all())
    assert not is_two_of_four(torch.tensor([[1.0, 1.0, 1.0, 0.0]]))


def test_a_device_that_cannot_says_why_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = sparsity.n_m(nn.Linear(16, 8))
    assert "no CUDA device" in str(sparsity.semi_structured_support())
    with pytest.raises(GraphPruneError, match=r"not possible: torch sees no CUDA device"):
        sparsity.semi_structured(model)
    assert set(sparsity.masks(model)) == {"weight"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "the weights are on cpu" in str(sparsity.semi_structured_support("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old one")
    assert "compute capability 7.5; 8.0 is needed" in str(sparsity.semi_structured_support())


def test_a_model_without_the_pattern_is_refused() -> None:
    with pytest.raises(GraphPruneError, match="keeps at most 2 of every 4 inputs"):
        sparsity.semi_structured(nn.Linear(16, 8))


@pytest.mark.skipif(sparsity.semi_structured_support() is not None, reason=str(sparsity.semi_structured_support()))
def test_on_the_gpu_the_output_stays() -> None:
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64)).cuda().half()
    sparsity.n_m(model)
    x = torch.randn(64, 256, device="cuda", dtype=torch.float16)
    with torch.inference_mode():
        expected = model(x)
        assert sparsity.semi_structured(model) == ["0.weight", "2.weight"]
        torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)
    assert "Sparse" in type(model[0].weight).__name__ or "Sparse" in type(model[0].weight.data).__name__
