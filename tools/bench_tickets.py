"""CIFAR-10, ResNet-20: sparse networks trained further, and lottery tickets, each against its controls.

    python -m tools.bench_tickets               # what is not stored yet, then docs/tickets.md and its plots
    python -m tools.bench_tickets --seeds 8     # more seeds
    python -m tools.bench_tickets --page        # only the page, from what is stored

A reduced protocol, for one core in under an hour; it compares methods under equal training and reaches no published
accuracy. Data: the first 10,000 training images, mirrored and shifted by up to 4 pixels at random; accuracy on the
first 5,000 test images. SGD with Nesterov momentum 0.9, weight decay 5e-4, batches of 64, bfloat16 autocast in
training and in evaluation. No setting was chosen on test images.

Further training: the trained network of the shared data folder is pruned in one shot, then trained for 60 steps,
learning rate 0.02 falling to 0 (cosine), masks in force. Tickets: from scratch, 400 steps (2.6 epochs), learning rate
0.1 after a linear rise over 80 steps, falling to 0 (cosine); global magnitude, half of what is left in each of 4
rounds, rewound to step 80. Random reinitialisation trains all 400 steps from new initial weights under the ticket's
masks; random masks keep the ticket's weights at step 80 and its number of weights in each layer. To save time, further
training and random masks have 2 seeds, tickets and random reinitialisation all.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graphprune import sparsity
from tools._common import machine_line, markdown_table, versions_line, write
from tools.bench_accuracy import loaders
from tools.bench_sparsity import PATTERNS, Curve, curve_table, draw, interval, n_of_m, one_shot_methods

OUTPUT = Path("docs/tickets.md")
FILES = Path("build/tickets")
IMAGES, TEST, BATCH = 10_000, 5_000, 64
TUNING, TUNING_RATE = 60, 0.02
STEPS, REWIND, RATE, ROUNDS = 400, 80, 0.1, 4
CONTROLLED = (0.75, 0.9375)
SEEDS, FEW = 5, 2  # for tickets against random reinitialisation, and for the rest
TICKET, REINIT, RANDOM = "winning ticket", "random reinitialisation", "random masks"
Rate = Callable[[int], float]


class Cifar:
    """The images, one way to train on them and one to measure."""

    def __init__(self, shared: types.ModuleType) -> None:
        self.shared = shared
        self.x, self.y = shared.cifar10("train", IMAGES)
        self.test = shared.cifar10("test", TEST)
        few = self.x[:1000], self.y[:1000]
        self.calibration = list(zip(few[0].split(250), few[1].split(250), strict=True))

    def train(self, model: nn.Module, first: int, last: int, rate: Rate) -> None:
        """Steps `first` to `last`, `rate` a function of the step; randomness from torch's random state."""
        model.train()
        optimiser = torch.optim.SGD(model.parameters(), 0.0, 0.9, weight_decay=5e-4, nesterov=True)
        for step in range(first, last):
            picked = torch.randint(0, len(self.x), (BATCH,))
            for group in optimiser.param_groups:
                group["lr"] = rate(step)
            optimiser.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(_shifted(self.x[picked])), self.y[picked])
            loss.backward()
            optimiser.step()
        model.eval()

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """In %, on the test images."""
        x, y = self.test
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(250), y.split(250), strict=True))
        return 100 * right / len(y)


def _shifted(x: Tensor) -> Tensor:
    """Every image shifted by up to 4 pixels, zeros from outside, and every other one mirrored."""
    count, _, height, width = x.shape
    padded = F.pad(x, (4, 4, 4, 4))
    down, right = torch.randint(0, 9, (2, count))
    columns = torch.arange(width).expand(count, width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns, width - 1 - columns) + right[:, None]
    rows = torch.arange(height) + down[:, None]
    return padded.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None]].permute(
        0, 3, 1, 2
    )


