"""Time tracing, planning and surgery against Torch-Pruning, alternated in one process.

    python -m tools.bench_planning                               # all networks, writes docs/planning.md
    python -m tools.bench_planning --networks resnet18 vgg16     # some, writes nothing
    python -m tools.bench_planning --profile densenet121         # where the time of ours goes

Ours is `graphprune.prune(model, example, 0.5, criterion="l2", verify=False, recover=None)`: tracing, dependency
analysis, importance, planning, Conv-BN folding and a pruned copy of the model, without the repair that is the default.
Torch-Pruning's is building its pruner (which builds the dependency graph) and one `step()` on a deep copy; as it prunes
in place, the deep copy is made before its clock starts, while the copy that ours makes is on ours. Both get the same
weights, image and ratio and rank by the L2 norm.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import dataclasses
import gc
import math
import pstats
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import graphprune
from graphprune.runtimes.statistics import speedup_interval
from tools._common import all_networks, build, example_for, machine_line, markdown_table, versions_line, write
from tools._peer import prune_in_place

# Networks on which Torch-Pruning works, of every family.
NETWORKS = (
    "resnet18 resnet50 densenet121 densenet201 vgg16 mobilenet_v2 mobilenet_v3_large efficientnet_b0 efficientnet_v2_s "
    "efficientnet_v2_l regnet_y_400mf regnet_x_8gf resnext50_32x4d googlenet inception_v3 squeezenet1_1 convnext_tiny "
    "mnasnet1_0 wide_resnet50_2 alexnet"
).split()
RATIO = 0.5
OUTPUT = Path("docs/planning.md")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one network in every round, ours and Torch-Pruning's."""

    name: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """How many times faster ours is, at the medians."""
        return statistics.median(self.theirs) / statistics.median(self.ours)

    @property
    def cells(self) -> tuple[str, ...]:
        """A row of the table."""
        _, low, high = speedup_interval(self.theirs, self.ours)
        medians = statistics.median(self.ours), statistics.median(self.theirs)
        return (
            self.name,
            *(f"{seconds:.3f}" for seconds in medians),
            f"{self.ratio:.2f}",
            f"{low:.2f} - {high:.2f}",
            str(len(self.ours)),
        )


HEADINGS = ("network", "graphprune, s", "Torch-Pruning, s", "times faster", "95 %", "rounds")


def prune_ours(model: nn.Module, example: Tensor) -> None:
    """Everything but verification and repair, which Torch-Pruning has none of."""
    graphprune.prune(model, example, RATIO, criterion="l2", verify=False, recover=None)


def seconds_of(function: Callable[[], object]) -> float:
    """Wall-clock time of one call, with the garbage of earlier ones swept up before."""
    gc.collect()
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(name: str, rounds: int, budget: float) -> Timing:
    """Alternate the two, `rounds` times after a round that does not count; at least 3 times, however long it takes.

    Stops early once `budget` seconds are spent.
    """
    model, example = build(name), example_for(name)
    ours: list[float] = []
    theirs: list[float] = []
    started = time.perf_counter()
    for number in range(rounds + 1):
        mine = seconds_of(lambda: prune_ours(model, example))
        copied = copy.deepcopy(model)
        other = seconds_of(lambda copied=copied: prune_in_place(copied, example, RATIO))  # type: ignore[misc]
        if number:
            ours.append(mine)
            theirs.append(other)
        if len(ours) >= 3 and time.perf_counter() - started > budget:
            break
    return Timing(name, tuple(ours), tuple(theirs))


def geometric_mean(timings: Sequence[Timing]) -> float:
    """Of how many times faster ours is."""
    return math.exp(statistics.fmean(math.log(t.ratio) for t in timings))


def document(timings: Sequence[Timing], threads: int) -> str:
    """The Markdown page."""
    slowest = min(timings, key=lambda t: t.ratio)
    return "\n".join(
        [
            "# Tracing, planning and surgery: how long they take",
            "",
            *(__doc__ or "").split("\n\n", 2)[2].strip().splitlines(),
            "",
            "The two take turns; the medians of all rounds are shown, and a 95 % bootstrap interval of their quotient.",
            "",
            "    python -m tools.bench_planning",
            "",
            f"Measured on: {machine_line(threads)}. {versions_line('torch', 'torchvision', 'torch-pruning')}.",
            "",
            markdown_table(HEADINGS, [t.cells for t in timings]),
            "",
            f"Geometric mean over {len(timings)} networks: {geometric_mean(timings):.2f} times faster. "
            f"Smallest: {slowest.ratio:.2f} ({slowest.name}).",
            "",
        ]
    )


def profile(name: str, lines: int, order: str) -> None:
    """Print where the time of ours goes; the first run, which imports and warms up, is not looked at."""
    model, example = build(name), example_for(name)
    prune_ours(model, example)
    profiler = cProfile.Profile()
    profiler.runcall(prune_ours, model, example)
    pstats.Stats(profiler).strip_dirs().sort_stats(order).print_stats(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    known = all_networks()
    parser = argparse.ArgumentParser(prog="python -m tools.bench_planning", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=known, metavar="NAME", help="default: 20 of all kinds")
    parser.add_argument("--rounds", type=int, default=7, help="for each network (default 7)")
    parser.add_argument("--budget", type=float, default=120, help="seconds for a network, 3 rounds apart (default 120)")
    parser.add_argument("--threads", type=int, default=1, help="of torch, for both (default 1)")
    parser.add_argument("--output", type=Path, help=f"Markdown page (default: {OUTPUT} if all networks are measured)")
    parser.add_argument("--profile", metavar="NAME", choices=known, help="profile ours on this network instead")
    parser.add_argument("--lines", type=int, default=40, help="of the profile (default 40)")
    parser.add_argument("--sort", default="tottime", help="order of the profile (default tottime)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    if options.profile:
        profile(options.profile, options.lines, options.sort)
        return
    timings = []
    print("{:22} {:>13} {:>16} {:>12} {:>15} {:>6}".format(*HEADINGS), flush=True)
    for name in options.networks or NETWORKS:
        timings.append(measure(name, options.rounds, options.budget))
        print("{:22} {:>13} {:>16} {:>12} {:>15} {:>6}".format(*timings[-1].cells), flush=True)
    print(f"geometric mean {geometric_mean(timings):.2f}, smallest {min(t.ratio for t in timings):.2f}")
    output = options.output or (None if options.networks else OUTPUT)
    if output:
        write(output, document(timings, options.threads))
        print(f"written: {output}")


if __name__ == "__main__":
    main()
