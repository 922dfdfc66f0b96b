"""Plans that leave out experts: find the mixtures, see whom the routers choose, cut, and try before promising."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..dependency.whole.experts import Experts, Mixture, find_mixtures
from ..errors import GraphPruneError
from ..importance.calibration import CalibrationData
from ..plans.data import AttributeChange
from ..plans.plan import Plan
from ..plans.structure import structure_of
from ..plans.verification import RouterWatch, failure_of, verify_experts
from ..support.settings import settings_of
from ..support.walking import all_modules
from ..tracing.example import ExampleInput
from ..tracing.pause import paused_collector
from ..tracing.state import configurations, evaluating
from ..tracing.trace import run_model
from .allocation.rounding import lost
from .layers import held_modules
from .request import GRANULARITIES, Decision, Granularity, Request

_COUNT = re.compile("expert", re.IGNORECASE)
_OTHER = re.compile("per_tok|top|shared|active|activated|selected|group|capacity", re.IGNORECASE)


class WholeExperts(Granularity):
    """Experts of mixtures go as a whole."""

    units = "experts"
    loses_inputs = False

    def check(self, request: Request) -> None:
        """Raise GraphPruneError for ratios by name, budgets and criteria, which experts do not take."""
        request.one_ratio("experts")
        if request.criterion not in (None, "routing"):
            raise GraphPruneError(f"criterion: experts are ranked by 'routing', got {request.criterion!r}")

    def decide(self, model: nn.Module, example: Any, request: Request) -> Decision:
        """The plan for a model."""
        return self.further(model, example, request, ())

    def further(self, model: nn.Module, example: Any, request: Request, before: Sequence[Plan]) -> Decision:
        """The plan for a model that has lost some already."""
        with paused_collector():
            return Decision(plan_experts(model, example, request, before), request)


GRANULARITIES.add("experts", WholeExperts())


def plan_experts(
    model: nn.Module,
    example_input: Any,
    request: Request,
    before: Sequence[Plan] = (),
) -> Plan:
    """The plan that leaves out a share of the experts of every mixture, rounded to nearest. `before`: what plans took
    already, of which the share is too.

    Those go that the router gives the least weight: the mean over tokens of the softmax of its outputs, measured on
    `data`, or on the example input without it. As many stay as a token gets, at least. A mixture whose code needs all
    of its experts stays, with the reason in `frozen`.
    """
    example = ExampleInput.of(example_input)
    held = held_modules(request.ignore, model)
    every = find_mixtures(model, example)
    mixtures = [m for m in every if held.isdisjoint(_names(m))]
    scores = _scores(model, mixtures, example, request.data)
    refused: dict[str, str] = {}
    chosen = [m for m in (_cut(m, scores[m.experts.router], request, before) for m in mixtures) if m.experts.gone]
    made = _plan(model, chosen, every, refused)
    if chosen and _failure(model, made, example):
        sound: list[Mixture] = []
        for mixture in chosen:  # which of them is it?
            reason = _failure(model, _plan(model, [*sound, mixture], every, {}), example)
            if reason:
                refused[mixture.experts.router] = reason
            else:
                sound.append(mixture)
        made = _plan(model, sound, every, refused)
    if not mixtures:
        none = "no mixture of experts: no router's outputs are ranked by a top-k"
        made = dataclasses.replace(made, frozen=("all mixtures of experts are ignored" if every else none,))
    return made


def _names(mixture: Mixture) -> tuple[str, ...]:
    """What must not be ignored: the module around it, or its parts where that is the whole model."""
    experts = mixture.experts
    return (mixture.block,) if mixture.block else (*filter(None, (experts.router, experts.listed)), *mixture.stacked)


def _scores(
    model: nn.Module, mixtures: Sequence[Mixture], example: ExampleInput, data: Any
) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    batches = [(example, None)] if data is None else CalibrationData(data, example, model)
    sums = {m.experts.router: torch.zeros(m.number, dtype=torch.float64) for m in mixtures}
    if not mixtures:
        return {}
    for inputs, _ in batches:
        watch = RouterWatch(model, [m.experts for m in mixtures], bar=False)
        with evaluating(model), watch:
            run_model(model, inputs.clone(), "data")
        for m in mixtures:
            for logits in watch.logits[m.experts.router]:
                sums[m.experts.router] += torch.softmax(logits.double().flatten(0, -2), -1).sum(0).cpu()
    out = {name: total.numpy() for name, total in sums.items()}
    for name, values in out.items():
        if not np.isfinite(values).all():
            raise GraphPruneError(f"{name}: the router's outputs are NaN on the data; check its weights")
    return out


def _cut(mixture: Mixture, scores: Any, request: Request, before: Sequence[Plan]) -> Mixture:
    earlier = (e for plan in before for e in plan.experts if e.router == mixture.experts.router)
    taken = sum(len(e.gone) for e in earlier)
    wanted = lost(request.one_ratio("experts"), mixture.number + taken) - taken
    most = request.rounding.most(mixture.number + taken) - taken
    number = min(wanted, most, mixture.number - max(mixture.chosen, request.min_channels))
    gone = np.argsort(scores, kind="stable")[: max(number, 0)]
    return dataclasses.replace(
        mixture, experts=dataclasses.replace(mixture.experts, gone=tuple(sorted(int(i) for i in gone)))
    )


def _plan(model: nn.Module, chosen: Sequence[Mixture], mixtures: Sequence[Mixture], refused: Mapping[str, str]) -> Plan:
    return Plan(
        removed={name: {0: m.experts.gone} for m in chosen for name in m.stacked},
        attributes=tuple(_attributes(model, chosen, mixtures)),
        experts=tuple(m.experts for m in chosen),
        frozen=tuple(f"the experts of {router} stay: {reason}" for router, reason in refused.items()),
        structure=structure_of(model),
    )


def _attributes(model: nn.Module, chosen: Sequence[Mixture], mixtures: Sequence[Mixture]) -> list[AttributeChange]:
    """What counts experts: in the modules of a mixture; in those around mixtures that all come out alike, as where the
    loss of the routers is computed; and in settings where all mixtures of the model do."""
    modules = all_modules(model)
    lost_by = {m.experts.router: len(m.experts.gone) for m in chosen}
    left = {m.experts.router: (m.number, m.number - lost_by.get(m.experts.router, 0)) for m in mixtures}
    out = []
    for path, module in modules.items():
        inside = [m for m in chosen if _within(path, m.block)]
        about = inside or [m for m in mixtures if _within(_place(m), path)]
        widths = {left[m.experts.router] for m in about}
        if len(widths) == 1:
            ((number, now),) = widths
            if now < number:
                found = [name for name, value in module.__dict__.items() if _is(value, number) and _counts(name)]
                out += [AttributeChange(path, name, (), number, now) for name in found]
    if chosen and len(set(left.values())) == 1:
        ((number, now),) = set(left.values())
        for path, name, settings in configurations(modules).values():
            keys = [key for key, value in settings_of(settings).items() if _is(value, number) and _counts(key)]
            out += [AttributeChange(path, name, (key,), number, now) for key in keys]
    return out


def _within(path: str, whole: str) -> bool:
    return not whole or path == whole or path.startswith(f"{whole}.")


def _place(mixture: Mixture) -> str:
    """A module of the mixture."""
    return mixture.block or mixture.experts.router


def _is(value: Any, number: int) -> bool:
    return type(value) is int and value == number


def _counts(name: str) -> bool:
    return bool(_COUNT.search(name)) and not _OTHER.search(name)


def _failure(model: nn.Module, plan: Plan, example: ExampleInput) -> str:
    return failure_of(lambda: verify_experts(model, plan.apply(model), plan.experts, example))


__all__ = ["Experts", "WholeExperts", "plan_experts"]
