"""Whether a repair without labels brings MiniLM closer to the dense network, and what that does to its score.

    python -m tools.bench_similarity --speedup 1.3 --images 640 --methods mean least_squares

Plans and repairs as in `tools.bench_accuracy`. Of every network the cosine similarities of the test pairs of STS-B: how
they correlate with the dense network's, their Spearman correlation with the scores that people gave, and the difference
of that to the dense network's and to the unrepaired one's, each with its standard error over pairs drawn with
replacement, the same for all networks. Writes docs/similarity.md. Needs transformers and scipy.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional

import graphprune
from tools._common import machine_line, markdown_table, versions_line, width_step, widths_line, write
from tools.bench_accuracy import DOCS, loaders, task

HEADER = """# Closer to the dense network, and the score

MiniLM at {speedup:g}x fewer multiply-accumulates, widths {widths}; {images:,} sentences without labels. A repair that
knows no labels can but bring the network closer to the dense one. "like the dense one": the rank correlation of the
cosine similarities of the test pairs of STS-B with the dense network's; "score": their Spearman correlation with what
people said, x 100. Differences with their standard errors over pairs drawn with replacement, the same for all.

Written by `python -m tools.bench_similarity` ({machine}; {versions}).
"""
BATCH = 64
DRAWS = 1000


@torch.no_grad()
def similarities(model: nn.Module, tokenizer: Any, pairs: list[tuple[str, str, float]]) -> NDArray[np.float32]:
    """The cosine of the mean hidden states of each pair."""
    texts = [text for pair in pairs for text in pair[:2]]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = torch.empty(len(texts), 0)
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        asked = [texts[i] for i in places]
        batch = dict(tokenizer(asked, padding=True, truncation=True, max_length=128, return_tensors="pt"))
        hidden, mask = model(**batch)[0], batch["attention_mask"].unsqueeze(-1).float()
        mean = functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        if not found.numel():
            found = mean.new_empty(len(texts), mean.shape[1])
        found[places] = mean
    return np.asarray((found[0::2] * found[1::2]).sum(1).numpy())


def rank(first: NDArray[Any], second: NDArray[Any]) -> float:
    return float(spearmanr(first, second)[0])


def rows_of(found: dict[str, NDArray[np.float32]], scores: NDArray[np.float64]) -> list[list[str]]:
    """A row for each network."""
    generator = np.random.default_rng(0)
    draws = [generator.integers(0, len(scores), len(scores)) for _ in range(DRAWS)]
    drawn = {name: np.array([100 * rank(own[i], scores[i]) for i in draws]) for name, own in found.items()}

    def against(name: str, other: str) -> str:
        if name == other or (name == "dense" and other == "unrepaired"):
            return ""
        difference = 100 * (rank(found[name], scores) - rank(found[other], scores))
        return f"{difference:+.2f} ± {(drawn[name] - drawn[other]).std():.2f}"

    return [
        [
            name, f"{rank(own, found['dense']):.4f}", f"{100 * rank(own, scores):.2f}", against(name, "dense"),
            against(name, "unrepaired"),
        ]
        for name, own in found.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speedup", type=float, default=1.3)
    parser.add_argument("--images", type=int, default=640, help="calibration sentences")
    parser.add_argument("--methods", nargs="+", default=["mean", "least_squares"])
    parser.add_argument("--round-to", type=width_step, default="auto", help="as in graphprune.plan")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    made = task("minilm", options.images, held_out=False)
    shared = loaders()
    _, tokenizer = shared.minilm()
    pairs = shared.stsb("test")
    plan = graphprune.plan(
        made.model, made.example, budget=graphprune.Budget(macs=1 / options.speedup), criterion="reconstruction",
        data=made.data, round_to=options.round_to, **made.options,
    )  # fmt: skip
    networks = {"dense": made.model, "unrepaired": plan.apply(made.model)}
    for method in options.methods:
        repaired = graphprune.recover(made.model, plan, made.example, made.data, method)
        print(repaired, flush=True)
        networks[method] = repaired.model
    found = {name: similarities(network, tokenizer, pairs) for name, network in networks.items()}
    headings = ["network", "like the dense one", "score", "to the dense one", "to the unrepaired one"]
    cells = rows_of(found, np.array([pair[2] for pair in pairs], dtype=np.float64))
    header = HEADER.format(
        speedup=options.speedup, widths=widths_line(options.round_to), images=options.images,
        machine=machine_line(torch.get_num_threads()), versions=versions_line("torch", "transformers"),
    )  # fmt: skip
    page = header + "\n" + markdown_table(headings, cells) + "\n"
    print(page)
    write(DOCS / "similarity.md", page)


if __name__ == "__main__":
    main()
