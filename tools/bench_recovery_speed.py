"""CPU time and memory of planning from data and of least squares, against an older commit of this repository.

    python -m tools.bench_recovery_speed --commit 380cafa                     # writes docs/recovery-speed.md
    python -m tools.bench_recovery_speed --commit 380cafa --rounds 1 --tasks resnet50

Criterion "reconstruction" at half of the multiply-accumulates, then `recover` with "least_squares": a ResNet-50 on 16
images of 96 x 96, and (planning alone) a ViT-B/16 on 256 images of 224 x 224. The older build runs from a clone in a
temporary folder; both run alternately, each time in a process of its own, with one thread. No trained weights are
needed: those of torchvision's constructors with scales and statistics that let every layer matter, on random images.
Seconds are of the processor and of these two calls alone, memory is the peak of the whole process, as the system tells.
A process that takes more than --limit seconds of CPU time is stopped: its figures are then the least that they can be.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools._common import machine_line, markdown_table, versions_line, write

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path("docs/recovery-speed.md")
TASKS = {
    "resnet50": {"network": "resnet50", "images": 16, "size": 96, "batch": 16, "recover": True},
    "vit_b_16": {"network": "vit_b_16", "images": 256, "size": 224, "batch": 32, "recover": False},
}
# What each process runs: nothing but the two builds' common public names.
_CHILD = """
import json, sys, time
import torch, torchvision
torch.set_num_threads(1)
import graphprune
task = json.loads(sys.argv[1])
generator = torch.Generator().manual_seed(0)
torch.manual_seed(0)
net = torchvision.models.get_model(task["network"], weights=None)
x = torch.randn(task["images"], 3, task["size"], task["size"], generator=generator)
norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
with torch.no_grad():
    for norm in norms:
        norm.weight.copy_(0.25 + torch.rand(norm.weight.shape, generator=generator))
        norm.bias.copy_(0.3 * torch.randn(norm.bias.shape, generator=generator))
        norm.momentum = None
        norm.reset_running_stats()
    if norms:
        net.train()(x)
net.eval()
data = list(x.split(task["batch"]))
start = time.process_time()
plan = graphprune.plan(
    net, x[:1], budget=graphprune.Budget(macs=0.5), criterion="reconstruction", data=data
)
planned = time.process_time()
if task["recover"]:
    graphprune.recover(net, plan, x[:1], data, "least_squares")
print(json.dumps({"plan": planned - start, "recover": time.process_time() - planned}))
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """One process: seconds of the two calls, GiB at its peak; `stopped`: it ran past the limit."""

    plan: float
    recover: float
    memory: float
    stopped: bool

    @property
    def total(self) -> float:
        return self.plan + self.recover


def run(folder: Path, task: dict[str, object], limit: int) -> Run:
    """The task by the build in `folder`."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))

    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _CHILD, json.dumps(task)]
    options = {"cwd": folder, "env": environment, "stdout": subprocess.PIPE, "text": True, "preexec_fn": limited}
    child = subprocess.Popen(command, **options)  # type: ignore[call-overload]
    assert child.stdout is not None
    said = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    memory = usage.ru_maxrss / 2**20
    if child.returncode < 0 and usage.ru_utime + usage.ru_stime > limit - 2:
        return Run(usage.ru_utime + usage.ru_stime, 0.0, memory, True)
    if child.returncode:
        raise SystemExit(f"the build in {folder} failed")
    return Run(**json.loads(said.splitlines()[-1]), memory=memory, stopped=False)


def older_build(commit: str, folder: str) -> Path:
    """A clone of this repository at `commit`."""
    target = Path(folder) / "older"
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(target)], check=True)
    subprocess.run(["git", "-C", str(target), "checkout", "--quiet", commit], check=True)
    return target


def cells(name: str, build: str, runs: Sequence[Run]) -> list[str]:
    """A row of the table: medians."""
    least = "at least " if any(r.stopped for r in runs) else ""
    what = "plan", "recover", "total", "memory"
    planned, recovered, both, memory = (statistics.median(getattr(r, w) for r in runs) for w in what)
    second = f"{recovered:.1f}" if TASKS[name]["recover"] else ""
    return [name, build, f"{least}{planned:.1f}", second, f"{least}{both:.1f}", f"{least}{memory:.2f}"]


def page(commit: str, rounds: int, rows: list[list[str]], ratios: list[str]) -> str:
    """The document."""
    headings = ["network", "build", "plan, s", "recover, s", "both, s", "peak, GiB"]
    return "\n".join(
        [
            "# Planning from data: time and memory",
            "",
            'Criterion "reconstruction" at half of the multiply-accumulates, then least squares: a ResNet-50 on 16 '
            "images of 96 x 96, and (planning alone) a ViT-B/16 on 256 images of 224 x 224. Weights are random ones, "
            f"which times do not depend on. Seconds of CPU time, one thread, medians of {rounds} "
            f"round{'s' if rounds != 1 else ''}, builds alternated, each run in a process of its own. Peak: of the "
            'whole process, the network, the images and PyTorch included. "At least": stopped after that time.',
            "",
            "Written by `python -m tools.bench_recovery_speed --commit " + commit + f"` ({machine_line(1)}; "
            f"{versions_line('torch', 'torchvision')}).",
            "",
            markdown_table(headings, rows),
            "",
            *ratios,
            "",
            "What bounds memory: moments of the layers looked at in one pass (1 GiB, or those of one layer where it "
            "alone needs more), three matrices as large as the number of one layer's inputs squared, the samples that "
            "outputs are measured on (8 to 64) and, up to 256 MiB, what stands before the layers that change. Where "
            "there are fewer rows of data than half of a layer's inputs, the rows are held and no such matrix is made. "
            "Repairs hold up to 256 MiB of the dense network's results, 2 GiB of what stands before the layers, and "
            "256 MiB of that for the inputs that they are checked on.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", required=True, help="the older build, a commit of this repository")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=3600, help="seconds of CPU time per process")
    parser.add_argument("--no-page", action="store_true", help="print alone")
    options = parser.parse_args()
    rows, ratios = [], []
    with tempfile.TemporaryDirectory() as folder:
        builds = {options.commit: older_build(options.commit, folder), "this build": ROOT}
        for name in options.tasks:
            found: dict[str, list[Run]] = {build: [] for build in builds}
            for _ in range(options.rounds):
                for build, place in builds.items():
                    found[build].append(run(place, TASKS[name], options.limit))
                    print(name, build, found[build][-1], flush=True)
            rows += [cells(name, build, runs) for build, runs in found.items()]
            old, new = found.values()
            if not any(r.stopped for r in (*old, *new)):
                ratio = statistics.median(r.total for r in old) / statistics.median(r.total for r in new)
                ratios.append(f"{name}: {ratio:.1f} times less CPU time.")
    text = page(options.commit, options.rounds, rows, ratios)
    print(text)
    if not options.no_page:
        write(OUTPUT, text)


if __name__ == "__main__":
    main()
