"""Statistics of what layers read, channel by channel, over calibration batches."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .gradients import channels_first
from .observe import observe, refuse_infinite_call
from .statistics import Calibration


@dataclasses.dataclass
class ChannelStatistics:
    """Sums over samples and positions of what one layer reads, one number per channel, in float64.

    `total`, `absolute`, `squares`: of x, |x| and x^2; `nonzero`: how often x is not zero; `rows`: how many there are;
    `rank`: sum over samples of the rank of the feature map; `independence`: sum over samples of the fall of the nuclear
    norm when the channel is zeroed; both only where asked for. `samples`: how many samples these sums are over.
    """

    total: Tensor
    absolute: Tensor
    squares: Tensor
    nonzero: Tensor
    rank: Tensor
    independence: Tensor
    rows: int = 0
    samples: int = 0

    @classmethod
    def zeros(cls, channels: int, device: torch.device) -> ChannelStatistics:
        total, absolute, squares, nonzero, rank, independence = torch.zeros(6, channels, dtype=torch.float64).to(device)
        return cls(total, absolute, squares, nonzero, rank, independence)

    @property
    def mean(self) -> Tensor:
        return self.total / max(self.rows, 1)

    @property
    def variance(self) -> Tensor:
        return (self.squares / max(self.rows, 1) - self.mean.square()).clamp_min(0)


def channel_statistics(calibration: Calibration, *, maps: bool = False) -> dict[str, ChannelStatistics]:
    """Statistics of the inputs of every reader, in one pass; `maps`: also those of whole feature maps (slow)."""
    readers = list(calibration.readers.values())
    out: dict[str, ChannelStatistics] = {}
    for index, example in enumerate(calibration.data.inputs()):
        calls = observe(calibration.model, readers, example, inputs=True)
        for reader in readers:
            for call in calls[reader.weight]:
                assert call.x is not None
                refuse_infinite_call(reader, call, index)
                x = channels_first(call.x, reader.data_axis).double()
                found = out.setdefault(reader.weight, ChannelStatistics.zeros(x.shape[1], x.device))
                _add(found, x)
                if maps:
                    shape = call.x.shape[-2:] if reader.data_axis < -1 and call.x.dim() >= 4 else None
                    found.rank += _ranks(x, shape)
                    found.independence += _independence(x)
    return out


def _add(found: ChannelStatistics, x: Tensor) -> None:
    found.total += x.sum((0, 2))
    found.absolute += x.abs().sum((0, 2))
    found.squares += x.square().sum((0, 2))
    found.nonzero += (x != 0).sum((0, 2))
    found.rows += x.shape[0] * x.shape[2]
    found.samples += x.shape[0]


def _ranks(x: Tensor, shape: torch.Size | None) -> Tensor:
    """Sum over samples of each channel's feature map rank; a channel without a map has rank 1, or 0 if it is zero."""
    if shape is None:
        return (x != 0).any(2).double().sum(0)
    maps = x.reshape(x.shape[0], x.shape[1], -1, shape[-1])
    ranks: Tensor = torch.linalg.matrix_rank(maps.float()).double().sum(0)
    return ranks


def _independence(x: Tensor) -> Tensor:
    """Sum over samples of |A|_* - |A without row c|_*, A = (channels, positions), from the Gram matrices."""
    gram = x @ x.mT
    whole = _nuclear(gram)
    channels = gram.shape[1]
    keep = 1 - torch.eye(channels, dtype=gram.dtype, device=gram.device)
    masks = keep[:, :, None] * keep[:, None, :]
    without = torch.stack([_nuclear(g * masks) for g in gram])  # (samples, channels)
    return (whole[:, None] - without).sum(0)


def _nuclear(gram: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum(-1)
    return norms
