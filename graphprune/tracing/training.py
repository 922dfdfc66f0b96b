"""Paths that a model takes in training mode only: auxiliary heads, for example."""

from __future__ import annotations

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from ..support.interrupts import interruptible
from .example import ExampleInput, result_tensors
from .names import named_tensors
from .recorder import Recorder

# What these do in training mode (batch statistics, dropped elements) changes values, never which channels meet.
_SAME_CHANNELS = (_NormBase, _DropoutNd, nn.RNNBase, nn.MultiheadAttention, nn.RReLU)


def unread(recorder: Recorder, model: nn.Module) -> set[int]:
    """The parameters (by identity) that the run so far has not read."""
    read = {n.meta.get("parameter") for n in recorder.graph.nodes if n.op == "get_attr"}
    names: dict[int, set[str]] = {}
    for name, tensor in named_tensors(model).items():
        if isinstance(tensor, nn.Parameter):
            names.setdefault(id(tensor), set()).add(name)
    return {key for key, found in names.items() if not found & read}


def record_training_paths(recorder: Recorder, model: nn.Module, example: ExampleInput) -> tuple[fx.Node, ...]:
    """Run the model a second time with its training flags set, and add to the graph what the first run did not do.

    Returns the output nodes that are new. The graph is left as it was when the model cannot run like that (detectors
    want targets) or reads no parameter that it had not read before.
    """
    before = unread(recorder, model)
    if not before:
        return ()
    mark = recorder.begin_second_run()
    for module in recorder.modules.values():
        module.training = not isinstance(module, _SAME_CHANNELS)
    try:
        with interruptible():
            out = example.call(model)
        found: list[Tensor] = result_tensors(out)
        nodes = tuple(dict.fromkeys(recorder.node_of(t) for t in found))
    except Exception:  # the run in eval mode has succeeded, and says all there is to say of such a model
        recorder.forget_second_run(mark)
        return ()
    finally:
        for module in recorder.modules.values():
            module.training = False
    if unread(recorder, model) == before:
        recorder.forget_second_run(mark)
        return ()
    return nodes

