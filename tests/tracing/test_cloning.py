"""What runs while a model is recorded are modules of their own: nothing of the user's is touched, whatever holds it."""

from __future__ import annotations

import collections
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.support.walking import named_tensors
from graphprune.tracing.cloning import Bare, SameMemory, Unclonable, clone_modules
from graphprune.tracing.trace import record_run


class Settings:
    def __init__(self) -> None:
        self.width, self.seen = 8, []


class Net(nn.Module):
    """A small network; `keep` gives it something more to hold, `use` does something with it in forward."""

    def __init__(self, keep: Callable[[Net], Any] | None = None, use: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.settings = Settings()
        self.inner = nn.Sequential(nn.ReLU())
        self.__dict__["use"] = use
        if keep is not None:
            self.__dict__["kept"] = keep(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(self.first(x))
        if self.use is not None:
            self.use(self, h)
        return self.second(h)


def clones(model: nn.Module, data: bool = True) -> dict[str, nn.Module]:
    convert = SameMemory(named_tensors(model).values()) if data else Bare()
    return clone_modules(dict(model.named_modules()), convert).modules


def everything(value: Any, found: dict[int, Any], depth: int = 0) -> dict[int, Any]:
    """All that is reached from a module through containers, attributes, methods and references."""
    if id(value) in found or depth > 12 or isinstance(value, (type, types.ModuleType, Tensor)):
        return found
    found[id(value)] = value
    held: list[Any] = []
    if isinstance(value, dict):
        held = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, collections.deque)):
        held = list(value)
    elif isinstance(value, types.MethodType):
        held = [value.__self__]
    elif isinstance(value, functools.partial):
        held = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, weakref.ref):
        held = [value()]
    elif hasattr(value, "__dict__"):
        held = list(value.__dict__.values())
    for item in held:
        everything(item, found, depth + 1)
    return found


