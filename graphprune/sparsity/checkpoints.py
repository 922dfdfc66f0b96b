"""How far a search for a lottery ticket has come, as a safetensors file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import GraphPruneError
from ..support.files import replacing
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
    tensors = {
        f"{part}/{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for part in _PARTS
        for name, tensor in getattr(progress, part).items()
    }
    about = json.dumps({"settings": progress.settings, "scores": progress.scores})
    with replacing(path) as temporary:
        save_file(tensors, str(temporary), {_KEY: about})


def read_progress(path: PathLike, settings: Mapping[str, Any]) -> Progress:
    """The state in a file. Raises GraphPruneError if it is damaged, or of a run with other settings, naming one."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    try:
        with safe_open(str(path), "pt") as file:
            about = json.loads((file.metadata() or {})[_KEY])
            scores = tuple(None if s is None else float(s) for s in about["scores"])
            found = dict(about["settings"])
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                part, _, name = key.partition("/")
                parts[part][name] = file.get_tensor(key)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise GraphPruneError(
            f"the checkpoint {path} cannot be read ({type(error).__name__}: {error}); delete it to start again"
        ) from error
    for name, value in settings.items():
        if found.get(name) != value:
            what = "names or shapes" if name == "shapes" else f"{name} {found.get(name)!r} instead of {value!r}"
            raise GraphPruneError(f"the checkpoint {path} is of another run, with {what}; delete it to start again")
    shapes = settings["shapes"]
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            fits = tensor.dtype == torch.bool if part == "masks" else list(tensor.shape) == shapes.get(name)
            if not fits:
                raise GraphPruneError(f"the checkpoint {path} is damaged: {part}/{name} does not fit the model")
    if set(parts["initial"]) != set(shapes) or set(parts["rewound"]) != set(shapes):
        raise GraphPruneError(f"the checkpoint {path} is damaged: tensors are missing")
    return Progress(settings, parts["initial"], parts["rewound"], parts["masks"], parts["trained"], scores)
