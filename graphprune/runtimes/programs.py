"""A model as a `torch.export` program in a file: what runtimes that do not read ONNX are written from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..errors import GraphPruneError
from .arguments import FlatArguments
from .capture import Flattened, explain, quiet


def save_program(model: nn.Module, arguments: FlatArguments, path: Path, *, any_batch: bool) -> Path:
    """Write the program of `model` in eval mode: flat tensors in and out, the first axis of what shares the batch free
    where `any_batch`. Call inside `inference_state`.

    Raises:
        GraphPruneError: the model cannot be captured, or not with a free batch; with its line.
    """
    if any_batch and arguments.batch_size == 1:
        # A batch of 1 means more than a size to torch (it broadcasts), so another one is traced.
        arguments = arguments.resized(2)
    shapes = tuple({0: torch.export.Dim.DYNAMIC} if batched else None for batched in arguments.batched)
    try:
        with quiet():
            program = torch.export.export(
                Flattened(model, arguments),
                tuple(t.detach().clone() for t in arguments.tensors),
                dynamic_shapes=(shapes,) if any_batch else None,
            )
            torch.export.save(program, path)
    except Exception as error:
        raise GraphPruneError(explain(type(model).__name__, error, arguments, any_batch)) from error
    return path
