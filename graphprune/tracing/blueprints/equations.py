"""What follows from a constructor for the sizes of layers: equations between numbers of the code and widths."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..origin import Attribute, Expr, Literal
from .interpreter import Reading, bound
from .values import Either, Items, Made, Number, Open, Value, number_of

# The arguments that are sizes of what torch's layers hold.
SIZES: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], tuple[str, ...]], ...] = (
    (nn.Linear, ("in_features", "out_features")),
    (nn.Bilinear, ("in1_features", "in2_features", "out_features")),
    (nn.modules.conv._ConvNd, ("in_channels", "out_channels")),
    (nn.modules.batchnorm._NormBase, ("num_features",)),
    (nn.GroupNorm, ("num_channels",)),
    ((nn.LayerNorm, nn.RMSNorm), ("normalized_shape",)),
    ((nn.Embedding, nn.EmbeddingBag), ("num_embeddings", "embedding_dim")),
    (nn.PReLU, ("num_parameters",)),
    ((nn.RNNBase, nn.RNNCellBase), ("input_size", "hidden_size")),
    (nn.MultiheadAttention, ("embed_dim", "num_heads", "kdim", "vdim")),
)
_FILLED = frozenset(getattr(torch, name) for name in "zeros ones empty full rand randn".split())
_LISTS = (nn.Sequential, nn.ModuleList)


@dataclasses.dataclass(frozen=True)
class Width:
    """A size of a layer, by the name of the argument that states it; of a parameter, by its axis."""

    module: str
    name: str
    axis: int | None = None


@dataclasses.dataclass(frozen=True)
class Equation:
    """In the code the two are the same number. `right`: a width, or what the constructor of a module inside was given
    it as."""

    left: Expr
    right: Width | Attribute


def equations_of(reading: Reading) -> tuple[Equation, ...]:
    """All that the code says of sizes of the object's layers."""
    found: list[Equation] = []
    module, path = reading.module, reading.path
    for name, value in reading.fields.items():
        if name == "":
            found += _of_module(value, module, path, path)
        elif name in module._modules:
            child = module._modules[name]
            if child is not None:
                found += _of_module(value, child, _join(path, name), path)
        elif isinstance(module._parameters.get(name, module._buffers.get(name)), Tensor):
            found += _of_tensor(value, name, path)
    return tuple(dict.fromkeys(found))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _of_module(value: Value, module: nn.Module, path: str, home: str) -> Iterator[Equation]:
    """What the value says of the module that it has become."""
    if isinstance(value, Either):
        fitting = [option for option in value.options if _fits(option, module)]
        if len(fitting) == 1:
            yield from _of_module(fitting[0], module, path, home)
        elif fitting:  # what all of them say
            said = [set(_of_module(option, module, path, home)) for option in fitting]
            yield from (e for e in _of_module(fitting[0], module, path, home) if all(e in other for other in said))
        return
    if isinstance(value, Made) and isinstance(module, _LISTS) and value.target in (*_LISTS, None, type(module)):
        yield from _of_list(value, module, path, home)
    elif isinstance(value, Items) and isinstance(module, _LISTS):
        yield from _of_entries(value, module, path, home)
    if isinstance(value, Made) and _fits(value, module):
        yield from _of_layer(value, module, path, home)


def _fits(value: Value, module: nn.Module) -> bool:
    """Whether the module may be what the call made."""
    if not isinstance(value, Made):
        return False
    if isinstance(value.target, type):
        return isinstance(module, value.target)
    return value.target is None


def _of_list(value: Made, module: nn.Module, path: str, home: str) -> Iterator[Equation]:
    first = value.args[0] if len(value.args) == 1 else None
    given = first if isinstance(first, Items) else Items(list(value.args))
    more = value.added
    yield from _of_entries(Items([*given.values, *more.values], [*given.loose, *more.loose]), module, path, home)


def _of_entries(items: Items, module: nn.Module, path: str, home: str) -> Iterator[Equation]:
    """Each of the modules in a list, beside what was put there."""
    children = [(_join(path, name), child) for name, child in module._modules.items() if child is not None]
    if items.loose:
        known = len(items.values) if len(items.values) <= len(children) else 0
        rest: Value = items.loose[0] if len(items.loose) == 1 else Either(tuple(items.loose))
        values = [*items.values[:known], *[rest] * (len(children) - known)]
    else:
        values = items.values
    if len(values) == len(children):
        for value, (inner, child) in zip(values, children, strict=True):
            yield from _of_module(value, child, inner, home)


def _of_layer(value: Value, module: nn.Module, path: str, home: str) -> Iterator[Equation]:
    """The arguments that a layer was made with."""
    if not isinstance(value, Made):
        return
    inner = next((a for a in value.args if isinstance(a, Made) and _fits(a, module)), None)
    if value.target is not None and not isinstance(value.target, type):
        if inner is not None:  # weight_norm(nn.Conv1d(...))
            yield from _of_layer(inner, module, path, home)
        return
    kind = value.target if isinstance(value.target, type) else type(module)
    names = bound(kind, list(value.args), value.kwargs)
    if names is None:
        return
    sizes = sizes_of(module) if kind.__module__.startswith("torch.nn") else None
    for name, given in names.items():
        if sizes is not None and name not in sizes:
            continue
        if sizes is None:
            yield from _handed_on(given, Open(Attribute(f"{path}()", name)), home)
        elif isinstance(given, Items):
            yield from _sizes(given.values, path, name, home)
        else:
            number = number_of(given, home)
            if number is not None and not isinstance(number.expr, Literal):
                yield Equation(number.expr, Width(path, name))


def _sizes(values: Iterable[Value], path: str, name: str, home: str) -> Iterator[Equation]:
    for axis, value in enumerate(values):
        number = number_of(value, home)
        if number is not None and not isinstance(number.expr, Literal):
            yield Equation(number.expr, Width(path, name, axis))


def _handed_on(given: Value, parameter: Open, home: str) -> Iterator[Equation]:
    """A number, numbers in a list, or what was passed in itself, which the constructor of a module inside gets."""
    if isinstance(given, Items) and not given.loose:
        for i, item in enumerate(given.values):
            yield from _handed_on(item, parameter.part(str(i)), home)
    elif isinstance(given, Open):
        yield Equation(given.leaf, parameter.leaf)
    else:
        number = number_of(given, home)
        if isinstance(number, Number) and not isinstance(number.expr, Literal):
            yield Equation(number.expr, parameter.leaf)


def _of_tensor(value: Value, name: str, path: str) -> Iterator[Equation]:
    """`nn.Parameter(torch.zeros(1, n, width))`."""
    while isinstance(value, Made) and value.target not in _FILLED and value.args:
        value = value.args[0]
    if isinstance(value, Made) and value.target in _FILLED:
        given = value.args
        if len(given) and isinstance(given[0], Items):
            given = tuple(given[0].values)
        yield from _sizes(given, path, name, path)


def sizes_of(module: nn.Module) -> tuple[str, ...] | None:
    """The arguments of a layer of torch's that are sizes of what it holds; None of other modules."""
    return _sizes_of_kind(type(module))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=512)
def _sizes_of_kind(kind: type[nn.Module]) -> tuple[str, ...] | None:
    return next((names for layer, names in SIZES if issubclass(kind, layer)), None)


__all__ = ["Equation", "Width", "equations_of", "sizes_of"]
