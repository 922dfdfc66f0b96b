"""Worth by what a unit passes on: "activation_mean", "activation_variance", "apoz", "wanda", "hrank", "chip"."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..dependency.groups import Group
from .calibration.activations import ChannelStatistics, channel_statistics
from .calibration.layers import Reader
from .calibration.statistics import Calibration
from .context import Floats, ImportanceContext
from .gradient import by_units
from .magnitude import mean_norm, over_members
from .registry import criterion, normalise

_Score = Callable[[ChannelStatistics, Reader], Tensor]


def _over_readers(context: ImportanceContext, group: Group, score: _Score, maps: bool = False) -> Floats:
    """Mean over the layers that read the group of a score per channel, summed over each unit's channels. A group that
    no linear layer or convolution reads scores by its weights ("l2"), on the same scale inside the group only."""
    calibration = context.calibration
    found = calibration.cached(_with_maps if maps else channel_statistics)
    vectors = []
    for member in context.members(group, ("in",)):
        reader = calibration.readers.get(member.parameter)
        if reader is None or reader.in_axis != member.axis or member.parameter not in found:
            continue
        values = score(found[member.parameter], reader)
        vectors.append(by_units(values, reader.groups, reader.transposed, member).cpu().numpy())
    return over_members(group, vectors) if vectors else normalise(mean_norm(context, group, 2))


def _with_maps(calibration: Calibration) -> dict[str, ChannelStatistics]:
    return channel_statistics(calibration, maps=True)


@criterion("activation_mean", needs="inputs", folded=True)
def activation_mean(context: ImportanceContext, group: Group) -> Floats:
    """Mean |x| of what each unit passes on (Molchanov et al., ICLR 2017, the activation criterion)."""
    return _over_readers(context, group, lambda s, _: s.absolute / s.rows)


@criterion("activation_variance", needs="inputs", folded=True)
def activation_variance(context: ImportanceContext, group: Group) -> Floats:
    """Variance of what each unit passes on, over samples and positions: what is constant can go into a bias (Polyak &
    Wolf, Channel-level acceleration of deep face representations, IEEE Access 2015)."""
    return _over_readers(context, group, lambda s, _: s.variance)


@criterion("apoz", needs="inputs", folded=True)
def apoz(context: ImportanceContext, group: Group) -> Floats:
    """1 - average percentage of zeros of what each unit passes on (Hu et al., Network Trimming, 2016)."""
    return _over_readers(context, group, lambda s, _: s.nonzero / s.rows)


@criterion("wanda", needs="inputs", folded=True)
def wanda(context: ImportanceContext, group: Group) -> Floats:
    """|W| |x|_2 summed over the weights that read each unit (Sun et al., Wanda, ICLR 2024, summed over whole input
    columns): how much of the layers' results comes through the unit."""

    def score(statistics: ChannelStatistics, reader: Reader) -> Tensor:
        weight = context.calibration.weights[reader.weight].detach().double().abs()
        columns = weight.movedim(reader.in_axis, 0).flatten(1)
        if reader.groups > 1 and not reader.transposed:
            rows = weight.reshape(reader.groups, -1, *weight.shape[1:])
            columns = rows.movedim(2, 1).flatten(2).flatten(0, 1)  # (groups x channels in a group, the rest)
        return columns.sum(1) * statistics.squares.sqrt()

    return _over_readers(context, group, score)


@criterion("hrank", needs="inputs", folded=True)
def hrank(context: ImportanceContext, group: Group) -> Floats:
    """Average rank of each unit's feature maps (Lin et al., HRank, CVPR 2020). Slow: one decomposition per map."""
    return _over_readers(context, group, lambda s, _: s.rank / s.samples, maps=True)


@criterion("chip", needs="inputs", folded=True)
def chip(context: ImportanceContext, group: Group) -> Floats:
    """Channel independence: how far the nuclear norm of the feature matrix (channels x positions) falls when a channel
    is zeroed, mean over samples (Sui et al., CHIP, NeurIPS 2021). Slow: one decomposition per sample and channel. A
    unit of several channels takes their sum."""
    return _over_readers(context, group, lambda s, _: s.independence / s.samples, maps=True)


