"""2:4 sparse weights in torch's compressed form, for GPUs with sparse tensor cores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import GraphPruneError
from ..support.doors import door
from .masks import make_plain
from .weights import find_weights

_MINIMUM = (8, 0)  # compute capability of NVIDIA's Ampere, the first with sparse tensor cores


def semi_structured_support(device: torch.device | str | None = None) -> str | None:
    """Why `device` (default: the current GPU) cannot compute with 2:4 sparse weights; None if it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here; 2:4 sparse weights need an NVIDIA GPU of compute capability 8.0 or more"
    chosen = torch.device("cuda" if device is None else device)
    if chosen.type != "cuda":
        return f"the weights are on {chosen}; move the model to the GPU first"
    if torch.version.hip is None and torch.cuda.get_device_capability(chosen) < _MINIMUM:
        found = ".".join(map(str, torch.cuda.get_device_capability(chosen)))
        return f"{torch.cuda.get_device_name(chosen)} has compute capability {found}; 8.0 is needed"
    return None


@door("model", in_place=True)
def semi_structured(model: nn.Module) -> list[str]:
    """Store the 2:4 sparse Linear weights of `model` in torch's compressed form, in place; returns their names.

    For inference on a GPU with sparse tensor cores, in float16 or bfloat16: half the memory, and faster matrix products
    where they are large. Masks of the converted weights are made permanent first, and the weights no longer train.
    Linear weights that are no 2:4 pattern, or of a shape or type that torch does not take, stay as they are.

    Raises GraphPruneError, with the model as it was, where the device cannot do it, saying why, and if no weight fits.
    """
    found = [w for w in find_weights(model) if all(_is_linear(s.module, s.attribute) for s in w.sites)]
    fitting = [w for w in found if is_two_of_four(w.value)]
    if not fitting:
        raise GraphPruneError("no Linear weight keeps at most 2 of every 4 inputs; call n_m(model, 2, 4) first")
    reason = semi_structured_support(fitting[0].value.device)
    if reason is not None:
        raise GraphPruneError(f"semi-structured tensors are not possible: {reason}")
    from torch.sparse import to_sparse_semi_structured

    made = {}
    problems = []
    for weight in fitting:
        try:
            made[weight.name] = to_sparse_semi_structured(weight.value)
        except (RuntimeError, ValueError) as error:  # torch's limits on shapes and types
            problems.append(f"{weight.name}: {error}")
    if not made:
        raise GraphPruneError("torch takes none of the 2:4 weights: " + "; ".join(problems))
    for weight in fitting:
        if weight.name in made:
            make_plain(weight)
            stored = nn.Parameter(made[weight.name], requires_grad=False)
            for site in weight.sites:
                site.module._parameters[site.attribute] = stored
    return list(made)


def _is_linear(module: nn.Module, attribute: str) -> bool:
    return isinstance(module, nn.Linear) and attribute == "weight"


def is_two_of_four(matrix: Tensor) -> bool:
    """At most 2 of every 4 consecutive values of each row are not zero, and the rows are whole groups."""
    if matrix.dim() != 2 or matrix.shape[1] % 4:
        return False
    return bool((matrix.unflatten(1, (-1, 4)).count_nonzero(-1) <= 2).all())
