"""Importance objects of the torch_pruning library as criteria, fed with groups of this library."""

from __future__ import annotations

import importlib
import types
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from ..dependency.groups import Group, Ints, Member
from ..errors import GraphPruneError
from .context import Floats, ImportanceContext, Layer
from .magnitude import mean_norm
from .registry import normalise


class _Item(NamedTuple):
    """One entry of a torch_pruning group: what would be cut from `layer` (a module or a bare parameter), and how."""

    name: str
    layer: nn.Module | nn.Parameter
    handler: Any
    positions: Ints
    axis: int


class TorchPruningCriterion:
    """A `torch_pruning.importance` object as a criterion function.

    The object gets a group of that library's own classes, made of the modules of the user's model that the group's
    members belong to, and therefore sees the model's own parameters and their `.grad`, with nothing folded. Members
    that are no weight of a standard module appear as bare parameters (which that library's objects do not
    score); buffers and slices its functions cannot express are left out.

    Scores are made per channel and summed over the k channels of a unit. Where the members of a group disagree on k,
    they are made per unit. Random numbers come from the context's seed.

    If the object has no score for a group (it returns None where it knows none of the layers, and that library then
    does not prune there), the group is ranked by "l2" with mean 1 per channel, and a warning says so.

    Raises GraphPruneError if an object that needs gradients finds none, and if it returns another number of scores
    than the group has channels.
    """

    def __init__(self, importance: Any) -> None:
        self.importance = importance
        self.__name__ = type(importance).__name__

    def __call__(self, context: ImportanceContext, group: Group) -> Floats:
        library = importlib.import_module("torch_pruning")
        items = self._with_gradients(_items(library, context, group), library)
        channels = _channels_per_unit(items)
        scores = self._score(_group(library, items, channels), context, group) if items else None
        if scores is None:
            warnings.warn(
                f"{self.__name__} has no score for group {group.index} ({group.name}): it is ranked by its l2 norm",
                stacklevel=2,
            )
            return normalise(mean_norm(context, group, 2)) * channels
        if scores.numel() == group.size:
            return _host(scores)
        # With unequal k the object returns as many entries as its first layer has channels, of which only the
        # first group.size, those that root indices point to, are filled.
        needed = group.size * channels
        if scores.dim() != 1 or scores.numel() < needed:
            raise GraphPruneError(
                f"{self.__name__} returned shape {tuple(scores.shape)} for group {group.index} ({group.name}): "
                f"expected one score for each of {needed} channels; use a group_reduction such as 'mean'"
            )
        summed: Floats = _host(scores)[:needed].reshape(group.size, channels).sum(axis=1)
        return summed

    def _score(self, tp_group: Any, context: ImportanceContext, group: Group) -> Tensor | None:
        state = torch.get_rng_state()
        try:
            # only the CPU's generator: it is the one restored below
            torch.default_generator.manual_seed(int(context.generator(group).integers(2**63)))
            scores = self.importance(tp_group)
        finally:
            torch.set_rng_state(state)
        return None if scores is None else torch.as_tensor(scores)

    def _with_gradients(self, items: list[_Item], library: types.ModuleType) -> list[_Item]:
        """Without the layers that have no gradient, for objects that read it: they are frozen, or nobody asked."""
        needing = (library.importance.GroupTaylorImportance, library.importance.GroupHessianImportance)
        if not isinstance(self.importance, needing):
            return items
        scored = tuple(self.importance.target_types)
        weights = {i.name: _weight(i.layer) for i in items if isinstance(i.layer, scored)}
        missing = {name for name, weight in weights.items() if weight is not None and weight.grad is None}
        if missing and len(missing) == sum(weight is not None for weight in weights.values()):
            name = f"{sorted(missing)[0]}.weight".lstrip(".")
            raise GraphPruneError(
                f"{self.__name__} needs gradients, and '{name}' has none: run loss.backward() on the model first"
            )
        return [item for item in items if item.name not in missing]


def _items(library: types.ModuleType, context: ImportanceContext, group: Group) -> list[_Item]:
    """The group's entries, one per module and operation, the layer that produces the channels first."""
    found: dict[tuple[int, Any], _Item] = {}
    for member in group.members:
        layers = context.layers(member.parameter)
        items = [item for layer in layers if (item := _module_item(library, layer, member)) is not None]
        items = items or _bare_parameter(library, layers, member)
        link = context.bn.get(member.parameter)
        if link is not None and link.axis == member.axis and (module := context.modules.get(link.module or "")):
            item = _module_item(library, Layer(link.module or "", module, "weight"), member, axis=0)
            items += [] if item is None else [item]
        for item in items:
            found.setdefault((id(item.layer), item.handler), item)
    items = list(found.values())
    box, optype = library.pruner.function.PrunerBox, library.ops.OPTYPE
    producing = [box[kind].prune_out_channels for kind in (optype.CONV, optype.LINEAR)]
    root = next((n for n, item in enumerate(items) if item.handler in producing), 0)
    return items[root : root + 1] + items[:root] + items[root + 1 :]


