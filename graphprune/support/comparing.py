"""What two models hold, compared bit by bit: tensors, numbers and texts, wherever attributes lead to them."""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .reach import attributes, content_of, slots

_MISSING = inspect.Parameter.empty
_ATOMS = (type(None), bool, int, str, bytes, range, slice, torch.dtype, torch.device, torch.layout,
          torch.memory_format, types.EllipsisType)  # fmt: skip
_SEQUENCES = (list, tuple, collections.deque)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Modes, which calls set for all modules at once; what is made when it is asked for; book-keeping of nn.Module's,
# torch.compile's and our own.
_ASIDE = frozenset("training _compiled_call_impl _is_full_backward_hook _version _is_torch_compile".split())
_OURS = "_graphprune_"
_TABLES = ("_parameters", "_buffers", "_modules")
# torch counts batches here, and nothing but an average without a momentum looks at it
_COUNTER = "num_batches_tracked"


@dataclasses.dataclass(frozen=True)
class Difference:
    """`where`: "blocks.0.norm.eps"; `what`, in words: "2e-05 instead of 1e-05". `values`: it is a tensor, as it should
    be but for its values. `number`: a whole number, a flag or a tensor of one; `added`: it should not be there.
    `owner`: the module of the first model that holds it, if it is a tensor of its tables."""

    where: str
    what: str
    values: bool = False
    number: bool = False
    added: bool = False
    owner: nn.Module | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclasses.dataclass
class Comparison:
    """`found`: what differs. `training` and `gradients`: the flags of modules and parameters, here and there.
    `tensors` and `attributes`: how many were compared."""

    found: list[Difference] = dataclasses.field(default_factory=list)
    training: dict[str, tuple[bool, bool]] = dataclasses.field(default_factory=dict)
    gradients: dict[str, tuple[bool, bool]] = dataclasses.field(default_factory=dict)
    tensors: int = 0
    attributes: int = 0


def compared(here: nn.Module, there: nn.Module, aside: Iterable[str] = ()) -> Comparison:
    """All that `here` holds beside what `there` does: parameters, buffers, tensors, numbers, texts and functions in
    attributes, lists, dicts and objects at any depth, which of them are the same object, and which classes they are of.

    Not compared: hooks, gradients, counted batches, random generators, caches that methods keep, and what no value can
    be seen of (locks, files). `aside`: attributes that are passed over as well.
    """
    walk = _Walk(frozenset(aside))
    walk.waiting.append(("", here, there))
    while walk.waiting:
        walk.step(*walk.waiting.pop())
    return walk.result


