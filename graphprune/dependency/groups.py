"""Groups: what the analysis hands to every later stage. Plain immutable data."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from typing import Literal

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Role = Literal["out", "in", "vector", "other"]


class GroupKind(enum.StrEnum):
    """What the units of a group are. Equal to its text, as in `group.kind == "head"`.

    The first that applies names a group: where Dims of several kinds are tied, the more specific one.
    """

    HEAD = "head"
    HEAD_FEATURE = "head feature"
    """Of queries, keys and values, where they cannot differ."""
    QK_FEATURE = "qk feature"
    """Of queries and keys, per head."""
    V_FEATURE = "v feature"
    """Of values, per head."""
    CONV_GROUP = "conv group"
    """A whole group of a grouped convolution."""
    GROUP_CHANNEL = "group channel"
    """A channel inside each group of a grouped convolution."""
    RESIDUAL_CHANNEL = "residual channel"
    """The width of a residual stream, in transformers that of the embeddings."""
    EMBEDDING_CHANNEL = "embedding channel"
    """Of other embeddings."""
    MLP_CHANNEL = "mlp channel"
    """A hidden width between linear layers or 1 x 1 convolutions."""
    CHANNEL = "channel"
    """Any other."""

    @property
    def is_head(self) -> bool:
        """A whole head of attention."""
        return self is GroupKind.HEAD

    @property
    def is_feature(self) -> bool:
        """A feature inside the heads of attention."""
        return self in _FEATURES

    @property
    def is_channel(self) -> bool:
        """A channel of a width that nothing cuts into heads or groups."""
        return self in _CHANNELS

    @classmethod
    def most_specific(cls, found: Iterable[GroupKind]) -> GroupKind:
        """The one that names a group whose Dims are of all these kinds."""
        return min(found, key=_RANK.__getitem__)

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise ValueError(f"{str(value)[:40]!r} is no kind of group; expected one of {', '.join(cls)}")

    def __repr__(self) -> str:
        return repr(self.value)


_RANK = {kind: rank for rank, kind in enumerate(GroupKind)}
_FEATURES = frozenset((GroupKind.HEAD_FEATURE, GroupKind.QK_FEATURE, GroupKind.V_FEATURE))
_CHANNELS = frozenset(
    (GroupKind.RESIDUAL_CHANNEL, GroupKind.EMBEDDING_CHANNEL, GroupKind.MLP_CHANNEL, GroupKind.CHANNEL)
)


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

    `kind` (`GroupKind`) says what the units are: "residual channel", "mlp channel", "head"... `name` is the parameter
    that produces the channels and its axis, for people to read. `structure` is equal for groups that have the same
    kinds and shapes of members (scope="isomorphic").
    """

    index: int
    name: str
    kind: GroupKind
    size: int
    members: tuple[Member, ...]
    structure: str
