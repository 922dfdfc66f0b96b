"""Put the tensors of a file into a rebuilt model: values, types and sharing as they were saved."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import GraphPruneError
from ...support.walking import all_modules, named_tensors
from .container import ModelFile
from .state import transient_names


def fill(model: nn.Module, file: ModelFile) -> None:
    """Fill `model` from `file`. Names, shapes and kinds are compared before anything is read."""
    slots = Slots(model)
    document = file.description
    for alias, name in document.aliases.items():
        if name not in file.names or alias in file.names:
            raise GraphPruneError(f"the file is damaged: {alias} is said to be {name}")
        slots.check(alias, file.shape(name))
    for name in file.names:
        slots.check(name, file.shape(name))
    for name in slots.wanted:
        if name not in file.names and name not in document.aliases:
            raise GraphPruneError(f"the file is of another model: it has no {name}")
    for name in file.names:
        slots.put(name, file.tensor(name))
    for alias, name in document.aliases.items():
        slots.share(alias, name)
    for name, dtype in document.transient.items():
        slots.cast(name, dtype)


def takes_bias(layer: nn.Module, name: str, shape: tuple[int, ...]) -> bool:
    """Whether the layer has an empty place of this name for one number per output."""
    outputs = getattr(layer, "out_channels", getattr(layer, "out_features", None))
    return name in layer._parameters and layer._parameters[name] is None and shape == (outputs,)


class Slots:
    """The places for tensors in a model."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = all_modules(model)
        self.tensors = named_tensors(model)
        hidden = transient_names(model)
        self.wanted = [name for name in self.tensors if name not in hidden]
        self.hidden = {name for name in self.tensors if name in hidden}
        self._used: set[int] = set()

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise GraphPruneError unless there is a place of this name and shape."""
        found = self.tensors.get(name)
        if found is None or name in self.hidden:
            if not self._empty(name, shape):
                raise GraphPruneError(f"the file is of another model: the rebuilt one has no {name}")
        elif tuple(found.shape) != shape:
            raise GraphPruneError(
                f"the file is of another model: {name} has shape {shape} in the file and {tuple(found.shape)} in the "
                f"rebuilt model"
            )
        elif found.is_meta:
            raise GraphPruneError(f"{name} is on the meta device; let build_model build a real model")

    def _empty(self, name: str, shape: tuple[int, ...]) -> bool:
        """A place that holds None: a bias that a layer was given, one number per output."""
        owner, table, last = self._place(name)
        return table == "_parameters" and owner is not None and takes_bias(owner, last, shape)

    def _place(self, name: str) -> tuple[nn.Module | None, str | None, str]:
        path, _, last = name.rpartition(".")
        owner = self.modules.get(path)
        tables = ("_parameters", "_buffers")
        return owner, next((t for t in tables if owner is not None and last in getattr(owner, t)), None), last

    def put(self, name: str, value: Tensor) -> None:
        """The tensor of this name gets these values and their type; one that was shared and is not any more becomes a
        tensor of its own."""
        old = self.tensors.get(name)
        owner, table, last = self._place(name)
        assert owner is not None and table is not None
        if old is None:
            weight = getattr(owner, "weight", None)
            like = weight if isinstance(weight, Tensor) else None
            value = value if like is None else value.to(like.device)
            made = nn.Parameter(value, requires_grad=like is None or like.requires_grad)
            getattr(owner, table)[last] = self.tensors[name] = made
            return
        if _kind(old.dtype) != _kind(value.dtype):
            raise GraphPruneError(f"the file is of another model: {name} is {value.dtype} there, and {old.dtype} here")
        data = torch.empty_like(old, dtype=value.dtype, requires_grad=False).copy_(value)
        if id(old) in self._used:
            own = nn.Parameter(data, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else data
            getattr(owner, table)[last] = self.tensors[name] = own
            self._used.add(id(own))
            return
        old.data = data
        self._used.add(id(old))

    def share(self, alias: str, name: str) -> None:
        """Both names are one tensor."""
        owner, table, last = self._place(alias)
        assert owner is not None and table is not None
        getattr(owner, table)[last] = self.tensors[alias] = self.tensors[name]

    def cast(self, name: str, dtype: torch.dtype) -> None:
        """A buffer that is in no file takes the type it had."""
        found = self.tensors.get(name)
        if found is not None and name in self.hidden and _kind(found.dtype) == _kind(dtype):
            found.data = found.data.to(dtype)


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "floating" if dtype.is_floating_point else str(dtype)
