"""How far a run has come, in a file: settings that tell it from other runs, plain values, and tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import GraphPruneError
from .containers import TensorFile, separate, write_tensors
from .documents import from_json, to_json
from .files import is_there
from .types import PathLike

Checkpoint = tuple[dict[str, Any], dict[str, Tensor]]
_AGAIN = "delete it to start again"


def write_run(path: PathLike, key: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Replace the file by one of this state; `about["settings"]`: of the run. Raises GraphPruneError when it cannot be
    written."""
    write_tensors(path, separate(tensors), key, to_json(about))


def read_run(path: PathLike, key: str, settings: Mapping[str, Any]) -> Checkpoint | None:
    """What `write_run` wrote, None where there is no file.

    Raises GraphPruneError if the file is damaged, or of a run with other settings, naming one.
    """
    if not is_there(path):
        return None
    try:
        file = TensorFile(path, key, "is no checkpoint of such a run")
        about = from_json(file.document)
        found = about["settings"] if isinstance(about, dict) and isinstance(about.get("settings"), dict) else None
        if found is None:
            raise GraphPruneError(f"{path} is damaged: it has no settings")
        tensors = {name: file.tensor(name) for name in file.names}
    except GraphPruneError as error:
        raise GraphPruneError(f"the checkpoint {path} cannot be read ({error}); {_AGAIN}") from error
    for name, value in from_json(to_json(settings)).items():
        if found.get(name) != value:
            what = "names or shapes" if name == "shapes" else f"{name} {found.get(name)!r} instead of {value!r}"
            raise GraphPruneError(f"the checkpoint {path} is of another run, with {what}; {_AGAIN}")
    return about, tensors


def score(value: Any) -> float | None:
    """A finite number, or None; TypeError for anything else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"{str(value)[:40]!r} is no score")
    return float(value)


def counted(value: Any, most: int) -> int:
    """A whole number from 0 to `most`; TypeError for anything else."""
    if type(value) is not int or not 0 <= value <= most:
        raise TypeError(f"{str(value)[:40]!r} is no number from 0 to {most}")
    return value
