"""A plan as JSON: written with its counts, a hash and a digest, and read as what somebody else may have written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..dependency.groups import GroupKind
from ..dependency.temperature import Rescale
from ..dependency.whole.blocks import Block
from ..dependency.whole.experts import Experts
from ..errors import GraphPruneError
from ..support.documents import DIGEST, check_digest, read_document, write_document
from ..support.types import PathLike
from .data import AttributeChange, GroupPlan, PlanData, UnsettledSize
from .fields import axis, flag, indices, listed, number, table, text, whole
from .invariants import check_invariants
from .latency import Latency
from .rewriting import Rewrite
from .surgery import Fold

FORMAT = "graphprune.plan/1"
_P = TypeVar("_P", bound=PlanData)
_ENTRIES = {f.name for f in dataclasses.fields(PlanData)} | {"format", "structural_hash", "counts", DIGEST}


def to_dict(plan: PlanData) -> dict[str, Any]:
    """Plain data, ready for JSON."""
    return {
        "format": FORMAT,
        "structural_hash": plan.structural_hash,
        "counts": _counts(plan),
        "versions": dict(plan.versions),
        "structure": {k: list(v) for k, v in plan.structure.items()},
        "removed": {n: {str(a): list(i) for a, i in axes.items()} for n, axes in plan.removed.items()},
        "attributes": [{**dataclasses.asdict(a), "key": list(a.key)} for a in plan.attributes],
        "unsettled": [{**dataclasses.asdict(u), "key": list(u.key)} for u in plan.unsettled],
        "folds": [dataclasses.asdict(f) for f in plan.folds],
        "rescales": [{**dataclasses.asdict(r), "indices": list(r.indices)} for r in plan.rescales],
        "groups": [dataclasses.asdict(g) for g in plan.groups],
        "frozen": list(plan.frozen),
        "statistics": plan.statistics,
        "output": plan.output,
        "rewrites": [r.to_dict() for r in plan.rewrites],
        "caches": [list(c) for c in plan.caches],
        "layers": [dataclasses.asdict(block) for block in plan.layers],
        "experts": [{**dataclasses.asdict(e), "gone": list(e.gone)} for e in plan.experts],
        "latency": None if plan.latency is None else plan.latency.to_dict(),
    }


def _counts(plan: PlanData) -> dict[str, int]:
    """How many entries there are of what changes a network, so that one that gets lost is missed; and how many
    different lists of indices, so that of axes that go together none is changed alone."""
    sections = ("attributes", "folds", "rescales", "rewrites", "caches", "layers", "experts")
    cuts = [gone for axes in plan.removed.values() for gone in axes.values()]
    lists = set({id(gone): gone for gone in cuts}.values())  # many axes may share one
    return {"removed": len(cuts), "lists": len(lists), **{name: len(getattr(plan, name)) for name in sections}}


def from_dict(data: Any, make: Callable[..., _P]) -> _P:
    """The inverse of `to_dict`; what `save` wrote, with its digest, is taken too. `make`: the class of the plan.

    Raises GraphPruneError for anything that is not a plan, does not match its digest, or lost or gained an entry.
    """
    _check_form(data)
    try:
        plan = make(**_fields(data))
        counts, stated = table(data["counts"]), text(data["structural_hash"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise GraphPruneError(f"not a plan: {type(error).__name__}: {error}") from error
    if stated != plan.structural_hash:
        raise GraphPruneError("not a plan: its structural hash is not that of the structure it describes")
    check_invariants(plan)
    _check_counts(plan, counts)
    return plan


def save(plan: PlanData, path: PathLike) -> Path:
    """Write the plan with a digest, to a temporary name first. Raises GraphPruneError when it cannot be written."""
    return write_document(path, to_dict(plan))


def load(path: PathLike, make: Callable[..., _P]) -> _P:
    """What `save` wrote. Raises GraphPruneError, naming the file, for anything else."""
    data = read_document(path, "plan", edited=True)
    try:
        return from_dict(data, make)
    except GraphPruneError as error:
        raise GraphPruneError(f"the plan {path} cannot be used: {error}") from error


def _check_form(data: Any) -> None:
    """Raise GraphPruneError unless it has the format, no entries of other formats, and its digest if any."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise GraphPruneError(f"not a plan: expected format {FORMAT!r}, found {str(found)[:60]!r}")
    unknown = [str(name)[:60] for name in data if name not in _ENTRIES]
    if unknown:
        raise GraphPruneError(f"not a plan: it has an entry {unknown[0]!r}, and plans have no such entries")
    check_digest(data, edited=True)


