"""Decoders with a cache in ONNX Runtime: what the file returns is its next past."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import graphprune
from graphprune.runtimes import ExportReport, export_onnx
from tests.runtimes.decoders import cache_of, decoder, greedy

CACHE = {0: "batch", 2: "past"}


def texts(report: ExportReport, ids: np.ndarray[Any, Any], steps: int, tokens: str = "ids") -> list[list[int]]:
    """Greedy texts: the whole beginning with an empty past, then a token at a time."""
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    past = {
        node.name: np.zeros([ids.shape[0] if size == "batch" else 0 if size == "past" else size for size in node.shape],
                            np.float32)
        for node in session.get_inputs() if node.name != tokens
    }  # fmt: skip
    made: list[Any] = []
    for _ in range(steps):
        logits, *present = session.run(None, {tokens: ids, **past})
        past = dict(zip(past, present, strict=True))
        ids = logits[:, -1].argmax(-1)[:, None]
        made.append(ids)
    return np.concatenate(made, 1).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("pruned", [False, True])
def test_ten_tokens_of_a_decoder_with_a_cache_of_tuples(tmp_path: Path, pruned: bool) -> None:
    model: Any = decoder()
    if pruned:
        model = graphprune.prune(model, torch.randint(0, 23, (2, 6)), 0.5)
        assert model.layers[0].up.out_features < 24
    example = {"ids": torch.randint(0, 23, (2, 3)), "past_key_values": cache_of(model, 2, 5)}
    kept = [t.clone() for pair in example["past_key_values"] for t in pair]
    free = {"ids": {0: "batch", 1: "length"}, "past_key_values": [(CACHE, CACHE)] * len(model.layers)}
    report = export_onnx(model, example, tmp_path / "net.onnx", dynamic_shapes=free)
    places = [f"{i}_{j}" for i in range(len(model.layers)) for j in range(2)]
    assert report.inputs == ("ids", *(f"past_key_values_{place}" for place in places))
    assert report.outputs == ("logits", *(f"present_{place}" for place in places))
    assert report.dynamic_axes["ids"] == {0: "batch", 1: "length"} and report.dynamic_batch
    assert report.dynamic_axes["past_key_values_0_1"] == {0: "batch", 2: "past"}
    assert report.checked_sizes[0] == {"batch": 2, "length": 3, "past": 5}
    assert {"batch": 1, "length": 1, "past": 1} in report.checked_sizes
    assert {"batch": 2, "length": 3, "past": 0} in report.checked_sizes
    assert all(torch.equal(a, b) for a, b in zip(kept, [t for p in example["past_key_values"] for t in p], strict=True))
    ids = torch.tensor([[3, 1, 4, 1], [15, 9, 2, 6], [5, 3, 5, 8]])
    wanted = greedy(model, ids, 10)
    assert len({token for row in wanted for token in row}) > 5
    assert texts(report, ids.numpy(), 10) == wanted
