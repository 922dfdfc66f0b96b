"""torchvision's own operators: regions of feature maps, deformable convolution."""

from __future__ import annotations

from ..context import NodeContext, Result
from ..state import State
from .registry import empty, rule


@rule("roi_align", "roi_pool")
def regions(context: NodeContext) -> Result:
    """A feature map (N, C, H, W) read in rectangles: (rectangles, C, height, width)."""
    x, boxes = context.state(context.arg(0)), context.state(context.arg(1, "rois"))
    context.freeze_state(boxes, "spatial", "used as positions")
    for axis in (0, 2, 3):
        context.freeze(x.axis(axis), "spatial", f"{context.operation} works along this axis")
    meta = context.node.meta["val"]
    if isinstance(meta, tuple):
        return [State(s, {1: x.axis(1)}) if s is not None else None for s in context.shapes]
    return State(context.shape, {1: x.axis(1)})


@rule("deform_conv2d")
def deformable(context: NodeContext) -> Result:
    """A convolution whose taps are moved by `offset` and weighted by `mask`, both positions and no channels."""
    x, weight, offset, mask, bias = (context.state(context.arg(i)) for i in range(5))
    for taps in (offset, mask):
        context.freeze_state(taps, "spatial", "moves or weights the taps of a deformable convolution")
    for axis in (2, 3):
        context.freeze(weight.axis(axis), "kernel", "kernel positions are no channels")
        context.freeze(x.axis(axis), "spatial", "a convolution slides along this axis")
    groups, offset_groups = int(context.arg(11)), int(context.arg(12))
    if groups != 1 or offset_groups != 1:
        for state in (x, weight, bias):
            context.freeze_state(state, "operator", "no rule for deformable convolution in groups")
        return empty(context)
    context.tie(x.axis(1), weight.axis(1), weight.shape[1], "reads channels that cannot be removed")
    context.tie(weight.axis(0), bias.axis(0), weight.shape[0], "bias that cannot be removed")
    return State(context.shape, {0: x.axis(0), 1: weight.axis(0)})
