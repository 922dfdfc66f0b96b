"""Models are used, planned and trained by several threads, and interrupted at any moment: they stay what they are."""

from __future__ import annotations

import gc
import math
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune
from graphprune.support import interrupts
from graphprune.tracing import patches
from graphprune.tracing.trace import record_run


class Net(nn.Module):
    """Widths from attributes, multi-head attention, `math.sqrt`; `closed` gives it a hook that cannot be cloned."""

    def __init__(self, closed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.width = 2, 8
        self.first, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.last = nn.Linear(8, 3)
        if closed:
            self.first.register_forward_hook(lambda *args: self.note())
        self.notes = 0

    def note(self) -> None:
        assert self.notes == 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)) / math.sqrt(self.width)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        out: Tensor = self.last(self.layer(h).view(x.shape[0], -1, self.heads, self.width // self.heads).flatten(2))
        return out


def process() -> tuple[Any, ...]:
    """What a recording may change in the process."""
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    holders = (F, torch.functional, torch._tensor)
    return (
        math.sqrt, range, nn.Module.__call__, nn.MultiheadAttention.forward, torch.Tensor.__len__,
        torch.autograd.Function.__dict__.get("apply"), torch.backends.mha.get_fastpath_enabled,
        torch.backends.mha.get_fastpath_enabled(), "float" in vars(F),
        [getattr(m, n, None) for m in holders for n in names],
        torch.is_grad_enabled(), torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack(),
        gc.isenabled(), signal.getsignal(signal.SIGINT),
    )  # fmt: skip


def picture(model: nn.Module) -> list[Any]:
    """Every attribute of every module by identity, and the values of its tensors."""
    own = [(p, k, id(v)) for p, m in model.named_modules() for k, v in m.__dict__.items() if type(v) is not int]
    tables = [(n, id(t), t.detach().sum().item()) for n, t in model.state_dict(keep_vars=True).items()]
    numbers = [(k, type(v), v) for m in model.modules() for k, v in m.__dict__.items() if isinstance(v, int)]
    return [own, tables, numbers]


def together(*runs: Callable[[], Any]) -> list[Any]:
    """The results of functions that run at the same time; errors are results."""
    results: list[Any] = [None] * len(runs)

    def call(place: int) -> None:
        try:
            results[place] = runs[place]()
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(runs))]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    return results


X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))


def planned(model: nn.Module) -> list[Any]:
    return [dict(graphprune.plan(model, X, 0.5, output=output).removed) for output in ("module", "hybrid")]


@pytest.mark.parametrize("closed", [False, True])
def test_one_model_in_several_threads(closed: bool) -> None:
    """Two plan it, two use it: every answer is that of a single thread."""
    model = Net(closed).eval()
    want, answer = planned(model), model(X).detach()
    before, state = picture(model), process()
    done = threading.Event()

    def plan() -> Any:
        try:
            return [planned(model) for _ in range(2)]
        finally:
            done.set()

    def serve() -> Any:
        found: list[bool] = []
        while not done.is_set() or not found:
            found.append(torch.allclose(model(X), answer, atol=1e-6))
        return found

    *plans, first, second = together(plan, plan, serve, serve)
    assert plans == [[want] * 2] * 2
    assert all(first) and all(second)
    assert picture(model) == before and process() == state


def test_two_models_whose_recordings_overlap() -> None:
    """The first begins first and ends first."""
    begun, ended = threading.Event(), threading.Event()

    class Waits(Net):
        def forward(self, x: Tensor) -> Tensor:
            begun.set()
            ended.wait(0.5) if self.last.out_features == 4 else None
            return super().forward(x)

    first, second = Net(), Waits()
    second.last = nn.Linear(8, 4)
    want, state = [planned(first), planned(second)], process()
    begun.clear()

    def late() -> Any:
        begun.wait(60)
        try:
            return planned(first)
        finally:
            ended.set()

    assert together(late, lambda: planned(second)) == want
    assert process() == state and not patches._places


def test_a_thread_that_trains_learns_the_same() -> None:
    def train() -> list[float]:
        model = Net().train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        losses = []
        for _ in range(15):
            optimizer.zero_grad()
            loss = model(X).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    want = train()
    model = Net().eval()
    losses, _, _ = together(train, lambda: planned(model), lambda: planned(model))
    assert losses == want


def test_patches_act_on_their_own_thread() -> None:
    def inside() -> float:
        with patches.patched(math, "sqrt", lambda original: lambda x: original(x) + 100):
            begun.set()
            ended.wait(60)
            with patches.patched(math, "sqrt", lambda previous: lambda x: previous(x) + 1000):
                nested = math.sqrt(4)
            return nested + math.sqrt(4)

    def outside() -> Any:
        begun.wait(60)
        try:
            return math.sqrt(4), math.sqrt.__name__
        finally:
            ended.set()

    begun, ended, original = threading.Event(), threading.Event(), math.sqrt
    assert together(inside, outside) == [1102 + 102, (2.0, "sqrt")]
    assert math.sqrt is original and not patches._places


@pytest.mark.parametrize("closed", [False, True])
def test_an_interrupt_at_any_moment(closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real signal at chosen lines of this library while a model is recorded."""
    monkeypatch.setattr(interrupts, "_LEVELS", 0)  # it comes at once, not a little later
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        model = Net(closed).train()
        before, state = picture(model), process()
        total = _interrupted(model, 0)
        assert total > 1000
        moments = random.Random(0).sample(range(1, total), 40)
        came_out = sum(_interrupted(model, moment) < 0 for moment in moments)
        assert picture(model) == before and process() == state and not patches._places
        assert came_out > 30
    finally:
        signal.signal(signal.SIGINT, handler)


def _interrupted(model: nn.Module, moment: int) -> int:
    """Record the model with Ctrl-C at the given event; the number of events, or -1 where it came out."""
    library = str(Path(graphprune.__file__).parent)
    seen = 0

    def watch(frame: FrameType, what: str, _value: Any) -> Any:
        nonlocal seen
        seen += what != "return"  # where signals are never looked at
        if seen == moment and what != "return":
            signal.raise_signal(signal.SIGINT)
        return watch

    before, state = picture(model), process()
    sys.settrace(lambda frame, *_: watch if frame.f_code.co_filename.startswith(library) else None)
    try:
        record_run(model, X, training_paths=True)
    except KeyboardInterrupt:
        seen = -1
    finally:
        sys.settrace(None)
    assert picture(model) == before, moment
    assert process() == state and not patches._places, moment
    return seen
