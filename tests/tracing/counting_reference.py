"""A second count that shares no code with ours, and a way to make networks of single calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


class Calls(nn.Module):
    """A network whose forward is a function; `parts` are its modules, `scale` its own parameter."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts, self.scale = function, nn.ModuleList(parts), nn.Parameter(torch.ones(1))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self.parts, *inputs)


def independent_macs(model: nn.Module, *inputs: Any) -> int:
    """torch's own counter: half its FLOPs. It knows no fused kernels, so attention runs as two products."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.eval()(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    flops: int = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


class _Products(TorchDispatchMode):
    """Multiplications of all matrix products, by the shapes that they have when they run."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "_grouped_mm"):
            self.total += out.numel() * args[0].shape[-1]
        elif name == "addmm":
            self.total += out.numel() * args[1].shape[-1]
        else:
            assert "mm" not in name and name not in ("convolution", "baddbmm", "_trilinear"), name
        return out


def computed(model: nn.Module, example: dict[str, Any] | Tensor) -> int:
    """MACs of a run whose only work are matrix products, grouped ones among them."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Products() as products:
        model(**example) if isinstance(example, dict) else model(example)
    return products.total
