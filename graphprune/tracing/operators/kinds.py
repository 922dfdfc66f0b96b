"""What the table says of an operator."""

from __future__ import annotations

import dataclasses
import enum

from .products import Form
from .work import Work


class Kind(enum.Enum):
    """What an operator does, as far as channels are concerned."""

    CONTRACTION = "contraction"
    CONVOLUTION = "convolution"
    RECURRENT = "recurrent"
    ATTENTION = "attention"
    LOOKUP = "lookup"
    DECLARED = "declared"  # a user's: what it does, its rule says
    MOVEMENT = "movement"
    POINTWISE = "pointwise"
    BATCH_NORM = "batch norm"
    LAYER_NORM = "layer norm"
    RMS_NORM = "rms norm"
    GROUP_NORM = "group norm"
    WEIGHT_NORM = "weight norm"
    SOFTMAX = "softmax"
    REDUCTION = "reduction"
    POOLING = "pooling"
    RESAMPLING = "resampling"
    QUANTISATION = "quantisation"
    READING = "reading"  # plain numbers, for Python


class Move(enum.Enum):
    """What an operator does with the elements of a tensor, where it changes none."""

    STAYS = "stays"  # each in its place: copies, casts, dropout in eval mode
    RESHAPES = "reshapes"  # in their order, in another shape
    ARRANGES = "arranges"  # all of them, in another order
    PICKS = "picks"  # some of them
    REPEATS = "repeats"
    JOINS = "joins"  # those of several tensors
    PADS = "pads"


class Merge(enum.Enum):
    """How two tensors become one, element by element; the value is the sign of the second one in a sum."""

    SUM = 1.0
    DIFFERENCE = -1.0
    PRODUCT = "product"
    QUOTIENT = "quotient"


@dataclasses.dataclass(frozen=True)
class Operator:
    """One line of the table.

    `form`: how its arguments make products. `work`: the multiply-accumulates of a call, where these are not those of
    the form's products (`work_of_product`). `move`: what a movement does. `view`: its result lies in the memory of its
    operand. `averages`: means over places. `merge`: how it joins two operands. `zeros`: zeros in its first operand are
    zeros in its result, because it scales. `bends`: where a function of one element is not smooth; `clips`: it does no
    more than clip, between these two numbers or two arguments. `own_statistics`: whether a batch norm takes the
    statistics of its batch, or the place of the argument that says so. `numbers`: the place of integers, one for each
    channel, that go with the channels.
    """

    kind: Kind
    form: Form | None = None
    work: Work | None = None
    move: Move | None = None
    view: bool = False
    averages: bool = False
    merge: Merge | None = None
    zeros: bool = False
    bends: tuple[float, ...] = ()
    clips: tuple[float, float] | None = None
    own_statistics: int | bool = False
    numbers: int | None = None

    @property
    def rule(self) -> str:
        """The name of the generic rule, for operators that have none of their own."""
        if self.form is not None:
            return self.form.rule
        what = self.move.value if self.kind is Kind.MOVEMENT and self.move is not None else self.kind.value
        return f"<{what}>"

    @property
    def sums(self) -> bool:
        """It adds two tensors, or subtracts one from the other."""
        return self.merge in (Merge.SUM, Merge.DIFFERENCE)

    @property
    def scales(self) -> bool:
        """It multiplies two tensors element by element, or divides one by the other."""
        return self.merge in (Merge.PRODUCT, Merge.QUOTIENT)

    @property
    def passes(self) -> bool:
        """Every element of its result is one of its (first) operand's."""
        return self.kind is Kind.MOVEMENT and self.move not in (None, Move.JOINS, Move.PADS)
