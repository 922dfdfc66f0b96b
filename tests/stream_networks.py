"""Random networks of residual streams, with all that makes it hard to tell what a layer reads: casts, idle dropout,
writes in place, views, routing, recurrence, numbers that leave the tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, STEPS = 8, 5
Step = Callable[["Network", Tensor, int], Tensor]


def cast(_: Network, x: Tensor, i: int) -> Tensor:
    return x.to(torch.float32)


def wider(_: Network, x: Tensor, i: int) -> Tensor:
    return x.double().tanh().to(torch.float32)


def compact(_: Network, x: Tensor, i: int) -> Tensor:
    return x.contiguous()


def idle(net: Network, x: Tensor, i: int) -> Tensor:
    return F.dropout(x, 0.5, net.training)


def reshaped(_: Network, x: Tensor, i: int) -> Tensor:
    return x.flatten().view(x.shape).unsqueeze(0).squeeze(0)


def noisy(_: Network, x: Tensor, i: int) -> Tensor:
    return x + 0.1 * torch.randn_like(x)


def block(net: Network, x: Tensor, i: int) -> Tensor:
    return x + 0.5 * net.down[i](net.up[i](x).relu())


def idle_block(net: Network, x: Tensor, i: int) -> Tensor:
    return x + net.idle(net.down[i](net.up[i](x.to(torch.float32)).relu_()))


def in_place(net: Network, x: Tensor, i: int) -> Tensor:
    h = net.down[i](F.gelu(net.up[i](x)))
    h.add_(x)
    h[:, 0] = h[:, 1]
    return h


def written_later(net: Network, x: Tensor, i: int) -> Tensor:
    """A view is read after what it looks at was written to."""
    h = net.down[i](x)
    view = h.view(-1)
    h.mul_(2.0)
    return view.view(x.shape) + x


def window(net: Network, x: Tensor, i: int) -> Tensor:
    out = torch.zeros_like(x)
    out[:, 2:5] = net.down[i](net.up[i](x))[:, 2:5]
    return out + x


def shared(net: Network, x: Tensor, i: int) -> Tensor:
    return x + 0.3 * net.both(net.both(x).tanh())


def routed(net: Network, x: Tensor, i: int) -> Tensor:
    chosen, out = net.router(x).argmax(1), torch.zeros_like(x)
    for number in range(2):
        rows = torch.where(chosen == number)[0]
        out = out.index_add(0, rows, net.down[number](net.up[number](x[rows])))
    return x + out


def top(net: Network, x: Tensor, i: int) -> Tensor:
    found = x.topk(WIDTH, 1)
    return x + net.down[i](net.up[i](found.values)) * found.indices.sum(1, keepdim=True)


def measured(net: Network, x: Tensor, i: int) -> Tensor:
    """Numbers leave the tensors and come back."""
    scale = 1 + abs(x.mean().item())
    return net.down[i](net.up[i](x)) / scale + torch.tensor(x.sum(1).tolist())[:, None]


def branch(net: Network, x: Tensor, i: int) -> Tensor:
    return x + net.down[i](net.up[i](x)) if x.sum() > 0 else x - net.down[i](net.up[i](x).relu())


def recurrent(net: Network, x: Tensor, i: int) -> Tensor:
    return x + net.lstm(x[None])[0][0]


def normed(net: Network, x: Tensor, i: int) -> Tensor:
    mean, variance = torch.var_mean(x, 1, keepdim=True)
    first, second = net.up[i](x - variance / (1 + mean.abs())).chunk(2, 1)
    return x + net.down[i](torch.cat([first * second, first], 1))


STEPS_OF: list[Step] = [
    cast, wider, compact, idle, reshaped, noisy, block, idle_block, in_place, written_later, window, shared, routed,
    top, measured, branch, recurrent, normed,
]  # fmt: skip


class Network(nn.Module):
    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.up = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=bool(i % 2)) for i in range(STEPS))
        self.down = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=bool(i % 3)) for i in range(STEPS))
        self.both, self.router, self.idle = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2), nn.Dropout(0.2)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i, step in enumerate(self.steps):
            x = step(self, x, i)
        return self.last(x)
