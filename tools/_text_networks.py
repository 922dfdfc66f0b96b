"""A small Llama and a small T5, trained on sentences in a few minutes, and how well they do on others.

The Llama says the next character of film reviews (SST-2). The T5 reads the words of a review in the order of the
dictionary, and says them in the right one; it knows the most frequent words only, the others are one. Both learn from
the training sentences of SST-2, always in the same order from the same seed, and are measured on its test sentences:
the share of characters or words that they say right, each given the right ones before it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F

LETTERS = " 'abcdefghijklmnopqrstuvwxyz`,.?!0123456789"
PAD, END, OTHER = 0, 1, 2
CODES = {letter: number for number, letter in enumerate(LETTERS, OTHER + 1)}
SIZE = len(LETTERS) + OTHER + 1
Example = tuple[dict[str, Tensor], Tensor]
LENGTH = 64  # characters that the Llama reads at once
WORDS = 800  # that the T5 knows


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained: its settings, batches of `batch`, `steps` of them, the highest learning rate."""

    settings: tuple[tuple[str, Any], ...]
    batch: int
    steps: int
    rate: float

    @property
    def mark(self) -> str:
        """Other recipes have others."""
        return f"{zlib.crc32(repr((self, SIZE, LENGTH, WORDS)).encode()):08x}"


LLAMA = Recipe(
    (
        ("hidden_size", 96),
        ("intermediate_size", 256),
        ("num_hidden_layers", 4),
        ("num_attention_heads", 6),
        ("num_key_value_heads", 3),
        ("max_position_embeddings", 2 * LENGTH),
        ("tie_word_embeddings", False),
    ),
    batch=32, steps=1000, rate=4e-3,
)  # fmt: skip
T5 = Recipe(
    (
        ("d_model", 96),
        ("d_kv", 16),
        ("d_ff", 192),
        ("num_heads", 6),
        ("num_layers", 3),
        ("num_decoder_layers", 3),
        ("feed_forward_proj", "gated-gelu"),
        ("dropout_rate", 0.0),
    ),
    batch=32, steps=1000, rate=3e-3,
)  # fmt: skip


def coded(text: str) -> list[int]:
    """The numbers of its characters, and the end."""
    return [*(CODES.get(letter, OTHER) for letter in text), END]


@dataclasses.dataclass(frozen=True)
class Learnt:
    """What a network learns: `examples` of texts, inputs and what to say of them."""

    name: str
    said: str
    recipe: Recipe
    make: Callable[[], nn.Module]
    examples: Callable[[list[str]], list[Example]]


# -- Llama


def stream(texts: list[str]) -> Tensor:
    """One sentence after the other, in rows of LENGTH characters and the one behind."""
    numbers = torch.tensor([number for text in texts for number in coded(text)])
    return numbers[: (len(numbers) - 1) // LENGTH * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH)


def llama() -> nn.Module:
    import transformers

    special = {"vocab_size": SIZE, "pad_token_id": PAD, "bos_token_id": END, "eos_token_id": END, "use_cache": False}
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**dict(LLAMA.settings), **special))
    return model


def llama_examples(texts: list[str]) -> list[Example]:
    """Inputs and the characters to say."""
    return [({"input_ids": row[:-1]}, row[1:]) for row in stream(texts)]


# -- T5


def t5() -> nn.Module:
    import transformers

    special = {"vocab_size": WORDS + OTHER + 1, "pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD}
    config = transformers.T5Config(**dict(T5.settings), **special, use_cache=False)
    model: nn.Module = transformers.T5ForConditionalGeneration(config)
    return model


def vocabulary(texts: list[str]) -> dict[str, int]:
    """The number of each of the most frequent words."""
    frequent = collections.Counter(word for text in texts for word in text.split()).most_common(WORDS)
    return {word: number for number, (word, _) in enumerate(frequent, OTHER + 1)}


def t5_examples(texts: list[str], known: dict[str, int]) -> list[Example]:
    """Inputs, and the words to say."""
    found = []
    for text in texts:
        words = text.split()
        read = torch.tensor([*(known.get(word, OTHER) for word in sorted(words)), END])
        wanted = torch.tensor([*(known.get(word, OTHER) for word in words), END])
        before = torch.cat([torch.tensor([PAD]), wanted[:-1]])
        found.append(
            ({"input_ids": read, "attention_mask": torch.ones_like(read), "decoder_input_ids": before}, wanted)
        )
    return found


# -- both


def batches(examples: list[Example], size: int) -> list[Example]:
    """Examples of similar lengths together, padded at the end; any prefix of the batches has all lengths."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][1]))
    together = [[examples[i] for i in order[start : start + size]] for start in range(0, len(order), size)]

    def padded(rows: list[Tensor]) -> Tensor:
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)

    made = [
        ({name: padded([inputs[name] for inputs, _ in part]) for name in part[0][0]}, padded([w for _, w in part]))
        for part in together
    ]
    mixed = torch.randperm(len(made), generator=torch.Generator().manual_seed(0))
    return [made[i] for i in mixed]


@torch.inference_mode()
def right(model: nn.Module, data: list[Example]) -> float:
    """Per cent of the characters said right."""
    hits = said = 0
    for inputs, wanted in data:
        asked = wanted != PAD
        hits += int((model(**inputs).logits.argmax(-1) == wanted)[asked].sum())
        said += int(asked.sum())
    return 100 * hits / said


def _endless(examples: list[Any], size: int) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(1)
    while True:
        mixed = [examples[i] for i in torch.randperm(len(examples), generator=generator)]
        for start in range(0, len(mixed) - 16 * size, 16 * size):
            yield from batches(mixed[start : start + 16 * size], size)


def trained(learnt: Learnt, examples: list[Example], folder: Path | None) -> nn.Module:
    """The network, from `folder` if it is there, else trained and stored there."""
    torch.manual_seed(0)
    name, recipe, model = learnt.name, learnt.recipe, learnt.make().eval()
    file = folder / f"{name}-{recipe.mark}.safetensors" if folder else None
    if file and file.is_file():
        load_model(model, str(file))
        return model
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step, (inputs, wanted) in enumerate(_endless(examples, recipe.batch)):
        if step == recipe.steps:
            break
        for group in optimizer.param_groups:  # a rise over the first twentieth, then down to zero as a cosine
            part = step / recipe.steps
            group["lr"] = recipe.rate * min(20 * part, 1) * (1 + math.cos(math.pi * part)) / 2
        model.train()
        loss = F.cross_entropy(model(**inputs).logits.flatten(0, 1), wanted.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"{name}: step {step}, loss {loss.item():.3f}", flush=True)
    model.eval()
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, str(file))
    return model


def _characters(texts: list[str]) -> Learnt:
    return Learnt("llama", "characters", LLAMA, llama, llama_examples)


def _order(texts: list[str]) -> Learnt:
    return Learnt("t5", "words", T5, t5, functools.partial(t5_examples, known=vocabulary(texts)))


TASKS: dict[str, Callable[[list[str]], Learnt]] = {"llama": _characters, "t5": _order}
"""By name, with the texts to learn from."""
