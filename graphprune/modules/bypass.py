"""What stays where a layer is taken out that is no element of a list."""

from __future__ import annotations

from typing import Any

from torch import nn


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
        x = args[self.stream] if isinstance(self.stream, int) else kwargs[self.stream]
        return x if not self.form else (x, *(None,) * (self.form - 1))

    def extra_repr(self) -> str:
        return f"stream={self.stream!r}, form={self.form}"