def _cosine(step: int, first: int, last: int, rate: float) -> float:
    return rate * 0.5 * (1 + math.cos(math.pi * (step - first) / (last - first)))


def tuning_rate(step: int) -> float:
    return _cosine(step, 0, TUNING, TUNING_RATE)


def ticket_rate(step: int) -> float:
    return RATE * (step + 1) / REWIND if step < REWIND else _cosine(step, REWIND, STEPS, RATE)


# -- networks to compare


def random_pattern(mask: Tensor, m: int, generator: torch.Generator) -> Tensor:
    """As many of every `m` consecutive input channels as in the mask, drawn at random."""
    grouped = mask.movedim(1, -1).unflatten(-1, (-1, m))
    order = torch.rand(grouped.shape, generator=generator).argsort(-1)
    mixed: Tensor = grouped.gather(-1, order).flatten(-2).movedim(-1, 1)
    return mixed


def pruned_networks(cifar: Cifar, seed: int) -> list[tuple[str, float, Callable[[], nn.Module]]]:
    """(method, sparsity, how to make it) of the trained network pruned in one shot, and of controls."""
    shared = cifar.shared
    methods = one_shot_methods(cifar.calibration)
    names = ("magnitude, global", "gradient", "weight x gradient")
    cases: list[tuple[str, float, Callable[[], nn.Module]]] = []

    def random_masks(fraction: float) -> nn.Module:
        found = sparsity.masks(sparsity.magnitude(shared.resnet20(), fraction))
        generator = torch.Generator().manual_seed(1000 + seed)
        mixed = {n: t.flatten()[torch.randperm(t.numel(), generator=generator)].view(t.shape) for n, t in found.items()}
        return sparsity.set_masks(shared.resnet20(), mixed)

    def reinitialised(fraction: float) -> nn.Module:
        torch.manual_seed(1000 + seed)
        found = sparsity.masks(sparsity.magnitude(shared.resnet20(), fraction))
        return sparsity.set_masks(shared.CifarResNet(3), found)

    def random_n_of_m(fraction: float) -> nn.Module:
        found = sparsity.masks(n_of_m(shared.resnet20(), fraction))
        generator = torch.Generator().manual_seed(1000 + seed)
        mixed = {n: random_pattern(t, PATTERNS[fraction][1], generator) for n, t in found.items()}
        return sparsity.set_masks(shared.resnet20(), mixed)

    for fraction in PATTERNS:
        cases += [(n, fraction, functools.partial(methods[n], shared.resnet20(), fraction)) for n in names]
        cases += [
            ("N:M", fraction, functools.partial(n_of_m, shared.resnet20(), fraction)),
            ("random N:M", fraction, functools.partial(random_n_of_m, fraction)),
            (RANDOM, fraction, functools.partial(random_masks, fraction)),
            (REINIT, fraction, functools.partial(reinitialised, fraction)),
        ]
    return [("dense", 0.0, shared.resnet20), *cases]


def tune(cifar: Cifar, rows: Rows, seed: int) -> None:
    """Rows of the networks pruned in one shot, before and after further training."""
    for method, fraction, make in pruned_networks(cifar, seed):
        if not rows.has("tuned", method, fraction, seed):
            model = make()
            before = cifar.accuracy(model)
            torch.manual_seed(5000 + seed)  # the same images in the same order
            cifar.train(model, 0, TUNING, tuning_rate)
            rows.add("tuned", method, fraction, seed, cifar.accuracy(model), before)


