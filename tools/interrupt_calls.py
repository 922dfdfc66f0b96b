"""Interrupt calls at random moments; the model and the process must be what they were.

    python -m tools.interrupt_calls --count 1000

A real signal (SIGALRM, handled as Ctrl-C is) comes at a random moment of plan, prune, recover, verify, count and
export_onnx on a network of convolutions, a transformer, and the former with a hook that cannot be cloned. A call must
end with KeyboardInterrupt or its result, the model must hold the same objects with the same values, no mode of torch,
no patch and no handler may stay, and a file that was there must be whole. Prints a table and writes
docs/robustness.json; exit status 1 after a failure.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphprune
from graphprune.tracing import patches
from tests.tracing.test_threads import Net as Transformer
from tests.tracing.test_threads import picture, process
from tools._robustness import record, show

COLUMNS = ("network", "call", "interrupts", "came_out", "finished", "failures")


class Convolutions(nn.Module):
    """Residual blocks with batch norms, and with `closed` a hook that cannot be cloned."""

    def __init__(self, closed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(3)
        )
        self.head = nn.Linear(16, 5)
        self.kept: list[Any] = []
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.bias)
                nn.init.uniform_(module.weight, 0.5, 1.5)
        if closed:
            self.stem.register_forward_hook(lambda *args: self.note())

    def note(self) -> None:
        assert not self.kept

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.stem(x)).relu()
        for block in self.blocks:
            h = h + block(h)
        out: Tensor = self.head(h.mean((2, 3)))
        return out


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    image = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    return {
        "convolutions": (Convolutions().eval(), image),
        "transformer": (Transformer().train(), text),
        "with a closure": (Convolutions(closed=True).train(), image),
    }


def calls(model: nn.Module, x: Tensor, folder: Path) -> dict[str, Callable[[], Any]]:
    """The calls, with the shares of the interrupts that they get."""
    plan = graphprune.plan(model, x, 0.5)
    small, data = plan.apply(model), [x, x + 1]
    path = folder / "small.onnx"
    graphprune.export_onnx(small, x, path, check=False)
    return {
        "plan": lambda: graphprune.plan(model, x, 0.5, output="hybrid"),
        "prune": lambda: graphprune.prune(model, x, 0.5, data=data),
        "recover": lambda: graphprune.recover(model, plan, x, data),
        "verify": lambda: graphprune.verify(model, small, plan, x),
        "count": lambda: graphprune.count(model, x),
        "export_onnx": lambda: graphprune.export_onnx(model, x, path, check=False),
    }


SHARES = {"plan": 4, "prune": 4, "recover": 4, "verify": 3, "count": 2, "export_onnx": 1}


def attack(
    model: nn.Module, call: Callable[[], Any], count: int, seed: int, whole: Callable[[], bool]
) -> dict[str, Any]:
    """`count` interrupts of one call."""
    generator, failures = random.Random(seed), []
    call()
    began = time.perf_counter()
    call()
    lasts = time.perf_counter() - began
    before, state = picture(model), process()
    came_out = 0
    for number in range(count):
        signal.setitimer(signal.ITIMER_REAL, max(1e-6, generator.random() * lasts * 1.05))
        try:
            call()
            ended = "finished"
        except KeyboardInterrupt:
            ended = "interrupted"
        except BaseException as error:
            ended = f"{type(error).__name__}: {str(error)[:200]}"
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            ended = "finished"
        came_out += ended == "interrupted"
        if ended not in ("finished", "interrupted"):
            failures.append(f"{number}: {ended}")
        if picture(model) != before:
            failures.append(f"{number}: the model is not what it was ({ended})")
        if process() != state or patches._places:
            differs = [i for i, (a, b) in enumerate(zip(process(), state, strict=True)) if a != b]
            failures.append(f"{number}: the process is not what it was ({ended}; {differs or list(patches._places)})")
        if not whole():
            failures.append(f"{number}: the file is damaged ({ended})")
        if len(failures) > 5:
            break
    return {"interrupts": count, "came_out": came_out, "finished": count - came_out, "told": failures}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="interrupts in all (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="other moments (default 0)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    rows: list[dict[str, Any]] = []
    each = options.count / (3 * sum(SHARES.values()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for network, (model, x) in networks().items():
            for what, call in calls(model, x, folder).items():

                def whole() -> bool:
                    import onnx

                    onnx.checker.check_model(str(folder / "small.onnx"))
                    return len(list(folder.iterdir())) == 1

                found = attack(model, call, round(each * SHARES[what]) + 1, options.seed, whole)
                for text in found["told"]:
                    print(f"{network}, {what}: {text}", flush=True)
                rows.append({"network": network, "call": what, "failures": len(found.pop("told")), **found})
                print(f"{network}, {what}: {found['interrupts']} interrupts", file=sys.stderr, flush=True)
    show(rows, COLUMNS)
    failures = sum(row["failures"] for row in rows)
    print(f"{sum(row['interrupts'] for row in rows)} interrupts, {failures} failures")
    record("interrupts", rows, count=options.count, seed=options.seed)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
