"""Every frozen axis of ten well-known networks has a reason, and every reason is true.

Each reason is checked against something that the analysis does not use: the text of the source line that it names, the
kind of the module that holds the parameter, or what the network computes when weights, inputs or indices are changed.
Networks of packages that may be missing have a stand-in, written in the same style.
"""

from __future__ import annotations

import dataclasses
import functools
import linecache
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import graphprune
from graphprune.dependency import Frozen, Reason
from graphprune.planning.request import Request
from graphprune.planning.widths import plan_from_graph
from graphprune.tracing.example import ExampleInput, result_tensors
from tests import standins

TEXT = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIDES = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 10,
    "max_source_positions": 16, "max_target_positions": 20,
}  # fmt: skip


def _resnet() -> tuple[nn.Module, Any]:
    return torchvision.models.resnet50(weights=None, num_classes=7), torch.randn(1, 3, 64, 64)


def _vit() -> tuple[nn.Module, Any]:
    model = torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 48, num_classes=10)
    return model, torch.randn(2, 3, 32, 32)


def _swin() -> tuple[nn.Module, Any]:
    model = torchvision.models.SwinTransformer([4, 4], 32, [2, 2], [2, 4], [4, 4], mlp_ratio=1.5, num_classes=10)
    return model, torch.randn(2, 3, 64, 64)


def _convnext() -> tuple[nn.Module, Any]:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)], num_classes=5), torch.randn(2, 3, 64, 64)


def _mask_rcnn() -> tuple[nn.Module, Any]:
    build = torchvision.models.detection.maskrcnn_resnet50_fpn
    model = build(
        weights=None, weights_backbone=None, min_size=64, max_size=64, num_classes=5, box_score_thresh=0.0,
        rpn_pre_nms_top_n_test=40, rpn_post_nms_top_n_test=20, box_detections_per_img=10,
    )  # fmt: skip
    return model, ([torch.rand(3, 64, 64)],)


def _hugging_face(name: str, config: str, example: Any, **options: Any) -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, name)(getattr(transformers, config)(**options)), example


def _yolo() -> tuple[nn.Module, Any]:
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    return tasks.DetectionModel("yolov8n.yaml", verbose=False), torch.randn(1, 3, 64, 64)


WORDS = {"input_ids": standins.words()}
BOTH = {"decoder_input_ids": standins.words(5)}
SOUND = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(1))
NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "ResNet-50": _resnet,
    "ViT": _vit,
    "Swin": _swin,
    "ConvNeXt": _convnext,
    "Mask R-CNN": _mask_rcnn,
    "YOLOv8n": _yolo,
    "BERT": lambda: _hugging_face("BertForSequenceClassification", "BertConfig", WORDS, **SIZES, **TEXT),
    "Llama": lambda: _hugging_face(
        "LlamaForCausalLM", "LlamaConfig", WORDS, num_key_value_heads=2, **SIZES, **TEXT
    ),
    "T5": lambda: _hugging_face(
        "T5ForConditionalGeneration", "T5Config", WORDS | BOTH, vocab_size=40, d_model=32, d_kv=8, d_ff=48,
        num_layers=2, num_heads=4,
    ),
    "Whisper": lambda: _hugging_face(
        "WhisperForConditionalGeneration", "WhisperConfig", {"input_features": SOUND} | BOTH,
        decoder_start_token_id=1, **SIDES, **TEXT,
    ),
    "as YOLO": lambda: (standins.Yolo(), torch.randn(2, 3, 32, 32)),
    "as BERT": lambda: (standins.Bert(), standins.words()),
    "as Llama": lambda: (standins.Llama(), standins.words()),
    "as T5": lambda: (standins.T5(), (standins.words(), standins.words(5))),
    "as Whisper": lambda: (standins.Whisper(), (torch.randn(2, 10, 16), standins.words())),
}  # fmt: skip


