"""The plan: what goes, as data. Can be read, compared, edited, stored as JSON and applied to a copy of the model."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..dependency.groups import GroupKind
from ..dependency.temperature import Rescale
from ..dependency.whole.blocks import Block
from ..dependency.whole.experts import Experts
from ..errors import GraphPruneError
from ..support.documents import DIGEST, check_digest, read_document, write_document
from ..support.doors import door
from ..support.types import PathLike
from ..support.versions import running_versions
from ..tracing.names import named_tensors
from .fields import axis, flag, indices, listed, number, table, text, whole
from .history import remember
from .latency import Latency
from .rewriting import OUTPUTS, Rewrite, replace
from .surgery import (
    Fold,
    attribute_at,
    bypass_layers,
    check_folds,
    close_gaps,
    fold_names,
    operate,
    remove_listed_experts,
)

FORMAT = "graphprune.plan/1"


@dataclasses.dataclass(frozen=True)
class AttributeChange:
    """`model.<module>.<name>[key...]` goes from `old` to `new`."""

    module: str
    name: str
    key: tuple[int | str, ...]
    old: int
    new: int

    def __str__(self) -> str:
        path = f"{self.module}.{self.name}" if self.module else self.name
        return path + "".join(f"[{k!r}]" for k in self.key) + f": {self.old} -> {self.new}"


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """One group in the plan: how many of its units stay. `asked`: how many should have stayed by the ratio, before
    widths were rounded (a real number); None where there was no ratio for it. `weight`: what it counts in `Plan.asked`
    and `Plan.gone`: the multiply-accumulates it has a part in, relative to the other groups' mean."""

    name: str
    kind: GroupKind
    size: int
    kept: int
    asked: float | None = None
    weight: float = 1.0

    @property
    def rounded(self) -> bool:
        """Whether another number stays than the one asked for, rounded to nearest."""
        return self.asked is not None and abs(self.asked - self.kept) > 0.5


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which indices of which parameter axes go, and everything that must change with them.

    `removed`: parameter or buffer name -> {axis: sorted removed indices, in the original numbering}.
    `attributes`: integer attributes of modules that must change. `folds`: Conv-BN pairs that are merged first.
    `rescales`: rows multiplied by a factor, so that attention keeps its temperature. `groups`: every group, with how
    much of it stays. `frozen`: what could not be removed, and why, one line each. `structure`: names and shapes of the
    model the plan was made for. `output`: "module", "hybrid" or "graph". `rewrites`: modules that are replaced by
    graphs of their recorded calls. `statistics`: whether something is removed that a norm, softmax or mean runs over.
    `versions`: of this library and of torch, when the plan was made.
    `caches`: (module, attribute) of dicts in which the model keeps tensors computed from its parameters; they are
    emptied. `layers`: layers that are left out; whatever else the plan changes lies outside them, and all names are
    those of the model with these layers.
    `experts`: mixtures that lose experts; `removed` then cuts routers and stacked weights, and nothing else.
    `latency`: what was asked, predicted and measured, where the budget was one of latency.
    """

    removed: Mapping[str, Mapping[int, tuple[int, ...]]]
    attributes: tuple[AttributeChange, ...] = ()
    folds: tuple[Fold, ...] = ()
    rescales: tuple[Rescale, ...] = ()
    groups: tuple[GroupPlan, ...] = ()
    frozen: tuple[str, ...] = ()
    structure: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    statistics: bool = False
    caches: tuple[tuple[str, str], ...] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=running_versions)
    output: str = "module"
    rewrites: tuple[Rewrite, ...] = ()
    layers: tuple[Block, ...] = ()
    experts: tuple[Experts, ...] = ()
    latency: Latency | None = None

    @property
    def asked(self) -> float | None:
        """The mean fraction that should go from the groups that a ratio speaks of, before widths are rounded; None
        without a ratio. Groups count by the multiply-accumulates that they have a part in."""
        return self._mean({i: g.asked for i, g in enumerate(self.groups) if g.asked is not None})

    @property
    def gone(self) -> float | None:
        """The same mean of the fractions that go."""
        return self._mean({i: g.kept for i, g in enumerate(self.groups) if g.asked is not None})

    def _mean(self, kept: Mapping[int, float]) -> float | None:
        groups = [(self.groups[i], k) for i, k in kept.items()]
        total = math.fsum(g.weight for g, _ in groups)
        return math.fsum(g.weight * (1 - k / g.size) for g, k in groups) / total if groups else None

    @property
    def empty(self) -> bool:
        """Nothing is removed (batch norms may still be folded)."""
        return not self.removed and not self.layers

    @property
    def changes_widths(self) -> bool:
        """It does something else than leaving layers out."""
        return any((self.removed, self.attributes, self.folds, self.rescales, self.rewrites, self.experts))

    @door("model")
    def apply(self, model: nn.Module) -> nn.Module:
        """A pruned copy of `model`, which must have the names and shapes the plan was made for. The copy remembers the
        plan: `graphprune.save` writes it beside the weights.

        Raises GraphPruneError, naming the first parameter that differs, when it has not, and where a plan that was
        changed cannot be carried out. `model` is never touched.
        """
        self.check(model)
        try:
            return remember(close_gaps(self.operated(model), model, self.layers), model, self)
        except GraphPruneError:
            raise
        except Exception as error:  # whatever a plan made to mislead broke, it broke in a copy
            raise GraphPruneError(f"the plan cannot be carried out ({type(error).__name__}: {error})") from error

    @door("model")
    def operated(self, model: nn.Module) -> nn.Module:
        """The pruned copy while the layers that are left out still have their places, and all others their names."""
        small = bypass_layers(model, self.layers) if self.layers else model
        if self.changes_widths or not self.layers:
            attributes = [(a.module, a.name, a.key, a.new) for a in self.attributes]
            small = operate(small, self.removed, attributes, self.folds, self.rescales, self.caches)
            remove_listed_experts(small, self.experts)
            small = replace(small, self.rewrites)
        return small

    @door("model")
    def check(self, model: nn.Module) -> None:
        """Raise GraphPruneError unless the plan fits `model`."""
        found = structure_of(model)
        for name, shape in self.structure.items():
            if name not in found:
                raise GraphPruneError(f"the plan was made for another model: this one has no {name}")
            if found[name] != tuple(shape):
                raise GraphPruneError(
                    f"the plan was made for another model: {name} has shape {found[name]}, "
                    f"the plan expects {tuple(shape)}"
                )
        extra = [n for n in found if n not in self.structure]
        if extra:
            raise GraphPruneError(f"the plan was made for another model: it knows no {extra[0]}")
        for a in self.attributes:
            value = attribute_at(model, a.module, a.name, a.key)
            if value != a.old:
                raise GraphPruneError(f"the plan was made for another model: expected {a}, found {value!r}")
        check_folds(model, self.folds)

    @property
    def structural_hash(self) -> str:
        """A hash of the names and shapes of the model the plan was made for."""
        return _hash_of(self.structure)

    def summary(self) -> str:
        """What is removed and what is not, for people."""
        lines = [f"  {', '.join(block.modules)}: left out" for block in self.layers]
        first = [f"{len(self.layers)} layers left out", *lines]
        if self.layers and not self.changes_widths:
            return "\n".join([*first, *(f"  {line}" for line in self.frozen)])
        lines = [f"  {e.router}: {len(e.gone)} experts left out" for e in self.experts]
        if self.experts:
            head = f"{sum(len(e.gone) for e in self.experts)} experts left out"
            lines += [f"  {text}" for text in (*map(str, self.attributes), *self.frozen)]
            return "\n".join([head, *lines])
        lines = first if self.layers else []
        cut = [g for g in self.groups if g.kept < g.size]
        listed = [g for g in self.groups if g.kept < g.size or g.rounded]
        lines.append(f"{len(cut)} of {len(self.groups)} groups pruned, {len(self.folds)} batch norms folded")
        if self.asked is not None and self.gone is not None:
            lines.append(f"  asked to remove {self.asked:.1%} of each on average, removed {self.gone:.1%}")
        lines += [
            f"  {g.name}: {g.kept} of {g.size} {g.kind}s kept" + (f", {g.asked:.4g} asked for" if g.rounded else "")
            for g in listed
        ]
        lines += [f"  {change}" for change in self.attributes]
        lines += [f"  {r.module or 'the model'} becomes a graph of its recorded calls" for r in self.rewrites]
        if self.latency is not None:
            lines.append(f"  {self.latency}")
        if self.frozen:
            lines.append("cannot be removed:")
            lines += [f"  {line}" for line in self.frozen]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()

    # -- as JSON

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "format": FORMAT,
            "structural_hash": self.structural_hash,
            "counts": self._counts,
            "versions": dict(self.versions),
            "structure": {k: list(v) for k, v in self.structure.items()},
            "removed": {n: {str(a): list(i) for a, i in axes.items()} for n, axes in self.removed.items()},
            "attributes": [{**dataclasses.asdict(a), "key": list(a.key)} for a in self.attributes],
            "folds": [dataclasses.asdict(f) for f in self.folds],
            "rescales": [{**dataclasses.asdict(r), "indices": list(r.indices)} for r in self.rescales],
            "groups": [dataclasses.asdict(g) for g in self.groups],
            "frozen": list(self.frozen),
            "statistics": self.statistics,
            "output": self.output,
            "rewrites": [r.to_dict() for r in self.rewrites],
            "caches": [list(c) for c in self.caches],
            "layers": [dataclasses.asdict(block) for block in self.layers],
            "experts": [{**dataclasses.asdict(e), "gone": list(e.gone)} for e in self.experts],
            "latency": None if self.latency is None else self.latency.to_dict(),
        }

    @property
    def _counts(self) -> dict[str, int]:
        """How many entries there are of what changes a network, so that one that gets lost is missed; and how many
        different lists of indices, so that of axes that go together none is changed alone."""
        sections = ("attributes", "folds", "rescales", "rewrites", "caches", "layers", "experts")
        cuts = [gone for axes in self.removed.values() for gone in axes.values()]
        lists = set({id(gone): gone for gone in cuts}.values())  # many axes may share one
        return {"removed": len(cuts), "lists": len(lists), **{name: len(getattr(self, name)) for name in sections}}

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """The inverse of `to_dict`; what `save` wrote, with its digest, is taken too.

        Raises GraphPruneError for anything that is not a plan, does not match its digest, or lost or gained an entry.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise GraphPruneError(f"not a plan: expected format {FORMAT!r}, found {str(found)[:60]!r}")
        unknown = [str(name)[:60] for name in data if name not in _ENTRIES]
        if unknown:
            raise GraphPruneError(f"not a plan: it has an entry {unknown[0]!r}, and plans have no such entries")
        check_digest(data, edited=True)
        try:
            plan = cls(
                removed={
                    n: {axis(a): indices(idx) for a, idx in table(axes).items()}
                    for n, axes in table(data["removed"]).items()
                },
                attributes=tuple(map(_attribute, listed(data["attributes"]))),
                folds=tuple(
                    Fold(text(f["layer"]), text(f["batch_norm"]), whole(f["axis"])) for f in listed(data["folds"])
                ),
                rescales=tuple(
                    Rescale(text(r["parameter"]), whole(r["axis"]), indices(r["indices"]), number(r["factor"]))
                    for r in listed(data["rescales"])
                ),
                groups=tuple(map(_group, listed(data["groups"]))),
                frozen=tuple(map(text, listed(data["frozen"]))),
                structure={k: tuple(map(_length, listed(v))) for k, v in table(data["structure"]).items()},
                statistics=flag(data["statistics"]),
                caches=tuple((text(path), text(name)) for path, name in listed(data["caches"])),
                output=text(data["output"]),
                rewrites=tuple(map(Rewrite.from_dict, listed(data["rewrites"]))),
                layers=tuple(map(Block.from_dict, listed(data["layers"]))),
                experts=tuple(map(Experts.from_dict, listed(data["experts"]))),
                latency=None if data["latency"] is None else Latency.from_dict(data["latency"]),
                versions={k: text(v) for k, v in table(data["versions"]).items()},
            )
            counts, stated = table(data["counts"]), text(data["structural_hash"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise GraphPruneError(f"not a plan: {type(error).__name__}: {error}") from error
        if plan.output not in OUTPUTS:
            raise GraphPruneError(f"not a plan: output is {plan.output!r}, expected one of {', '.join(OUTPUTS)}")
        if stated != plan.structural_hash:
            raise GraphPruneError("not a plan: its structural hash is not that of the structure it describes")
        plan._check_indices()
        plan._check_layers()
        plan._check_factors()
        plan._check_counts(counts)
        return plan

    def _check_counts(self, counts: Mapping[str, Any]) -> None:
        for name, found in self._counts.items():
            if counts.get(name) != found:
                raise GraphPruneError(
                    f"the plan has lost or gained entries: its counts say {counts.get(name)!r} {name}, and it lists "
                    f"{found}; whoever changed it on purpose corrects the entry \"counts\""
                )

    def _check_layers(self) -> None:
        for e in self.experts:
            if e.router not in self.structure or (e.gone and e.gone[-1] >= self.structure[e.router][0]):
                raise GraphPruneError(f"the plan leaves out experts of {e.router!r} that it does not describe")
        if self.layers and self.experts:
            raise GraphPruneError("a plan that leaves layers out leaves out no experts; make a second plan for that")
        paths = [path for block in self.layers for path in block.modules]
        for path in paths:
            if not any(name.startswith(f"{path}.") for name in self.structure):
                raise GraphPruneError(f"the plan leaves out {path!r}, which it does not describe")
        gone = tuple(f"{path}." for path in paths)
        modules = [*(a.module for a in self.attributes), *(path for path, _ in self.caches)]
        modules += [r.module for r in self.rewrites]
        modules += [name for fold in self.folds for name in (fold.layer, fold.batch_norm)]
        for name in (*self.removed, *(r.parameter for r in self.rescales), *(f"{m}." for m in modules)):
            if name.startswith(gone):
                raise GraphPruneError(f"the plan changes {name.rstrip('.')}, which lies in a layer that it leaves out")

    def _check_indices(self) -> None:
        ordered: dict[int, bool] = {}  # lists that many axes share are looked at once
        for name, axes in self.removed.items():
            shape = self.structure.get(name)
            for at, gone in axes.items():
                if shape is None or not 0 <= at < len(shape):
                    raise GraphPruneError(f"the plan removes from axis {at} of {name}, which it does not describe")
                if len(gone) >= shape[at]:
                    raise GraphPruneError(f"the plan removes all of axis {at} of {name}; at least one must stay")
                if id(gone) not in ordered:
                    ordered[id(gone)] = all(a < b for a, b in itertools.pairwise(gone))
                if not ordered[id(gone)] or (gone and not 0 <= gone[0] <= gone[-1] < shape[at]):
                    raise GraphPruneError(
                        f"the plan's indices for axis {at} of {name} must be increasing and lie in [0, {shape[at]})"
                    )

    def _check_factors(self) -> None:
        """Folds and rescales name what the plan describes."""
        for fold in self.folds:
            layer, norm = fold_names(fold)[0], f"{fold.batch_norm}.running_mean"
            if layer not in self.structure or norm not in self.structure:
                raise GraphPruneError(f"the plan folds {fold.batch_norm} into {fold.layer}, which it does not describe")
            if fold.axis not in (0, 1):
                raise GraphPruneError(f"the plan folds {fold.batch_norm} along axis {fold.axis}; expected 0 or 1")
        if len({f.layer for f in self.folds}) + len({f.batch_norm for f in self.folds}) != 2 * len(self.folds):
            raise GraphPruneError("the plan folds two batch norms into one layer, or one into two")
        for scale in self.rescales:
            shape = self.structure.get(scale.parameter, ())
            at = scale.indices
            inside = 0 <= scale.axis < len(shape) and len(at) <= shape[scale.axis]
            if not inside or (at and not 0 <= min(at) <= max(at) < shape[scale.axis]):
                raise GraphPruneError(
                    f"the plan rescales axis {scale.axis} of {scale.parameter} by {scale.factor}, which cannot be"
                )

    def save(self, path: PathLike) -> Path:
        """Write the plan as JSON with a digest, to a temporary name first. Raises GraphPruneError when the path cannot
        be written."""
        return write_document(path, self.to_dict())

    @classmethod
    def load(cls, path: PathLike) -> Plan:
        """Read a plan written by `save`. Whoever changed it by hand removes its entry "digest".

        Raises GraphPruneError when there is none, it is damaged, was changed since it was written, or lost an entry.
        """
        data = read_document(path, "plan", edited=True)
        try:
            return cls.from_dict(data)
        except GraphPruneError as error:
            raise GraphPruneError(f"the plan {path} cannot be used: {error}") from error


def check_plan(plan: Any, model: nn.Module) -> None:
    """Raise GraphPruneError unless it is a plan, and one for `model`."""
    if not isinstance(plan, Plan):
        raise GraphPruneError(f"plan: expected what graphprune.plan returns, got {type(plan).__name__}")
    plan.check(model)


_ENTRIES = {f.name for f in dataclasses.fields(Plan)} | {"format", "structural_hash", "counts", DIGEST}


def _length(value: Any) -> int:
    if whole(value) < 0:
        raise ValueError(f"{value} is no length")
    return whole(value)


def _attribute(data: Mapping[str, Any]) -> AttributeChange:
    key = tuple(step if isinstance(step, str) else whole(step) for step in listed(data["key"]))
    return AttributeChange(text(data["module"]), text(data["name"]), key, whole(data["old"]), whole(data["new"]))


def _group(data: Mapping[str, Any]) -> GroupPlan:
    asked = None if data["asked"] is None else number(data["asked"])
    kept, size, weight = whole(data["kept"]), whole(data["size"]), number(data["weight"])
    if not (weight > 0 and 0 <= kept <= size and size > 0):
        raise ValueError(f"a group of weight {weight} keeps {kept} of {size}")
    return GroupPlan(text(data["name"]), GroupKind(text(data["kind"])), size, kept, asked, weight)


def folding(model: nn.Module, folds: Sequence[Fold]) -> Plan:
    """The plan that removes nothing and merges these batch norms into their layers."""
    return Plan(removed={}, folds=tuple(folds), structure=structure_of(model))


def structural_hash(model: nn.Module) -> str:
    """A hash of the names and shapes of a model, equal to that of the plans made for it."""
    return _hash_of(structure_of(model))


def _hash_of(structure: Mapping[str, tuple[int, ...]]) -> str:
    text = json.dumps({k: list(v) for k, v in sorted(structure.items())})
    return hashlib.sha256(text.encode()).hexdigest()


def structure_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters and buffers."""
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
