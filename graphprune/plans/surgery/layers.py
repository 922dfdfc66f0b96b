"""Take whole layers out of a copy of a model; indices and depths that the code keeps follow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ...dependency.whole.blocks import Block
from ...dependency.whole.experts import Experts
from ...errors import GraphPruneError
from ...support.settings import is_named_tuple, is_settings, settings_of, with_setting
from ...support.walking import all_modules
from ...tracing.cloning import INTERNAL
from ..modules.bypass import Bypass, Gap, Silence
from .copying import clone_with

# How attributes are called that count layers: num_hidden_layers, n_layer, encoder_layers, depth, depths.
_COUNTS = re.compile(r"(^|_)(n_?)?(layers?|blocks?|depths?)($|_)|^n_(layer|block)s?$", re.IGNORECASE)
_SIDES = ("encoder", "decoder")


def remove_layers(model: nn.Module, blocks: Sequence[Block]) -> nn.Module:
    """A copy of `model` without the given layers; `model` is not touched.

    Elements of a Sequential or ModuleList are deleted from it. In the layers that move up, integers that said their
    place (`layer_idx`) are renumbered; attributes of the list's owner and of configuration objects that say how many
    layers there are (`num_hidden_layers`), or hold one item for each, are brought in line. Other layers are replaced
    by a `Bypass` of this library, branches by a `Silence`.

    Other numbers that a layer got from its place when it was built (GPT-2's scale by inverse depth) stay what they
    were. A configuration cannot say so: `graphprune.load` restores them, the model's own `from_pretrained` does not.

    Raises GraphPruneError where the model has no such layers or cannot be copied.
    """
    return close_gaps(bypass_layers(model, blocks), model, blocks)


def bypass_layers(model: nn.Module, blocks: Sequence[Block]) -> nn.Module:
    """A copy of `model` in which each of the given layers does nothing, those of lists too: all else keeps its name.

    Raises GraphPruneError where the model has no such layers or cannot be copied.
    """
    small = clone_with(model, {})
    modules = all_modules(small)
    for block in (piece for whole in blocks for piece in whole.pieces):
        owner, _, name = block.module.rpartition(".")
        if block.module not in modules or not block.module:
            raise GraphPruneError(f"the plan leaves out {block.module or 'the model itself'}, which this model lacks")
        if block.listed and not isinstance(modules[owner], (nn.Sequential, nn.ModuleList)):
            raise GraphPruneError(f"the plan shortens {owner}, which is a {type(modules[owner]).__name__}, no list")
        modules[owner]._modules[name] = _bypass(modules[block.module], block)
        if not block.listed:
            _forbid_fused_paths(modules, owner)
    return small


def close_gaps(small: nn.Module, model: nn.Module, blocks: Iterable[Block]) -> nn.Module:
    """Delete what stands in lists for layers that are left out, in place; returns `small`.

    `model`: the original, which says which integers count layers; `small`: made from it by `bypass_layers`, and cut
    since or not.
    """
    listed = [block for block in blocks if block.listed]
    if not listed:
        return small
    originals, modules = all_modules(model), all_modules(small)
    lists: dict[str, set[int]] = {}
    for block in listed:
        owner, _, name = block.module.rpartition(".")
        lists.setdefault(owner, set()).add(list(originals[owner]._modules).index(name))
    for path in sorted(lists, key=lambda p: p.count("."), reverse=True):  # inner ones first: outer ones are renumbered
        places = _places(list(originals[path]._modules.items()))
        _shorten(small, path, modules[path], sorted(lists[path]), places)
    return small


def uncounted_tokens(model: nn.Module, blocks: Sequence[Block]) -> str:
    """Why caches of keys and values would miscount tokens without these layers; empty when they would not.

    Layers that hold their place (`layer_idx`) use it to find their part of a cache, and the length of the first part
    is the position of the next token. Where a `Bypass` or `Silence` stands for what writes to that part, it stays
    empty, which no single run shows. Modules that say they are no decoder (`is_decoder`) keep no keys.
    """
    modules = all_modules(model)
    blocks = [piece for block in blocks for piece in block.pieces]
    deleted = {block.module for block in blocks if block.listed}
    replaced = [block.module for block in blocks if not block.listed]
    for path in dict.fromkeys(path for block in blocks for path in _lists_around(modules, block.module)):
        items = list(modules[path]._modules.items())
        names = [f"{path}.{name}" if path else name for name, _ in items]
        first = next((name for name in names if name not in deleted), "")
        writers = [f"{first}.{inner}" if inner else first for inner, _ in _places(items)] if first else []
        for writer in (w for w in writers if getattr(modules.get(w), "is_decoder", True) is not False):
            if isinstance(modules.get(writer), Bypass) or any(_within(writer, one) for one in replaced):
                return (
                    f"{writer} holds the number of a layer and would be the first of {path or 'the model'} to do so; "
                    f"without it, a cache of keys and values loses its count of tokens"
                )
    return ""


def _lists_around(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """The lists that a module is in, at whatever depth."""
    return [owner for owner in _outer(path) if isinstance(modules.get(owner), (nn.Sequential, nn.ModuleList))]


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def remove_listed_experts(small: nn.Module, experts: Iterable[Experts]) -> None:
    """Shorten the lists of experts of a copy, in place; stacked ones are cut as tensors are."""
    shortened = [one for one in experts if one.listed and one.gone]
    modules = all_modules(small) if shortened else {}
    for one in shortened:
        owner = modules.get(one.listed)
        if not isinstance(owner, nn.ModuleList) or len(owner) <= one.gone[-1]:
            raise GraphPruneError(f"the plan shortens {one.listed}, which is no list of that many experts")
        places = _places(list(owner._modules.items()))
        _shorten(small, one.listed, owner, list(one.gone), places, recount=False)


def _bypass(module: nn.Module, block: Block) -> Bypass:
    if block.listed and not block.branch:
        return Gap(module, block.stream, block.form).train(module.training)
    kind = Silence if block.branch else Bypass
    new = kind(block.stream, block.form).train(module.training)
    for name, value in module.__dict__.items():  # what the code around it may look at (`layer.attention_type`)
        if not name.startswith("_") and isinstance(value, (bool, int, float, str)) and not hasattr(new, name):
            setattr(new, name, value)
    for name in module._parameters:  # code that asks `attention.in_proj_bias is None`
        if not hasattr(new, name):
            new.register_parameter(name, None)
    return new


def _forbid_fused_paths(modules: Mapping[str, nn.Module], path: str) -> None:
    """Torch's encoder reads the weights of its parts where it runs as one fused operation; they are gone."""
    for outer in (path, *_outer(path)):
        module = modules[outer]
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # what torch sets for activations that it cannot fuse
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _outer(path: str) -> list[str]:
    """The paths of the modules that a path lies in, from the inside to the model."""
    owners = [path.rpartition(".")[0]]
    while owners[-1]:
        owners.append(owners[-1].rpartition(".")[0])
    return owners


def _shorten(
    model: nn.Module,
    path: str,
    owner: nn.Module,
    gone: list[int],
    places: Sequence[tuple[str, str]],
    recount: bool = True,
) -> None:
    """`places`: see `_places`, of the list as it was."""
    items = list(owner._modules.items())
    count = len(items)
    stay = [item for i, item in enumerate(items) if i not in gone]
    numbered = all(name == str(i) for i, (name, _) in enumerate(items))
    owner._modules.clear()
    for i, (name, module) in enumerate(stay):
        owner._modules[str(i) if numbered else name] = module
        inside = all_modules(module) if module is not None else {}
        for inner, attribute in places:
            found = inside.get(inner)  # none in what stands for a layer that is left out
            if found is not None and isinstance(found.__dict__.get(attribute), int):
                found.__dict__[attribute] = i
    if recount:
        _recount(model, path, count, gone)


def _places(items: Sequence[tuple[str, nn.Module | None]]) -> list[tuple[str, str]]:
    """(path inside, attribute) of integers that say the number of the element they are in, in every element."""
    if len(items) < 2:
        return []
    common: set[tuple[str, str]] | None = None
    for i, (_, module) in enumerate(items):
        here = {
            (inner, name)
            for inner, m in (module.named_modules() if module is not None else ())
            for name, value in m.__dict__.items()
            if type(value) is int and value == i and name != "training"
        }
        common = here if common is None else common & here
    return sorted(common or ())


def _recount(model: nn.Module, path: str, count: int, gone: list[int]) -> None:
    """Depths in the owner of the list, and in configuration objects of it, of the model and of what is between."""
    owners = _outer(path)
    seen: dict[int, Any] = {}
    for place in owners:
        module = model.get_submodule(place)
        held = module.__dict__
        if place == owners[0]:
            held.update(_recounted(held, path, count, gone))
        for name, value in list(held.items()):
            if name not in INTERNAL and id(value) not in seen and is_settings(value):
                if not is_named_tuple(value):  # of which every holder has its own
                    seen[id(value)] = value
                for setting, new in _recounted(settings_of(value), path, count, gone).items():
                    value = held[name] = with_setting(value, setting, new)


def _recounted(held: Mapping[str, Any], path: str, count: int, gone: list[int]) -> dict[str, Any]:
    """What of the values by name counts the layers of the list, with its new value."""
    new: dict[str, Any] = {}
    for name in _on_side(filter(_COUNTS.search, held), path):
        value = held[name]
        if type(value) is int and value == count:
            new[name] = count - len(gone)
        elif type(value) in (list, tuple) and len(value) == count and not _is_stages(value, path, count):
            new[name] = type(value)(v for i, v in enumerate(value) if i not in gone)
        elif type(value) in (list, tuple) and _is_stages(value, path, count):
            stage = _stage(path)
            new[name] = type(value)(v - len(gone) if i == stage else v for i, v in enumerate(value))
    return new


def _on_side(names: Iterable[str], path: str) -> list[str]:
    """Where encoder and decoder are counted apart: those of the side on which the list lies."""
    names = list(names)
    for side, other in (_SIDES, _SIDES[::-1]):
        if side in path.lower():
            own = [n for n in names if side in n.lower()]
            return own or [n for n in names if other not in n.lower()]
    return names


def _stage(path: str) -> int:
    """The last number in a path: `layers.2.blocks` is in stage 2."""
    numbers = [part for part in path.split(".") if part.isdigit()]
    return int(numbers[-1]) if numbers else -1


def _is_stages(value: Sequence[Any], path: str, count: int) -> bool:
    """`depths = [2, 2, 6, 2]`, and this is the list of one stage."""
    stage = _stage(path)
    return 0 <= stage < len(value) and all(type(v) is int for v in value) and value[stage] == count
