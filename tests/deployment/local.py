"""A worker without a process of its own: the same requests and files, answered here, in a fraction of the time."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from graphprune.errors import GraphPruneError
from graphprune.runtimes.adapters import adapter
from graphprune.runtimes.adapters.worker import Served
from graphprune.runtimes.adapters.workers import Worker


class LocalWorker(Worker):
    """Every request goes through JSON, as it does to a process. Remembers which there were."""

    def __enter__(self) -> LocalWorker:
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        self._served = Served(adapter(self.runtime))
        self.asked: list[str] = []
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def ask(self, request: str, **values: Any) -> Any:
        self.asked.append(request)
        try:
            with torch.no_grad():
                answer = getattr(self._served, request)(**json.loads(json.dumps(values)))
        except GraphPruneError as error:
            raise GraphPruneError(f"runtime {self.runtime!r}: {error}") from error
        return json.loads(json.dumps(answer))
