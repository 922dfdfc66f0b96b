"""Repair of masked layers: the weights that are left are fitted again, without training and without labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraphPruneError
from ..importance.calibration import (
    CalibrationData,
    Call,
    Moments,
    Reader,
    as_weight,
    find_readers,
    rows_of,
    weight_matrix,
)
from ..plans.surgery import clone_with, find_folds
from ..recovery.repair import walk
from ..recovery.repair.checking import Check, FitData
from ..recovery.repair.solve import masked_ridge_solution
from ..recovery.repair.steps import LayerRecovery, Option, Options, Steps, better_of_two
from ..support.doors import door
from ..support.numbers import check_number
from ..support.progress import ProgressOption, reported, stage
from ..support.walking import named_tensors
from ..support.warning import warn
from ..synthesis import made_for
from ..tracing.example import ExampleInput
from ..tracing.trace import record_run
from .masks import make_permanent
from .weights import Mask, Weight, find_weights, steps_of


@door("model", "dense", in_place=True, exact=True)
@reported("reconstruction")
def reconstruct(
    model: nn.Module,
    dense: nn.Module,
    example_input: Any,
    data: Any,
    *,
    ridge: float = 1e-3,
    progress: ProgressOption = None,
) -> nn.Module:
    """Fit the unmasked weights of `model` again so that its layers make what those of `dense` do; masks stay in force.

    Layer after layer: inputs from the already repaired network, targets from the dense one, and for every output a
    ridge regression over the weights that its mask leaves (the layer-wise problem of Hubara et al., Accelerated Sparse
    Neural Training, 2021, solved in closed form). Constant terms go into biases or the batch norms behind. `ridge`,
    times the mean second moment of the inputs, holds the weights to those they had. An eighth of the samples (256 are
    enough) is held from the fit: layers whose new weights make the outputs worse there stay as they were, and a warning
    names them.

    `model` is `dense` after masking; it is changed in place and returned. `example_input` as in `graphprune.prune`;
    `data` yields inputs, or (inputs, targets) whose targets are not used, and is read several times. Transposed
    convolutions, weights under further parametrisations (weight norm) and layers with more than 12,000 inputs per
    output stay as they are. `progress`: as in `graphprune.plan`.

    Raises GraphPruneError where the two do not fit together, without masks, and for unusable data; then nothing is
    changed.
    """
    check_number("ridge", ridge)
    masked = {site.name: w for w in find_weights(model) if _alone(w) for site in w.sites}
    example = ExampleInput.of(example_input)
    data = made_for(data, dense, example_input)
    with torch.no_grad():
        small = make_permanent(clone_with(model, {}))
        _check_alike(model, dense)
        fit = _Fit(dense, small, {name: w.mask for name, w in masked.items()}, example, data, float(ridge))
        fit.run()
        _copy_back(small, model, masked)
    return model


def _alone(weight: Weight) -> bool:
    """Masked, and nothing but masked."""
    steps = [step for site in weight.sites for step in steps_of(site.module).get(site.attribute, ())]
    return weight.mask is not None and all(isinstance(step, Mask) for step in steps)


def _check_alike(model: nn.Module, dense: nn.Module) -> None:
    mine, theirs = (
        {site.name: tuple(w.value.shape) for w in find_weights(net) for site in w.sites} for net in (model, dense)
    )
    for name, shape in mine.items():
        if theirs.get(name) != shape:
            raise GraphPruneError(
                f"reconstruct: {name} of the masked model is not in the dense one with the same shape; pass the model "
                f"as it was before masking"
            )


def _copy_back(small: nn.Module, model: nn.Module, masked: dict[str, Weight]) -> None:
    """Move repaired values into the masked model, whose masked tensors have other names."""
    there = named_tensors(model)
    for name, value in named_tensors(small).items():
        if name in masked:
            for site in masked[name].sites:
                setattr(site.module, site.attribute, value.detach().clone())
        elif name in there:
            there[name].data.copy_(value)


class _Fit:
    """Visits the masked layers of `small`, whose masks are plain zeros, in order."""

    def __init__(
        self,
        dense: nn.Module,
        small: nn.Module,
        masks: dict[str, Tensor | None],
        example: ExampleInput,
        data: Any,
        ridge: float,
    ) -> None:
        self.dense, self.small, self.masks, self.ridge = dense, small, masks, ridge
        self.data = FitData(CalibrationData(data, example, small), dense)
        check = Check(dense, small, self.data.held)
        check.refuse_infinite(find_readers(record_run(dense, example)), self.data.first_held)
        self.steps = Steps(small, check, self._constant)
        trace = record_run(small, example)
        modules = dict(small.named_modules())
        self.norms = {f.layer: modules[f.batch_norm] for f in find_folds(small, trace)}
        self.readers = [r for r in find_readers(trace) if r.weight in masks and self._possible(r)]

    def _possible(self, reader: Reader) -> bool:
        weight = named_tensors(self.small)[reader.weight]
        return reader.separable and weight.numel() // weight.shape[reader.out_axis] <= walk.MAX_FEATURES

    def run(self) -> None:
        named = named_tensors(self.small)
        device = next((t.device for t in named.values()), torch.device("cpu"))
        targets = {
            r.weight: walk.Target(torch.arange(named[r.weight].shape[r.out_axis], device=device), None)
            for r in self.readers
        }
        order = walk.waves(self.readers, lambda r: walk.bytes_needed(r, named[r.weight]))
        left_out: dict[str, str] = {}

        pair = walk.Pair(self.dense, self.small, self.data, order)
        self.steps.check.follow(pair.levels)

        def once() -> list[LayerRecovery]:
            report: list[LayerRecovery] = []
            pair.begin()
            with stage("fitting", len(self.readers), "layers") as now:
                for wave in order:
                    by_weight = {r.weight: r for r in wave}
                    now.tell(", ".join(by_weight))
                    found = self._moments(pair, wave, targets).items()
                    tried = [(by_weight[n], Options([self._fitted(by_weight[n], moments)])) for n, moments in found]
                    report += self.steps.take(tried) if tried else []
                    now.advance(len(wave))
            left_out.update(pair.left_out)
            return report

        report = better_of_two(self.steps, once)
        fitted = {said.weight for said in report}
        left = {said.weight: said.note for said in report if not said.changed}
        left |= {name: why for name, why in left_out.items() if name not in fitted}
        if left:
            warn("reconstruct: left as they were: " + "; ".join(f"{name} ({why})" for name, why in left.items()))

    def _moments(
        self, pair: walk.Pair, wave: Sequence[Reader], targets: dict[str, walk.Target]
    ) -> dict[str, Moments]:
        named = named_tensors(self.small)
        found: dict[str, Moments] = {}

        def take(reader: Reader, call: Call, wanted: Tensor, seen: int) -> None:
            x, y = rows_of(reader, call, wanted, named[reader.weight], seen)
            if reader.weight not in found:
                found[reader.weight] = Moments(x.shape[0], x.shape[2], y.shape[2], x.device)
            found[reader.weight].add(x, y)

        pair.gather(wave, targets, take)
        return found

    def _constant(self, reader: Reader) -> walk.Constant:
        """Without new biases: they would change the state dict."""
        norm = self.norms.get(reader.weight.rpartition(".")[0])
        return walk.Constant(self.small, reader, norm, new_bias=False)

    def _fitted(self, reader: Reader, moments: Moments) -> Option:
        weight, mask = named_tensors(self.small)[reader.weight], self.masks[reader.weight]
        assert mask is not None
        constant = self._constant(reader)
        start = weight_matrix(reader, weight)
        bias = start.new_zeros(weight.shape[reader.out_axis]) if constant.bias is None else constant.bias.double()
        start = torch.cat([start, bias.reshape(start.shape[0], 1, -1)], 1)
        last = torch.full_like(start[:, -1:], constant.possible, dtype=torch.bool)
        free = torch.cat([weight_matrix(reader, mask) != 0, last], 1)
        solution = masked_ridge_solution(moments, start, self.ridge, free)
        change = (solution[:, -1] - start[:, -1]).reshape(-1) if constant.possible else None
        scale = max(float(moments.variance.sum()) * moments.rows, 1e-300)
        before, after = (moments.squared_error(w) / scale for w in (start, solution))
        said = LayerRecovery(reader.weight, "masked least squares", before, after)
        return Option(said, as_weight(reader, solution[:, :-1], weight) * mask, change)
