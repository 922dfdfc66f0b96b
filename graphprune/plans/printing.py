"""A plan as text, for people."""

from __future__ import annotations

from collections.abc import Iterable

from .data import GroupPlan, PlanData


def summary(plan: PlanData) -> str:
    """What is removed and what is not: one line of numbers, then one line for each thing."""
    if plan.layers and not plan.changes_widths:
        return "\n".join([*_layers(plan), *_indented(plan.frozen)])
    if plan.experts:
        return "\n".join([*_experts(plan), *_indented(map(str, plan.attributes)), *_indented(plan.frozen)])
    lines = [*(_layers(plan) if plan.layers else ()), *_widths(plan)]
    if plan.latency is not None:
        lines.append(f"  {plan.latency}")
    if plan.unsettled:
        lines.append("numbers that may be out of date (the option sizes makes them follow):")
        lines += _indented(map(str, plan.unsettled))
    if plan.frozen:
        lines += ["cannot be removed:", *_indented(plan.frozen)]
    return "\n".join(lines)


def _layers(plan: PlanData) -> list[str]:
    names = (f"{', '.join(block.modules)}: left out" for block in plan.layers)
    return [f"{len(plan.layers)} layers left out", *_indented(names)]


def _experts(plan: PlanData) -> list[str]:
    names = (f"{e.router}: {len(e.gone)} experts left out" for e in plan.experts)
    return [f"{sum(len(e.gone) for e in plan.experts)} experts left out", *_indented(names)]


def _widths(plan: PlanData) -> list[str]:
    cut = [g for g in plan.groups if g.kept < g.size]
    lines = [f"{len(cut)} of {len(plan.groups)} groups pruned, {len(plan.folds)} batch norms folded"]
    if plan.asked is not None and plan.gone is not None:
        lines.append(f"  asked to remove {plan.asked:.1%} of each on average, removed {plan.gone:.1%}")
    lines += _indented(_group(g) for g in plan.groups if g.kept < g.size or g.rounded)
    lines += _indented(map(str, plan.attributes))
    lines += _indented(f"{r.module or 'the model'} becomes a graph of its recorded calls" for r in plan.rewrites)
    return lines


def _group(group: GroupPlan) -> str:
    asked = f", {group.asked:.4g} asked for" if group.rounded else ""
    return f"{group.name}: {group.kept} of {group.size} {group.kind}s kept{asked}"


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]
