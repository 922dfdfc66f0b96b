"""What every test gets: fixed seeds, few threads, memory given back, and the shared data where there is some."""

from __future__ import annotations

import builtins
import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

SHARED_DATA_VARIABLE = "GRAPHPRUNE_SHARED_DATA"
THREADS_VARIABLE = "GRAPHPRUNE_TEST_THREADS"


def shared_data_folder() -> Path:
    """The folder named by GRAPHPRUNE_SHARED_DATA, else ../shared/data beside the checkout; it need not exist."""
    named = os.environ.get(SHARED_DATA_VARIABLE)
    return Path(named).expanduser() if named else Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ.get(THREADS_VARIABLE, "1")))
    # How long an example takes is the machine's affair.
    hypothesis.settings.register_profile("any machine", deadline=None)
    hypothesis.settings.load_profile("any machine")
    if os.environ.get(SHARED_DATA_VARIABLE) and not shared_data_folder().is_dir():
        # A misspelt path must not turn every such test into a quiet skip.
        raise pytest.UsageError(f"{SHARED_DATA_VARIABLE} names {shared_data_folder()}, which is not a folder")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    folder = shared_data_folder()
    if folder.is_dir():
        return
    skip = pytest.mark.skip(reason=f"no shared data at {folder}: set {SHARED_DATA_VARIABLE}")
    for item in items:
        if item.get_closest_marker("shared_data"):
            item.add_marker(skip)


def pytest_collection_finish(session: pytest.Session) -> None:
    # The imported libraries live as long as the process: without them a collection takes a fraction of the time.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data(request: pytest.FixtureRequest) -> Path:
    """The folder of trained networks and data. Only for tests marked `shared_data`, which are skipped without it."""
    folder = shared_data_folder()
    if not folder.is_dir():
        pytest.fail("the fixture shared_data was asked for by a test that is not marked shared_data")
    return folder


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


_GROWTH = 256 << 20
_held = 0


def _resident() -> int:
    """Bytes of memory that this process holds; a huge number where nothing tells."""
    try:
        import psutil
    except ImportError:
        return 1 << 62
    return int(psutil.Process().memory_info().rss)


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    global _held
    yield
    # Graphs and modules refer to each other, so whole networks would wait for the collector. A collection takes a tenth
    # of a second, longer than many a test: only where memory has grown.
    if _resident() < _held + _GROWTH:
        return
    gc.collect()
    _held = _resident()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing matplotlib fails, as where it is not installed."""
    original = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