def tickets(cifar: Cifar, rows: Rows, seed: int) -> None:
    """Rows of the tickets of every round and of their controls, each trained alone after it was found."""
    fractions = [1 - 0.5**k for k in range(ROUNDS + 1)]
    controls = (REINIT, RANDOM) if seed < FEW else (REINIT,)
    wanted = [(m, f) for f in CONTROLLED for m in controls]
    if all(rows.has("ticket", m, f, seed) for m, f in [*wanted, *((TICKET, f) for f in fractions)]):
        return
    train = functools.partial(cifar.train, rate=ticket_rate)
    FILES.mkdir(parents=True, exist_ok=True)

    def evaluate(model: nn.Module) -> float:
        masks = sparsity.masks(model)
        number = round(math.log2(1 / _density(model, masks)))
        save_file(masks, FILES / f"{seed}-{number}.safetensors")
        accuracy = cifar.accuracy(model)
        if not rows.has("ticket", TICKET, fractions[number], seed):
            rows.add("ticket", TICKET, fractions[number], seed, accuracy)
        return accuracy

    def build() -> nn.Module:
        model: nn.Module = cifar.shared.CifarResNet(3)
        return model

    torch.manual_seed(seed)
    last = sparsity.lottery_ticket(
        build(), train, fractions[-1], steps=STEPS, rounds=ROUNDS, rewind=REWIND, evaluate=evaluate, seed=100 * seed,
        checkpoint=FILES / f"{seed}.safetensors",
    )  # fmt: skip
    found = [load_file(FILES / f"{seed}-{number}.safetensors") for number in range(ROUNDS + 1)]
    for fraction, masks in zip(fractions, found, strict=True):
        ticket = dataclasses.replace(last, masks=masks)
        if fraction in CONTROLLED and not rows.has("ticket", REINIT, fraction, seed):
            model = ticket.random_reinit(build, 1000 + seed)
            torch.manual_seed(5000 + seed)
            train(model, 0, STEPS)
            rows.add("ticket", REINIT, fraction, seed, cifar.accuracy(model))
        if fraction in CONTROLLED and RANDOM in controls and not rows.has("ticket", RANDOM, fraction, seed):
            model = ticket.random_masks(1000 + seed)
            torch.manual_seed(5000 + seed)
            train(model, REWIND, STEPS)
            rows.add("ticket", RANDOM, fraction, seed, cifar.accuracy(model))


def _density(model: nn.Module, masks: dict[str, Tensor]) -> float:
    """The share that is left of the weights that can be masked: those with two axes or more."""
    gone = sum(int((~mask).sum()) for mask in masks.values())
    return 1 - gone / sum(p.numel() for p in model.parameters() if p.dim() > 1)


