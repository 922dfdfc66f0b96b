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
from .allocation import Settings
from .allocation.selection import names_in, producers, winners
from .allocation.steps import nearest

# True of every network: said last.
_EVERYWHERE = ("immovable", "output")
_NEVER = ("kernel", "numbers", "vocabulary")
_SHOWN = 3


def tell(message: str, strict: bool) -> None:
    """Warn, or raise GraphPruneError where the caller is strict; an empty message says that all is well."""
    if message and strict:
        raise GraphPruneError(message)
    if message:
        warn(message)


def shortfall(plan: Plan, settings: Settings, whole: str | None, graph: DependencyGraph | None) -> str:
    """What was asked for and did not come, and why; empty where something came of everything, or nothing was asked.

    `settings`: as the plan was made with them; `whole`: "layer", "branch" or "experts" where such were asked for;
    `graph`: what the plan was made of, None for those.
    """
    if settings.budget is not None:
        return _missed(plan)
    ratio = settings.ratio
    if isinstance(ratio, Mapping):
        return "" if graph is None else _named(plan, ratio, settings, graph)
    if not plan.empty or not ratio:
        return ""
    why = _nothing_whole(plan, settings, whole) if whole else _nothing(plan, settings, graph)
    return f"nothing was removed, although ratio={float(ratio):g} was asked for: {why}"


def _missed(plan: Plan) -> str:
    """Other budgets are met or refused; of a latency the nearest plan that was seen is taken."""
    found = plan.latency
    if found is None or not plan.empty or found.requested_ms >= 0.995 * found.dense_ms:
        return ""
    return f"nothing was removed, although a latency was asked for: {found}"


def _nothing_whole(plan: Plan, settings: Settings, whole: str) -> str:
    if plan.frozen:
        return f"granularity={whole!r}: {_some(plan.frozen)}"
    limits = f"ratio and max_ratio={settings.max_ratio:g}" if settings.max_ratio < 1 else "the ratio"
    what = {"layer": "layers", "branch": "branches"}.get(whole, "experts")
    return f"granularity={whole!r}: {limits} of the {what} that can go round to none; raise the ratio"


def _nothing(plan: Plan, settings: Settings, graph: DependencyGraph | None) -> str:
    chosen = [g for g in plan.groups if g.asked is not None]
    if chosen:
        return _held(chosen, settings)
    if plan.groups:
        kinds = Counter(g.kind for g in plan.groups)
        there = ", ".join(f"{n} group{'s' if n > 1 else ''} of {kind}s" for kind, n in kinds.most_common())
        return (
            f"granularity={settings.granularity!r}, and nothing of that kind can go here, only {there}: choose another "
            f'granularity, or leave it out ("auto")'
        )
    frozen = () if graph is None else graph.frozen
    return f"nothing of this network can go: {_reasons(frozen)}; graphprune.doctor(model, example_input) says more"


def _held(groups: Sequence[GroupPlan], settings: Settings) -> str:
    """Which options leave these groups whole, each with the widest of its groups and what to do."""
    held: dict[str, list[GroupPlan]] = {}
    for group in groups:
        held.setdefault(_option(group, settings), []).append(group)
    parts = []
    for option, members in sorted(held.items(), key=lambda item: -len(item[1])):
        widest = max(members, key=lambda g: g.size)
        what = f"{len(members)} group{'s' if len(members) > 1 else ''}, the widest {widest.name} of {widest.size}"
        parts.append(_TEXTS[option].format(what=what, kinds=f"{widest.kind}s", s=settings))
    return "; ".join(parts)


_TEXTS = {
    "ratio": "the ratio is less than half a unit of {what} {kinds}: raise it",
    "min_channels": "min_channels={s.min_channels} keeps all of {what} {kinds}: lower it",
    "max_ratio": "max_ratio={s.max_ratio:g} allows no unit of {what} {kinds} to go: raise it",
    "round_to": "round_to={s.round_to} leaves no narrower width to {what} {kinds}: lower it",
    "code": "what the code allows leaves no narrower width to {what} {kinds}: ask for more",
}


def _option(group: GroupPlan, settings: Settings) -> str:
    """What keeps all units of a group from which some should have gone."""
    assert group.asked is not None
    size, step = group.size, settings.round_to
    if nearest(group.size - group.asked) < 1:
        return "ratio"
    if settings.min_channels >= size:
        return "min_channels"
    if settings.floor(size) >= size:
        return "max_ratio"
    if isinstance(step, int) and step > 1 and max(step, nearest(group.asked / step) * step) >= size:
        return "round_to"
    return "code"


def hopeless(plan: Plan, settings: Settings) -> bool:
    """Whether options keep every group whole that a ratio speaks of, whatever the ratio."""
    asked = [dataclasses.replace(g, asked=1.0) for g in plan.groups if g.asked is not None and g.size > 1]
    return bool(asked) and all(_option(g, settings) in ("min_channels", "max_ratio", "round_to") for g in asked)


def _named(plan: Plan, ratio: Mapping[str, float], settings: Settings, graph: DependencyGraph) -> str:
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
            parts.append(f"{pattern!r} ({_held(asked, settings)})")
        elif mine:
            kinds = ", ".join(sorted({f"{plan.groups[i].kind}s" for i in mine}))
            parts.append(f"{pattern!r} (granularity={settings.granularity!r}, and these are {kinds})")
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
