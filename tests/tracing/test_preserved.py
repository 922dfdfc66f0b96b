"""Recording leaves no trace: not in the model, not in the example, not in the process, also after an error."""

from __future__ import annotations

import copy
import gc
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune import GraphPruneError
from graphprune.tracing.origin import TracedFloat, TracedInt
from graphprune.tracing.trace import record_run
from tests.tracing.interpreter import changes, picture_of_model, picture_of_process


class Busy(nn.Module):
    """Does to itself, to its arguments and to the process all that a forward pass may do."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.sizes, self.by_name = 6, (6, [2, 3]), {"heads": 2, "inner": (3, 4)}
        self.rate, self.name, self.nothing = 0.5, "busy", None
        self.conv = nn.Conv2d(3, self.width, 3)
        self.norm = nn.BatchNorm2d(6)
        self.frozen = nn.Linear(6, 4).requires_grad_(False)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("window", torch.zeros(3), persistent=False)
        self.fail_at = ""
        self.norm.training = False  # a frozen norm inside a training model
        self.moved: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        self._maybe("start")
        noise = random.random() + float(np.random.rand()) + float(torch.rand(1))
        x = self.norm(self.conv(x))
        self.steps += 1
        self.window[1:].copy_(torch.ones(2))
        self.steps = self.steps * 2  # another tensor under the buffer's name
        self.width = x.shape[1]
        self.last, self.count = x, x.shape[1] * 2
        self.extra = nn.Linear(1, 1)
        self.register_buffer("late", torch.zeros(1))
        self.scale = nn.Parameter(torch.ones(1))
        self.train()
        self._maybe("middle")
        x = self.drop(x).mean((2, 3)).reshape(-1, self.by_name["heads"], self.sizes[1][1]).flatten(1)
        x = self.frozen(x) * noise / math.sqrt(self.sizes[0])
        self._maybe("end")
        return x

    def _maybe(self, where: str) -> None:
        if self.fail_at == where:
            raise ValueError(f"failed at the {where}")
        if self.fail_at == f"stop at the {where}":
            raise KeyboardInterrupt


def busy(**attributes: Any) -> Busy:
    torch.manual_seed(0)
    model = Busy()
    model.train()
    model.norm.training = False
    for key, value in attributes.items():
        setattr(model, key, value)
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    model.conv.weight.user_note = "kept"  # type: ignore[attr-defined]
    return model


def test_model_and_process_are_as_before() -> None:
    model, x = busy(), torch.randn(2, 3, 8, 8)
    torch.backends.mha.set_fastpath_enabled(True)
    before, process = picture_of_model(model), picture_of_process()
    trace = record_run(model, x)
    assert trace.parameters
    assert not changes(before, picture_of_model(model))
    assert not changes(process, picture_of_process())


@pytest.mark.parametrize("where", ["start", "middle", "end"])
def test_as_before_after_an_error(where: str) -> None:
    model, x = busy(fail_at=where), torch.randn(2, 3, 8, 8)
    before, process = picture_of_model(model), picture_of_process()
    with pytest.raises(GraphPruneError) as caught:
        record_run(model, x)
    line = Busy._maybe.__code__.co_firstlineno + 2
    assert "ValueError" in str(caught.value) and f"failed at the {where}" in str(caught.value)
    assert f"test_preserved.py:{line}" in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)
    assert not changes(before, picture_of_model(model))
    assert not changes(process, picture_of_process())


def test_as_before_after_an_interrupt() -> None:
    model, x = busy(fail_at="stop at the middle"), torch.randn(2, 3, 8, 8)
    before, process = picture_of_model(model), picture_of_process()
    with pytest.raises(KeyboardInterrupt):
        record_run(model, x)
    assert not changes(before, picture_of_model(model))
    assert not changes(process, picture_of_process())


def test_requires_grad_changed_by_forward_is_as_before() -> None:
    class Freezes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            self.a.requires_grad_(False)
            self.b.requires_grad_(True)
            return self.b(self.a(x))

    model = Freezes()
    record_run(model, torch.randn(2, 3))
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False]


def test_a_fast_path_that_was_off_stays_off() -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        record_run(nn.Linear(3, 2), torch.randn(1, 3))
        assert torch.backends.mha.get_fastpath_enabled() is False
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


_seen: list[Any] = []  # not the hooks' own: what those collect is put back


def test_forward_runs_once_in_eval_mode_without_gradients_with_hooks() -> None:
    seen, _ = _seen, _seen.clear()

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, self.fc.training, torch.is_grad_enabled()))
            return self.fc(x)

    model = Watched().train()
    model.fc.register_forward_hook(lambda m, args, out: _seen.append("hook") or out * 2)
    model.fc.register_forward_pre_hook(lambda m, args: _seen.append("pre"))
    before = picture_of_model(model)
    trace = record_run(model, torch.randn(2, 3))
    assert seen == [(False, False, False), "pre", "hook"]
    assert "aten.mul.Tensor" in [str(n.target) for n in trace.graph.nodes]  # what the hook does belongs to the network
    assert not changes(before, picture_of_model(model))


def traced_numbers_in(value: Any) -> list[Any]:
    """Traced numbers reachable from a value through containers, modules and tensors."""
    found, queue, seen = [], [value], set()
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, (TracedInt, TracedFloat)):
            found.append(item)
        elif isinstance(item, (dict, list, tuple, set, nn.Module, Tensor)):
            queue += gc.get_referents(item)
            queue += list(vars(item).values()) if hasattr(item, "__dict__") else []
    return found


def test_no_traced_number_stays_behind() -> None:
    model, x = busy(), torch.randn(2, 3, 8, 8)
    trace = record_run(model, x)
    assert not traced_numbers_in(model)
    assert not traced_numbers_in(x)
    values: list[Any] = []
    for node in trace.graph.nodes:
        values += [node.args, node.kwargs, node.meta.get("val")]
    assert not traced_numbers_in(values)


class Memory(nn.Module):
    """Keeps results in containers of its own, as caches of position tables do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.cache: dict[Any, Any] = {}
        self.seen: list[Any] = []
        self.sizes: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        if n not in self.cache:
            self.cache[n] = torch.arange(n, dtype=x.dtype) * x.shape[0]
        self.seen.append(n)
        self.sizes.add(x.shape[0])
        return self.fc(x + self.cache[n])


