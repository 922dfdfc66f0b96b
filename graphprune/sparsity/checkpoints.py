"""How far a search for a lottery ticket has come, as a safetensors file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import GraphPruneError
from ..support.runs import read_run, score, write_run
from ..support.types import PathLike

_KEY = "graphprune.lottery/1"
_PARTS = ("initial", "rewound", "masks", "trained")


@dataclasses.dataclass(frozen=True, eq=False)
class Progress:
    """`settings`: what the run was asked for. `scores`: of the trainings that are done. The rest: tensors by name."""

    settings: Mapping[str, Any]
    initial: dict[str, Tensor]
    rewound: dict[str, Tensor]
    masks: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    trained: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    scores: tuple[float | None, ...] = ()


def write_progress(path: PathLike, progress: Progress) -> None:
    """Replace the file by one of this state. Raises GraphPruneError when it cannot be written."""
    tensors = {f"{part}/{name}": tensor for part in _PARTS for name, tensor in getattr(progress, part).items()}
    write_run(path, _KEY, {"settings": progress.settings, "scores": progress.scores}, tensors)


def read_progress(path: PathLike, settings: Mapping[str, Any]) -> Progress | None:
    """The state in a file, None where there is no file.

    Raises GraphPruneError if it is damaged, or of a run with other settings, naming one.
    """
    found = read_run(path, _KEY, settings)
    if found is None:
        return None
    about, tensors = found
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    try:
        scores = tuple(map(score, about["scores"]))
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        _check(parts, len(scores), settings)
    except (KeyError, TypeError, ValueError) as error:
        raise GraphPruneError(
            f"the checkpoint {path} is damaged ({type(error).__name__}: {error}); delete it to start again"
        ) from error
    return Progress(settings, parts["initial"], parts["rewound"], parts["masks"], parts["trained"], scores)


def _check(parts: Mapping[str, Mapping[str, Tensor]], done: int, settings: Mapping[str, Any]) -> None:
    """Raise ValueError unless these are the tensors of a run with these settings after so many trainings."""
    shapes, types = settings["shapes"], settings["types"]
    finished = done == settings["rounds"] + 1
    if done > settings["rounds"] + 1:
        raise ValueError(f"{done} trainings of {settings['rounds'] + 1} are done")
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            kind = "bool" if part == "masks" else types.get(name)
            if list(tensor.shape) != shapes.get(name) or str(tensor.dtype).removeprefix("torch.") != kind:
                raise ValueError(f"{part}/{name} does not fit the model")
    for part in ("initial", "rewound", *(("trained",) if finished else ())):
        if parts[part].keys() != shapes.keys():
            raise ValueError(f"tensors of {part} are missing")
    if bool(parts["masks"]) != (done > 0) or (parts["trained"] and not finished):
        raise ValueError("masks are missing, or there are some too early")
