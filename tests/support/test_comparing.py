"""What two models hold, compared, against bytes and differences made by hand."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.support.comparing import compared, same_bits
from tests.plans.verification.damages import Tokens, made


def test_bits_against_bytes() -> None:
    """Equal is what has the same bytes."""
    torch.manual_seed(0)
    nan, zero = torch.tensor([float("nan"), 1.0]), torch.tensor([0.0, 1.0])
    tensors = [nan, zero, -zero, zero.clone(), torch.tensor([1 + 2j]), torch.tensor([1 + 2j]).conj(),
               torch.tensor([True, False]), torch.tensor([False, False]), torch.tensor(3), torch.tensor(4),
               torch.randn(3, 4), torch.randn(3, 4).t(), torch.zeros(0)]  # fmt: skip
    tensors += [t.to(torch.bfloat16) for t in (nan, zero, -zero)] + [t.to(torch.float16) for t in (nan, zero, -zero)]
    for a in tensors:
        assert same_bits(a, a.clone())
        for b in (b for b in tensors if (a.dtype, a.shape) == (b.dtype, b.shape)):
            bytes_of = [bytes(t.resolve_conj().contiguous().view(-1).untyped_storage()) for t in (a.clone(), b.clone())]
            assert same_bits(a, b) == (bytes_of[0] == bytes_of[1]), (a, b)


def test_sparse_and_quantised_tensors() -> None:
    dense = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    for form in (Tensor.to_sparse, Tensor.to_sparse_csr):
        assert same_bits(form(dense), form(dense)) and not same_bits(form(dense), form(2 * dense))
    one, other = (torch.quantize_per_tensor(v, 0.1, 0, torch.qint8) for v in (dense, dense + 1))
    assert same_bits(one, one.clone()) and not same_bits(one, other)


def test_objects_that_lead_back_to_themselves() -> None:
    """A ring of objects, modules that know their parents, and lists in themselves are compared once."""

    class Knows(nn.Module):
        def __init__(self, number: float) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)
            object.__setattr__(self.inner, "parent", self)
            self.ring: list[Any] = [number]
            self.ring.append(self.ring)

    torch.manual_seed(0)
    one = Knows(1.0)
    other = copy.deepcopy(one)
    assert not compared(one, other).found
    other.ring[0] = 2.0
    assert [str(d) for d in compared(one, other).found] == ["ring[0]: 1.0 instead of 2.0"]


def test_tokens_hold_more_than_their_tensors() -> None:
    """What is counted is what is there: settings, slots, closures and the distribution among it."""
    net, _ = made(Tokens, torch.float32)
    found = compared(net, copy.deepcopy(net))
    held = {id(t) for t in (*net.parameters(), *net.buffers())}
    plain = 1 + 1 + 2  # the table, the bias in a dict, and the two of the distribution
    assert not found.found and found.tensors == len(held) + plain and found.attributes > 40
