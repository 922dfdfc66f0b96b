"""`RewrittenModule`: the graph of a recipe in the place, and with the contents, of the module it was recorded from."""

from __future__ import annotations

import copy
import dataclasses
import sys
import types
from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from ...errors import GraphPruneError
from ...support.walking import all_modules
from .functions import method, resolve
from .recipes import Rewrite, decode
from .safety import check_argument, check_keywords, check_path, check_read

_OF_A_GRAPH = frozenset(fx.GraphModule(nn.Module(), fx.Graph()).__dict__) - frozenset(nn.Module().__dict__)
_NOT_KEPT = _OF_A_GRAPH | {"forward", "_recipe"}


class RewrittenModule(fx.GraphModule):
    """A `torch.fx.GraphModule` that keeps parameters, buffers, children, hooks and attributes of the module it
    replaces, under the same names. It can be trained, copied, pickled and exported like any module.

    The graph calls what the module's code called, in the same order, with literal sizes rewritten. Arguments that are
    no tensors, and comparisons of sizes, are checked: a call that the module's own code would have treated differently
    raises GraphPruneError.

    It is an instance of the replaced module's class too, so that other code finds its methods and passes `isinstance`.
    """

    _replaced: type[nn.Module] = nn.Module

    def __init__(self, old: nn.Module, recipe: Rewrite) -> None:
        graph = build_graph(recipe)
        for op, target, *_ in recipe.steps:
            if op in ("get_attr", "call_module"):
                check_path(old, op, target)
        super().__init__(old, graph, class_name=self._replaced.__name__)
        self.__dict__.update({k: v for k, v in old.__dict__.items() if k not in _NOT_KEPT})
        self.__dict__["_recipe"] = recipe

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenModule:
        new = _bare(self._replaced)
        memo[id(self)] = new
        return _restored(new, copy.deepcopy(self._contents(), memo), self._recipe)

    def __copy__(self) -> RewrittenModule:
        return _restored(_bare(self._replaced), self._contents(), self._recipe)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self._replaced, self._contents(), self._recipe.to_dict())

    def _contents(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _NOT_KEPT}

    @property
    def _recipe(self) -> Rewrite:
        found: Rewrite = self.__dict__["_recipe"]
        return found


class _Start(nn.Module):
    """Ends the chain of constructors: the replaced class must not set up its layers anew."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


def _class_for(replaced: type[nn.Module]) -> type[RewrittenModule]:
    bases = (RewrittenModule, _Start, replaced)
    return types.new_class(replaced.__name__, bases, exec_body=lambda names: names.update(_replaced=replaced))


def _bare(replaced: type[nn.Module]) -> RewrittenModule:
    kind = _class_for(replaced)
    return kind.__new__(kind)


def _restored(new: RewrittenModule, contents: dict[str, Any], recipe: Rewrite) -> RewrittenModule:
    holder = nn.Module()
    holder.__dict__.update(contents)
    RewrittenModule.__init__(new, holder, recipe)
    return new


def _unpickled(replaced: type[nn.Module], contents: dict[str, Any], recipe: dict[str, Any]) -> RewrittenModule:
    return _restored(_bare(replaced), contents, Rewrite.from_dict(recipe))


def rewritten(old: nn.Module, recipe: Rewrite) -> RewrittenModule:
    """The module that takes the place of `old`, with its contents."""
    replaced = old._replaced if isinstance(old, RewrittenModule) else type(old)
    new = _bare(replaced)
    RewrittenModule.__init__(new, old, recipe)
    return new


def build_graph(recipe: Rewrite) -> fx.Graph:
    """The steps as a torch.fx graph. Raises GraphPruneError for steps that a plan has no business taking."""
    graph = fx.Graph()
    nodes: list[Any] = []
    try:
        for op, target, data, named in recipe.steps:
            args = tuple(decode(data, nodes))
            kwargs = {k: decode(v, nodes) for k, v in named.items()}
            check_keywords(kwargs)
            if op == "output":
                nodes.append(graph.output(args[0]))
            elif op == "placeholder":
                check_argument(target)
                nodes.append(graph.placeholder(target, default_value=args[0]) if args else graph.placeholder(target))
            elif op == "build":
                nodes.append(graph.call_function(_class(target, recipe.home), args, kwargs))
            elif op == "call_function":
                if target == "builtins.getattr":
                    check_read(args)
                nodes.append(graph.call_function(resolve(target), args, kwargs))
            elif op == "call_method":
                nodes.append(graph.call_method(method(target), args, kwargs))
            elif op in ("get_attr", "call_module"):
                nodes.append(graph.create_node(op, target, args, kwargs))
            else:
                raise GraphPruneError(f"not a plan: a step of {recipe.module or 'the model'} is {op!r}")
    except (IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        where = recipe.module or "the model"
        raise GraphPruneError(f"not a plan: the steps of {where} are damaged: {error}") from error
    return graph


def _class(target: str, home: str) -> type:
    """A class of the model's output: a named tuple or dataclass that is loaded already, from the model's own package
    or from a package that its module uses."""
    module, _, name = target.partition(":")
    found: Any = sys.modules.get(module)
    for step in name.split("."):
        found = getattr(found, step, None)
    structured = isinstance(found, type) and (dataclasses.is_dataclass(found) or hasattr(found, "_fields"))
    if not structured:
        raise GraphPruneError(
            f"the plan's output is a {target}, which is not loaded or no named tuple or dataclass; import the model's "
            f"code ({home}) first"
        )
    return found  # type: ignore[no-any-return]


def replace(model: nn.Module, rewrites: Iterable[Rewrite]) -> nn.Module:
    """Put graphs in the place of modules of `model`, inner ones first; returns the model (or what replaced it)."""
    for rewrite in sorted(rewrites, key=lambda r: -len(r.module.split(".")) if r.module else 0):
        modules = all_modules(model)
        old = modules.get(rewrite.module)
        if old is None:
            raise GraphPruneError(f"the plan replaces the module {rewrite.module}, which this model does not have")
        new = rewritten(old, rewrite)
        if not rewrite.module:
            return new
        for parent in modules.values():
            for name, child in parent._modules.items():
                if child is old:
                    parent._modules[name] = new
    return model
