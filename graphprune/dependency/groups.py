"""Groups: what the analysis hands to every later stage. Plain immutable data."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Role = Literal["out", "in", "vector", "other"]


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One axis of one parameter or buffer that a group reaches.

    `positions[u]` are the indices along `axis` that go when unit `u` of the group goes, shape (units, k): k is 1 for
    an ordinary channel, 64 for a head of 64 features, 2 for the two halves of a gated unit.

    `role`: "out" - the axis that produces channels (filters of a convolution, rows of a Linear);
    "in" - the axis that consumes them; "vector" - the tensor has only this axis longer than 1 (bias, norm scale,
    running statistics); "other" - anything else (a position embedding, an embedding table).
    """

    parameter: str
    axis: int
    positions: Ints
    role: Role


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Interchangeable units: each removes the same number of positions from the same parameter axes.

    `kind` is "residual channel" (the width of a residual stream, in transformers that of the embeddings), "embedding
    channel" (of other embeddings), "mlp channel" (a hidden width between linear layers or 1 x 1 convolutions), any
    other "channel", "head", "qk feature" (of queries and keys, per head), "v feature" (of values), "head feature" (of
    all three, where they cannot differ), "conv group" or "group channel" (a channel inside each group of a grouped
    convolution). `name` is the parameter that produces the channels and its axis, for people to read.
    `structure` is equal for groups that have the same kinds and shapes of members (scope="isomorphic").
    """

    index: int
    name: str
    kind: str
    size: int
    members: tuple[Member, ...]
    structure: str
