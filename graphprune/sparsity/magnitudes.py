"""Unstructured pruning by the magnitude of the weights."""

from __future__ import annotations

from torch import nn

from ..support.doors import door
from ..support.types import Ignore, Parts
from .masks import put_in_force
from .ranking import Scope, check_scope, check_sparsity, keep_highest
from .weights import select_weights


@door("model", in_place=True)
def magnitude(
    model: nn.Module,
    sparsity: float,
    scope: Scope = "global",
    *,
    parameters: Parts = "weights",
    ignore: Ignore = (),
) -> nn.Module:
    """Mask the weights of smallest absolute value, and return the model, which is changed in place.

    - `sparsity`: fraction of weights that are zero afterwards, in [0, 1), masks already in force included. Rounded to
      nearest, the count is exact even among equal values, of which those with a lower index stay.
    - `scope`: "global" (default) ranks all chosen weights together, "layer" prunes the same fraction of each tensor.
    - `parameters`: "weights" (default; no biases, no vectors, no parameters of norms), "all", or modules, parameters,
      their names and patterns: modules (`"layer3.*"`) mean their weights, parameters (`"fc.bias"`, `"*.bias"`) just
      these. `ignore`: the same, of what is left out.

    The masks stay in force during training (see `set_masks`) and what is pruned does not come back: a second call with
    a higher sparsity prunes more. `make_permanent` ends it.

    Raises GraphPruneError, with the model as it was, for arguments out of range, names that match nothing, weights that
    are NaN or infinite, and where more is masked already than is asked for.

    >>> import torch, graphprune
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> net = graphprune.sparsity.magnitude(net, 0.75)
    >>> sum(int((layer.weight == 0).sum()) for layer in (net[0], net[2]))
    144
    """
    wanted = check_sparsity(sparsity)
    check_scope(scope)
    weights = select_weights(model, parameters, ignore)
    put_in_force(keep_highest(weights, [w.value.abs() for w in weights], wanted, scope))
    return model