class Rows:
    """Results, written to a file one by one; those that are there are not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    def has(self, part: str, method: str, fraction: float, seed: int) -> bool:
        key = (part, method, round(fraction, 4), seed)
        return any((r["part"], r["method"], r["sparsity"], r["seed"]) == key for r in self.rows)

    def add(
        self, part: str, method: str, fraction: float, seed: int, accuracy: float, before: float | None = None
    ) -> None:
        row = {"part": part, "method": method, "sparsity": round(fraction, 4), "seed": seed, "accuracy": accuracy}
        self.rows.append(row if before is None else {**row, "before": before})
        write(self.path, json.dumps(self.rows, indent=1) + "\n")
        print(time.strftime("%H:%M:%S"), self.rows[-1], flush=True)

    def curves(self, part: str, key: str = "accuracy") -> dict[str, Curve]:
        out: dict[str, Curve] = {}
        for row in sorted(self.rows, key=lambda r: r["seed"]):
            if row["part"] == part and row["method"] != "dense" and row["sparsity"]:
                out.setdefault(row["method"], {}).setdefault(row["sparsity"], []).append(row[key])
        return out

    def dense(self, part: str, key: str = "accuracy") -> list[float]:
        return [r[key] for r in self.rows if r["part"] == part and not r["sparsity"]]


# -- the page


def _verdicts(curves: dict[str, Curve], best: str, rivals: Sequence[str]) -> str:
    """Paired differences with their intervals, where there are two pairs."""
    cells = []
    for rival in rivals:
        for fraction in sorted(curves[rival]):
            pairs = list(zip(curves[best][fraction], curves[rival][fraction], strict=False))
            if len(pairs) > 1:
                mean, low, high = interval([a - b for a, b in pairs])
                cells.append((rival, f"{100 * fraction:g} %", f"{mean:+.1f}", f"{low:+.1f} to {high:+.1f}"))
    return markdown_table((f"{best} minus", "sparsity", "points", "95 % interval"), cells) if cells else ""


def page(rows: Rows, folder: Path) -> str:
    """The Markdown page, of what is there."""
    text = (__doc__ or "").strip().split("\n\n", 2)[2]
    parts = [
        "# CIFAR-10, ResNet-20: sparsity with training, and lottery tickets",
        "",
        *text.splitlines(),
        "",
        "    python -m tools.bench_tickets",
        "",
        f"Measured on: {machine_line(1)}. {versions_line('torch', 'numpy', 'scipy')}.",
        "",
    ]
    if rows.curves("tuned"):
        parts += _tuned_section(rows, folder)
    if rows.curves("ticket"):
        parts += _ticket_section(rows, folder)
    return "\n".join(parts)


def _table(curves: dict[str, Curve]) -> str:
    return curve_table(curves, spread=all(len(v) > 1 for curve in curves.values() for v in curve.values()))


def _how_many(count: int) -> str:
    return "one run" if count == 1 else f"mean and standard deviation of {count} runs"


def _tuned_section(rows: Rows, folder: Path) -> list[str]:
    tuned, dense = rows.curves("tuned"), rows.dense("tuned")
    mean = sum(dense) / len(dense)
    draw(folder / "tickets-tuned.svg", f"ResNet-20 pruned in one shot, {TUNING} steps after", mean, tuned)
    return [
        "## Pruned in one shot, then trained",
        "",
        f"Top-1 in %, {_how_many(len(dense))}; each draws images and random masks anew. Dense: "
        f"{rows.dense('tuned', 'before')[0]:.1f}, and {mean:.1f} after the same training. N:M is 2:4, 1:4 and 1:8; "
        f"gradients come from 1,000 training images. Controls: random masks keep the trained weights, with as many in "
        f"each layer as global magnitude leaves; random reinitialisation has the masks of global magnitude; random "
        f"N:M keeps as many of each group, at random.",
        "",
        "Without training:",
        "",
        _table(rows.curves("tuned", "before")),
        "",
        f"After {TUNING} steps, the masks in force:",
        "",
        _table(tuned),
        "",
        "![pruned and trained](tickets-tuned.svg)",
        "",
    ]


def _ticket_section(rows: Rows, folder: Path) -> list[str]:
    found, dense = rows.curves("ticket"), rows.dense("ticket")
    mean = sum(dense) / len(dense)
    draw(folder / "tickets.svg", "ResNet-20 from scratch", mean, found)
    runs = {len(values) for values in found.get(RANDOM, {}).values()} - {len(dense)}
    few = f" ({RANDOM}: of {min(runs)})" if runs else ""
    verdicts = _verdicts(found, TICKET, [name for name in (REINIT, RANDOM) if name in found])
    return [
        "## Lottery tickets",
        "",
        f"Top-1 in %, {_how_many(len(dense))}{few}; dense {mean:.1f}. Nothing here is trained to convergence: tickets "
        f"above the dense network say nothing about the end of a full training.",
        "",
        _table(found),
        "",
        *([verdicts, ""] if verdicts else []),
        "![tickets](tickets.svg)",
        "",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_tickets", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"how many (default {SEEDS})")
    parser.add_argument("--page", action="store_true", help="train nothing")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"Markdown page (default {OUTPUT})")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = Rows(options.output.with_suffix(".json"))
    if not options.page:
        cifar = Cifar(loaders())
        for seed in range(options.seeds):
            tickets(cifar, rows, seed)
            if seed < FEW:
                tune(cifar, rows, seed)
    write(options.output, page(rows, options.output.parent))
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
