from __future__ import annotations

import onnxruntime
import pytest

from graphprune.errors import GraphPruneError
from graphprune.runtimes import Provider, providers, resolve_provider, usable_providers
from graphprune.runtimes.providers import CPU, CUDA, why_not

no_cuda = pytest.mark.skipif(why_not(CUDA) is None, reason="CUDA loads here")


def test_cpu_under_all_its_names() -> None:
    for name in ("cpu", "CPU", CPU, CPU.lower()):
        assert resolve_provider(name) == Provider(CPU)
    assert resolve_provider("cpu").device == "cpu"
    given = Provider(CPU, "mine")
    assert resolve_provider(given) is given


@no_cuda
def test_auto_falls_back_and_says_so() -> None:
    chosen = resolve_provider()
    assert chosen.name == CPU
    assert chosen.note is not None and CUDA in chosen.note and CPU in chosen.note
    assert str(chosen) == CPU


def test_auto_takes_cuda_where_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "why_not", lambda name: None)
    chosen = resolve_provider("auto")
    assert chosen.name == CUDA and chosen.device == "cuda" and "loads here" in (chosen.note or "")


@no_cuda
@pytest.mark.parametrize("name", ["cuda", "CUDAExecutionProvider", "tensorrt", "NoSuchProvider"])
def test_what_is_not_there_is_an_error_that_names_what_is(name: str) -> None:
    with pytest.raises(GraphPruneError, match=rf"provider '{name}' is not usable here .*usable are .*{CPU}"):
        resolve_provider(name)


def test_provider_of_another_type() -> None:
    with pytest.raises(GraphPruneError, match="expected a name"):
        resolve_provider(3)  # type: ignore[arg-type]


def test_usable_providers_are_listed_and_load() -> None:
    usable = usable_providers()
    assert CPU in usable
    assert set(usable) <= set(onnxruntime.get_available_providers())


def test_a_listed_provider_whose_libraries_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is there, the session starts, but on another provider: what ONNX Runtime does without cuDNN."""

    class Session:
        def __init__(self, *args: object, **kwargs: object) -> None:
            assert kwargs["enable_fallback"] == 0

        def get_providers(self) -> list[str]:
            return [CPU]

    monkeypatch.setattr(providers, "_nvidia_driver_problem", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    assert why_not.__wrapped__(CUDA) == "its libraries cannot be loaded"


def test_the_attempt_runs_a_node() -> None:
    assert providers._attempt(CPU) is None


def test_a_provider_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("CUDA failure 35: driver too old\nmore")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    assert providers._attempt(CPU) == "CUDA failure 35: driver too old"