class _Walk:
    def __init__(self, aside: frozenset[str]) -> None:
        self.aside = aside
        self.result = Comparison()
        self.waiting: list[tuple[str, Any, Any]] = []
        self.seen: set[tuple[int, int]] = set()
        self.partners: tuple[dict[int, int], dict[int, int]] = {}, {}

    def differs(self, where: str, what: str, **more: Any) -> None:
        self.result.found.append(Difference(where or "the model", what, **more))

    def put(self, pairs: Iterable[tuple[str, Any, Any]]) -> None:
        """To be looked at next, in this order."""
        self.waiting += reversed(list(pairs))

    def step(self, where: str, a: Any, b: Any, owner: nn.Module | None = None) -> None:
        if isinstance(a, _ATOMS) or isinstance(b, _ATOMS) or isinstance(a, (float, complex)):
            self.atom(where, a, b)
            return
        if (id(a), id(b)) in self.seen:
            return
        self.seen.add((id(a), id(b)))
        if not _same_class(type(a), type(b)):
            self.differs(where, f"a {_kind(a)} instead of a {_kind(b)}", added=b is None)
            return
        if isinstance(a, (nn.Module, Tensor)) and not self.pair_up(where, a, b):
            return
        if isinstance(a, nn.Module):
            self.module(where, a, b)
        elif isinstance(a, Tensor):
            self.tensor(where, a, b, owner)
        elif a is not b:
            self.value(where, a, b)

    def pair_up(self, where: str, a: Any, b: Any) -> bool:
        """One object of the one model stands for one object of the other."""
        known, back = self.partners[0].setdefault(id(a), id(b)), self.partners[1].setdefault(id(b), id(a))
        if known == id(b) and back == id(a):
            return True
        self.differs(where, f"this {_kind(a)} and another are one and the same in only one of the two")
        return False

    # -- values

    def atom(self, where: str, a: Any, b: Any) -> None:
        self.result.attributes += 1
        # 0.0 and -0.0 are two numbers, and every NaN is as good as another
        same = type(a) is type(b) and (a == b or _both_nan(a, b)) and (not isinstance(a, float) or repr(a) == repr(b))
        if not same:
            number = all(type(v) in (bool, int, type(None)) for v in (a, b))
            self.differs(where, f"{_shown(a)} instead of {_shown(b)}", number=number, added=b is None)

    def value(self, where: str, a: Any, b: Any) -> None:
        if isinstance(a, np.ndarray):
            self.array(where, a, b)
        elif isinstance(a, np.generic):
            self.atom(where, a.tobytes(), b.tobytes())
        elif isinstance(a, dict):
            self.mapping(where, a, b)
            self.object(where, a, b)
        elif isinstance(a, _SEQUENCES):
            if len(a) != len(b):
                self.differs(where, f"{len(a)} items instead of {len(b)}")
            else:
                self.put((f"{where}[{i}]", x, y) for i, (x, y) in enumerate(zip(a, b, strict=True)))
            self.object(where, a, b)
        elif isinstance(a, (set, frozenset)):
            if all(isinstance(item, (*_ATOMS, float)) for item in (*a, *b)) and a != b:
                self.differs(where, f"{_shown(a)} instead of {_shown(b)}")
        elif isinstance(a, types.MethodType):
            self.put([(where, a.__func__, b.__func__), (where, a.__self__, b.__self__)])
        elif isinstance(a, types.FunctionType):
            self.function(where, a, b)
        elif isinstance(a, functools.partial):
            self.put([(where, a.func, b.func), (where, a.args, b.args), (where, a.keywords, b.keywords)])
        elif isinstance(a, (type, types.BuiltinFunctionType, types.ModuleType)):
            if not isinstance(a, type) or not _same_class(a, b):
                self.differs(where, f"{_shown(a)} instead of {_shown(b)}")
        else:
            self.object(where, a, b)

    def array(self, where: str, a: np.ndarray, b: np.ndarray) -> None:
        self.result.tensors += 1
        if a.dtype != b.dtype or a.shape != b.shape:
            self.differs(where, f"{a.dtype} {a.shape} instead of {b.dtype} {b.shape}")
        elif not a.dtype.hasobject and a.tobytes() != b.tobytes():
            self.differs(where, "other values", values=True)

    def mapping(self, where: str, a: dict[Any, Any], b: dict[Any, Any]) -> None:
        one, other = dict(dict.items(a)), dict(dict.items(b))  # a class of the user's may read otherwise
        if all(_plain_key(key) for key in (*one, *other)):
            self.entries(where, one, other, "[{!r}]")
        elif len(one) == len(other):  # modules and tensors as keys: in the order in which they were put there
            items = zip(one.items(), other.items(), strict=True)
            self.put((f"{where}[{i}]", x, y) for i, (left, right) in enumerate(items)
                     for x, y in zip(left, right, strict=True))  # fmt: skip
        else:
            self.differs(where, f"{len(one)} entries instead of {len(other)}")

    def entries(self, where: str, one: Mapping[Any, Any], other: Mapping[Any, Any], form: str) -> None:
        both = []
        for key in dict.fromkeys((*one, *other)):
            place = f"{where}{form.format(key)}".lstrip(".")
            if key in one and key in other:
                both.append((place, one[key], other[key]))
            elif key in one:
                self.differs(place, f"{_shown(one[key])} where nothing should be", added=True)
            else:
                self.differs(place, f"is gone; {_shown(other[key])} should be there")
        self.put(both)

    def function(self, where: str, a: types.FunctionType, b: types.FunctionType) -> None:
        if a.__code__ != b.__code__:
            self.differs(where, f"{a.__qualname__} instead of {b.__qualname__}, or another of that name")
            return
        cells = zip(map(content_of, a.__closure__ or ()), map(content_of, b.__closure__ or ()), strict=True)
        named = [(f"{where}, {name} in it", *pair) for name, pair in zip(a.__code__.co_freevars, cells, strict=True)]
        self.put([*named, (where, a.__defaults__, b.__defaults__), (where, a.__kwdefaults__, b.__kwdefaults__)])

    def object(self, where: str, a: Any, b: Any) -> None:
        """Attributes and slots of an object whose class hides nothing."""
        opened = type(a).__module__.startswith("torch.distributions")
        one, other = (vars(v) if opened else attributes(v) for v in (a, b))
        if one is not None and other is not None:
            self.entries(where, *_without_lazy(a, b, one, other), ".{}")
        names = [name for name in slots(a) if hasattr(a, name) or hasattr(b, name)]
        if names:
            held = [{name: getattr(v, name) for name in names if hasattr(v, name)} for v in (a, b)]
            self.entries(where, held[0], held[1], ".{}")

    # -- modules and tensors

    def module(self, where: str, a: nn.Module, b: nn.Module) -> None:
        self.result.training[where] = a.training, b.training
        prefix = f"{where}." if where else ""
        names = [[k for k, v in m._modules.items() if v is not None] for m in (a, b)]
        if names[0] != names[1]:
            self.differs(where, f"the modules {_some(names[0])} instead of {_some(names[1])}")
        children = [(f"{prefix}{k}", a._modules[k], b._modules[k]) for k in names[0] if b._modules.get(k) is not None]
        attributed = [{k: v for k, v in m.__dict__.items() if self._counts(k, v)} for m in (a, b)]
        attributed = list(_without_lazy(a, b, *attributed))
        _with_those_of_the_class(a, b, attributed[0], attributed[1])
        self.put(children)
        self.entries(where, attributed[0], attributed[1], ".{}")
        for table in ("_buffers", "_parameters"):
            self.table(prefix, a, getattr(a, table), getattr(b, table))

    def _counts(self, name: str, value: Any) -> bool:
        aside = name in _ASIDE or name in self.aside or name in _TABLES or "hook" in name or name.startswith(_OURS)
        return not aside and not isinstance(value, torch.fx.Graph)

    def table(self, prefix: str, owner: nn.Module, one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
        for name in dict.fromkeys((*one, *other)):
            a, b = one.get(name), other.get(name)
            if name == _COUNTER or (a is None and b is None):
                continue
            if a is None or b is None:
                what = "is gone" if a is None else "a tensor where none should be"
                self.differs(prefix + name, what, added=b is None, owner=owner)
            else:
                self.step(prefix + name, a, b, owner)

    def tensor(self, where: str, a: Tensor, b: Tensor, owner: nn.Module | None) -> None:
        self.result.tensors += 1
        if a.shape != b.shape:
            self.differs(where, f"has shape {tuple(a.shape)} instead of {tuple(b.shape)}")
        elif (a.dtype, a.layout) != (b.dtype, b.layout):
            self.differs(where, f"is {a.dtype} ({a.layout}) instead of {b.dtype} ({b.layout})")
        elif a is not b and not same_bits(a, b):
            number = a.numel() == 1 and not (a.is_floating_point() or a.is_complex())
            self.differs(where, "has other values", values=True, number=number, owner=owner)
        if isinstance(a, nn.Parameter):
            self.result.gradients[where] = a.requires_grad, b.requires_grad
        told = [{k: v for k, v in t.__dict__.items() if not k.startswith("_")} for t in (a, b)]
        if any(told):
            self.entries(where, told[0], told[1], ".{}")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """The same numbers, of the same type and shape, NaNs and signs of zero too; True where one has no data, or of a
    kind that torch cannot compare."""
    if a.is_meta or b.is_meta:
        return True
    a, b = a.detach(), b.detach().to(a.device)
    try:
        if type(a) in (Tensor, nn.Parameter, nn.Buffer) and a.layout is torch.strided and not a.is_quantized:
            return bool(torch.equal(_bits(a), _bits(b)))
        if hasattr(a, "__tensor_flatten__"):
            names = a.__tensor_flatten__()[0]
            return all(same_bits(getattr(a, name), getattr(b, name)) for name in names)
        if a.layout is not torch.strided:
            a, b = a.to_dense(), b.to_dense()
        return bool(torch.equal(a, b))
    except (RuntimeError, NotImplementedError, TypeError):
        return True


def _bits(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    flat = tensor.resolve_neg().reshape(-1).contiguous()
    kind = _BITS.get(flat.element_size())
    return flat if kind is None or flat.dtype is torch.bool else flat.view(kind)


def _without_lazy(
    a: Any, b: Any, one: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Without what only one has because a property that is worked out once was asked for."""
    kinds = functools.cached_property, torch.distributions.utils.lazy_property
    lazy = {n for n in one.keys() ^ other.keys() if isinstance(inspect.getattr_static(type(a), n, None), kinds)}
    return {k: v for k, v in one.items() if k not in lazy}, {k: v for k, v in other.items() if k not in lazy}


def _with_those_of_the_class(a: nn.Module, b: nn.Module, one: dict[str, Any], other: dict[str, Any]) -> None:
    """An attribute that only one has hides one of the class, which is what the other uses."""
    for name in one.keys() ^ other.keys():
        mine, model = (other, b) if name in one else (one, a)
        value = inspect.getattr_static(type(model), name, _MISSING)
        if value is not _MISSING and not hasattr(type(value), "__get__"):
            mine[name] = value


def _same_class(a: type, b: type) -> bool:
    """One class, or two that were made alike at run time."""
    if a is b:
        return True
    named = (a.__module__, a.__qualname__) == (b.__module__, b.__qualname__)
    return named and len(a.__bases__) == len(b.__bases__) and all(map(_same_class, a.__bases__, b.__bases__))


def _plain_key(key: Any) -> bool:
    return all(map(_plain_key, key)) if type(key) is tuple else isinstance(key, (*_ATOMS, float, type))


def _both_nan(a: Any, b: Any) -> bool:
    return isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)


def _kind(value: Any) -> str:
    return type(value).__qualname__


def _shown(value: Any) -> str:
    if isinstance(value, (*_ATOMS, float, complex)):
        text = repr(value)
        return text if len(text) <= 60 else text[:57] + "..."
    name = getattr(value, "__qualname__", None)
    return str(name) if isinstance(name, str) else f"a {_kind(value)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "none"
