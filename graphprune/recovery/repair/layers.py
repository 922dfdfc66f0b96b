"""Recovery by refitting layers: constant terms alone ("mean"), or all weights ("least_squares")."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...dependency.reparametrised import forms_in
from ...importance.calibration import (
    CalibrationData,
    Call,
    Moments,
    NoProducts,
    Reader,
    as_weight,
    find_readers,
    rows_of,
    weight_matrix,
)
from ...plans.plan import Plan
from ...plans.surgery import find_folds
from ...support.walking import named_tensors
from ...tracing.example import ExampleInput
from ...tracing.trace import record_run
from . import walk
from .solve import ridge_solution, squared_error


@dataclasses.dataclass(frozen=True)
class LayerRecovery:
    """What was done to one layer.

    `before`, `after`: mean squared difference to the wanted results on the calibration data, divided by their
    variance; NaN where not measured. `note` says what could not be done, and where a correction is not exact.
    `changed`: whether anything was done.
    """

    weight: str
    method: str
    before: float
    after: float
    note: str = ""
    changed: bool = True

    def __str__(self) -> str:
        note = f": {self.note}" if self.note else ""
        error = "" if math.isnan(self.before) else f", relative error {self.before:.2e} -> {self.after:.2e}"
        return f"{self.weight}: {self.method}{error}{note}"


class Refit:
    """Visits the layers of `small` in order; `dense` is the network whose results are wanted, folded as `small` is.

    Both have the names of the plan's model. `unlike`: layers that are folded in `small` alone, and left as they are.
    """

    def __init__(
        self,
        dense: nn.Module,
        small: nn.Module,
        plan: Plan,
        example: ExampleInput,
        data: CalibrationData,
        ridge: float,
        every_layer: bool,
        progress: Callable[[str], None] | None,
        unlike: frozenset[str] = frozenset(),
        new_bias: bool = True,
    ) -> None:
        self.dense, self.small, self.plan, self.data = dense, small, plan, data
        self.ridge, self.every_layer, self.progress, self.new_bias = ridge, every_layer, progress, new_bias
        self.forms = forms_in(small)
        trace = record_run(small, example)
        self.readers = [r for r in find_readers(trace) if r.weight.rpartition(".")[0] not in unlike]
        self.behind = _behind_layers(dense, plan, example)
        self.device = next((p.device for p in small.parameters()), torch.device("cpu"))
        norms = {f.layer: f.batch_norm for f in find_folds(small, trace)}
        modules = dict(small.named_modules())
        self.norms = {layer: modules[norm] for layer, norm in norms.items()}
        self.report: list[LayerRecovery] = []

    def run(self, solve: bool) -> list[LayerRecovery]:
        """Refit what is to be refit; `solve`: all weights, else the constant terms alone."""
        chosen = self._chosen(solve)
        named = named_tensors(self.small)
        targets = {r.weight: walk.target_of(self.plan, r, self.device) for r in chosen}
        order = walk.waves(chosen, lambda r: walk.bytes_needed(r, named[r.weight]))
        pair = walk.Pair(self.dense, self.small, self.data, order)
        for wave in order:
            if self.progress is not None:
                self.progress(", ".join(r.weight for r in wave))
            solved = [r for r in wave if solve and not self._refusal(r)]
            shifted = [r for r in wave if r not in solved]
            self._pass(pair, wave, solved, shifted, targets)
        return self.report

    def _chosen(self, solve: bool) -> list[Reader]:
        """Layers that lost inputs or stand behind a layer that is left out and, with `every_layer`, all that come after
        one of them."""
        cut = {r.weight for r in self.readers if self.plan.removed.get(r.weight, {}).get(r.in_axis)} | self.behind
        chosen = []
        for reader in self.readers:
            after = self.every_layer and solve and not reader.after.isdisjoint(cut)
            if not reader.separable and reader.bias not in self.plan.structure:
                continue  # no constant term of its own
            if reader.weight in cut or after:
                chosen.append(reader)
        return chosen

    def _refusal(self, reader: Reader) -> str:
        """Why the weights of a layer are left alone."""
        weight = named_tensors(self.small)[reader.weight]
        features = weight.numel() // weight.shape[reader.out_axis]
        for form in (self.forms[name] for name in (reader.weight, reader.bias) if name in self.forms):
            if not form.changeable:
                return f"{form.title} cannot make any values: only its constant term is corrected, where that is free"
        if not reader.separable:
            return "transposed convolution of several groups: only its constant term is corrected"
        if features > walk.MAX_FEATURES:
            return f"{features} inputs are more than {walk.MAX_FEATURES}: only its constant term is corrected"
        return ""

    def _pass(
        self,
        pair: walk.Pair,
        wave: Sequence[Reader],
        solved: list[Reader],
        shifted: list[Reader],
        targets: dict[str, walk.Target],
    ) -> None:
        named = named_tensors(self.small)
        moments: dict[str, Moments] = {}
        shifts: dict[str, _Shift] = {r.weight: _Shift() for r in shifted}
        unlike: dict[str, str] = {}  # users' layers that are no layers, and why

        def take(reader: Reader, call: Call, wanted: Tensor, seen: int) -> None:
            weight = named[reader.weight]
            if reader.weight in unlike:
                return
            checked = reader.declared and reader.separable
            try:
                x, y = rows_of(reader, call, wanted, weight, seen) if checked else (None, None)
            except NoProducts as error:
                unlike[reader.weight] = f"{error}: left alone"
                return
            if reader.weight in shifts:
                assert call.y is not None
                axis = walk.channel_axis(reader, call.y)
                shifts[reader.weight].add(wanted, call.y, axis, _padded(call))
                return
            if x is None or y is None:
                x, y = rows_of(reader, call, wanted, weight, seen)
            if reader.weight not in moments:
                moments[reader.weight] = Moments(x.shape[0], x.shape[2], y.shape[2], x.device)
            moments[reader.weight].add(x, y)

        pair.gather(wave, targets, take)
        for name, told in unlike.items():
            self.report.append(LayerRecovery(name, "none", math.nan, math.nan, told, False))
        with torch.no_grad():
            for reader in solved:
                if reader.weight in moments:
                    self._solve(reader, moments.pop(reader.weight))
            for reader in (r for r in shifted if r.weight not in unlike):
                self._shift(reader, shifts[reader.weight])

    def _constant(self, reader: Reader) -> walk.Constant:
        return walk.Constant(self.small, reader, self.norms.get(reader.weight.rpartition(".")[0]), self.new_bias)

    def _solve(self, reader: Reader, moments: Moments) -> None:
        weight = named_tensors(self.small)[reader.weight]
        constant = self._constant(reader)
        start = weight_matrix(reader, weight)
        outputs = weight.shape[reader.out_axis]
        bias = start.new_zeros(outputs) if constant.bias is None else constant.bias.detach().double()
        start = torch.cat([start, bias.reshape(start.shape[0], 1, -1)], 1)
        if self._loose(reader, moments):
            return
        solution = ridge_solution(moments, start, self.ridge, constant.possible)
        scale = max(float(moments.variance.sum()) * moments.rows, 1e-300)
        before, after = (squared_error(moments, w) / scale for w in (start, solution))
        note = "" if constant.possible else "has no bias, so means are matched by the weights alone"
        weight.data.copy_(as_weight(reader, solution[:, :-1], weight))
        if constant.possible:
            constant.add((solution[:, -1] - start[:, -1]).reshape(-1))
        self.report.append(LayerRecovery(reader.weight, "least squares", before, after, note))

    def _loose(self, reader: Reader, moments: Moments) -> bool:
        """Layers that lost nothing are refitted only where the data outnumber their weights well."""
        cut = self.plan.removed.get(reader.weight, {}).get(reader.in_axis)
        return not cut and moments.rows < 8 * moments.gram.shape[1]

    def _shift(self, reader: Reader, found: _Shift) -> None:
        constant = self._constant(reader)
        notes = [self._refusal(reader)]
        if found.rows and constant.possible:
            constant.add(found.change)
            if found.padded:
                notes.append("padded: exact on average, not at the border")
        elif not constant.possible:
            notes.append("has no bias and no batch norm behind it: left alone")
        note = "; ".join(n for n in notes if n)
        after = found.after if constant.possible else found.before
        self.report.append(LayerRecovery(reader.weight, "mean", found.before, after, note, constant.possible))


def _behind_layers(dense: nn.Module, plan: Plan, example: ExampleInput) -> set[str]:
    """The weights of `dense` whose inputs are computed from what layers make that the plan leaves out."""
    if not plan.layers:
        return set()
    readers = find_readers(record_run(dense, example))
    lost = {r.weight for r in readers if any(block.holds(r.weight) for block in plan.layers)}
    return {r.weight for r in readers if r.weight not in lost and not r.after.isdisjoint(lost)}


class _Shift:
    """Sums over rows of the wanted minus the found results of one layer, per output."""

    def __init__(self) -> None:
        self.rows = 0
        self.padded = False
        self.sums: list[Tensor] = []

    def add(self, wanted: Tensor, found: Tensor, axis: int, padded: bool) -> None:
        d, y = ((t.movedim(axis, -1).flatten(0, -2).double()) for t in (wanted - found, wanted))
        new = [d.sum(0), d.square().sum(0), y.sum(0), y.square().sum(0)]
        self.sums = [a + b for a, b in zip(self.sums, new, strict=True)] if self.sums else new
        self.rows += d.shape[0]
        self.padded |= padded

    @property
    def change(self) -> Tensor:
        return self.sums[0] / self.rows

    def _relative(self, squares: Tensor) -> float:
        variance = (self.sums[3] / self.rows - (self.sums[2] / self.rows).square()).clamp_min(0).sum()
        return float((squares / self.rows).sum() / variance.clamp_min(1e-300))

    @property
    def before(self) -> float:
        return self._relative(self.sums[1]) if self.rows else float("nan")

    @property
    def after(self) -> float:
        return self._relative(self.sums[1] - self.sums[0].square() / self.rows) if self.rows else float("nan")


def _padded(call: Call) -> bool:
    padding = call.geometry[1] if call.geometry is not None else 0
    return padding == "same" or (isinstance(padding, tuple) and any(padding))