def _module_item(library: types.ModuleType, layer: Layer, member: Member, axis: int | None = None) -> _Item | None:
    """`member` as an operation on the standard module that holds it; None if that library has none for it."""
    module, attribute, positions = layer.module, layer.attribute, member.positions
    axis = member.axis if axis is None else axis
    kind = library.ops.module2type(module)
    pruner = library.pruner.function.PrunerBox.get(kind)
    if attribute not in ("weight", "bias", "running_mean", "running_var") or pruner is None:
        return None
    handler = pruner.prune_out_channels
    if isinstance(module, _ConvNd):
        if attribute == "bias":
            # a transposed weight with groups cannot be indexed by output channels
            if module.transposed and module.groups > 1:
                return None
        elif axis == (0 if module.transposed else 1):
            handler = pruner.prune_in_channels
            if module.groups > 1 and not module.transposed:
                # that library numbers the input channels of all groups through
                width = module.in_channels // module.groups
                offsets = width * np.arange(module.groups, dtype=np.int64)
                positions = (offsets[None, :, None] + positions[:, None, :]).reshape(positions.shape[0], -1)
    elif isinstance(module, nn.Linear):
        if axis == 1:
            handler = pruner.prune_in_channels
    elif isinstance(module, nn.LayerNorm):
        if len(module.normalized_shape) != 1:
            return None
    elif isinstance(module, nn.Embedding):
        if axis != 1:
            return None
    elif not isinstance(module, (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.PReLU)):
        return None
    return _Item(layer.name, module, handler, positions, axis)


def _bare_parameter(library: types.ModuleType, layers: tuple[Layer, ...], member: Member) -> list[_Item]:
    for layer in layers:
        tensor = getattr(layer.module, layer.attribute, None)
        # the bias of a known layer is no parameter of its own
        if isinstance(tensor, nn.Parameter) and not (layer.attribute == "bias" and _is_standard(layer.module)):
            pruner = library.pruner.function.PrunerBox[library.ops.OPTYPE.PARAMETER]
            return [_Item(member.parameter, tensor, pruner.prune_out_channels, member.positions, member.axis)]
    return []


def _is_standard(module: nn.Module) -> bool:
    return isinstance(module, (_ConvNd, nn.Linear, nn.LayerNorm))


def _channels_per_unit(items: list[_Item]) -> int:
    """k where all modules of the group agree on it, else 1: then every channel of a unit counts for the unit."""
    counts = {item.positions.shape[1] for item in items if isinstance(item.layer, nn.Module)}
    if not counts:
        counts = {item.positions.shape[1] for item in items[:1]}
    return counts.pop() if len(counts) == 1 else 1


def _group(library: types.ModuleType, items: list[_Item], channels: int) -> Any:
    """A torch_pruning Group: indices in each layer, and which channel of the group's own numbering each belongs to."""
    group = library.dependency.Group()
    for item in items:
        units, k = item.positions.shape
        root = np.arange(units)[:, None] * channels + np.arange(k)[None, :] * channels // k
        # Some of that library's objects sort the indices in place and leave the root indices: sort both before.
        order = np.argsort(item.positions, axis=None, kind="stable")
        node = library.dependency.Node(item.layer, None, item.name)
        node.pruning_dim = item.axis
        dependency = library.dependency.Dependency(item.handler, item.handler, source=node, target=node)
        group.add_dep(dependency, item.positions.reshape(-1)[order].tolist())
        group[-1].root_idxs = root.reshape(-1)[order].tolist()
    return group


def _weight(layer: nn.Module | nn.Parameter) -> nn.Parameter | None:
    return layer._parameters.get("weight") if isinstance(layer, nn.Module) else layer


def _host(scores: Tensor) -> Floats:
    if scores.is_meta:
        raise GraphPruneError(
            "the model is on the meta device and has no values to judge: load its weights first, or use "
            "criterion='random', which needs none"
        )
    values: Floats = scores.detach().reshape(-1).to("cpu", torch.float64).numpy()
    return values
