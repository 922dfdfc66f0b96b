"""One kind of width at a time, on transformers of real size: what goes, in which output mode, proven.

    python -m tools.granularity                             # all of them, writes docs/granularity.md
    python -m tools.granularity --only 'torchvision Swin-T'     # some, writes nothing

Needs `pip install graphprune[coverage]`. Weights are random: nothing is downloaded. Each granularity is tried with
output="module" first, then "hybrid", then "graph"; the row shows the first in which anything goes. It is proven by
`graphprune.verify`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import nn

import graphprune
from graphprune.errors import GraphPruneError
from tools._common import enliven, machine_line, markdown_table, parameters_in, versions_line, write

RATIO = 0.5
OUTPUT = Path("docs/granularity.md")
GRANULARITIES: tuple[str | tuple[str, ...], ...] = (
    "heads",
    "head features",
    "qk features",
    "v features",
    "mlp",
    "embedding",
    ("heads", "head features", "mlp", "embedding"),
    "auto",
)
HEADINGS = ("model", "granularity", "output mode", "parameters removed", "largest relative error", "planning, s CPU")


def _images() -> torch.Tensor:
    return torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def _words() -> torch.Tensor:
    return torch.randint(3, 1000, (1, 32), generator=torch.Generator().manual_seed(0))


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=8000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "torchvision ViT-B/16": lambda: (torchvision.models.vit_b_16(weights=None), _images()),
    "torchvision Swin-T": lambda: (torchvision.models.swin_t(weights=None), _images()),
    "timm ViT-S/16": lambda: (timm.create_model("vit_small_patch16_224", pretrained=False), _images()),
    "timm Swin-T": lambda: (timm.create_model("swin_tiny_patch4_window7_224", pretrained=False), _images()),
    "Hugging Face ViT-B/16": lambda: (
        transformers.ViTForImageClassification(transformers.ViTConfig()),
        {"pixel_values": _images()},
    ),
    "Hugging Face BERT base": lambda: (
        transformers.BertForSequenceClassification(transformers.BertConfig()),
        {"input_ids": _words()},
    ),
    # without its cache, which no graph of an attention module can hold
    "Hugging Face Llama, 12 layers": lambda: (_llama(), {"input_ids": _words(), "use_cache": False}),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """What one granularity does to one model."""

    model: str
    granularity: str | tuple[str, ...]
    mode: str
    share: float
    error: float
    seconds: float
    passed: bool

    @property
    def cells(self) -> tuple[str, ...]:
        name = self.granularity if isinstance(self.granularity, str) else "all four"
        if not self.mode:
            return self.model, name, "none: q, k and v lie on one axis", "", "", f"{self.seconds:.2f}"
        error = f"{self.error:.0e}" if self.passed else f"**{self.error:.0e}**"
        return self.model, name, self.mode, f"{self.share:.1%}", error, f"{self.seconds:.2f}"


def examine(name: str, granularity: str | tuple[str, ...], model: nn.Module, example: Any) -> Row:
    """Plan in the first output mode in which anything goes, cut and prove."""
    spent = 0.0
    for mode in ("module", "hybrid", "graph"):
        started = time.process_time()
        try:
            plan = graphprune.plan(model, example, RATIO, granularity=granularity, output=mode)
        except GraphPruneError:  # no graph can stand for the whole network
            continue
        finally:
            spent = time.process_time() - started
        if plan.empty:
            continue
        small = plan.apply(model)
        report = graphprune.verify(model, small, plan, example)
        worst = max((c.error for c in report.checks if not math.isnan(c.error)), default=math.nan)
        share = 1 - parameters_in(small) / parameters_in(model)
        return Row(name, granularity, mode, share, worst, spent, report.passed)
    return Row(name, granularity, "", 0.0, math.nan, spent, True)


def rows(names: Sequence[str]) -> Iterator[Row]:
    """Every granularity of every named model."""
    for name in names:
        torch.manual_seed(0)
        model, example = MODELS[name]()
        enliven(model.eval(), example)
        for granularity in GRANULARITIES:
            yield examine(name, granularity, model, example)


def page(found: Sequence[Row], versions: str, machine: str) -> str:
    """The Markdown page."""
    lines = [
        "# Granularity: one kind of width at a time",
        "",
        f"`python -m tools.granularity`, ratio {RATIO:g}, random weights. The *output mode* is the first of module, "
        "hybrid and graph in which anything goes. The error is the largest of the permutation and the "
        "zero-equivalence (or rewritten-graph) check of `graphprune.verify`. `tests/allocation/test_granularity.py` "
        "checks on small ones of these networks that nothing else goes. *All four* are heads, head features, mlp and "
        "embedding; *auto* is the default.",
        "",
        f"{versions}. {machine}.",
        "",
        markdown_table(HEADINGS, [row.cells for row in found]),
        "",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; exit status 1 if a proof failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.granularity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(MODELS), metavar="NAME", help=f"of {', '.join(MODELS)}")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    found = []
    for row in rows(options.only or list(MODELS)):
        print(" | ".join(row.cells), flush=True)
        found.append(row)
    if not options.only:
        versions = versions_line("torch", "torchvision", "timm", "transformers")
        write(OUTPUT, page(found, versions, machine_line(torch.get_num_threads())))
        print(f"written: {OUTPUT}")
    return 0 if all(row.passed for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
