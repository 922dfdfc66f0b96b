from __future__ import annotations

import pytest

from graphprune.deployment import across, exporting
from tests.deployment.local import LocalWorker


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runtimes work in this process."""
    monkeypatch.setattr(exporting, "Worker", LocalWorker)
    monkeypatch.setattr(across, "Worker", LocalWorker)