def _fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a plan, each of its type. Raises KeyError, TypeError or ValueError where one is not."""
    latency = data["latency"]
    return {
        "removed": {
            n: {axis(a): indices(idx) for a, idx in table(axes).items()} for n, axes in table(data["removed"]).items()
        },
        "attributes": tuple(map(_attribute, listed(data["attributes"]))),
        "unsettled": tuple(map(_unsettled, listed(data["unsettled"]))),
        "folds": tuple(map(_fold, listed(data["folds"]))),
        "rescales": tuple(map(_rescale, listed(data["rescales"]))),
        "groups": tuple(map(_group, listed(data["groups"]))),
        "frozen": tuple(map(text, listed(data["frozen"]))),
        "structure": {k: tuple(map(_length, listed(v))) for k, v in table(data["structure"]).items()},
        "statistics": flag(data["statistics"]),
        "caches": tuple((text(path), text(name)) for path, name in listed(data["caches"])),
        "output": text(data["output"]),
        "rewrites": tuple(map(Rewrite.from_dict, listed(data["rewrites"]))),
        "layers": tuple(map(Block.from_dict, listed(data["layers"]))),
        "experts": tuple(map(Experts.from_dict, listed(data["experts"]))),
        "latency": None if latency is None else Latency.from_dict(latency),
        "versions": {k: text(v) for k, v in table(data["versions"]).items()},
    }


def _check_counts(plan: PlanData, counts: Mapping[str, Any]) -> None:
    for name, found in _counts(plan).items():
        if counts.get(name) != found:
            raise GraphPruneError(
                f"the plan has lost or gained entries: its counts say {counts.get(name)!r} {name}, and it lists "
                f"{found}; whoever changed it on purpose corrects the entry \"counts\""
            )


def _length(value: Any) -> int:
    if whole(value) < 0:
        raise ValueError(f"{value} is no length")
    return whole(value)


def _attribute(data: Mapping[str, Any]) -> AttributeChange:
    return AttributeChange(
        text(data["module"]), text(data["name"]), _key(data), whole(data["old"]), whole(data["new"])
    )


def _key(data: Mapping[str, Any]) -> tuple[int | str, ...]:
    return tuple(step if isinstance(step, str) else whole(step) for step in listed(data["key"]))


def _unsettled(data: Mapping[str, Any]) -> UnsettledSize:
    return UnsettledSize(
        text(data["module"]), text(data["name"]), _key(data), whole(data["value"]), text(data["why"])
    )


def _fold(data: Mapping[str, Any]) -> Fold:
    return Fold(text(data["layer"]), text(data["batch_norm"]), whole(data["axis"]))


def _rescale(data: Mapping[str, Any]) -> Rescale:
    return Rescale(text(data["parameter"]), whole(data["axis"]), indices(data["indices"]), number(data["factor"]))


def _group(data: Mapping[str, Any]) -> GroupPlan:
    asked = None if data["asked"] is None else number(data["asked"])
    kept, size, weight = whole(data["kept"]), whole(data["size"]), number(data["weight"])
    if not (weight > 0 and 0 <= kept <= size and size > 0):
        raise ValueError(f"a group of weight {weight} keeps {kept} of {size}")
    return GroupPlan(text(data["name"]), GroupKind(text(data["kind"])), size, kept, asked, weight)
