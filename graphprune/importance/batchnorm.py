"""Worth by BatchNorm scales: "bn_scale"."""

from __future__ import annotations

from ..dependency.groups import Group
from ..errors import GraphPruneError
from .context import Floats, ImportanceContext
from .magnitude import mean_norm, over_members
from .registry import criterion, normalise


@criterion("bn_scale", comparable=True)
def bn_scale(context: ImportanceContext, group: Group) -> Floats:
    """|gamma| of the BatchNorm behind each channel (Liu et al., Network Slimming, ICCV 2017).

    Mean over the group's BatchNorms; a unit of k channels takes the mean of their scales. Trained scales, also where
    they are folded into convolutions. Compared across groups as they are, by one threshold, as in the paper.

    A group without BatchNorm is ranked by "l2", scaled so that its mean is the mean |gamma| of the whole model: among
    the other groups it counts as an average one. Raises GraphPruneError if the model has no BatchNorm with a scale.
    """
    if context.mean_bn_scale is None:
        raise GraphPruneError(
            "criterion 'bn_scale': the model has no BatchNorm layer with a scale (affine=True); use 'l2' instead"
        )
    scales = context.bn_scales(group)
    if scales:
        return over_members(group, scales)
    return normalise(mean_norm(context, group, 2)) * context.mean_bn_scale
