"""What stays where a layer is taken out that is no element of a list, or a branch of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Bypass(nn.Module):
    """Returns one of its arguments.

    `stream`: which one, a position or the name of a keyword. `form`: 0 to return it as it is, else the length of a
    tuple that begins with it and holds None otherwise, as attention layers return (hidden, None).
    """

    def __init__(self, stream: int | str, form: int = 0) -> None:
        super().__init__()
        self.stream, self.form = stream, form

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stream."""
        x = self._result(args[self.stream] if isinstance(self.stream, int) else kwargs[self.stream])
        return x if not self.form else (x, *(None,) * (self.form - 1))

    def _result(self, stream: Tensor) -> Tensor:
        return stream

    def extra_repr(self) -> str:
        return f"stream={self.stream!r}, form={self.form}"


class Silence(Bypass):
    """Returns zeros of the shape of one of its arguments: a residual branch that adds nothing."""

    def _result(self, stream: Tensor) -> Tensor:
        return torch.zeros_like(stream)  # of its own memory: the code around may add to it in place


class Gap(Bypass):
    """Stands in a list for a layer that is about to be taken out of it.

    Code around may look at what the layer has (`layers[0].self_attn.batch_first`): everything but the call is the
    layer's own. Its parameters are not the gap's.
    """

    def __init__(self, whole: nn.Module, stream: int | str, form: int = 0) -> None:
        super().__init__(stream, form)
        self.__dict__["whole"] = _Held(whole)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["whole"].module, name)


class _Held:
    """Keeps a module out of its holder's modules."""

    __slots__ = ("module",)

    def __init__(self, module: nn.Module) -> None:
        self.module = module
