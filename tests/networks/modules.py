"""Closed torch.nn modules: multi-head attention, transformer layers, recurrent networks."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .registry import network, tokens, variant, vector, words


class SelfAttentionModule(nn.Module):
    def __init__(self, batch_first: bool = True, weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.weights = weights
        self.embed = nn.Linear(10, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=batch_first, **options)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        y = self.embed(x)
        mixed, weights = self.attention(y, y, y, need_weights=self.weights)
        out = self.head(y + mixed)
        return (out, weights) if self.weights else out


variant("mha_self", SelfAttentionModule, tokens(), temperature=True)
variant("mha_self_without_bias", lambda: SelfAttentionModule(bias=False), tokens(), temperature=True)
variant("mha_self_extra_bias", lambda: SelfAttentionModule(add_bias_kv=True), tokens(), temperature=True)
variant("mha_self_zero_token", lambda: SelfAttentionModule(add_zero_attn=True), tokens(), temperature=True)
variant("mha_self_sequence_first", lambda: SelfAttentionModule(False), lambda: torch.randn(6, 2, 10), batch_axis=1,
        temperature=True)
# The averaged weights of the heads are an output: their number may not change.
variant("mha_self_weights", lambda: SelfAttentionModule(weights=True), tokens(), temperature=True)


class CrossAttentionModule(nn.Module):
    def __init__(self, key_width: int | None = None, value_width: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Linear(10, 16)
        self.context = nn.Linear(8, key_width or 16)
        self.value = nn.Linear(8, value_width or 16)
        self.attention = nn.MultiheadAttention(16, 4, kdim=key_width, vdim=value_width, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        query = self.embed(x)
        return self.head(self.attention(query, self.context(memory), self.value(memory), need_weights=False)[0])


def _two_sequences() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 5, 10), torch.randn(2, 7, 8)


variant("mha_cross", CrossAttentionModule, _two_sequences, temperature=True)
variant("mha_cross_other_widths", lambda: CrossAttentionModule(12, 9), _two_sequences, temperature=True)


@network(tokens(), temperature=True)
class MaskedAttentionModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(10, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=y.dtype)
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -1] = True
        mixed, _ = self.attention(y, y, y, attn_mask=mask, key_padding_mask=padding.to(y.dtype) * -1e4)
        return self.head(mixed)


@network(tokens(), temperature=True)
class ImageAttentionModule(nn.Module):
    """nn.MultiheadAttention alone: its width is the input and the output of the network, only heads could go."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(10, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, **options)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)))


variant("transformer_encoder_layer", Encoder, tokens(), statistics=True, temperature=True)
variant("transformer_encoder_layer_pre_norm", lambda: Encoder(norm_first=True, activation="gelu"), tokens(),
        statistics=True, temperature=True)


@network(tokens(), statistics=True, temperature=True)
class TransformerEncoderStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(10, 12)
        layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(12), enable_nested_tensor=False)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


