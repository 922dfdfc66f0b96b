"""Paths that a model takes in training mode only: auxiliary heads, and results that it returns in no other mode."""

from __future__ import annotations

from collections import Counter

from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from ..support.interrupts import interruptible
from ..support.walking import tensors_in
from .branching import branches_on_training
from .example import ExampleInput, result_tensors
from .patches import Patch, patched_together
from .recorder import Recorder

# What these do in training mode (batch statistics, dropped elements) changes values, never which channels meet.
_SAME_CHANNELS = (_NormBase, _DropoutNd, nn.RNNBase, nn.MultiheadAttention, nn.RReLU)
_DROPOUTS = "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout".split()


def unread(recorder: Recorder) -> set[int]:
    """The parameters (by identity) that the run so far has not read."""
    read = {n.meta.get("parameter") for n in recorder.graph.nodes if n.op == "get_attr"}
    names: dict[int, set[str]] = {}
    for name, tensor in tensors_in(recorder.modules).items():
        if isinstance(tensor, nn.Parameter):
            names.setdefault(id(tensor), set()).add(name)
    return {key for key, found in names.items() if not found & read}


def record_training_paths(
    recorder: Recorder, model: nn.Module, example: ExampleInput, outputs: tuple[fx.Node, ...]
) -> tuple[fx.Node, ...]:
    """Run the model a second time with its training flags set, and add to the graph what the first run did not do.
    `outputs`: what the first run returned.

    Returns the nodes that training returns besides; calls that only it makes are marked "training_only". The second run
    is made only where it may show something: parameters that were not read, layers whose result went nowhere, code that
    does another thing in training mode. The graph is left as it was when the model cannot run like that (detectors want
    targets), or reads and returns what it did before.
    """
    before = unread(recorder)
    switched = [m for m in recorder.modules.values() if not isinstance(m, _SAME_CHANNELS)]
    if not (before or _leads_nowhere(recorder, outputs) or branches_on_training(switched)):
        return ()
    first = set(recorder.graph.nodes)
    mark = recorder.begin_second_run()
    for module in switched:
        module.training = True
    try:
        with patched_together(_NOTHING_DROPPED), interruptible():
            out = example.call(model)
        found: list[Tensor] = result_tensors(out)
        nodes = tuple(dict.fromkeys(recorder.node_of(t) for t in found))
    except Exception:  # the run in eval mode has succeeded, and says all there is to say of such a model
        recorder.forget_second_run(mark)
        return ()
    finally:
        for module in recorder.modules.values():  # forward may have called train()
            module.training = False
    more = _shapes(nodes) != _shapes(outputs) or any(n in first and n not in outputs for n in nodes)
    if not more and unread(recorder) == before:
        recorder.forget_second_run(mark)
        return ()
    for node in recorder.graph.nodes:
        if node not in first:
            node.meta["training_only"] = True
    return nodes


def _shapes(nodes: tuple[fx.Node, ...]) -> Counter[tuple[int, ...]]:
    return Counter(node.meta["val"].shape for node in nodes)


def _leads_nowhere(recorder: Recorder, outputs: tuple[fx.Node, ...]) -> bool:
    """A parameter was used for something that is no part of the result, kept for training perhaps."""
    parameters, useful = [], set(outputs)
    for node in reversed(recorder.graph.nodes):
        if node.op != "call_function":
            continue
        if node in useful or _writes(node):
            useful.update(node.all_input_nodes)
        else:
            parameters += [n for n in node.all_input_nodes if n.op == "get_attr" and "parameter" in n.meta]
    return bool(parameters)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


# Functional dropout as in eval mode: what follows it is what the first run did.
_NOTHING_DROPPED = [Patch(functional, name, lambda _: lambda input, *_args, **_kwargs: input) for name in _DROPOUTS]
