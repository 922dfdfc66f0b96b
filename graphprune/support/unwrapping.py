"""What is handed over as a model: the module inside wrappers, or an error that says what to pass instead."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from ..errors import GraphPruneError
from .walking import all_modules, first_names, named_tensors, tensors_in

# Attributes under which objects of other libraries keep their networks, the likeliest first.
_PLACES = ("model", "lightning_module", "module", "network", "net", "unet", "transformer", "vae", "text_encoder")


def inside(model: nn.Module) -> nn.Module | None:
    """The module inside one wrapper, or None where there is no wrapper."""
    compiled = _loaded("torch._dynamo.eval_frame", "OptimizedModule")  # slow to import, and there if any is compiled
    found: Any = None
    if compiled is not None and isinstance(model, compiled):
        found = model._orig_mod
    elif isinstance(model, (DataParallel, DistributedDataParallel)):
        found = model.module
    return found if isinstance(found, nn.Module) else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s and the data-parallel wrappers; a model without them as it is."""
    while (found := inside(model)) is not None:
        model = found
    return model


def checked_model(value: Any, what: str = "model", *, keep_wrapper: bool = False) -> nn.Module:
    """The module that was handed over, without wrappers unless `keep_wrapper`.

    `what`: the name of the argument, for errors. Raises GraphPruneError for everything that is no network as it stands
    in Python code: sharded and scripted ones, pipelines, exported programs, state dicts, paths, classes, functions.
    """
    if not isinstance(value, nn.Module):
        raise no_model(value, what)
    model = unwrapped(value)
    kinds: dict[type, str] = {}
    modules = first_names(all_modules(model))
    for path, module in modules.items():
        kind = type(module)
        if path and kinds.get(kind) == "":
            continue
        reason = kinds[kind] = _unfit(module, f"{what}.{path}" if path else what, not path)
        if reason:
            raise GraphPruneError(reason)
    for name, parameter in tensors_in(modules).items():
        if type(parameter) is Tensor or not isinstance(parameter, nn.Parameter):
            continue
        if not keep_wrapper and is_lazy(parameter):
            raise GraphPruneError(f"{what}: {name} has no shape yet; run the model once first")
        if _is_sharded(parameter):
            raise GraphPruneError(
                f"{what}: the parameter {name} is a DTensor, one process's part of a tensor; "
                f"{_BEFORE_SHARDING}"
            )
    return value if keep_wrapper else model


def check_changeable(model: nn.Module, what: str) -> None:
    """Raise GraphPruneError where tensors of the model were made under `torch.inference_mode()`: nothing can be written
    to them."""
    for name, tensor in named_tensors(model).items():
        if tensor.is_inference():
            raise GraphPruneError(
                f"{what}: {name} was made under torch.inference_mode() and cannot be changed in place; pass a copy "
                f"that is made outside of it: copy.deepcopy({what})"
            )


def no_model(value: Any, what: str, wanted: str = "a torch.nn.Module") -> GraphPruneError:
    """The error for something that is no module: what it is, and what to pass instead."""
    told, cure = _described(value, what)
    return GraphPruneError(f"{what}: expected {wanted}, got {told}; {cure}")


_BEFORE_SHARDING = (
    "prune before sharding (fully_shard, FSDP, tensor parallelism) and shard the smaller network; for one that was "
    "trained sharded, gather the full state dict "
    "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) and load it into a "
    "network that is not sharded"
)