@network(_two_sequences, statistics=True, temperature=True)
class TransformerDecoderLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.memory = nn.Linear(10, 12), nn.Linear(8, 12)
        self.layer = nn.TransformerDecoderLayer(12, 3, 18, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.head(self.layer(self.embed(x), self.memory(memory), tgt_mask=mask, tgt_is_causal=True))


class Recurrent(nn.Module):
    """A recurrent network between two Linear layers; `read` says what of its results is used."""

    def __init__(self, kind: str, read: str = "sequence", width: int = 0, **options: Any) -> None:
        super().__init__()
        self.read = read
        self.batch_first = options.setdefault("batch_first", True)
        self.embed = nn.Linear(10, 12)
        self.network = getattr(nn, kind)(12, 14, **options)
        self.head = nn.Linear(width or 14, 4)

    def forward(self, x: Tensor) -> Tensor:
        sequence, state = self.network(self.embed(x))
        if self.read == "last":
            return self.head(sequence[:, -1])
        if self.read == "hidden":
            hidden = state[0] if isinstance(state, tuple) else state
            return self.head(hidden[-1])
        if self.read == "both_hidden":
            return self.head(torch.cat([state[0][-2], state[0][-1]], dim=-1))
        if self.read == "cell":
            return self.head(state[1].squeeze(0))
        return self.head(sequence)


variant("lstm", lambda: Recurrent("LSTM"), tokens())
variant("lstm_last_step", lambda: Recurrent("LSTM", "last"), tokens())
variant("lstm_hidden", lambda: Recurrent("LSTM", "hidden"), tokens())
variant("lstm_cell_state", lambda: Recurrent("LSTM", "cell"), tokens())
variant("lstm_without_bias", lambda: Recurrent("LSTM", bias=False), tokens())
variant("lstm_bidirectional", lambda: Recurrent("LSTM", width=28, bidirectional=True), tokens())
variant("lstm_bidirectional_hidden", lambda: Recurrent("LSTM", "both_hidden", 28, bidirectional=True), tokens())
variant("lstm_two_layers", lambda: Recurrent("LSTM", num_layers=2, dropout=0.1), tokens())
variant("lstm_projected", lambda: Recurrent("LSTM", width=6, proj_size=6), tokens())
variant("lstm_sequence_first", lambda: Recurrent("LSTM", batch_first=False), lambda: torch.randn(6, 2, 10),
        batch_axis=1)
variant("gru", lambda: Recurrent("GRU"), tokens())
variant("gru_bidirectional_two_layers", lambda: Recurrent("GRU", width=28, num_layers=2, bidirectional=True), tokens())
variant("gru_hidden", lambda: Recurrent("GRU", "hidden"), tokens())
variant("rnn_tanh", lambda: Recurrent("RNN"), tokens())
variant("rnn_relu_two_layers", lambda: Recurrent("RNN", num_layers=2, nonlinearity="relu"), tokens())


class RecurrentCells(nn.Module):
    def __init__(self, kind: str, width: int = 12) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Linear(10, 9)
        self.cell = getattr(nn, kind)(9, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(x.size(0), self.width)
        state: Any = (hidden, torch.zeros_like(hidden)) if isinstance(self.cell, nn.LSTMCell) else hidden
        outputs = []
        for step in torch.relu(self.embed(x)).unbind(1):
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return self.head(torch.stack(outputs, 1))


for _kind in ("LSTMCell", "GRUCell", "RNNCell"):
    variant(f"cells_{_kind[:-4].lower()}", lambda kind=_kind: RecurrentCells(kind), tokens(4))  # type: ignore[misc]


@network(tokens(4))
class LearnedInitialState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(10, 12, batch_first=True)
        self.hidden = nn.Parameter(torch.randn(1, 1, 12))
        self.cell = nn.Parameter(torch.randn(1, 1, 12))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        state = self.hidden.expand(-1, b, -1).contiguous(), self.cell.expand(-1, b, -1).contiguous()
        return self.head(self.lstm(x, state)[0])


@network(words(5), batch_axis=None)
class PackedSequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 9)
        self.gru = nn.GRU(9, 11, batch_first=True)
        self.head = nn.Linear(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(x), torch.tensor([5, 3]), batch_first=True)
        sequence, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        return self.head(sequence)


@network(words())
class EncoderDecoderRecurrent(nn.Module):
    """The encoder's last state starts the decoder: both must have the same width."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(20, 8), nn.Embedding(20, 10)
        self.encoder, self.decoder = nn.GRU(8, 12, batch_first=True), nn.GRU(10, 12, batch_first=True)
        self.head = nn.Linear(12, 20)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.encoder(self.source(x))
        return self.head(self.decoder(self.target(x.flip(1)), state)[0])


@network(tokens())
class RecurrentResidual(nn.Module):
    """Two recurrent layers of equal width with a residual connection, as in speech encoders."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(10, 12)
        self.first, self.second = nn.GRU(12, 12, batch_first=True), nn.LSTM(12, 12, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        y = y + self.first(y)[0]
        return self.head(y + self.second(y)[0])


@network(vector(12))
class HandWrittenRecurrence(nn.Module):
    """A gated recurrence over bare matrices, four steps of three features each."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.width = width
        self.inputs = nn.Parameter(0.4 * torch.randn(3, 2 * width))
        self.recurrent = nn.Parameter(0.3 * torch.randn(width, 2 * width))
        self.bias = nn.Parameter(0.3 * torch.randn(2 * width))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[0], self.width, dtype=x.dtype)
        for step in x.split(3, dim=1):
            gate, value = (step @ self.inputs + state @ self.recurrent + self.bias).chunk(2, 1)
            state = torch.lerp(state, torch.tanh(value), gate.sigmoid())
        return self.head(state)


@network(lambda: torch.randn(2, 3, 3, 5, 5))
class ConvolutionalLstm(nn.Module):
    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.width = width
        self.gates = nn.Conv2d(3 + width, 4 * width, 3, padding=1)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, steps, _, h, w = x.shape
        hidden = cell = x.new_zeros(b, self.width, h, w)
        for t in range(steps):
            i, f, o, g = torch.split(self.gates(torch.cat([x[:, t], hidden], 1)), self.width, dim=1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * F.tanh(cell)
        return self.head(hidden)
