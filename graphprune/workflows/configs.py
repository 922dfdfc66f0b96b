"""Configurations of Hugging Face models: which numbers in them say what a pruned model is, if any can.

`from_pretrained` builds a model from its configuration and loads the weights. A pruned model comes back that way only
where every layer has the width that the configuration states for all of them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import GraphPruneError
from ..plans.rewriting import RewrittenModule
from ..plans.surgery import clone_with
from ..plans.verification.results import relative_error
from ..support.doors import door
from ..support.settings import is_settings, settings_of, with_setting
from ..support.walking import all_modules, named_tensors
from ..tracing.blueprints.equations import sizes_of
from ..tracing.example import ExampleInput
from ..tracing.origin import Attribute, Expr, Session, TracedInt, evaluate, is_traced, leaves
from ..tracing.state import evaluating
from ..tracing.trace import run_model

_LARGEST_GUESS = 4096
Key = tuple[int | str, ...]
Field = tuple[int | str, ...]  # a path of names, and of places in lists, from the model's configuration
Misfit = tuple[str, tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class ConfigFit:
    """`changes`: field of the configuration ("text_config.hidden_size") -> (old, new). `reason`: why no configuration
    can express the model, or ""; nothing was changed then."""

    changes: Mapping[str, tuple[int | None, int]]
    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        return self.reason or "\n".join(f"{name}: {old} -> {new}" for name, (old, new) in self.changes.items())


class _FieldInt(TracedInt):
    """A traced number that survives the copies that models make of their configurations."""

    def __deepcopy__(self, memo: Any) -> int:
        return self


@door("model")
def fit_config(model: nn.Module, example_input: Any, *, tolerance: float = 1e-6) -> ConfigFit:
    """Bring `model.config` in line with the pruned `model`, so that `save_pretrained` and `from_pretrained` return it.

    The fields are found by building the model anew from its configuration, on the meta device, and following where each
    number in it ends up. The result is proven: a model built from the new configuration, with the weights of `model`,
    must compute what `model` computes on `example_input`, to `tolerance` (relative, in double precision).

    Where layers have different widths, where a size follows from others in the class's code (BERT's head width is
    hidden_size / num_attention_heads), where batch norms were folded or modules became graphs, no configuration can
    express the model: `reason` says so, and nothing is changed. `graphprune.save` stores any pruned model.

    `model`: has a `config`, and is built by `type(model)(config)`, as those of Hugging Face's transformers are, or by
    `type(model).from_config(config)`, as those of diffusers are. Only `model`'s own configuration is changed; the model
    it was pruned from keeps its own.

    Raises GraphPruneError for models without a configuration, or that cannot be built from it.
    """
    config = getattr(model, "config", None)
    if not is_settings(config):
        raise GraphPruneError(f"fit_config: {type(model).__name__} has no configuration object in .config")
    for path, module in all_modules(model).items():
        if isinstance(module, RewrittenModule):
            return ConfigFit({}, f"{path or 'the model'} became a graph, which no configuration describes")
    guesses, reason = _demands(model, config)
    if reason:
        return ConfigFit({}, reason)
    attempts = [_completed(model, config, guess) for guess in guesses]
    wanted, misfits = min(attempts, key=lambda attempt: len(attempt[1]))
    if misfits:
        return ConfigFit({}, _unfit(model, wanted, misfits))
    changes = {_text(field): (_get(config, field), value) for field, value in wanted.items()}
    reason = _proof(model, config, wanted, ExampleInput.of(example_input), tolerance)
    return ConfigFit({} if reason else changes, reason)


def _text(field: Field) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in field).lstrip(".")


def _fields(config: Any, depth: int = 0) -> Iterator[tuple[Field, int | None]]:
    """Numbers, those in lists too, and empty fields, of a configuration and of those inside it."""
    for name, value in settings_of(config).items():
        if name.startswith("_"):
            continue
        if type(value) is int or value is None:
            yield (name,), value
        elif type(value) in (list, tuple):
            yield from (((name, i), item) for i, item in enumerate(value) if type(item) is int)
        elif depth < 2 and is_settings(value):
            for field, inner in _fields(value, depth + 1):
                yield (name, *field), inner


def _get(config: Any, field: Field) -> Any:
    for step in field:
        config = config[step] if isinstance(step, int) else settings_of(config)[step]
    return config


def _set(config: Any, field: Field, value: Any) -> Any:
    """`config` with another value there: itself, or another where it is a named tuple."""
    step, rest = field[0], field[1:]
    inner = value if not rest else _set(_get(config, field[:1]), rest, value)
    if isinstance(step, int):
        return type(config)([*config[:step], inner, *config[step + 1 :]])
    return with_setting(config, step, inner)


def _with(config: Any, values: Mapping[Field, Any]) -> Any:
    new = copy.deepcopy(config)
    for field, value in values.items():
        new = _set(new, field, value)
    return new


def _build(model: nn.Module, config: Any, device: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.device(device), contextlib.redirect_stdout(None):
        made: nn.Module = _constructor(model, config)(config)
    return made


def _constructor(model: nn.Module, config: Any) -> Callable[[Any], nn.Module]:
    """What makes a model of this class from its configuration. Raises GraphPruneError where the class takes none."""
    kind = type(model)
    from_config: Callable[[Any], nn.Module] | None = getattr(kind, "from_config", None)
    if from_config is not None and isinstance(config, dict):
        return from_config
    first, *others = inspect.signature(kind).parameters.values() or [_NOTHING]
    if not _needed(first) or any(map(_needed, others)):
        raise GraphPruneError(
            f"fit_config: {kind.__name__} takes {', '.join(inspect.signature(kind).parameters) or 'nothing'}, and no "
            f"configuration; models are understood that are built by type(model)(config), as those of Hugging Face's "
            f"transformers, or by type(model).from_config(config), as those of diffusers"
        )
    return kind


_NOTHING = inspect.Parameter("nothing", inspect.Parameter.KEYWORD_ONLY, default=None)


def _needed(parameter: inspect.Parameter) -> bool:
    variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return not variadic and parameter.default is parameter.empty


def _demands(model: nn.Module, config: Any) -> tuple[list[dict[Field, int]], str]:
    """What each field has to be, by the numbers that modules keep: guesses, as what a module keeps may be out of date
    where its code does not read it; or why two of them contradict."""
    traced = {f: _FieldInt(v) for f, v in _fields(config) if v is not None}
    session = Session()
    for field, number in traced.items():
        session.note(number, Attribute("", "config", field, int.__int__(number)))
    try:
        built = _build(model, _with(config, traced), "meta")
    except GraphPruneError:
        raise
    except Exception as error:
        raise GraphPruneError(
            f"fit_config: {type(model).__name__}(config) failed: {type(error).__name__}: {error}"
        ) from error
    modules = all_modules(model)
    changed: dict[Expr, dict[int, str]] = defaultdict(dict)
    layers: dict[Expr, dict[int, str]] = defaultdict(dict)  # what torch's layers say, which is never out of date
    kept: dict[Expr, int] = {}
    for path, module in all_modules(built).items():
        if path not in modules:
            return [], f"the model has no {path}, which its configuration makes (a folded batch norm, a removed layer)"
        sizes = sizes_of(modules[path]) or ()
        for name, value in vars(module).items():
            now = vars(modules[path]).get(name)
            if not is_traced(value) or type(now) is not int:
                continue
            if name in sizes:
                layers[value.origin].setdefault(now, f"{path}.{name}")
            if now != int.__int__(value):
                changed[value.origin].setdefault(now, f"{path}.{name}")
            else:
                kept[value.origin] = now
    for expr, values in itertools.chain(layers.items(), changed.items()):
        if len(values) > 1:
            (a, first), (b, second) = list(values.items())[:2]
            return [], f"{expr_text(expr)} cannot be {a} and {b} at once (for {first} and {second})"
    targets = {expr: next(iter(values)) for expr, values in changed.items()}
    known = {e.key: t for e, t in targets.items() if isinstance(e, Attribute)}
    unchanged = {e.key for e in kept if isinstance(e, Attribute)}
    return [_solved({**kept, **targets}, known, believed) for believed in ([set(), unchanged], [unchanged])], ""


def expr_text(expr: Expr) -> str:
    """An expression over configuration fields, for people."""
    if isinstance(expr, Attribute):
        return f"config.{_text(expr.key)}"
    return str(expr)


def _solved(targets: Mapping[Expr, int], known: Mapping[Key, int], staying: list[set[Key]]) -> dict[Field, int]:
    """The fields, from those known and from expressions that come out right for one value of one more field. Rounds
    differ in which fields are believed to stay."""
    wanted = dict(known)
    for believed, (expr, target) in itertools.product(staying, targets.items()):
        fields = {leaf.key: leaf for leaf in leaves(expr) if isinstance(leaf, Attribute)}
        unknown = [leaf for key, leaf in fields.items() if key not in wanted and key not in believed]
        if isinstance(expr, Attribute) or len(unknown) != 1 or _value(expr, wanted) == target:
            continue
        old = unknown[0].value
        now = _value(expr, wanted) or 1
        proportional = [round(old * target / now), round(old * now / (target or 1))]
        for guess in [*proportional, *range(1, min(old, _LARGEST_GUESS))]:
            if guess > 0 and _value(expr, {**wanted, unknown[0].key: guess}) == target:
                wanted[unknown[0].key] = guess
                break
    return wanted


def _value(expr: Expr, fields: Mapping[Key, int]) -> float | None:
    """An expression with some fields changed; None where it cannot be computed."""

    def lookup(leaf: Any) -> int:
        return fields.get(leaf.key, leaf.value)

    try:
        return evaluate(expr, lookup)
    except ArithmeticError:
        return None


def _refused(misfits: list[Misfit]) -> bool:
    return misfits[:1] == [("", (), ())]


def _misfits(model: nn.Module, config: Any) -> list[Misfit]:
    """Name, shape in the model, shape by the configuration. Names without a text: the class refuses these numbers
    together, which is further away than any shape."""
    here = named_tensors(model)
    try:
        built = named_tensors(_build(model, config, "meta"))
    except Exception:
        return [("", (), ())] * (2 * len(here) + 1)
    out = []
    for name in here | built:
        mine, theirs = (tuple(t[name].shape) if name in t else () for t in (here, built))
        if mine != theirs or (name in here) != (name in built):
            out.append((name, mine, theirs))
    return out


def _completed(model: nn.Module, config: Any, wanted: dict[Field, int]) -> tuple[dict[Field, int], list[Misfit]]:
    """With fields that were left open filled in where that makes the sizes right; and what does not fit."""
    misfits = _misfits(model, _with(config, wanted))
    for field in [f for f, v in _fields(config) if v is None and misfits]:
        pairs = [pair for _, mine, theirs in misfits for pair in zip(mine, theirs, strict=False)]
        for size in dict.fromkeys(a for a, b in pairs if a != b):
            fewer = _misfits(model, _with(config, {**wanted, field: size}))
            if len(fewer) < len(misfits) and not _refused(fewer):
                wanted, misfits = {**wanted, field: size}, fewer
                break
    return wanted, misfits


def _unfit(model: nn.Module, wanted: Mapping[Field, int], misfits: list[Misfit]) -> str:
    """Why the closest configuration that was found does not express the model."""
    name, mine, theirs = misfits[0]
    stated = ", ".join(f"{_text(f)} = {v}" for f, v in wanted.items()) or "as it is"
    if _refused(misfits):
        return f"{type(model).__name__} cannot be built with {stated}"
    if not mine or not theirs:
        has, lacks = ("model", "configuration") if mine else ("configuration", "model")
        return f"the {has} ({stated}) has {name}, and the {lacks} has none" if has == "model" else (
            f"the configuration ({stated}) makes {name}, which the model has not"
        )
    return f"{name} has shape {mine}, and the configuration ({stated}) makes it {theirs}"


def _proof(
    model: nn.Module, config: Any, wanted: Mapping[Field, int], example: ExampleInput, tolerance: float
) -> str:
    """Set the fields if the model then is what its configuration says; else why not."""
    new = _with(config, wanted)
    fresh, reference, own = _build(model, new, "cpu"), clone_with(model, {}), clone_with(model, {})
    place = next((name for name, kept in vars(model).items() if kept is config), "config")
    vars(own)[place] = new
    fresh.load_state_dict(dict(model.state_dict()), strict=False)
    try:
        error = _distance([reference, fresh, own], model, example, torch.float64)
    except GraphPruneError:  # some operators, grouped products among them, take no double precision
        given = next(model.parameters()).dtype
        error = _distance([reference, fresh, own], model, example, given)
        tolerance = max(tolerance, 100 * torch.finfo(given).eps)
    if error <= tolerance:
        for field, value in wanted.items():
            config = _set(config, field, value)
        if config is not model.config:
            vars(model)[place] = config
        return ""
    values = ", ".join(f"{_text(field)} = {value}" for field, value in wanted.items())
    return (
        f"a model built with {values} computes something else (relative error {error:.2g}): its code derives more than "
        f"sizes from the configuration"
    )


def _distance(made: list[nn.Module], model: nn.Module, example: ExampleInput, dtype: torch.dtype) -> float:
    """How far the outputs of the others are from those of the first, relative, on the model's device."""
    device = next(model.parameters()).device
    example = example.clone().map(lambda t: t.to(dtype) if t.is_floating_point() else t)
    results = []
    for one in made:
        one.to(device=device, dtype=dtype)
        with evaluating(one):
            results.append(run_model(one, example.clone(), "fit_config"))
    return max(relative_error(found, results[0]) for found in results[1:])


__all__ = ["ConfigFit", "fit_config"]
