"""Decoders with a cache in ONNX Runtime: what the file returns is its next past."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch.utils import _pytree

import graphprune
from graphprune.errors import GraphPruneError
from graphprune.runtimes import ExportReport, export_onnx
from graphprune.runtimes.arguments import FlatArguments
from graphprune.runtimes.dynamic import FreeAxes
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


def test_ten_tokens_of_a_pruned_decoder_with_a_cache_of_tuples(tmp_path: Path) -> None:
    model: Any = graphprune.prune(decoder(), torch.randint(0, 23, (2, 6)), 0.5)
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


@pytest.mark.parametrize("registered", [False, True])
def test_ten_tokens_of_a_pruned_llama(tmp_path: Path, registered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    cache = transformers.DynamicCache
    nodes = dict(_pytree.SUPPORTED_NODES)
    nodes.pop(cache, None)
    monkeypatch.setattr(_pytree, "SUPPORTED_NODES", nodes)
    if registered:  # as some versions do on import, and `register_dynamic_cache_export_support` does

        def flatten(value: Any) -> tuple[list[Any], None]:
            layers = [part[:2] for part in value]
            return [[keys for keys, _ in layers], [values for _, values in layers]], None

        nodes[cache] = _pytree.NodeDef(cache, flatten, lambda parts, _: cache(zip(*parts, strict=True)), None)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.4, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    ids = torch.randint(0, 31, (2, 5))
    model = graphprune.prune(transformers.LlamaForCausalLM(config).eval(), {"input_ids": ids}, 0.5)
    with torch.no_grad():
        past = model(input_ids=ids, use_cache=True).past_key_values
    free = {"input_ids": {0: "batch", 1: "length"}, "past_key_values": CACHE}
    example = {"input_ids": ids[:, :3], "past_key_values": past}
    report = export_onnx(model, example, tmp_path / "net.onnx", dynamic_shapes=free)
    assert past.get_seq_length() == 5 and len(report.inputs) == 5
    assert report.inputs[1] == ("past_key_values_0_0" if registered else "past_key_values_layers_0_keys")
    assert report.outputs[1].endswith("_0_0" if registered else "_layers_0_keys")
    wanted = model.generate(ids[:1], max_new_tokens=10, do_sample=False)[:, 5:].tolist()
    assert texts(report, ids[:1].numpy(), 10, "input_ids") == wanted


def test_a_cache_that_counts_beside_its_tensors() -> None:
    class CountingCache:
        def __init__(self) -> None:
            self.keys, self.seen = torch.randn(2, 3), 3

    cache = CountingCache()
    arguments = FlatArguments.of({"x": torch.randn(2, 1), "past": cache})
    assert arguments.names == ("x", "past_keys") and arguments.example.clone().kwargs["past"].keys is not cache.keys
    assert torch.equal(arguments.rebuild([torch.ones(2), torch.zeros(4)]).kwargs["past"].keys, torch.zeros(4))
    with pytest.raises(GraphPruneError, match=r"past \(CountingCache\) keeps numbers beside its tensors \(seen\)"):
        FreeAxes.of({"past": {1: "length"}}, arguments, dynamic_batch=True)
