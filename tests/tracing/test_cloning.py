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
from graphprune.tracing.cloning import Bare, SameMemory, Unclonable, clone_modules
from graphprune.tracing.names import named_tensors
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
