"""What can be asked for: the options of `plan` and `prune`, once, checked once; and what their granularity names."""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
from torch import nn

from ..dependency import DependencyGraph
from ..dependency.reparametrised import plain
from ..errors import GraphPruneError
from ..plans.naming import in_users_names
from ..plans.plan import Plan
from ..plans.rewriting import check_output
from ..runtimes.latency import Target
from ..support.registry import Registry
from ..support.suggestions import check_choice, did_you_mean
from ..support.types import Ignore, LossFunction
from ..synthesis import made_for
from ..tracing.matching import items_of
from .allocation import Budget, Kinds, Rounding, RoundTo
from .allocation.selection import check_ratio

Criterionlike = str | Callable[..., Any]
SCOPES = ("local", "global", "isomorphic")
FOLLOW, HOLD = CHOICES = ("follow", "hold")  # what becomes of a number that an attribute keeps

P = ParamSpec("P")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """The options of `plan`, which says what they mean; this is the only list of them beside its signature.

    What can be checked without the model is checked here, so a request that exists is sound as far as that goes. Then
    `ignore` is a tuple, and `ratio` None just where there is a budget. Raises GraphPruneError, naming the option.
    """

    ratio: float | Mapping[str, float] | None = None
    ignore: Ignore = ()
    scope: str = "local"
    criterion: Criterionlike | None = None
    round_to: RoundTo = "auto"
    min_channels: int = 1
    granularity: str | Sequence[str] = "auto"
    fold_bn: bool = True
    seed: int = 0
    output: str = "module"
    budget: Budget | None = None
    max_ratio: float = 1.0
    data: Any = None
    loss_fn: LossFunction | None = None
    target: Target | None = None
    layer_criterion: Any = None
    strict: bool = False
    sizes: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", _checked_ratio(self.ratio, self.budget))
        object.__setattr__(self, "ignore", tuple(items_of(self.ignore, "ignore")))
        object.__setattr__(self, "sizes", _checked_sizes(self.sizes))
        check_choice("scope", self.scope, SCOPES)
        _check_plain(self)
        check_output(self.output)
        Target.of(self.target)
        _check_together(self, self.rounding, self.strategy)
        self.strategy.check(self)

    @functools.cached_property
    def rounding(self) -> Rounding:
        """Which widths groups may have."""
        return Rounding(self.round_to, self.min_channels, self.max_ratio)

    @functools.cached_property
    def strategy(self) -> Granularity:
        """What the granularity names."""
        return strategy_of(self.granularity)

    def one_ratio(self, what: str) -> float:
        """The ratio, for `what` ("layers") goes as a whole. Raises GraphPruneError for a dict and for a budget."""
        if self.ratio is None or isinstance(self.ratio, Mapping):
            kind = "a budget" if self.ratio is None else "a dict"
            raise GraphPruneError(f"ratio: {what} take one number, got {kind}; use ignore= for those that must stay")
        return self.ratio

    def but(self, **options: Any) -> Request:
        """The same with other options, checked anew."""
        return dataclasses.replace(self, **options)

    def with_data_for(self, model: nn.Module, example: Any) -> Request:
        """The same, with inputs that are made of this model where `data` stands for such."""
        data = made_for(self.data, model, example)
        return self if data is self.data else self.but(data=data)

    def decide(self, model: nn.Module, example: Any) -> Decision:
        """The plan for a model. Its request has the inputs that are made of the model, where it asks for such."""
        asked = self.with_data_for(model, example)
        bare = plain(model)
        decision = asked.strategy.decide(bare, example, asked)
        return dataclasses.replace(decision, plan=in_users_names(decision.plan, bare, model))


OPTIONS = tuple(field.name for field in dataclasses.fields(Request))


def _checked_ratio(ratio: Any, budget: Any) -> float | dict[str, float] | None:
    """`ratio` and `budget` exclude each other; without both, half goes."""
    if budget is not None:
        if not isinstance(budget, Budget):
            raise GraphPruneError(f"budget: expected a graphprune.Budget, got {type(budget).__name__}")
        if ratio is not None:
            raise GraphPruneError("ratio and budget exclude each other: a budget decides how much of each group stays")
        return None
    if not isinstance(ratio, Mapping):
        return check_ratio(0.5 if ratio is None else ratio)
    for name in ratio:
        if not isinstance(name, str):
            raise GraphPruneError(f"ratio: a dict maps names of modules and parameters to fractions; {name!r} is none")
    if not ratio:
        raise GraphPruneError("ratio: the dict is empty; map names of modules, or patterns, to fractions")
    return {name: check_ratio(value, f"ratio[{name!r}]") for name, value in ratio.items()}


def _checked_sizes(sizes: Any) -> dict[str, str]:
    """What the user says of attributes, by name."""
    if sizes is None:
        return {}
    if not isinstance(sizes, Mapping) or not all(isinstance(name, str) for name in sizes):
        raise GraphPruneError(
            f'sizes: expected a dict from names of attributes to "follow" or "hold", such as '
            f'{{"num_features": "follow"}}, got {type(sizes).__name__}'
        )
    for name, choice in sizes.items():
        check_choice(f"sizes[{name!r}]", choice, CHOICES)
    return dict(sizes)