def test_containers_of_the_model_are_as_before() -> None:
    model = Memory()
    record_run(model, torch.randn(2, 6))
    assert not traced_numbers_in(model)
    assert (model.cache, model.seen, model.sizes) == ({}, [], set())


def test_a_filled_cache_is_as_before() -> None:
    model = Memory()
    model(torch.randn(2, 6))
    kept = model.cache[6]
    before = picture_of_model(model)
    record_run(model, torch.randn(2, 6))
    assert not changes(before, picture_of_model(model))
    assert model.cache[6] is kept and not vars(kept)
    copy.deepcopy(model)


def test_plain_tensor_attributes_that_are_written_are_as_before() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.counter = nn.Linear(3, 2), torch.zeros(2)
            self.states = [torch.zeros(2)]

        def forward(self, x: Tensor) -> Tensor:
            self.counter += 1
            self.states[0].add_(1)
            return self.fc(x) + self.counter + self.states[0]

    model = Plain()
    before = picture_of_model(model)
    record_run(model, torch.randn(2, 3))
    assert not changes(before, picture_of_model(model))


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_the_example_is_as_before(form: str) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.relu(x))

    x = torch.randn(4, 3)
    before = x.clone()
    record_run(Writes(), {"tensor": x, "tuple": (x,), "dict": {"x": x}}[form])
    assert torch.equal(x, before)
    assert not vars(x) and not x.requires_grad and x.grad_fn is None


def test_example_inputs_that_require_gradients() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    trace = record_run(nn.Linear(3, 2), x)
    assert x.requires_grad and x.grad is None and not vars(x)
    assert len(trace.graph.output_node().args[0]) == 1


def test_inside_inference_mode_and_no_grad() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.inference_mode():
        x = torch.randn(1, 3)
        trace = record_run(model, x)
        assert torch.is_inference_mode_enabled()
    assert len(trace.parameters) == 4
    with torch.no_grad():
        record_run(model, torch.randn(1, 3))
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_written_buffers_and_parameters_keep_their_values_and_identity() -> None:
    class Writer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.register_buffer("ema", torch.randn(4))
            self.register_buffer("small", torch.randn(4).half())

        def forward(self, x: Tensor) -> Tensor:
            self.w.data.mul_(0.5)
            self.w[1:3, ::2] = 0
            self.ema.mul_(0.9).add_(x.mean(0), alpha=0.1)
            torch.mul(self.small, 2, out=self.small)
            self.ema.view(2, 2).t().zero_()
            return F.linear(x, self.w) + self.ema + self.small

    model = Writer()
    before = picture_of_model(model)
    record_run(model, torch.randn(3, 4))
    assert not changes(before, picture_of_model(model))


def test_a_model_can_be_copied_and_stored_while_it_is_recorded() -> None:
    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.width = nn.Linear(3, 4), 4

        def forward(self, x: Tensor) -> Tensor:
            self.twin = copy.deepcopy(self)
            kept.append(self.twin)
            return self.fc(x).view(-1, self.width)

    kept: list[Any] = []
    record_run(Copies(), torch.randn(2, 3))
    assert type(kept[0].width) is int
    assert not traced_numbers_in(kept[0])


def test_functions_of_torch_that_recording_opens_still_dispatch_to_subclasses() -> None:
    calls = []

    class Noted(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.softmax(F.dropout(self.fc(x), 0.5, self.training), -1)

    x = torch.randn(2, 3).as_subclass(Noted)
    model = Uses()
    trace = record_run(model, x)
    assert "softmax" in calls
    assert [n for n in trace.graph.nodes if "softmax" in str(n.target)]
