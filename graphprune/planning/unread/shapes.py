"""How long the axes of a model's tensors are, before and after, and the sizes that layers have by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from ...support.walking import named_tensors
from ...tracing.blueprints import Width

Removed = Mapping[str, Mapping[int, Sequence[int]]]


def shapes_of(
    model: nn.Module, removed: Removed
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]], list[tuple[str, int]]]:
    """The shapes of all tensors by name before and after, and the axes that lose something."""
    tensors = named_tensors(model)
    axes = {id(tensors[name]): cut for name, cut in removed.items() if name in tensors}
    before = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    after = dict(before)
    cuts = []
    for name, tensor in tensors.items():
        cut = axes.get(id(tensor), {})
        if cut:
            shape = list(before[name])
            for axis, lost in cut.items():
                shape[axis] -= len(lost)
                cuts.append((name, axis))
            after[name] = tuple(shape)
    return before, after, cuts


def stated(
    module: nn.Module,
    width: Width,
    shape: Callable[[str], tuple[int, ...] | None],
    number: Callable[[str], int],
) -> int | None:
    """The size of a layer of torch's, from the shapes of its tensors by name, and the numbers that it keeps."""
    weight = next(
        (s for n in ("weight", "running_mean", "parametrizations.weight.original1", "weight_v", "weight_orig")
         if (s := shape(n)) is not None), None,
    )  # fmt: skip
    if weight is None:
        weight = shape("parametrizations.weight.original")
    name = width.name
    if isinstance(module, nn.modules.conv._ConvNd) and weight is not None:
        turned = module.transposed != (name == "in_channels")
        return weight[1] * number("groups") if turned else weight[0]
    if isinstance(module, nn.Linear) and weight is not None:
        return weight[name == "in_features"]
    if isinstance(module, nn.Bilinear) and weight is not None:
        return weight[("out_features", "in1_features", "in2_features").index(name)]
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
        return weight[width.axis or 0] if width.axis is not None or len(weight) == 1 else None
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and weight is not None:
        return weight[name == "embedding_dim"]
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        end = "" if isinstance(module, nn.RNNCellBase) else "_l0"
        found = shape(f"weight_ih{end}" if name == "input_size" else f"weight_hh{end}")
        return None if found is None or getattr(module, "proj_size", False) else found[1]
    if isinstance(module, nn.MultiheadAttention):
        found = shape("out_proj.weight") if name == "embed_dim" else None
        return number("num_heads") if name == "num_heads" else None if found is None else found[0]
    return weight[0] if weight else None