def _check_plain(request: Request) -> None:
    """Raise GraphPruneError for a flag, a seed or a loss that is none."""
    for name in ("fold_bn", "strict"):
        value = getattr(request, name)
        if not isinstance(value, (bool, np.bool_)):
            raise GraphPruneError(f"{name}: expected True or False, got {value!r}")
    seed, loss = request.seed, request.loss_fn
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise GraphPruneError(f"seed: expected a non-negative integer, got {seed!r}")
    if loss is not None and not callable(loss):
        raise GraphPruneError(f"loss_fn: expected a function (output, targets) -> scalar, got {type(loss).__name__}")


def _check_together(request: Request, rounding: Rounding, strategy: Granularity) -> None:
    """Raise GraphPruneError for options that mean nothing beside the granularity."""
    del rounding  # made to be checked
    if request.layer_criterion is not None and not strategy.ranks_layers:
        raise GraphPruneError(
            'layer_criterion: it ranks layers where widths change too, as in granularity=["layer", "channels"]; '
            "elsewhere use criterion"
        )
    if request.target is not None and strategy.kinds is None:
        raise GraphPruneError(
            f"target: it chooses widths, and granularity={request.granularity!r} changes none; leave it out"
        )


@dataclasses.dataclass(frozen=True)
class Decision:
    """A plan with what it was made of: the request as it was in the end, and the graph (None where only wholes go).
    `note`: what to add where nothing came of the request."""

    plan: Plan
    request: Request
    graph: DependencyGraph | None = None
    note: str = ""

    @property
    def unready(self) -> str:
        """Which parameters the model's first run on data would set."""
        return "" if self.graph is None else self.graph.trace.unready


class Granularity(abc.ABC):
    """What goes. One object for every name in `GRANULARITIES`, whose `decide` makes the plan.

    `kinds`: of groups whose widths change; None where things go as a whole, called `units`. `ranks_layers`: whether
    `layer_criterion` means something. `loses_inputs`: whether what stays loses inputs, which `recover` makes up for.
    """

    kinds: Kinds | None = None
    units: str = "things"
    ranks_layers: bool = False
    loses_inputs: bool = True

    @abc.abstractmethod
    def decide(self, model: nn.Module, example: Any, request: Request) -> Decision:
        """The plan for a model whose granularity this is. It is not changed."""

    def check(self, request: Request) -> None:  # noqa: B027 - most options mean the same for all
        """Raise GraphPruneError for options that this takes otherwise, before any work begins."""

    def further(self, model: nn.Module, example: Any, request: Request, before: Sequence[Plan]) -> Decision:
        """`decide`, where the ratio is of what the original had, from which the plans `before` have led to `model`."""
        raise GraphPruneError(
            f"granularity={request.granularity!r} takes its ratio at once: use prune, as prune_gradually does not know "
            f"how many {self.units} there were"
        )

    def beside(self, other: Granularity) -> Granularity | None:
        """This and another at the same time; None where they do not go together."""
        del other
        return None


GRANULARITIES: Registry[Granularity] = Registry("granularity")


def strategy_of(granularity: Any) -> Granularity:
    """What a name, or names together, stand for. Underscores are spaces, and "head" is "heads".

    Raises GraphPruneError for unknown ones and what does not go together.
    """
    names = [granularity] if isinstance(granularity, str) else granularity
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise GraphPruneError(f"granularity: expected a name or a list of names, got {granularity!r}")
    found = {name: _found(name) for name in names}
    first, *others = found
    strategy = found[first]
    for name in others:
        both = _together(strategy, found[name])
        if both is None:
            clash = next((n for n in found if n != name and not _together(found[n], found[name])), first)
            raise GraphPruneError(
                f"granularity: {name!r} does not go with {clash!r}; prune one of them first, then the result: "
                f"prune(prune(model, x, 0.3, granularity={name!r}), x, 0.3)"
            )
        strategy = both
    return strategy


def _together(one: Granularity, other: Granularity) -> Granularity | None:
    return one.beside(other) or other.beside(one)


def _found(name: str) -> Granularity:
    plain = name.replace("_", " ")
    return GRANULARITIES.find(f"{plain}s" if plain not in GRANULARITIES and f"{plain}s" in GRANULARITIES else plain)


def options_in(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a function's arguments that are options of a request."""
    return {name: arguments[name] for name in OPTIONS if name in arguments}


def check_names(given: Iterable[str], known: Iterable[str], who: str, why: Mapping[str, str] | None = None) -> None:
    """Raise GraphPruneError for options that are not known to `who`; `why` says it of some."""
    names = list(known)
    for name in given:
        if why and name in why:
            raise GraphPruneError(f"{who}: {name}: {why[name]}")
        if name not in names:
            meant = did_you_mean(name, names)
            raise GraphPruneError(f"{who}: unknown option {name!r}{meant}; known: {', '.join(names)}")


def takes_options(why: Mapping[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a function that hands on the options of a request, which it takes as `**options`: its signature shows them,
    and others are refused before it runs. `why`: options that it does not take, and the reason for each."""

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        own = inspect.signature(function)
        mine = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for field in dataclasses.fields(Request)
            if field.name not in why and field.name not in own.parameters
        ]
        who = function.__qualname__.removesuffix(".__init__")
        known = [p.name for p in (*mine, *more) if p.name != "self"]

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            check_names(kwargs, known, who, why)
            return function(*args, **kwargs)

        checked.__signature__ = own.replace(parameters=[*mine, *more])  # type: ignore[attr-defined]
        return checked

    return decorated


__all__ = [
    "FOLLOW",
    "GRANULARITIES",
    "HOLD",
    "OPTIONS",
    "Criterionlike",
    "Decision",
    "Granularity",
    "Request",
    "check_names",
    "options_in",
    "strategy_of",
    "takes_options",
]
