"""Sub-graphs compute what they stand for, and the meter finds every one of them again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from graphprune.runtimes.latency.kernels import Kernel, Sample
from graphprune.runtimes.latency.meters import _called, chunks, make_meter
from graphprune.runtimes.latency.subgraphs import channels_of, groups_of, sites_after, subgraphs
from graphprune.runtimes.profiles import profile
from graphprune.runtimes.providers import CPU, Provider

SAMPLES = [
    Sample(Kernel("conv", (1, 9, 8), (3, 3), (2, 1), (1, 1), (1, 1)), (5, 7)),
    Sample(Kernel("conv", (2, 9, 9), (3, 3), (1, 1), (0, 2), (2, 2)), (16, 32)),
    Sample(Kernel("conv", (1, 12), (3,), (2,), (1,), (1,)), (4, 8)),
    Sample(Kernel("depthwise", (1, 7, 7), (5, 5), (1, 1), (2, 2), (1, 1), multiplier=2), (6,)),
    Sample(Kernel("grouped", (1, 7, 7), (1, 1), (1, 1), (0, 0), (1, 1)), (3, 4, 5)),
    Sample(Kernel("conv", (1, 4, 4), (3, 3), (2, 2), (1, 1), (1, 1), True, (1, 1)), (6, 10)),
    Sample(Kernel("depthwise", (1, 4, 4), (2, 2), (2, 2), (0, 0), (1, 1), True), (6,)),
    Sample(Kernel("linear"), (9, 12, 20)),
    Sample(Kernel("matmul"), (3, 5, 6, 7)),
]


def shape_in_torch(sample: Sample) -> tuple[int, ...]:
    """The shape of the result, from PyTorch's own modules."""
    k = sample.kernel
    if k.op == "linear":
        return tuple(nn.Linear(sample.lengths[1], sample.lengths[2])(torch.zeros(sample.lengths[:2])).shape)
    if k.op == "matmul":
        b, m, i, n = sample.lengths
        return tuple((torch.zeros(b, m, i) @ torch.zeros(b, i, n)).shape)
    kind = {(1, False): nn.Conv1d, (2, False): nn.Conv2d, (2, True): nn.ConvTranspose2d}[len(k.kernel), k.transposed]
    inputs, outputs = channels_of(sample)
    more = {"output_padding": k.output_padding} if k.output_padding else {}
    layer = kind(
        inputs, outputs, k.kernel, k.stride, k.padding, dilation=k.dilation, groups=groups_of(sample), **more
    )
    assert sample.weights == layer.weight.numel()
    return tuple(layer(torch.zeros(k.shape[0], inputs, *k.shape[1:])).shape)


def test_sub_graphs_are_what_they_stand_for() -> None:
    made = subgraphs(SAMPLES)
    run = profile(made.model, made.feeds, Provider(CPU), threads=1, options={}, runs=2)
    shapes = {s for node in run.nodes for s in node.outputs}
    for sample in SAMPLES:
        want = shape_in_torch(sample)
        padded = [s for s in shapes if len(s) == len(want) and s[2:] == want[2:] and s[1] >= want[1]]
        assert want in shapes or padded, sample
        if sample.kernel.convolution:
            assert sites_after(sample) == want[2:]


@pytest.mark.parametrize("threads", [1, 2])
def test_every_sample_gets_its_time(threads: int) -> None:
    found = make_meter(Provider(CPU), threads, {})(SAMPLES)
    assert len(found) == len(SAMPLES) and all(seconds >= 0 and node is not None for seconds, node in found)
    big = [s for s in SAMPLES if s.kernel.op == "linear"]
    more = [*big, Sample(Kernel("linear"), (900, 512, 512))]
    times = [seconds for seconds, _ in make_meter(Provider(CPU), threads, {})(more)]
    assert times[1] > times[0]


def test_whole_calls_are_timed_where_nodes_are_not() -> None:
    found = _called(SAMPLES[:2], Provider(CPU), 1, {})
    assert all(seconds > 0 and node is None for seconds, node in found)


def test_chunks_hold_every_sample_once() -> None:
    rng = np.random.default_rng(0)
    samples = [Sample(Kernel("linear"), tuple(int(n) for n in rng.integers(1, 4000, 3))) for _ in range(300)]
    made = chunks(samples)
    assert sorted(i for chunk in made for i in chunk) == list(range(300))
    assert all(len(c) == 1 or sum(samples[i].weights for i in c) <= 6e7 for c in made)