def _unfit(module: nn.Module, path: str, outermost: bool) -> str:
    """Why a module cannot be pruned, nor anything that holds it; empty where it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return (
            f"{path} is TorchScript (a {type(module).__name__}), whose code cannot be changed; pass the Python module "
            f"that it was made from, and script or trace the pruned result"
        )
    if any(kind is not None and isinstance(module, kind) for kind in _sharding_classes()):
        return f"{path} is sharded over processes (fully_shard, FSDP): {_BEFORE_SHARDING}"
    if not outermost and isinstance(module, DistributedDataParallel):
        return (
            f"{path} is a DistributedDataParallel inside the model, which synchronises processes at every call; put "
            f"the module inside it back in its place ({path} = {path}.module), prune, and wrap the result"
        )
    if _is_command(module):
        return (
            f"{path} is a {type(module).__name__} of ultralytics, a command around a network and no network itself; "
            f"pass its .model, and put the pruned network there afterwards"
        )
    if outermost and any(kind.__module__.startswith("deepspeed.") for kind in type(module).__mro__):
        return f"{path} is a {type(module).__name__} of DeepSpeed; {_BEFORE_SHARDING}"
    return ""


def _sharding_classes() -> tuple[Any, Any]:
    name = "torch.distributed.fsdp"
    return _loaded(name, "FSDPModule"), _loaded(name, "FullyShardedDataParallel")


def _is_sharded(parameter: Tensor) -> bool:
    kind = _loaded("torch.distributed.tensor", "DTensor")
    return kind is not None and isinstance(parameter, kind)


def _is_command(module: nn.Module) -> bool:
    """A `YOLO` object or one of its kin: a torch module whose forward reads files, predicts and returns results."""
    return any(kind.__module__.startswith("ultralytics.engine.") for kind in type(module).__mro__)


def _loaded(module: str, name: str) -> Any:
    """A class of a module that somebody has imported; None where nobody has, so that nothing can be one."""
    return getattr(sys.modules.get(module), name, None)


def _described(value: Any, what: str) -> tuple[str, str]:
    """What was handed over instead of a module, and what to pass."""
    kind = _kind(value)
    if isinstance(value, type):
        cure = f"make an instance: {value.__name__}(...)" if issubclass(value, nn.Module) else "pass a network"
        return f"the class {value.__name__}", cure
    if value is None:
        return "None", "pass the network"
    if isinstance(value, (str, os.PathLike)):
        cure = "build the network and load the file into it, such as model.load_state_dict(torch.load(path))"
        return f"the path {str(value)!r}", cure
    if isinstance(value, Tensor):
        return "a tensor", f"{what} is the network, and comes before its inputs"
    if isinstance(value, Mapping):
        return _described_mapping(value)
    if isinstance(value, (list, tuple)):
        return kind, "pass one network at a time"
    known = _described_library(value)
    if known is not None:
        return known
    places = _networks_in(value)
    if places:
        return f"{kind}, which holds networks and is none", f"pass its {' or '.join(places)}"
    owner = getattr(value, "__self__", None)
    if isinstance(owner, nn.Module):
        return f"the method {value.__name__} of {_kind(owner)}", "pass the network itself"
    if callable(value):
        name = getattr(value, "__name__", kind)
        return f"the function {name}" if inspect.isroutine(value) else kind, "pass the network that it makes"
    return kind, "pass the network itself"


def _kind(value: Any) -> str:
    """The class of an object, with an article."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def _described_mapping(value: Mapping[Any, Any]) -> tuple[str, str]:
    kind = _kind(value)
    modules = [repr(k) for k, v in value.items() if isinstance(v, nn.Module)]
    if modules:
        return f"{kind} that holds modules", f"pass one of them: [{'], ['.join(modules[:4])}]"
    dicts = [k for k, v in value.items() if isinstance(v, Mapping) and any(isinstance(t, Tensor) for t in v.values())]
    inner = f"checkpoint[{dicts[0]!r}]" if dicts else "it"
    if not dicts and not any(isinstance(v, Tensor) for v in value.values()):
        return kind, "pass the network itself"
    told = f"{kind}, a checkpoint" if dicts else f"{kind}, a state dict"
    return told, f"build the network and load {inner} into it first: model.load_state_dict(...)"


def _described_library(value: Any) -> tuple[str, str] | None:
    """Objects of torch and ONNX that stand for a network and cannot be changed."""
    exported = _loaded("torch.export", "ExportedProgram")
    if exported is not None and isinstance(value, exported):
        return "an ExportedProgram of torch.export", "pass the module that it was exported from, and export the result"
    if isinstance(value, (torch.jit.ScriptFunction, torch._C.ScriptModule)):
        return "TorchScript", "pass the Python module that it was made from"
    home = type(value).__module__.partition(".")[0]
    if home in ("onnx", "onnxruntime", "tensorrt", "openvino"):
        return f"{_kind(value)} of {home}", "pass the PyTorch module that it was exported from"
    return None


def _networks_in(value: Any) -> list[str]:
    """How the networks that an object holds are written: ".unet", ".model"."""
    held = vars(value) if hasattr(value, "__dict__") else {}
    # Properties (Lightning's trainer.lightning_module) may run anything: only likely names are asked.
    found = {name: held[name] if name in held else _asked(value, name) for name in (*_PLACES, *held)}
    seen: set[int] = set()
    names = []
    for name, part in found.items():
        if isinstance(part, nn.Module) and id(part) not in seen and not name.startswith("_"):
            seen.add(id(part))
            names.append(f".{name}")
    return names[:6]


def _asked(value: Any, name: str) -> Any:
    try:
        return getattr(value, name, None)
    except Exception:  # what the property of an unknown object raises says nothing about the network
        return None

