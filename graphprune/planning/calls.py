"""plan() and prune(): the stages in order. request -> trace -> dependency graph -> importance -> allocation -> plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import GraphPruneError
from ..plans.plan import Plan
from ..plans.verification import verify as run_verification
from ..recovery import BlockFit, auto_possible, check_method
from ..recovery import recover as recover_accuracy
from ..runtimes.latency import Target
from ..support.doors import door
from ..support.progress import ProgressOption, reported, stage
from ..support.types import Ignore, LossFunction
from ..tracing.pause import paused_collector
from .allocation import Budget, RoundTo
from .request import Criterionlike, Request, options_in
from .shortfall import shortfall, tell


@door("model", exact=True)
@reported("planning")
def plan(
    model: nn.Module,
    example_input: Any,
    ratio: float | Mapping[str, float] | None = None,
    *,
    ignore: Ignore = (),
    scope: str = "local",
    criterion: Criterionlike | None = None,
    round_to: RoundTo = "auto",
    min_channels: int = 1,
    granularity: str | Sequence[str] = "auto",
    fold_bn: bool = True,
    seed: int = 0,
    output: str = "module",
    budget: Budget | None = None,
    max_ratio: float = 1.0,
    data: Any = None,
    loss_fn: LossFunction | None = None,
    target: Target | None = None,
    layer_criterion: Any = None,
    strict: bool = False,
    sizes: Mapping[str, str] | None = None,
    progress: ProgressOption = None,
) -> Plan:
    """Decide what to remove from `model`, without changing it.

    - `ratio`: fraction of each group's channels to remove, in [0, 1). A number, or a dict from module names,
      parameter names or patterns (`"layer3.*"`) to numbers; what names the innermost module counts, of several a name
      before a pattern, then the longest, and what none matches stays. Default 0.5, unless there is a budget.
    - `budget`: instead of a ratio, a `graphprune.Budget` for the whole network, such as `Budget(macs=0.5)`; the widths
      of the groups are chosen so that the least importance is lost for it.
      `Budget(latency=0.5)` is about the time of a call on the `target`; see below.
    - `max_ratio`: the largest fraction that any group may lose, in (0, 1]. Default 1: all units but one.
    - `ignore`: modules, parameters, names of them or patterns, whose outputs stay, with all that lies in them. The
      network's inputs and outputs always stay. What is inside for this call may be an interface for others: where parts
      are called on their own, as encode and decode of an autoencoder are, the latent between them is to be held with
      `ignore`, by the name of the layer that makes it (`doctor` lists such methods).
    - `scope`: "local" ranks inside each group, "global" across all groups, "isomorphic" across groups of the same
      structure (Fang et al., ECCV 2024).
    - `criterion`: "flow" (default), "l1", "l2", "bn_scale", "fpgm", "lamp", "random"; with `data` "reconstruction",
      "activation_mean", "activation_variance", "apoz", "wanda", "hrank", "chip"; with `data` that have targets
      "taylor", "taylor_gate", "fisher", "hessian"; any function registered with `graphprune.criterion`, a callable, or
      an importance object of the torch_pruning library.
    - `round_to`: which widths are kept. "auto" (default): those that were at least as fast as the next larger ones in
      every runtime measured (docs/widths.md): multiples of 16 from 32 on, of 8 from 16, of 4 from 4; any number of
      whole heads. A group gets the width above or below what the ratio leaves it, the least important channels first,
      so that the mean fraction that goes (of groups weighted by their multiply-accumulates) is the one asked for, as
      nearly as can be; equal layers of transformers stay equal. `plan.asked` and `plan.gone` say both fractions. Where
      they are more than 0.02 apart, or a budget is missed by more than 1 %, as happens in small networks, widths are
      finer. A number: multiples of that many channels, each group rounded to nearest by itself, narrower ones whole;
      1: every width. `min_channels`: keep at least this many.
    - `granularity`: what goes. Any of "heads", "head features" (those of queries and keys, and those of values;
      equally many where both are free), "qk features", "v features" (one of the two without the other), "mlp" (hidden
      widths between linear layers), "embedding" (widths of residual streams and embeddings), "channels" (every width
      but heads and their features), "filters" (channels that convolutions make), "neurons" (rows of linear layers).
      Nothing else is touched: where sizes in the code tie it to something else, it stays and the plan says so.
      Default "auto": every width, whole heads where the ratio takes at least one, else head features. "layer":
      `ratio` of the layers that can be left out as a whole go (residual blocks, transformer layers, convolutions that
      keep their shape), ranked by `criterion` "block_influence" (default), "taylor", "loss", "magnitude" (mean `|w|`,
      no data), "output" (change of the outputs), "latency" (milliseconds gained in ONNX Runtime), or a function that
      says what a network costs; of the other options `ignore`, `budget`, `max_ratio`, `data` and `loss_fn` apply.
      "branch": the same for residual branches inside layers, attention or MLP alone (default "output"). "experts":
      `ratio` of the experts of every mixture, those that its router gives the least weight on `data` (else on the
      example input); `ignore`, `max_ratio`.
      A list of "layer" or "branch" and widths, such as ["layer", "auto"] or ["layer", "channels"], takes a `budget` and
      decides how many layers go and how wide the others stay: of the ways within the budget that one is taken whose
      outputs are nearest to the model's, on 256 samples of `data` after a repair by least squares, else on the example
      input. `criterion` ranks channels, `layer_criterion` layers. Names in the plan are those of the whole model.
    - `layer_criterion`: how layers are ranked where `granularity` lists "layer" or "branch" and widths too; names and
      defaults as in "layer" above.
    - `fold_bn`: merge batch norms into the layers before them (default). With False they stay for later training;
      what goes is the same.
    - `seed`: for the criterion "random".
    - `data`: calibration batches for criteria that need them, as `finetune` takes them: a DataLoader or a list that
      yields inputs, or (inputs, targets) for those that need a loss. Inputs are a tensor, a tuple of positional
      arguments, or a dict of keyword arguments. `loss_fn(output, targets)`: that loss, a scalar; default cross-entropy
      of logits and class numbers, or, for dicts with the labels that the model takes, the loss that it returns itself
      (`output.loss`). For dicts a `loss_fn` gets the dict as targets. Criteria without a loss look at no labels. Where
      there are no data, `graphprune.Synthetic(n=512)`: inputs made from the model itself (see `graphprune.synthesize`).
    - `output`: what happens where a size written in the user's code blocks. "module" (default): those channels stay,
      and the plan names the line. "hybrid": the smallest module whose own code blocks is replaced by a
      `torch.fx.GraphModule` of its recorded calls, sizes rewritten; everything else keeps its class. "graph": the whole
      network becomes one graph. Both keep parameter names, train, and take the batch sizes, resolutions and lengths
      that the code took; where the code would have done something else than recorded, they raise GraphPruneError.

    - `target`: where latency budgets hold, a `graphprune.Target` (default: ONNX Runtime here, CUDA if it loads, one
      thread). Times are looked up in a table measured there, the widths are those that this machine likes, and the plan
      is exported, measured against the dense network and corrected a few times; `plan.latency` says what came of it.
      Needs real weights and a model that exports. With a ratio or another budget, widths are rounded to the steps that
      were found on the target (see `round_to`), since others may be no faster than the next larger step.

    With `round_to=1` numbers are rounded to nearest (0.34 of 10 removes 3); ties between equal scores keep the lower
    index.

    - `strict`: whether it is an error, instead of a GraphPruneWarning, where a ratio above 0 removes nothing at all, or
      nothing of a name in the dict, or a latency is missed by more than 1 %. Either names the option, or the most
      frequent reasons in the code, or what was measured.

    - `sizes`: what becomes of numbers that modules keep and this call does not read (`num_features`, for a method that
      puts a new head on): {name or pattern: "follow" or "hold"}. Without it those follow with which the code of their
      class makes a layer whose width changes; a number that is only equal stays, and `plan.unsettled` lists those of
      which the code does not tell. "follow": as the layers in its module that are as wide; "hold": it stays.

    - `progress`: who is told how far this is. None (default): a line on standard error where that is a terminal, once
      it has taken two seconds; inside another call, whoever listens to that. True: the same, also inside a call that
      was told False. False: nobody. A function: it is called with a `graphprune.Progress` at every step, as in
      `progress=print`; what it raises ends the call and comes out as it is, and the model is as it was.

    Warns of parameters that the model sets itself from the first data it sees, where it has seen none yet (`prune`
    refuses such a model).

    Raises GraphPruneError for arguments out of range, unknown names, weights that are NaN, and models that fail on the
    example input. A model with nothing to prune gives a plan that removes nothing and says why, axis by axis.
    """
    request = Request(**options_in(locals()))
    decision = request.decide(model, example_input)
    tell(decision.unready, strict)
    tell(shortfall(decision), strict)
    return decision.plan


@door("model", exact=True)
@reported("pruning")
def prune(
    model: nn.Module,
    example_input: Any,
    ratio: float | Mapping[str, float] | None = None,
    *,
    verify: bool = True,
    ignore: Ignore = (),
    scope: str = "local",
    criterion: Criterionlike | None = None,
    round_to: RoundTo = "auto",
    min_channels: int = 1,
    granularity: str | Sequence[str] = "auto",
    fold_bn: bool = True,
    seed: int = 0,
    output: str = "module",
    budget: Budget | None = None,
    max_ratio: float = 1.0,
    data: Any = None,
    loss_fn: LossFunction | None = None,
    recover: str | BlockFit | None = "auto",
    target: Target | None = None,
    layer_criterion: Any = None,
    strict: bool = False,
    sizes: Mapping[str, str] | None = None,
    progress: ProgressOption = None,
) -> nn.Module:
    """A physically smaller copy of `model`; the model itself is not touched.

    The same as `plan(...).apply(model)`, followed by `verify` unless `verify=False`, and by `recover`. All other
    arguments are those of `plan`. Verification costs four forward passes and two copies of the model; it raises
    GraphPruneError if the pruned network is not what the plan says. Of a model in a wrapper (`torch.compile`,
    DataParallel, DistributedDataParallel) the result is the module inside, to be wrapped anew.

    `recover`: how what was lost is repaired after verification, without labels or training. "auto" (default): with
    `data` by least squares, no layer given a new bias; without, behind batch norms, by the means and variances that
    they store (docs/one-line.md says what that gives back); elsewhere not at all. "mean", "moments", "batchnorm",
    "least_squares" or "blocks" (minutes; the most without labels), or a `BlockFit`: that method, see
    `graphprune.recover`. None: not at all; the network is what
    `plan(...).apply(model)` makes.

    `progress`: as in `plan`, of the verification and the repair too.

    >>> import torch, graphprune
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
    >>> small = graphprune.prune(net, torch.randn(1, 3, 8, 8), 0.5)
    >>> small[0].weight.shape, small[2].weight.shape
    (torch.Size([4, 3, 3, 3]), torch.Size([4, 4, 3, 3]))
    """
    request = Request(**options_in(locals()))
    check_recover(request, recover)
    with paused_collector():
        with stage("planning"):
            decision = request.decide(model, example_input)
        tell(decision.unready, strict=True)
        tell(shortfall(decision), strict)
        graph, decided = decision.graph, decision.plan
        with stage("cutting"):
            small = decided.apply(model)
    if verify:
        with stage("verifying"):
            report = run_verification(model, small, decided, example_input, graph=graph)
        report.raise_on_failure()
    return repaired(model, decided, small, example_input, data, recover)


def check_recover(request: Request, method: str | BlockFit | None) -> None:
    """Raise GraphPruneError for a method of repair that is none, or that needs what the request does not have."""
    check_method(method, request.data)
    if not request.strategy.loses_inputs and method not in (None, "auto", "batchnorm"):
        raise GraphPruneError(f"recover={method!r} repairs layers that lost inputs; here none has")


def repaired(
    model: nn.Module, decided: Plan, small: nn.Module, example: Any, data: Any, method: str | BlockFit | None
) -> nn.Module:
    """`small`, or where there is a method and something to go by, the repaired network that it makes of the plan."""
    if method is None or (method == "auto" and not auto_possible(model, decided, data)):
        return small
    # what nobody asked for adds no names to the state dict of a class that has no biases
    new_bias = None if method != "auto" or data is None else False
    return recover_accuracy(model, decided, example, data, method, new_bias=new_bias).model
