"""A stack of recurrent layers of which each has a width of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ...errors import GraphPruneError

_KERNELS: dict[str, Any] = {
    "LSTM": torch._VF.lstm,
    "GRU": torch._VF.gru,
    "RNN_TANH": torch._VF.rnn_tanh,
    "RNN_RELU": torch._VF.rnn_relu,
}
_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
States = tuple[Tensor, ...]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
          "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")  # fmt: skip


def run_layers(
    mode: str,
    data: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[States | None],
    layers: Sequence[list[Tensor]],
    *,
    biases: bool,
    directions: int,
    batch_first: bool,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[Tensor, list[States]]:
    """torch's kernels, one call per layer: the output and the last states of each layer.

    `mode`: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU". `data`: the sequence, or the data of a packed one with its
    `batch_sizes`. `states`: per layer (h,) or (h, c), each of shape (directions, batch, width), or None for zeros.
    `layers`: per layer the weights in torch's order. `dropout` between layers, when `training`.
    """
    ends: list[States] = []
    kernel = _KERNELS[mode]
    for index, (weights, given) in enumerate(zip(layers, states, strict=True)):
        start = given or _zeros(mode, data, batch_sizes, weights, directions, batch_first)
        hidden = start if mode == "LSTM" else start[0]
        if batch_sizes is None:
            out = kernel(data, hidden, weights, biases, 1, 0.0, training, directions == 2, batch_first)
        else:
            out = kernel(data, batch_sizes, hidden, weights, biases, 1, 0.0, training, directions == 2)
        data = out[0]
        ends.append(tuple(out[1:]))
        if dropout and training and index < len(layers) - 1:
            data = nn.functional.dropout(data, dropout, training)
    return data, ends


def _zeros(
    mode: str, data: Tensor, batch_sizes: Tensor | None, weights: list[Tensor], directions: int, batch_first: bool
) -> States:
    batch = int(batch_sizes[0]) if batch_sizes is not None else data.shape[0 if batch_first else 1]
    hidden = torch.zeros(directions, batch, weights[1].shape[1], dtype=data.dtype, device=data.device)
    if mode != "LSTM":
        return (hidden,)
    projected = next((w for w in weights[2 : len(weights) // directions] if w.dim() == 2), None)
    if projected is None:
        return hidden, hidden
    return hidden, torch.zeros(directions, batch, projected.shape[1], dtype=data.dtype, device=data.device)


class Recurrent(nn.Module):
    """`nn.LSTM`, `nn.GRU` or `nn.RNN` with free widths: every layer has its own hidden width (and projected width).

    Parameters, their names and their order are those of the torch module, inputs too: a sequence (length, batch,
    features), batch first, unbatched, or a `PackedSequence`. What it returns is the same as well, except that where
    layers were of different widths when it was made (`stacked` is False) the last states are a tuple with one tensor
    (directions, batch, width) per layer, and initial states are given in that form.
    """

    def __init__(self, module: nn.RNNBase) -> None:
        """Takes over the parameters of `module` - the objects themselves, whatever their widths - its hooks and its
        mode."""
        super().__init__()
        self.mode = module.mode
        self.num_layers, self.bidirectional, self.bias = module.num_layers, module.bidirectional, module.bias
        self.batch_first, self.dropout = module.batch_first, float(module.dropout)
        self.projected = module.proj_size > 0
        self.training = module.training
        for name, parameter in module._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in module._buffers.items():
            self.register_buffer(name, buffer, name not in module._non_persistent_buffers_set)
        for table in _HOOKS:
            setattr(self, table, copy.copy(getattr(module, table)))
        layers = self._layers()
        self.stacked = len({(w[0].shape[0], w[1].shape[1]) for w in layers}) == 1
        # for those who read them; nothing here does
        self.input_size, self.hidden_size, self.proj_size = module.input_size, module.hidden_size, module.proj_size

    @property
    def widths(self) -> tuple[int, ...]:
        """The hidden width of each layer."""
        return tuple(w[0].shape[0] // _GATES[self.mode] for w in self._layers())

    def _layers(self) -> list[list[Tensor]]:
        kinds = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if self.bias else [])]
        kinds += ["weight_hr"] if self.projected else []
        ends = ["", "_reverse"] if self.bidirectional else [""]
        return [
            [getattr(self, f"{kind}_l{layer}{end}") for end in ends for kind in kinds]
            for layer in range(self.num_layers)
        ]

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """As `nn.LSTM.forward` or that of the module whose place this takes."""
        packed = isinstance(input, PackedSequence)
        if packed:
            data, batch_sizes, order, back = input
        else:
            data, batch_sizes, order, back = input, None, None, None
        alone = not packed and data.dim() == 2
        if alone:
            data = data.unsqueeze(0 if self.batch_first else 1)
        out, ends = run_layers(
            self.mode,
            data,
            batch_sizes,
            self._given(hx, alone, order),
            self._layers(),
            biases=self.bias,
            directions=2 if self.bidirectional else 1,
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
        )
        parts = [tuple(_selected(s, back) for s in kind) for kind in zip(*ends, strict=True)]
        if alone:
            out = out.squeeze(0 if self.batch_first else 1)
            parts = [tuple(s.squeeze(1) for s in kind) for kind in parts]
        states = tuple(torch.cat(kind) if self.stacked else kind for kind in parts)
        result = PackedSequence(out, batch_sizes, order, back) if packed else out
        return result, (states if self.mode == "LSTM" else states[0])

    def _given(self, hx: Any, alone: bool, order: Tensor | None) -> list[States | None]:
        """The initial states the caller gave, per layer."""
        if hx is None:
            return [None] * self.num_layers
        kinds = []
        for state in hx if self.mode == "LSTM" else (hx,):
            layers = state.chunk(self.num_layers) if isinstance(state, Tensor) else tuple(state)
            if len(layers) != self.num_layers:
                raise GraphPruneError(f"initial states: expected {self.num_layers}, one per layer, got {len(layers)}")
            kinds.append([_selected(s.unsqueeze(1) if alone else s, order) for s in layers])
        return list(zip(*kinds, strict=True))

    def flatten_parameters(self) -> None:
        """Nothing: each layer is a call of its own."""

    def extra_repr(self) -> str:
        """Widths and options."""
        text = f"{self.mode}, {self.input_size}, widths={self.widths}, batch_first={self.batch_first}"
        return text + (", bidirectional=True" if self.bidirectional else "")


def _selected(state: Tensor, order: Tensor | None) -> Tensor:
    return state if order is None else state.index_select(1, order)


def replacement_of(module: nn.Module) -> Recurrent | None:
    """The module to put in place of an RNN of torch whose layers have been cut to different widths; None where there is
    nothing to replace."""
    if type(module) not in (nn.LSTM, nn.GRU, nn.RNN):
        return None
    assert isinstance(module, nn.RNNBase)
    found = Recurrent(module)
    return None if found.stacked else found
