"""Many threads plan, run and train the same models; every result must be that of one thread alone.

    python -m tools.share_models --threads 16 --seconds 120

Six of sixteen threads plan models that all share (a network of convolutions, a transformer, one with a hook that cannot
be cloned), as modules and as graphs; six run them; four train models of their own. Plans, answers and losses are
compared with those of a single thread, and afterwards nothing of the process may be patched and the models must hold
what they held. Prints a table and writes docs/robustness.json; exit status 1 after a failure.
"""

from __future__ import annotations

import argparse
import collections
import copy
import functools
import operator
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import graphprune
from graphprune.tracing import patches
from tests.tracing.test_threads import picture, process
from tools._robustness import record, show
from tools.interrupt_calls import Convolutions, networks

COLUMNS = ("thread", "network", "calls", "failures")
Shared = dict[str, tuple[nn.Module, Tensor]]


def removed(model: nn.Module, x: Tensor, output: str) -> Any:
    return dict(graphprune.plan(model, x, 0.5, output=output).removed)


def answer(model: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = model(x)
    return found.detach()


# made once: the random numbers of the process belong to all threads
_START = Convolutions().train()


def losses(seed: int) -> list[float]:
    """A short training, from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(_START)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    found = []
    for _ in range(5):
        x = torch.randn(8, 3, 8, 8, generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), torch.randint(5, (8,), generator=generator))
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


class Crowd:
    """The threads, and what they found."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.calls: collections.Counter[tuple[str, str]] = collections.Counter()
        self.wrong: collections.Counter[tuple[str, str]] = collections.Counter()
        self.told: list[str] = []

    def repeat(self, what: str, jobs: dict[str, Callable[[], str]], seed: int) -> None:
        """Until time is up, one of the jobs after the other in random order; each returns what is wrong, or ""."""
        generator = random.Random(seed)
        while time.monotonic() < self.end:
            name = generator.choice(list(jobs))
            try:
                wrong = jobs[name]()
            except Exception as error:
                wrong = f"{type(error).__name__}: {str(error)[:200]}"
            self.calls[what, name] += 1
            if wrong:
                self.wrong[what, name] += 1
                self.told.append(f"{what}, {name}: {wrong}")


def jobs(shared: Shared) -> dict[str, dict[str, Callable[[], str]]]:
    """What threads of each kind do, with its right results found before."""
    plans, answers = {}, {}
    for name, (model, x) in shared.items():
        model.eval()
        for output in ("module", "hybrid"):
            plan = functools.partial(removed, model, x, output)
            plans[f"{name}, {output}"] = _compared(plan, operator.eq)
        answers[name] = _compared(functools.partial(answer, model, x), torch.equal)
    trainings = {f"seed {seed}": _compared(functools.partial(losses, seed), operator.eq) for seed in range(3)}
    return {"plan": plans, "run": answers, "train": trainings}


def _compared(job: Callable[[], Any], same: Callable[[Any, Any], bool]) -> Callable[[], str]:
    want = job()
    return lambda: "" if same(job(), want) else "another result than alone"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=16, help="threads in all (default 16)")
    parser.add_argument("--seconds", type=float, default=120, help="how long they go on (default 120)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-4)
    shared = networks()
    work = jobs(shared)
    before, state = {n: picture(m) for n, (m, _) in shared.items()}, process()
    crowd = Crowd(options.seconds)
    kinds = [("plan", "run", "plan", "run", "train", "plan", "run", "train")[i % 8] for i in range(options.threads)]
    threads = [threading.Thread(target=crowd.repeat, args=(k, work[k], i)) for i, k in enumerate(kinds)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, (model, _) in shared.items():
        if picture(model) != before[name]:
            crowd.told.append(f"{name}: the model is not what it was")
    if process() != state or patches._places:
        crowd.told.append("the process is not what it was")
    for text in crowd.told[:20]:
        print(text)
    rows = [
        {"thread": what, "network": name, "calls": calls, "failures": crowd.wrong[what, name]}
        for (what, name), calls in sorted(crowd.calls.items())
    ]
    show(rows, COLUMNS)
    print(f"{sum(crowd.calls.values())} calls in {options.threads} threads, {len(crowd.told)} failures")
    record("threads", rows, threads=options.threads, seconds=options.seconds)
    return bool(crowd.told)


if __name__ == "__main__":
    sys.exit(main())
