"""Learning from the dense network: its logits, and features inside it, whatever widths pruning has left."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import GraphPruneError
from ...support.numbers import check_number
from ...support.suggestions import check_choice, did_you_mean
from ...tracing.example import result_tensors

FEATURE_LOSSES = ("similarity", "attention", "mse")


@dataclasses.dataclass(frozen=True)
class Distillation:
    """How a network learns from a teacher (Hinton et al., 2015).

    loss = (1 - weight) * loss_fn + weight * T² KL(teacher / T || student / T) + feature_weight * features

    - `temperature`: T, above 0. `weight`: in [0, 1]; where a batch has no targets the teacher counts alone.
    - `features`: paths of modules, in both networks, whose outputs are compared too; none by default.
    - `feature_loss`: "similarity" (default): the matrices of similarities between the items of the batch (Tung and
      Mori, 2019), for outputs of any width. "attention": maps of mean squares over the channels (Zagoruyko and
      Komodakis, 2017), for (batch, channels, ...) outputs of any number of channels. "mse": the mean squared error
      over the teacher's mean square, for outputs of equal shape.
    - `feature_weight`: factor of the mean over `features`, at least 0. For a short training of a network that was cut
      out of its teacher try "mse" on block outputs with a weight that rules the loss (hundreds) and a temperature of 8
      to 16: every batch then says far more than its class probabilities do (docs/finetune.md).

    Raises GraphPruneError for values out of range.
    """

    temperature: float = 4.0
    weight: float = 0.5
    features: tuple[str, ...] = ()
    feature_loss: str = "similarity"
    feature_weight: float = 1.0

    def __post_init__(self) -> None:
        check_number("Distillation: temperature", self.temperature, above=True)
        check_number("Distillation: weight", self.weight, high=1)
        check_number("Distillation: feature_weight", self.feature_weight)
        features: Any = self.features
        if isinstance(features, str) or not isinstance(features, Iterable):
            raise GraphPruneError(f"Distillation: features must be a list of module paths, got {features!r}")
        object.__setattr__(self, "features", tuple(features))
        check_choice("Distillation: feature_loss", self.feature_loss, FEATURE_LOSSES)


def logit_distance(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² KL(softmax(teacher / T) || softmax(student / T)), classes along axis 1, mean over everything else."""
    if student.shape != teacher.shape:
        raise GraphPruneError(
            f"teacher: its outputs have shape {tuple(teacher.shape)}, the model's {tuple(student.shape)}; the teacher "
            f"must answer the same question"
        )
    axis = 1 if student.dim() > 1 else 0
    own = F.log_softmax(student.float() / temperature, axis)
    wanted = F.log_softmax(teacher.detach().float() / temperature, axis)
    divergence = F.kl_div(own, wanted, reduction="none", log_target=True).sum(axis)
    return temperature**2 * divergence.mean()


def feature_distance(student: Tensor, teacher: Tensor, kind: str, name: str) -> Tensor:
    """How far the outputs of module `name` are apart; see `Distillation`."""
    own, wanted = student.float(), teacher.detach().float()
    if len(own) != len(wanted) or own.dim() < 2:
        raise GraphPruneError(f"Distillation: {name} gives {tuple(own.shape)} and {tuple(wanted.shape)}, no features")
    if kind == "similarity":
        return (_similarities(own) - _similarities(wanted)).square().sum() / len(own) ** 2
    if kind == "attention":
        if own.dim() < 3 or own.shape[2:] != wanted.shape[2:]:
            raise GraphPruneError(
                f"Distillation: {name} gives {tuple(own.shape)} and {tuple(wanted.shape)}; 'attention' needs "
                f"(batch, channels, ...) with equal places; use feature_loss='similarity'"
            )
        return (_attention(own) - _attention(wanted)).square().mean()
    if own.shape != wanted.shape:
        raise GraphPruneError(
            f"Distillation: {name} gives {tuple(own.shape)} in the model and {tuple(wanted.shape)} in the teacher; "
            f"'mse' needs equal shapes; use feature_loss='similarity'"
        )
    return F.mse_loss(own, wanted) / wanted.square().mean().clamp_min(1e-12)


def _similarities(features: Tensor) -> Tensor:
    flat = features.flatten(1)
    return F.normalize(flat @ flat.T, dim=1)


def _attention(features: Tensor) -> Tensor:
    return F.normalize(features.square().mean(1).flatten(1), dim=1)


class Tap:
    """The latest outputs of named modules, while inside."""

    def __init__(self, model: nn.Module, names: Iterable[str], what: str) -> None:
        known = dict(model.named_modules())
        for name in names:
            if name not in known:
                hint = did_you_mean(name, known) or "; see model.named_modules()"
                raise GraphPruneError(f"Distillation: the {what} has no module {name!r}{hint}")
        self._modules = {name: known[name] for name in names}
        self._what = what
        self._seen: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Tap:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._watcher(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def __getitem__(self, name: str) -> Tensor:
        """The output of this module in the last run."""
        if name not in self._seen:
            raise GraphPruneError(f"Distillation: the {self._what} does not run {name!r}, or it returns no tensor")
        return self._seen[name]

    def _watcher(self, name: str) -> Any:
        def watch(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensors = result_tensors(output)
            if tensors and isinstance(tensors[0], torch.Tensor):
                self._seen[name] = tensors[0]

        return watch
