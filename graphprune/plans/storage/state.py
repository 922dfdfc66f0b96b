"""The tensors of a model that a file holds."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ...errors import GraphPruneError
from ...support.containers import separate
from ...support.walking import all_modules, named_tensors


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """`tensors`: parameters and persistent buffers, each under its first name. `aliases`: further names of shared ones.
    `transient`: buffers that no state dict holds, and their types."""

    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    transient: dict[str, torch.dtype]

    @classmethod
    def of(cls, model: nn.Module) -> State:
        """Raises GraphPruneError for what cannot be stored."""
        tensors: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        transient: dict[str, torch.dtype] = {}
        first: dict[int, str] = {}
        hidden = transient_names(model)
        for name, tensor in named_tensors(model).items():
            if name in hidden:
                transient[name] = tensor.dtype
            elif id(tensor) in first:
                aliases[name] = first[id(tensor)]
            else:
                first[id(tensor)] = name
                tensors[name] = tensor
                _check(name, tensor)
        for name, value in model.state_dict(keep_vars=True).items():
            if name not in tensors and name not in aliases:
                what = "is no tensor" if not isinstance(value, Tensor) else "is neither a parameter nor a buffer"
                raise GraphPruneError(f"{name} {what}: extra state of modules cannot be saved")
        return cls(tensors, aliases, transient)

    def values(self) -> dict[str, Tensor]:
        """Tensors to write: contiguous, none with the memory of another."""
        return separate(self.tensors)


def transient_names(model: nn.Module) -> set[str]:
    """The names of buffers that no state dict holds."""
    return {
        f"{path}.{name}" if path else name
        for path, module in all_modules(model).items()
        for name in module._non_persistent_buffers_set
    }


def _check(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise GraphPruneError(f"the weights cannot be written: {name!r} is on the meta device and has no values")
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.layout != torch.strided or tensor.is_quantized:
        raise GraphPruneError(f"{name}: only ordinary tensors can be saved, not {type(tensor).__name__}")