class Tap:
    """A hook object that holds a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any) -> None:
        self.module.last = args[-1]  # type: ignore[assignment]


def _hooked(net: Net, hook: Any) -> Any:
    net.first.register_forward_hook(hook)


KINDS: dict[str, Callable[[Net], Any]] = {
    "nothing": lambda net: None,
    "list": lambda net: [net.first, [net.second, 3]],
    "tuple": lambda net: (net.first, "name"),
    "dict": lambda net: {"a": net.first, "b": {"c": net}},
    "ordered dict": lambda net: collections.OrderedDict(a=net.second),
    "default dict": lambda net: collections.defaultdict(list, a=[net.second]),
    "modules as keys": lambda net: {net.first: 1},
    "set": lambda net: {net.first, net.second},
    "deque": lambda net: collections.deque([net.first], maxlen=3),
    "bound method": lambda net: net.first.forward,
    "partial": lambda net: functools.partial(net.second.forward),
    "nested partial": lambda net: functools.partial(functools.partial(map, net.first.forward), key=net.second),
    "weak reference": lambda net: weakref.ref(net.first),
    "the module itself": lambda net: net,
    "object": lambda net: types.SimpleNamespace(module=net.first, number=3),
    "object in a list": lambda net: [types.SimpleNamespace(module=net.first)],
    "hook, bound": lambda net: _hooked(net, net.second._get_name),
    "hook, object": lambda net: _hooked(net, Tap(net)),
    "unregistered module": lambda net: [nn.Sequential(nn.ReLU())],
    "circle": lambda net: (lambda a: (a.append(a), a.append(net.first), a)[-1])([]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", [True, False])
def test_no_way_leads_from_a_clone_to_a_module_of_the_user(kind: str, data: bool) -> None:
    net = Net(KINDS[kind])
    own = {id(m) for m in net.modules()}
    made = clones(net, data)
    reached = everything(made[""], {})
    assert not own & reached.keys()
    assert len({id(m) for m in made.values()} & reached.keys()) == len(set(map(id, made.values())))
    assert {p: type(m) for p, m in made.items()} == {p: type(m) for p, m in net.named_modules()}
    assert list(made[""].state_dict()) == list(net.state_dict())


def _closure(net: Net) -> Any:
    return lambda *args: net.first


def _default(net: Net) -> Any:
    def function(*args: Any, of: Any = net) -> Any:
        return of

    return function


class Slotted:
    __slots__ = ("module",)

    def __init__(self, module: nn.Module) -> None:
        self.module = module


@pytest.mark.parametrize("keep", [_closure, _default, lambda n: [_closure(n)], lambda n: functools.partial(_closure(n)),
                                  lambda n: _hooked(n, _closure(n)), Slotted])  # fmt: skip
def test_what_cannot_be_taken_apart_is_said(keep: Callable[[Net], Any]) -> None:
    with pytest.raises(Unclonable):
        clones(Net(keep))


def _counting(net: Net) -> Any:
    """A hook that changes the model it closes over, as tools for statistics do."""
    net.calls = 0

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        net.calls += 1
        net.last = net.first.weight.sum()

    return _hooked(net, hook)


def test_a_model_that_cannot_be_cloned_is_recorded_and_as_before() -> None:
    net, x = Net(_counting).train(), torch.randn(2, 4)
    before = {name: dict(m.__dict__) for name, m in net.named_modules()}
    plan = graphprune.plan(net, x, 0.5)
    assert len(plan.removed["first.weight"][0]) == 4
    for name, module in net.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert all(module.__dict__[k] is v for k, v in before[name].items())
    assert net.calls == 0 and all(not t.is_meta for t in net.state_dict().values())


def test_a_module_that_only_runs_show_is_found_out() -> None:
    """Nothing that the clone holds leads to it: a function reads it from its globals under another name."""
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(registry["net"].first(x).relu())

    registry: dict[str, Any] = {}
    registry["net"] = net = Calls()
    plan = graphprune.plan(net, torch.randn(2, 4), 0.5)
    assert len(plan.removed["first.weight"][0]) == 4 and plan.apply(net).first.weight.shape == (4, 4)


def test_shared_things_stay_shared() -> None:
    shared = [1, torch.ones(2)]
    net = Net(lambda n: shared)
    net.first.__dict__["same"] = shared
    net.second.__dict__["settings"] = net.settings
    net.second.weight = nn.Parameter(net.second.weight[:, :4].detach().clone())
    net.register_parameter("tied", net.first.bias)
    made = clones(net)
    assert made[""].kept is made["first"].same is not shared
    assert made[""].settings is made["second"].settings is not net.settings
    assert made[""].tied is made["first"].bias is not net.first.bias
    assert made[""].kept[1] is shared[1]  # a tensor that is no parameter


def test_writes_reach_nothing_of_the_users() -> None:
    net = Net()
    net.register_buffer("count", torch.zeros(2))
    net.register_buffer("view", net.count[:1])
    net.register_buffer("own", torch.zeros(2))
    made = clones(net)[""]
    assert made.first.weight.data_ptr() == net.first.weight.data_ptr()
    assert made.own.data_ptr() != net.own.data_ptr()
    assert made.count.data_ptr() == net.count.data_ptr() and made.view.data_ptr() == made.count.data_ptr()
    made.first.weight.data = torch.ones(1)
    made.own += 1
    made.settings.seen.append(1)
    made.settings.width = 3
    assert net.first.weight.shape == (8, 4) and not net.own.any() and net.settings.seen == []
    assert net.settings.width == 8


def _store(net: Net, h: Tensor) -> None:
    net.settings.seen.append(h)
    net.settings.width = 5
    net.first.last = h
    net.kept["features"] = h


def test_what_forward_stores_stays_with_the_clone() -> None:
    net = Net(lambda n: {}, _store)
    record_run(net, torch.randn(2, 4))
    assert net.settings.seen == [] and net.settings.width == 8 and not hasattr(net.first, "last") and net.kept == {}


def test_what_hooks_collect_stays_as_it_was() -> None:
    net, features = Net(), {"all": [torch.ones(1)]}
    first = features["all"][0]
    net.first.register_forward_hook(lambda module, args, out: features["all"].append(out))
    net.second.register_forward_hook(lambda module, args, out: features.update(last=out))
    plan = graphprune.plan(net, torch.randn(2, 4), 0.5)
    assert len(plan.removed["first.weight"][0]) == 4
    assert features.keys() == {"all"} and len(features["all"]) == 1 and features["all"][0] is first


def test_attributes_of_parameters_go_along() -> None:
    net = Net()
    net.first.weight.expert = 3  # type: ignore[attr-defined]
    for data in (True, False):
        assert clones(net, data)["first"].weight.expert == 3


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm,
                                  nn.utils.parametrizations.spectral_norm])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_modules_with_computed_weights(norm: Any) -> None:
    net = Net().eval()
    net.first = norm(net.first)
    x = torch.randn(2, 4)
    made = clones(net)[""]
    assert torch.equal(made(x), net(x))
    assert all(a is not b for a, b in zip(made.modules(), net.modules(), strict=True))


def test_recurrent_layers_read_the_clone_s_weights() -> None:
    net = nn.LSTM(3, 5)
    made = clones(net, data=False)[""]
    assert all(w.is_meta for w in made._flat_weights)
    assert all(a is b for a, b in zip(made._flat_weights, made.parameters(), strict=True))
    assert made(torch.empty(2, 1, 3, device="meta"))[0].is_meta and not net.weight_ih_l0.is_meta


def test_graph_modules_keep_their_code() -> None:
    net = torch.fx.symbolic_trace(Net())
    x = torch.randn(2, 4)
    assert torch.equal(clones(net)[""](x), net(x))


def test_a_module_compiled_in_place_runs_uncompiled() -> None:
    net = Net()
    net.inner._compiled_call_impl = lambda *args: pytest.fail("the compiled code ran")
    assert clones(net)[""](torch.randn(2, 4)).shape == (2, 3)
    assert net.inner._compiled_call_impl is not None


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_stays_of_any_run_of_the_model(data: bool, training: bool) -> None:
    """Planning with data, verification and repair run the model itself."""
    net, x = Net(lambda n: {}, _store).train(training), torch.randn(4, 4)
    net.settings.__dict__.pop("seen")  # plain objects are restored where the whole run is, not batch by batch
    net.__dict__["use"] = lambda n, h: (n.kept.update(features=h), setattr(n.first, "last", h), n.train())
    given = [x, x + 1] if data else None
    plan = graphprune.plan(net, x, 0.5, data=given, criterion="activation_mean" if data else None)
    small = graphprune.prune(net, x, 0.5, data=given)
    graphprune.recover(net, plan, x, given or [x])
    assert small.first.weight.shape == (4, 4)
    assert net.kept == {} and not hasattr(net.first, "last") and net.training is training


class AttributeDict(dict[str, Any]):
    __getattr__ = dict.__getitem__


class Names(list[str]):
    pass


class Mode(str):
    pass


class HalfSlotted:
    __slots__ = ("on",)


class WithSlots(HalfSlotted):
    def __init__(self) -> None:
        self.on, self.width = True, 8


_seen: list[bool] = []  # what a closure of the model collected would be put back

CONTENTS: dict[str, tuple[Callable[[], Any], Callable[[Any], bool]]] = {
    "a dict with attributes": (lambda: AttributeDict(skip=True), lambda v: bool(v.skip and v["skip"])),
    "a list": (lambda: Names(["a", "b"]), lambda v: len(v) == 2 and v[1] == "b"),
    "a str": (lambda: Mode("dense"), lambda v: v == "dense"),
    "a counter": (lambda: collections.Counter("aab"), lambda v: v["a"] == 2),
    "a named tuple": (lambda: collections.namedtuple("T", "a b")(1, [2]), lambda v: v.b == [2]),
    "slots and attributes": (WithSlots, lambda v: v.on and v.width == 8),
    "a namespace": (lambda: types.SimpleNamespace(a=[1]), lambda v: v.a == [1]),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_objects_of_any_class_keep_what_is_in_them(kind: str) -> None:
    make, right = CONTENTS[kind]
    _seen.clear()
    net = Net(lambda n: make(), lambda n, h: _seen.append(right(n.kept)))
    record_run(net, torch.randn(2, 4))
    assert _seen and all(_seen) and right(net.kept)


class Store:
    feature: Any = None


class StoreHook:
    def __init__(self, store: Store) -> None:
        self.store = store

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.store.feature = out


def _through(net: Net, store: Store, hook: Any) -> Store:
    net.first.register_forward_hook(hook)
    return store


SHARING: dict[str, Callable[[Net, Store], Any]] = {
    "a hook object": lambda net, store: _through(net, store, StoreHook(store)),
    "a bound method": lambda net, store: _through(net, store, StoreHook(store).__call__),
    "a partial function": lambda net, store: _through(net, store, functools.partial(_remember, store)),
    "a closure": lambda net, store: _through(net, store, lambda m, args, out: _remember(store, m, args, out)),
}


def _remember(store: Store, module: nn.Module, args: Any, out: Tensor) -> None:
    store.feature = out


@pytest.mark.parametrize("kind", SHARING)
def test_one_object_stays_one(kind: str) -> None:
    """What a hook stores is what forward reads, in every plan, and nothing of it stays."""
    store = Store()
    _seen.clear()
    net = Net(lambda n: SHARING[kind](n, store), lambda n, h: _seen.append(n.kept.feature is not None))
    plans = [dict(graphprune.plan(net, torch.randn(2, 4), 0.5).removed) for _ in range(2)]
    assert _seen and all(_seen)
    assert plans[0] == plans[1] and store.feature is None and net.kept is store


def test_weights_inside_objects_are_the_model_s() -> None:
    class Operation:
        def __init__(self, layer: nn.Linear) -> None:
            self.weight, self.bias = layer.weight, layer.bias

        def __call__(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight, self.bias)

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
            self.operation = Operation(self.first)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.operation(x).relu())

    net = Uses()
    assert len(graphprune.plan(net, torch.randn(2, 4), 0.5).removed["first.weight"][0]) == 4


def test_what_cleans_up_when_it_is_gone_is_not_made_twice() -> None:
    gone: list[str] = []

    class Extractor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.features = Net(), {}
            self.handles = [self.net.first.register_forward_hook(self.save)]

        def save(self, module: nn.Module, args: Any, out: Tensor) -> None:
            self.features["first"] = out

        def forward(self, x: Tensor) -> Tensor:
            self.net(x)
            return self.features["first"]

        def __del__(self) -> None:
            gone.append("module")
            for handle in self.handles:
                handle.remove()

    net = Extractor()
    graphprune.plan(net, torch.randn(2, 4), 0.0)
    assert not gone and len(net.net.first._forward_hooks) == 1 and net(torch.randn(2, 4)).shape == (2, 8)


def test_memory_that_a_run_makes_is_not_put_back_into_the_user_s() -> None:
    class Borrows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            layer = nn.Linear(8, 8)
            layer.weight.data, layer.bias.data = self.b.weight.data, self.b.bias.data
            return self.c(layer(self.a(x).relu()).relu())

    net = Borrows()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    record_run(net, torch.randn(2, 4))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_model_s_own_fallback_does_not_hide_the_module_past_its_clone() -> None:
    class Falls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.second(registry["net"].first(x).relu())
            except Exception:
                return self.third(x)

    registry: dict[str, Any] = {}
    registry["net"] = net = Falls()
    assert len(graphprune.plan(net, torch.randn(2, 4), 0.5).removed["first.weight"][0]) == 4


def test_a_signal_s_own_exception_comes_out() -> None:
    import signal

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            signal.raise_signal(signal.SIGUSR1)
            return self.layer(x)

    def handle(number: int, frame: Any) -> None:
        raise TimeoutError("too slow")

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with pytest.raises(TimeoutError, match="too slow"):
            graphprune.plan(Slow(), torch.randn(2, 4), 0.5)
    finally:
        signal.signal(signal.SIGUSR1, before)


class Single:
    """There is one of it."""

    _one: Single | None = None

    def __new__(cls) -> Single:
        if cls._one is None:
            cls._one = object.__new__(cls)
            cls._one.__dict__["width"] = 8
        return cls._one


@pytest.mark.parametrize("kind", ["in a list", "the only one", "inside another"])
def test_objects_that_are_not_copied_are_as_before(kind: str) -> None:
    held = Single() if kind == "the only one" else types.SimpleNamespace(width=8, inner=types.SimpleNamespace(seen=[]))
    before = dict(held.__dict__)

    def use(net: Net, h: Tensor) -> None:
        net.kept_one().last = h
        net.kept_one().width += 0

    net = Net(lambda n: [held] if kind == "in a list" else held, use)
    if kind == "inside another":
        inner, before = held.inner, {"seen": []}
        net.__dict__["kept_one"] = lambda: inner
        before = dict(inner.__dict__)
        inner.width = before["width"] = 8
        held = inner
    else:
        net.__dict__["kept_one"] = (lambda: net.kept[0]) if kind == "in a list" else (lambda: net.kept)
    graphprune.plan(net, torch.randn(2, 4), 0.5)
    assert held.__dict__ == before and type(held.width) is int
