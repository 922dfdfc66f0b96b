"""Which runtimes are usable, in a process of each left out here: tests of workers have those."""

from __future__ import annotations

import pytest

from graphprune.runtimes import listing
from graphprune.runtimes.adapters import PRECISIONS, RUNTIMES, Adapter, adapter
from graphprune.runtimes.adapters import openvino as module


@pytest.mark.parametrize("name", list(RUNTIMES))
@pytest.mark.parametrize("features", [("avx2",), ("avx512f", "avx512_bf16", "avx512_fp16")])
def test_a_status_says_what_the_adapter_says(
    name: str, features: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(asked: Adapter) -> str:
        return f"{asked.title} is not here"

    monkeypatch.setattr(listing, "_absent", absent)
    monkeypatch.setattr(module, "cpu_features", lambda: features)
    asked, found = adapter(name), listing._status(adapter(name))
    assert tuple(found.offered) == asked.precisions()
    assert found.refused == {p: asked.why_refused(p) for p in PRECISIONS if p not in asked.precisions()}
    assert found.missing == f"{asked.title} is not here" and not found.usable
    if name == "openvino":
        assert ("bf16" in found.offered) == ("avx512_bf16" in features)
    if name == "onnxruntime":
        assert "provider='cuda'" in found.refused["fp16"]
