"""The training loop: one epoch at a time, on a model and an optimizer that a pruning step may replace in between."""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import GraphPruneError, GraphPruneWarning
from ...importance.calibration import ONE_INPUT, CalibrationData
from ...plans.plan import Plan
from ...support.numbers import check_integer, check_number
from ...support.randomness import seed_epoch
from ...support.suggestions import check_choice
from .carrying import carry_optimizer
from .checkpoints import check_fit, check_others, load_model, load_optimizer, model_state, optimizer_state, own_tensors
from .objective import Objective
from .penalties import GroupPenalty

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
_PENALTY = "regularize/"
_RATES = {"sgd": 0.02, "adam": 1e-3, "adamw": 1e-3}


@dataclasses.dataclass(frozen=True)
class Training:
    """Options of a training; see `graphprune.finetune`."""

    epochs: int
    optimizer: str | MakeOptimizer = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.05
    clip: float | None = 5.0
    amp: bool | str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("epochs", self.epochs, 0)
        check_integer("seed", self.seed, 0)
        if not callable(self.optimizer):
            check_choice("optimizer", self.optimizer, _RATES, "a function (model) -> torch.optim.Optimizer")
        if callable(self.optimizer) and self.lr is not None:
            raise GraphPruneError("lr: the optimizer that your function makes has its own; leave lr out")
        check_number("lr", self.lr, optional=True)
        check_number("momentum", self.momentum, high=1)
        check_number("weight_decay", self.weight_decay)
        check_number("warmup", self.warmup, high=1)
        check_number("clip", self.clip, optional=True)
        if self.clip == 0 or self.lr == 0:
            raise GraphPruneError(f"{'clip' if self.clip == 0 else 'lr'}: must be above 0, got 0")
        if self.amp not in (True, False, "auto"):
            raise GraphPruneError(f"amp: expected True, False or 'auto', got {self.amp!r}")

    def make(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of the parameters that want gradients."""
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise GraphPruneError("the model has no parameter with requires_grad; there is nothing to train")
        if callable(self.optimizer):
            made = self.optimizer(model)
            if not isinstance(made, torch.optim.Optimizer):
                raise GraphPruneError(f"optimizer: the function returned a {type(made).__name__}, no optimizer")
            return made
        rate = _RATES[self.optimizer] if self.lr is None else self.lr
        if self.optimizer == "sgd":
            nesterov = self.momentum > 0
            return torch.optim.SGD(trained, rate, self.momentum, weight_decay=self.weight_decay, nesterov=nesterov)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(trained, rate, weight_decay=self.weight_decay)

    def to_dict(self) -> dict[str, Any]:
        """What must be the same for a run to be the same, as JSON; a function cannot be compared."""
        return {**dataclasses.asdict(self), "optimizer": self.optimizer if isinstance(self.optimizer, str) else "own"}


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Of the learning rate, at step 0, 1, ..., steps - 1: a linear rise over the first `warmup` of them to 1, then half
    a cosine that would reach 0 at `steps` (Loshchilov and Hutter, 2017)."""
    rise = min(round(warmup * steps), steps - 1)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def mixed_precision(amp: bool | str, device: torch.device) -> torch.dtype | None:
    """The data type of automatic mixed precision: with "auto" on accelerators that have one, None for none."""
    if amp is False or (amp == "auto" and device.type not in ("cuda", "xpu")):
        return None
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


class Trainer:
    """A model in training. `model` and `optimizer` may be replaced by `prune`; `step` counts optimizer steps.
    `original`: the one that it is a copy of, which the loss may know. `penalty`: on the channels of `model`."""

    penalty: GroupPenalty | None = None

    def __init__(
        self, model: nn.Module, data: Any, objective: Objective, options: Training, original: nn.Module
    ) -> None:
        self.model = model
        self.options = options
        self.optimizer = options.make(model)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self._data = data
        self._objective = objective
        self._loss = objective.state(model, original)
        device = next(p.device for p in model.parameters())
        self._dtype = mixed_precision(options.amp, device)
        self._device = device.type
        self._resumed, self._told = "", False
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._dtype is torch.float16)
        self._closure = _wants_closure(self.optimizer)
        if self._closure and self._scaler.is_enabled():
            raise GraphPruneError(
                f"optimizer: {type(self.optimizer).__name__} asks for a closure, which the scaling of float16 losses "
                f"does not allow; pass amp=False"
            )
        self.steps = self._count_steps()

    def _count_steps(self) -> int:
        """Batches in an epoch; loaders that do not say are read once."""
        data = CalibrationData(self._data, ONE_INPUT, self.model)  # checks the form
        if isinstance(self._data, Tensor):
            return sum(1 for _ in data.silently())
        try:
            return len(self._data)
        except TypeError:
            seed_epoch(self.options.seed, 0, self._data)
            return sum(1 for _ in self._data)

    def epoch(self, number: int, tick: Callable[[], None]) -> tuple[float, float]:
        """Train epoch `number` (from 0); the mean loss and the last learning rate. Calls `tick` after every batch."""
        seed_epoch(self.options.seed, number, self._data)
        self.model.train()
        total, rate, seen = 0.0, 0.0, 0
        with self._objective.watching(self.model), torch.enable_grad():  # whatever the caller's mode
            for inputs, targets in CalibrationData(self._data, ONE_INPUT, self.model).silently():
                rate = self._set_rates(number * self.steps + min(seen, self.steps - 1))
                loss = self._step(inputs, targets)
                if not math.isfinite(loss):
                    raise GraphPruneError(
                        f"training: the loss is {loss} in batch {seen} of epoch {number + 1}; lower lr (now {rate:g}) "
                        f"or clip, or look for inputs that are not finite"
                    )
                total, seen = total + loss, seen + 1
                tick()
        return total / seen, rate

    def _set_rates(self, step: int) -> float:
        factor = rate_factor(step, self.options.epochs * self.steps, self.options.warmup)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        return float(self.rates[0] * factor)

    def _step(self, inputs: Any, targets: Any) -> float:
        if self._closure:
            losses: list[float] = []

            def closure() -> Tensor:
                loss = self._backward(inputs.clone(), targets)
                losses.append(float(loss.detach()))
                return loss if self.penalty is None else loss.detach() + self.penalty.penalty().detach()

            self._update(closure)
            loss_seen = losses[0] if losses else math.nan
        else:
            loss_seen = float(self._backward(inputs, targets).detach())
            self._update()
        if self.penalty is not None:
            self.penalty.step()
        return loss_seen

    def _backward(self, inputs: Any, targets: Any) -> Tensor:
        """The loss of a batch; its gradients, clipped, are where the optimizer looks for them."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._device, self._dtype, enabled=self._dtype is not None):
            loss = self._objective(self.model, inputs, targets)
        if not loss.requires_grad:
            raise GraphPruneError(
                "training: the loss does not depend on any parameter that wants gradients; look for torch.no_grad, "
                "detach or argmax in the model's forward and in loss_fn"
            )
        self._scaler.scale(loss).backward()
        if self.options.clip is not None:
            self._scaler.unscale_(self.optimizer)
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, self.options.clip)
        if self.penalty is not None:  # like weight decay, which is not clipped either
            self.penalty.add_gradients(self._scaler if self.options.clip is None else None)
        return loss

    def _update(self, *closure: Callable[[], Tensor]) -> None:
        """A step of the optimizer; the first one after `load` shows whether its state was whole."""
        try:
            self._scaler.step(self.optimizer, *closure)
        except GraphPruneError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            if not self._resumed:
                name = type(self.optimizer).__name__
                raise GraphPruneError(
                    f"optimizer: {name}.step failed ({what}); it is called without arguments, and with a closure that "
                    f"gives the loss where `step(self, closure)` asks for one"
                ) from error
            raise GraphPruneError(
                f"{self._resumed} is damaged: the optimizer cannot go on from its state there ({what}); delete it to "
                f"start again"
            ) from error
        self._scaler.update()
        self._resumed = ""

    def prune(self, small: nn.Module, plan: Plan | None) -> tuple[str, ...]:
        """Go on with `small`, made from the model by `plan`; see `carry_optimizer`. The model itself, masked: as is."""
        if small is self.model:
            return ()
        if plan is None:
            raise GraphPruneError("the method returned another model and no plan; the optimizer cannot follow it")
        restarted = carry_optimizer(self.optimizer, self.model, small, plan)
        self.model = small
        return restarted

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that the next epoch depends on: plain values, and tensors by name."""
        self._tell_what_is_not_stored()
        held, tensors_of_loss = self._loss.state()
        other = {**tensors_of_loss, **self._foreign()}
        plain, tensors = optimizer_state(self.optimizer, {**other, **own_tensors(self.model)})
        about = {"optimizer": plain, "scaler": self._scaler.state_dict(), "loss": held}
        return about, {**model_state(self.model), **other, **tensors, **self._penalty_state()}

    def _tell_what_is_not_stored(self) -> None:
        lost = self._loss.unstored()
        if lost and not self._told:
            self._told = True
            warnings.warn(
                f"checkpoint: the loss holds in {', '.join(lost[:3])} what cannot be stored; a run that is resumed "
                f"starts with what is there then. Keep numbers, tensors and containers of them, or objects that are "
                f"there from the beginning",
                GraphPruneWarning,
                stacklevel=2,
            )

    def load(self, about: Mapping[str, Any], tensors: Mapping[str, Tensor], what: str) -> None:
        """Go on from a `state`. The model must have its structure already."""
        known = ("model/", "best/", "optimizer/", "loss/", "other/", _PENALTY)
        unknown = [name for name in tensors if not name.startswith(known)]
        if unknown:
            raise GraphPruneError(f"{what} is damaged: nothing is called {unknown[0]!r}")
        foreign = self._foreign()
        check_others(foreign, tensors, what)
        check_fit(self.model, tensors, what)
        grown = {name.removeprefix(_PENALTY): t for name, t in tensors.items() if name.startswith(_PENALTY)}
        if self.penalty is not None:
            self.penalty.load_state_dict(grown)
        elif grown:
            raise GraphPruneError(f"{what} is of another run, with regularize")
        self._loss.load(tensors, about["loss"])
        load_model(self.model, tensors, what)
        try:
            with torch.no_grad():
                for name, tensor in foreign.items():
                    tensor.copy_(tensors[name])
            named = {**self._loss.tensors(), **foreign, **own_tensors(self.model)}
            load_optimizer(self.optimizer, named, about["optimizer"], tensors)
            if about["scaler"]:
                self._scaler.load_state_dict(about["scaler"])
        except GraphPruneError as error:
            raise GraphPruneError(f"{what} is damaged: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise GraphPruneError(f"{what} is damaged: {type(error).__name__}: {error}") from error
        self._resumed = what

    def _penalty_state(self) -> dict[str, Tensor]:
        state = {} if self.penalty is None else self.penalty.state_dict()
        return {f"{_PENALTY}{name}": tensor for name, tensor in state.items()}

    def _foreign(self) -> dict[str, Tensor]:
        """What the optimizer trains beside the model and what the loss is known to hold, by its place there."""
        own = {id(t) for t in (*own_tensors(self.model).values(), *self._loss.tensors().values())}
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        return {f"other/{i}": p for i, p in enumerate(trained) if id(p) not in own}


def _wants_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step must be given a function that computes the loss anew, as LBFGS does."""
    # torch wraps `step` of every class that has been made once, and keeps its signature
    parameter = inspect.signature(optimizer.step).parameters.get("closure")
    return parameter is not None and parameter.default is inspect.Parameter.empty
