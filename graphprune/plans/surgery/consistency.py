"""Whether the tensors of each module still fit each other, and what the module says of itself."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ...errors import GraphPruneError
from ...tracing.names import all_modules


def check_consistent(model: nn.Module, small: nn.Module) -> None:
    """Raise GraphPruneError where a module of `small` has tensors that do not fit each other, and that of the same name
    in `model`, from which it was made, has not: the plan lost an entry or was changed."""
    before = all_modules(model)
    for path, module in all_modules(small).items():
        found = _misfit(module)
        if found and path in before and not _misfit(before[path]):
            raise GraphPruneError(
                f"the plan does not fit together: {path or 'the model'} would have {found}; an entry is lost or wrong"
            )


def _misfit(module: nn.Module) -> str:
    """What does not fit in a module of torch.nn, in words; "" if nothing does not, or for other modules."""
    sizes = {
        name: tuple(tensor.shape)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if isinstance(tensor, Tensor)
    }
    weight, bias = sizes.get("weight"), sizes.get("bias")
    if isinstance(module, _ConvNd) and weight is not None:
        outputs = weight[1] * module.groups if module.transposed else weight[0]
        if weight[0] % module.groups:
            return f"a weight of shape {weight} in {module.groups} groups"
        return "" if bias in (None, (outputs,)) else f"{outputs} outputs and a bias of shape {bias}"
    if isinstance(module, nn.Linear) and weight is not None:
        return "" if bias in (None, weight[:1]) else f"{weight[0]} outputs and a bias of shape {bias}"
    if isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm)):
        vectors = {name: size for name, size in sizes.items() if size}  # not the number of batches
        if len(set(vectors.values())) > 1:
            return " and ".join(f"{name} of shape {size}" for name, size in vectors.items())
        grouped = isinstance(module, nn.GroupNorm) and weight is not None and weight[0] % module.num_groups
        return f"{weight[0]} channels in {module.num_groups} groups" if grouped else ""  # type: ignore[index]
    if isinstance(module, nn.RNNBase):
        return _recurrent_misfit(sizes)
    return ""


def _recurrent_misfit(sizes: dict[str, tuple[int, ...]]) -> str:
    """Gates of a layer and direction are as long in all of its tensors."""
    ends = {name.partition("_l")[2] for name in sizes if name.startswith("weight_ih_l")}
    for end in ends:
        parts = {name: sizes[name][0] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                 if (name := f"{kind}_l{end}") in sizes}  # fmt: skip
        if len(set(parts.values())) > 1:
            return " and ".join(f"{name} with {length} rows" for name, length in parts.items())
    return ""
