"""How far what batch norms read is from what they have stored of their training data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one call of a batch norm read: means and variances of its channels, and those that it stores. `least`: its
    eps, which it adds to variances."""

    mean: Tensor
    variance: Tensor
    stored_mean: Tensor
    stored_variance: Tensor
    least: float

    @classmethod
    def of(cls, x: Tensor, stored_mean: Tensor, stored_variance: Tensor, least: float) -> Seen:
        """What these values, channels along axis 1, say; gradients flow through it."""
        mean, variance = _of_channels(_wide(x))
        return cls(mean, variance, stored_mean.to(mean.dtype), stored_variance.to(mean.dtype), least)

    def mismatch(self) -> Tensor:
        """The divergence (Kullback-Leibler, in nats) of a normal distribution of what was read from that of what is
        stored, as the mean over channels."""
        stored = self.stored_variance + self.least
        ratio = (self.variance + self.least) / stored
        return ((self.mean - self.stored_mean).square() / stored + ratio - 1 - ratio.log()).mean() / 2


def mismatch(seen: Sequence[Seen]) -> Tensor:
    """The mean over the calls of batch norms, a scalar in at least single precision."""
    return torch.stack([one.mismatch() for one in seen]).mean()


class Watching(TorchFunctionMode):
    """While inside, on this thread, `seen` gathers what batch norms with stored statistics read; they do what they did.

    Batch norms are found where they call torch, so that those of any class are, and functions too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self.means: set[int] = set()  # where in memory they are stored

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        given = kwargs or {}
        if function is F.batch_norm:
            return self._batch_norm(*args, **given)
        if function is torch.batch_norm:  # another order, and one flag more
            x, weight, bias, mean, variance, training, momentum, eps, _ = args
            return self._batch_norm(x, mean, variance, weight, bias, training, momentum, eps)
        return function(*args, **given)

    def _batch_norm(
        self, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
        bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        if training or running_mean is None or running_var is None:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        mean, variance = running_mean.detach(), running_var.detach()
        self.means.add(mean.data_ptr())
        scale = (variance + eps).rsqrt()
        if weight is not None:
            scale = scale * weight.detach()
        shift = -mean * scale if bias is None else bias.detach() - mean * scale
        made: tuple[Tensor, Tensor, Tensor] = _Normalised.apply(input, scale, shift)
        y, *found = made
        wide = found[0].dtype
        self.seen.append(Seen(found[0], found[1], mean.to(wide), variance.to(wide), eps))
        return y


class _Normalised(torch.autograd.Function):
    """(x, scale, shift) -> (x * scale + shift, means of x, variances of x), by channel.

    One pass over x each way: what torch has for it takes several times as long on a CPU, and most of the time of all
    is spent here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = _statistics(x)
        ctx.save_for_backward(x, scale, mean)
        view = _view(x)
        return torch.addcmul(shift.to(x.dtype).view(view), x, scale.to(x.dtype).view(view)), mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, scale, mean = ctx.saved_tensors
        of_y, of_mean, of_variance = grads
        rows, view = x.numel() // x.shape[1], _view(x)
        factor = of_variance * (2 / rows)
        constant = of_mean / rows - factor * mean
        out = torch.addcmul(constant.to(x.dtype).view(view), x, factor.to(x.dtype).view(view))
        return out.addcmul_(of_y, scale.to(x.dtype).view(view)), None, None


def _view(x: Tensor) -> list[int]:
    return [1, -1, *[1] * (x.dim() - 2)]


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances (divided by the number of rows) of the channels, in at least single precision."""
    wide = _wide(x)
    if wide.device.type == "cpu":  # five times as fast as var_mean
        found: tuple[Tensor, Tensor] = torch.batch_norm_update_stats(wide, None, None, 0.0)
        return found
    return _of_channels(wide)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _of_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x, [axis for axis in range(x.dim()) if axis != 1], correction=0)
    return mean, variance