@dataclasses.dataclass
class Subject:
    """A network, its frozen axes after planning, and its outputs."""

    model: nn.Module
    example: ExampleInput
    frozen: tuple[Frozen, ...]
    outputs: list[Tensor]
    names: dict[str, list[str]]

    @functools.cached_property
    def modules(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules())

    def tensor(self, name: str) -> Tensor:
        return dict(self.model.named_parameters()).get(name, dict(self.model.named_buffers()).get(name))  # type: ignore[return-value]

    def holder(self, name: str) -> nn.Module:
        return self.modules[name.rpartition(".")[0]]

    @torch.no_grad()
    def run(self) -> list[Tensor]:
        torch.manual_seed(0)
        return result_tensors(self.example.clone().call(self.model))

    @torch.no_grad()
    def changed(self, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The outputs with `tensor` changed, which is put back."""
        before = tensor.clone()
        tensor.copy_(change(before))
        try:
            return self.run()
        finally:
            tensor.copy_(before)


@functools.cache
def subject(name: str) -> Subject:
    torch.manual_seed(0)
    model, example = NETWORKS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or parameter.abs().max() == 0:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.eval()
    graph = graphprune.trace(model, example)
    graph, _ = plan_from_graph(model, graph, Request(0.5, criterion="l2", round_to=1))
    tensors: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            tensors.setdefault(id(tensor), []).append(f"{path}.{key}" if path else key)
    names = {n: found for found in tensors.values() for n in found}
    found = Subject(model, ExampleInput.of(example), graph.frozen, [], names)
    found.outputs = found.run()
    return found


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def index_of(shape: tuple[int, ...] | torch.Size, axis: int, which: Any) -> tuple[Any, ...]:
    return (*[slice(None)] * axis, which, *[slice(None)] * (len(shape) - axis - 1))


# -- one check per kind of reason. Each gets the subject, the frozen axis, the reason and the text of the source line.


def kernel(s: Subject, f: Frozen, reason: Reason, code: str) -> None:
    module = s.holder(f.parameter)
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d) and f.axis >= 2
    assert tuple(module.kernel_size)[f.axis - 2] == f.length


def numbers(s: Subject, f: Frozen, reason: Reason, code: str) -> None:
    assert not s.tensor(f.parameter).is_floating_point()


def vocabulary(s: Subject, f: Frozen, reason: Reason, code: str) -> None:
    """The table is read by whole numbers; a row that none of them names may go wild, one that is named may not."""
    tables = [s.modules[n.rpartition(".")[0]] for n in s.names[f.parameter]]
    tables = [t for t in tables if isinstance(t, nn.Embedding)]
    assert tables and f.axis == 0
    used: set[int] = set()

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert not inputs[0].is_floating_point()
        used.update(inputs[0].unique().tolist())

    hooks = [t.register_forward_pre_hook(watch) for t in tables]
    s.run()
    for hook in hooks:
        hook.remove()
    assert used
    if not any(r.kind == "output" for r in f.reasons):  # else its rows are the output's, too
        free = sorted(set(range(f.length)) - used)
        if free:
            wild = s.changed(s.tensor(f.parameter), lambda t: t.index_fill(0, torch.tensor(free), 1e3))
            assert same(wild, s.outputs)
    row = torch.tensor([min(used - {0}, default=0)])
    assert not same(s.changed(s.tensor(f.parameter), lambda t: t.index_add(0, row, t[:1] + 1)), s.outputs)


def output(s: Subject, f: Frozen, reason: Reason, code: str) -> None:
    """An output has an axis of this length (times what is laid out around it), and the outputs depend on the slice.
    Where a slice of the weights reaches one index of such an axis only, it is the same index."""
    fitting = [i for i, o in enumerate(s.outputs) if any(n % f.length == 0 and n for n in o.shape)]
    if not fitting:  # boxes and scores of a detector: parts of the axis
        fitting = [i for i, o in enumerate(s.outputs) if any(f.length % n == 0 and n > 1 for n in o.shape)]
    assert fitting
    tensor, at = s.tensor(f.parameter), f.length // 2
    where = index_of(tensor.shape, f.axis, at)

    def nudged(t: Tensor) -> Tensor:
        t = t.clone()
        t[where] = t[where] * 1.5 + 0.25
        return t

    after = s.changed(tensor, nudged)
    differing = [i for i, o in enumerate(s.outputs) if after[i].shape != o.shape or not torch.equal(after[i], o)]
    assert differing
    if isinstance(s.holder(f.parameter), nn.Conv2d | nn.Linear) and f.axis == 1:
        return  # it reads what is put out
    for i in set(differing) & set(fitting):
        for axis, n in enumerate(s.outputs[i].shape):
            if n == f.length and after[i].shape == s.outputs[i].shape:
                hit = (after[i] != s.outputs[i]).movedim(axis, 0).flatten(1).any(1)
                if int(hit.sum()) == 1:
                    assert hit[at]


def reads_input(s: Subject, f: Frozen, reason: Reason, code: str) -> None:
    """What the layer reads does not depend on any parameter."""
    seen: list[Tensor] = []
    hook = s.holder(f.parameter).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    s.run()
    kept = [p.detach().clone() for p in s.model.parameters()]
    with torch.no_grad():
        for p in s.model.parameters():
            p.mul_(1.25)
        s.run()
        for p, before in zip(s.model.parameters(), kept, strict=True):
            p.copy_(before)
    hook.remove()
    assert torch.equal(seen[0], seen[len(seen) // 2])
    assert seen[0].shape[1 if seen[0].dim() > 2 else -1] == f.length


def literal(s: Subject, f: Frozen, reason: Reason, code: str) -> None:
    number = re.search(r"is the (literal|number) (\d+)", reason.text)
    assert number and bool(re.search(rf"(?<![\w.]){number[2]}\b", code)) == (number[1] == "literal")
    call = re.search(r" in (\w+)\(\)", reason.text)
    assert call is None or call[1] in code


def picked(s: Subject, f: Frozen, reason: Reason, code: str) -> None:
    """Indexing is on the line, and the order of the positions matters to the result."""
    assert "[" in code or re.search(r"index|gather|topk|sort|nms", code)
    order_matters(s, f)


def order_matters(s: Subject, f: Frozen) -> None:
    tensor = s.tensor(f.parameter)
    slope = torch.linspace(-1, 1, f.length).reshape([f.length if a == f.axis else 1 for a in range(tensor.dim())])
    slope *= tensor.detach().std()
    assert not same(s.changed(tensor, lambda t: t + slope), s.changed(tensor, lambda t: (t + slope).roll(1, f.axis)))


def no_channel(s: Subject, f: Frozen, reason: Reason, code: str) -> None:
    assert not isinstance(s.holder(f.parameter), nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    order_matters(s, f)


def by_text(*expected: tuple[str, str]) -> Callable[[Subject, Frozen, Reason, str], None]:
    """For reasons that name an operation: the line holds it."""

    def check(s: Subject, f: Frozen, reason: Reason, code: str) -> None:
        found = [pattern for words, pattern in expected if words in reason.text]
        assert found, f"nothing checks {reason.text!r}"
        assert any(re.search(pattern, code) for pattern in found), f"{reason}: {code}"
        order_matters(s, f)

    return check


CHECKS: dict[str, Callable[[Subject, Frozen, Reason, str], None]] = {
    "kernel": kernel,
    "numbers": numbers,
    "vocabulary": vocabulary,
    "output": output,
    "literal": literal,
    "no channel": no_channel,
    "immovable": by_text(
        ("combined with", r"[-+*/]|cat|where|mul|add|copy"),
        ("reads channels", r"\("),
        ("laid beside", r"cat|stack"),
    ),
    "index": picked,
    "selected": by_text(("used by itself", r"\[.*-?\d+.*\]|unbind|select|for |, ")),
    "values": by_text(("plain numbers", r"nonzero|where|item|bool|tolist")),
    "stride": by_text(("in steps", r"::")),
    "spatial": by_text(("slides along", r"conv|\(")),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_reason_is_true(name: str) -> None:
    s = subject(name)
    assert s.frozen
    done: set[tuple[str, str, tuple[int, ...], int]] = set()
    for frozen in s.frozen:
        assert frozen.reasons, f"{frozen.parameter} axis {frozen.axis} is frozen without a reason"
        for reason in frozen.reasons:
            code = ""
            if reason.source is None:
                assert reason.kind in ("kernel", "numbers", "no channel"), f"{reason} names no line"
            else:
                lines = linecache.getlines(reason.source.file)
                assert 0 < reason.source.line <= len(lines), f"{reason} names a line that there is not"
                code = _statement(lines, reason.source.line)
            key = (reason.kind, str(reason), tuple(s.tensor(frozen.parameter).shape), frozen.axis)
            if key in done:  # alike in another layer
                continue
            done.add(key)
            try:
                check = reads_input if "the model's input" in reason.text else CHECKS[reason.kind]
                check(s, frozen, reason, code)
            except AssertionError as error:
                raise AssertionError(f"{frozen.parameter} axis {frozen.axis}: {reason}: {code.strip()}") from error


def _statement(lines: list[str], line: int) -> str:
    """The line, with those that it goes on in or was begun in, as far as brackets are open."""
    text = lines[line - 1]
    first = line - 1
    while first > 0 and line - first < 5 and text.count(")") > text.count("("):
        first -= 1
        text = lines[first] + text
    last = line
    while last < len(lines) and last - line < 8 and text.count("(") > text.count(")"):
        text += lines[last]
        last += 1
    return text
