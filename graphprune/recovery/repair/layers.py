"""Recovery by refitting layers: constant terms alone ("mean"), or all weights ("least_squares")."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ...dependency.reparametrised import forms_in
from ...importance.calibration import (
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
from ...support.progress import stage
from ...support.walking import named_tensors, tensor_named
from ...tracing.example import ExampleInput
from ...tracing.trace import record_run
from . import walk
from .checking import Check, FitData
from .solve import ridge_solution
from .steps import LayerRecovery, Option, Options, Steps, better_of_two, with_note


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
        data: FitData,
        ridge: float,
        every_layer: bool,
        unlike: frozenset[str] = frozenset(),
        new_bias: bool = True,
    ) -> None:
        self.dense, self.small, self.plan, self.data = dense, small, plan, data
        self.ridge, self.every_layer, self.new_bias = ridge, every_layer, new_bias
        self.forms = forms_in(small)
        trace = record_run(small, example)
        self.readers = [r for r in find_readers(trace) if r.weight.rpartition(".")[0] not in unlike]
        self.behind = _behind_layers(dense, plan, example)
        self.device = next((p.device for p in small.parameters()), torch.device("cpu"))
        norms = {f.layer: f.batch_norm for f in find_folds(small, trace)}
        modules = dict(small.named_modules())
        self.norms = {layer: modules[norm] for layer, norm in norms.items()}
        self.check = Check(dense, small, data.held)
        self.check.refuse_infinite(find_readers(record_run(dense, example)), data.first_held)
        self.steps = Steps(small, self.check, self._constant)
        self.report: list[LayerRecovery] = []

    def run(self, solve: bool) -> list[LayerRecovery]:
        """Refit what is to be refit; `solve`: all weights, else the constant terms alone."""
        chosen = [r for r in self._chosen(solve) if solve or self._has_place(r)]
        placeless, named = self.report, named_tensors(self.small)
        order = walk.waves(chosen, lambda r: walk.bytes_needed(r, named[r.weight]))
        pair = walk.Pair(self.dense, self.small, self.data, order)
        self.check.follow(pair.levels)

        def visit() -> list[LayerRecovery]:
            self.report = list(placeless)
            return self._run(pair, solve)

        return better_of_two(self.steps, visit)

    def _run(self, pair: walk.Pair, solve: bool) -> list[LayerRecovery]:
        pair.begin()
        targets = {r.weight: walk.target_of(self.plan, r, self.device) for wave in pair.order for r in wave}
        with stage("fitting", len(targets), "layers") as now:
            for wave in pair.order:
                now.tell(", ".join(r.weight for r in wave))
                solved = [r for r in wave if solve and not self._refusal(r)]
                shifted = [r for r in wave if r not in solved]
                self._pass(pair, wave, solved, shifted, targets)
                now.advance(len(wave))
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

    def _has_place(self, reader: Reader) -> bool:
        """Whether a constant term can go anywhere; else the layer is left before any data are read for it."""
        if self._constant(reader).possible:
            return True
        refusal, why = self._refusal(reader), "has no bias and no batch norm behind it: left alone"
        self._leave(reader, f"{refusal}; {why}" if refusal else why)
        return False

    def _refusal(self, reader: Reader) -> str:
        """Why the weights of a layer are left alone."""
        weight = tensor_named(self.small, reader.weight)
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
        met = moments.keys() | {name for name, shift in shifts.items() if shift.rows} | unlike.keys()
        for reader in wave:
            if reader.weight not in met:
                self._leave(reader, f"{pair.left_out.get(reader.weight, 'the data do not reach it')}: left alone")
        for name, told in unlike.items():
            self.report.append(LayerRecovery(name, "none", math.nan, math.nan, told, False))
            shifts.pop(name, None)
        with torch.no_grad():
            tried = [(r, self._solutions(r, moments.pop(r.weight))) for r in solved if r.weight in moments]
            tried += [(r, self._shifts(r, shifts[r.weight])) for r in shifted if r.weight in met - unlike.keys()]
            possible = [(reader, Options(options)) for reader, options in tried if options is not None]
            if possible:
                self.report += [with_note(said, pair.note(said.weight)) for said in self.steps.take(possible)]

    def _constant(self, reader: Reader) -> walk.Constant:
        return walk.Constant(self.small, reader, self.norms.get(reader.weight.rpartition(".")[0]), self.new_bias)

    def _solutions(self, reader: Reader, moments: Moments) -> Iterator[Option] | None:
        """All weights fitted, where there are enough rows for that; else, or should that fail, the mean alone."""
        few = self._few(reader, moments)
        if not few or self._constant(reader).possible:
            return self._fitted(reader, moments, few)
        self._leave(reader, f"{few}, and it has none: left alone")
        return None

    def _fitted(self, reader: Reader, moments: Moments, few: str) -> Iterator[Option]:
        weight = tensor_named(self.small, reader.weight)
        constant = self._constant(reader)
        start = weight_matrix(reader, weight)
        outputs = weight.shape[reader.out_axis]
        bias = start.new_zeros(outputs) if constant.bias is None else constant.bias.detach().double()
        start = torch.cat([start, bias.reshape(start.shape[0], 1, -1)], 1)
        scale = max(float(moments.variance.sum()) * moments.rows, 1e-300)
        before = moments.squared_error(start)
        if not few:
            solution = ridge_solution(moments, start, self.ridge, constant.possible)
            note = "" if constant.possible else "has no bias, so means are matched by the weights alone"
            change = (solution[:, -1] - start[:, -1]).reshape(-1) if constant.possible else None
            after = moments.squared_error(solution)
            said = LayerRecovery(reader.weight, "least squares", before / scale, after / scale, note)
            yield Option(said, as_weight(reader, solution[:, :-1], weight), change)
        if constant.possible:
            missed = moments.mean_missed(start)
            # moving a constant by the mean of what is missed takes away the squares of that, row by row
            after = max(0.0, before - moments.rows * float(missed.square().sum()))
            said = LayerRecovery(reader.weight, "mean", before / scale, after / scale, few)
            yield Option(said, None, missed.reshape(-1))

    def _leave(self, reader: Reader, why: str) -> None:
        self.report.append(LayerRecovery(reader.weight, "none", math.nan, math.nan, why, False))

    def _few(self, reader: Reader, moments: Moments) -> str:
        """Layers that lost nothing are refitted only where the data outnumber their weights well; "" where they do."""
        cut = self.plan.removed.get(reader.weight, {}).get(reader.in_axis)
        needed = 8 * (moments.features + 1)
        if cut or moments.rows >= needed:
            return ""
        return f"{moments.rows} rows of data are fewer than the {needed} for its weights: only its constant term is " \
            "corrected"

    def _shifts(self, reader: Reader, found: _Shift) -> Iterator[Option] | None:
        if not self._has_place(reader):
            return None
        notes = [self._refusal(reader), "padded: exact on average, not at the border" if found.padded else ""]
        said = LayerRecovery(reader.weight, "mean", found.before, found.after, "; ".join(n for n in notes if n))
        return iter([Option(said, None, found.change)])


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
