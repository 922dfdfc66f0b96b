"""What was asked for and did not come, in words: for a warning or, where the caller is strict, an error."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence

from ..dependency import DependencyGraph, Frozen
from ..errors import GraphPruneError
from ..plans.data import GroupPlan
from ..plans.plan import Plan
from ..support.warning import warn
from .allocation.selection import names_in, producers, winners
from .request import Decision, Request

# True of every network: said last.
_EVERYWHERE = ("immovable", "output")
_NEVER = ("kernel", "numbers", "vocabulary")
_SHOWN = 3
# How far above what was asked for a latency may be.
_MET = 1.01


def tell(message: str, strict: bool) -> None:
    """Warn, or raise GraphPruneError where the caller is strict; an empty message says that all is well."""
    if message and strict:
        raise GraphPruneError(message)
    if message:
        warn(message)


def shortfall(decision: Decision) -> str:
    """What was asked for and did not come, and why; empty where something came of everything, or nothing was asked."""
    plan, request, graph = decision.plan, decision.request, decision.graph
    ratio = request.ratio
    if ratio is None:
        told = missed(plan)
    elif isinstance(ratio, Mapping):
        told = "" if graph is None else _named(plan, ratio, request, graph)
    elif not plan.empty or not ratio:
        told = ""
    else:
        why = _nothing_whole(plan, request) if request.strategy.kinds is None else _nothing(plan, request, graph)
        told = f"nothing was removed, although ratio={ratio:g} was asked for: {why}"
    return f"{told}; {decision.note}" if told and decision.note else told


def missed(plan: Plan) -> str:
    """Why a latency is not what was asked for, empty where it is, or none was: other budgets are met or refused, of a
    latency the nearest plan that was seen is taken."""
    found = plan.latency
    if found is None:
        return ""
    if plan.empty:
        near = found.requested_ms >= 0.995 * found.dense_ms
        return "" if near else f"nothing was removed, although a latency was asked for: {found}"
    seen, how = found.measured_ms, "measured"
    if seen is None:
        seen, how = found.predicted_ms, "predicted"
    if seen <= _MET * found.requested_ms:
        return ""
    return (
        f"the latency that was asked for is missed: {seen:.3g} ms {how}, {found.requested_ms:.3g} ms asked for "
        f"({seen / found.requested_ms - 1:+.1%}; {found.dense_ms:.3g} ms dense, {len(found.attempts)} attempts); it is "
        f"the nearest plan that was seen: ask for less time, on a machine that does nothing else"
    )


def _nothing_whole(plan: Plan, request: Request) -> str:
    if plan.frozen:
        return f"granularity={request.granularity!r}: {_some(plan.frozen)}"
    limits = f"ratio and max_ratio={request.max_ratio:g}" if request.max_ratio < 1 else "the ratio"
    units = request.strategy.units
    return f"granularity={request.granularity!r}: {limits} of the {units} that can go round to none; raise the ratio"


def _nothing(plan: Plan, request: Request, graph: DependencyGraph | None) -> str:
    chosen = [g for g in plan.groups if g.asked is not None]
    if chosen:
        return _held(chosen, request)
    if plan.groups:
        kinds = Counter(g.kind for g in plan.groups)
        there = ", ".join(f"{n} group{'s' if n > 1 else ''} of {kind}s" for kind, n in kinds.most_common())
        return (
            f"granularity={request.granularity!r}, and nothing of that kind can go here, only {there}: choose another "
            f'granularity, or leave it out ("auto")'
        )
    frozen = () if graph is None else graph.frozen
    return f"nothing of this network can go: {_reasons(frozen)}; graphprune.doctor(model, example_input) says more"


def _held(groups: Sequence[GroupPlan], request: Request) -> str:
    """Which options leave these groups whole, each with the widest of its groups and what to do."""
    held: dict[str, list[GroupPlan]] = {}
    for group in groups:
        held.setdefault(_held_by(group, request) or "code", []).append(group)
    parts = []
    for option, members in sorted(held.items(), key=lambda item: -len(item[1])):
        widest = max(members, key=lambda g: g.size)
        what = f"{len(members)} group{'s' if len(members) > 1 else ''}, the widest {widest.name} of {widest.size}"
        parts.append(_TEXTS[option].format(what=what, kinds=f"{widest.kind}s", s=request))
    return "; ".join(parts)


_TEXTS = {
    "ratio": "the ratio is less than half a unit of {what} {kinds}: raise it",
    "min_channels": "min_channels={s.min_channels} keeps all of {what} {kinds}: lower it",
    "max_ratio": "max_ratio={s.max_ratio:g} allows no unit of {what} {kinds} to go: raise it",
    "round_to": "round_to={s.round_to} leaves no narrower width to {what} {kinds}: lower it",
    "code": "what the code allows leaves no narrower width to {what} {kinds}: ask for more",
}


def _held_by(group: GroupPlan, request: Request) -> str:
    """Which option keeps all units of a group from which some should have gone; empty where none does."""
    assert group.asked is not None
    return request.rounding.holds(group.asked, group.size)


def hopeless(plan: Plan, request: Request) -> bool:
    """Whether options keep every group whole that a ratio speaks of, whatever the ratio."""
    asked = [dataclasses.replace(g, asked=1.0) for g in plan.groups if g.asked is not None and g.size > 1]
    return bool(asked) and all(_held_by(g, request) in ("min_channels", "max_ratio", "round_to") for g in asked)


def _named(plan: Plan, ratio: Mapping[str, float], request: Request, graph: DependencyGraph) -> str:
    """Names with a ratio above 0 of which nothing goes, other than those that longer names overrule."""
    best, table = winners(ratio, graph), names_in(graph)
    makers = producers(graph)
    parts = []
    for pattern, value in ratio.items():
        if not value:
            continue
        mine = [i for i, winner in enumerate(best) if winner == pattern]
        if any(plan.groups[i].kept < plan.groups[i].size for i in mine):
            continue
        asked = [plan.groups[i] for i in mine if plan.groups[i].asked is not None]
        if asked:
            parts.append(f"{pattern!r} ({_held(asked, request)})")
        elif mine:
            kinds = ", ".join(sorted({f"{plan.groups[i].kind}s" for i in mine}))
            parts.append(f"{pattern!r} (granularity={request.granularity!r}, and these are {kinds})")
        elif not (meant := table.meant(pattern, "ratio").keys()) & {name for names in makers for name in names}:
            firsts = {first for name, first in graph.trace.aliases.items() if name in meant}
            carried = _carried(firsts, graph)
            if not carried:
                parts.append(f"{pattern!r} ({_reasons(_produced(firsts, graph))})")
            elif not any(plan.groups[i].kept < plan.groups[i].size for i in carried):
                parts.append(f"{pattern!r} (its channels are made by {makers[carried[0]][0]}: give that a ratio)")
    return f"ratio: nothing was removed of {'; '.join(parts)}" if parts else ""


def _carried(firsts: Container[str], graph: DependencyGraph) -> list[int]:
    """The groups of which these parameters are a part without producing or only reading them: those of norms."""
    held = [any(m.parameter in firsts and m.role != "in" for m in group.members) for group in graph.groups]
    return [i for i, holds in enumerate(held) if holds]


def _produced(firsts: Container[str], graph: DependencyGraph) -> list[Frozen]:
    """What is frozen on the axes that these parameters produce."""
    return [f for f in graph.frozen if f.parameter in firsts and graph.roles.get((f.parameter, f.axis)) != "in"]


def _reasons(frozen: Iterable[Frozen]) -> str:
    """The most frequent reasons, those that are true of every network last, each with its first line."""
    counted: Counter[str] = Counter()
    first: dict[str, str] = {}
    everywhere: set[str] = set()
    for item in frozen:
        for reason in item.reasons:
            if reason.kind not in _NEVER:
                counted[reason.text] += 1
                first.setdefault(reason.text, str(reason))
                if reason.kind in _EVERYWHERE:
                    everywhere.add(reason.text)
    if not counted:
        return "it has no parameters with channels"
    order = sorted(counted, key=lambda text: (text in everywhere, -counted[text]))
    told = [f"{first[text]}, {counted[text]} ax{'es' if counted[text] > 1 else 'is'}" for text in order[:_SHOWN]]
    return "; ".join(told) + (f"; and {len(order) - _SHOWN} more reasons" if len(order) > _SHOWN else "")


def _some(lines: Sequence[str]) -> str:
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more


__all__ = ["hopeless", "shortfall", "tell"]
