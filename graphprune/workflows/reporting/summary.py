"""`report`: what pruning has done to a network, in one object: sizes, sparsity, work, latency, accuracy."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from ...deployment import benchmark
from ...errors import GraphPruneError
from ...plans.history import histories
from ...recovery.training.evaluation import evaluator, metric_name
from ...runtimes import BenchmarkReport
from ...sparsity.files import save as save_sparse
from ...sparsity.overview import SparsityReport
from ...sparsity.overview import report as sparsity_of
from ...support.doors import door
from ...support.files import check_target, replacing
from ...support.progress import ProgressOption, reported, stage
from ...support.registry import Registry
from ...support.suggestions import check_choice
from ...support.tables import Column, render, table
from ...support.types import PathLike
from ...support.unwrapping import checked_model
from ...support.walking import all_modules, named_tensors
from ...tracing.counting import Count, LayerCount, at_batch_size, count
from ..curves import Sensitivity

STAGES = ("before", "after pruning", "after recovery")


@dataclasses.dataclass(frozen=True)
class Size:
    """One network. `parameters`, and how many of them are not zero; `bytes` of all parameters and buffers as they are,
    and `sparse_bytes`: size of the file that `graphprune.sparsity.save` writes; `macs` of one call, the whole batch of
    the example; `sparsity`: fraction of all parameters that is zero."""

    parameters: int
    nonzero: int
    bytes: int
    sparse_bytes: int
    macs: int
    sparsity: float


@dataclasses.dataclass(frozen=True)
class Layer:
    """A module that holds parameters or multiplies, without the modules in it, by module path; the columns add up to
    the totals. Widths are output channels or features, None for norms and the like and where the layer is in one of
    the networks only; MACs are of one call; `sparsity`: fraction of its weights that is zero in the pruned network."""

    name: str
    kind: str
    width_before: int | None
    width_after: int | None
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    sparsity: float


@dataclasses.dataclass(frozen=True)
class Point:
    """A network on the curve of accuracy against cost."""

    name: str
    score: float
    macs: int
    parameters: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What `report` found. `scores`: stage ("before", "after pruning", "after recovery") -> `metric`. `sensitivity`:
    group -> {ratio: score or error}. Speed is in `benchmark`, where the networks are "before" and "after".
    `batch_size`: length of the first axis of the example's first tensor, None without one."""

    title: str
    before: Size
    after: Size
    layers: tuple[Layer, ...]
    metric: str
    scores: Mapping[str, float]
    points: tuple[Point, ...] = ()
    sensitivity: Mapping[str, Mapping[float, float]] = dataclasses.field(default_factory=dict)
    benchmark: BenchmarkReport | None = None
    notes: tuple[str, ...] = ()
    batch_size: int | None = None

    @property
    def compression(self) -> float:
        """Parameters before / after; zeros count as parameters."""
        return self.before.parameters / max(1, self.after.parameters)

    @property
    def nonzero_compression(self) -> float:
        """Parameters before / parameters that are not zero after."""
        return self.before.parameters / max(1, self.after.nonzero)

    @property
    def byte_compression(self) -> float:
        """Bytes before / bytes of the smaller form after: as it is, or the sparse file."""
        return self.before.bytes / max(1, min(self.after.bytes, self.after.sparse_bytes))

    @property
    def mac_reduction(self) -> float:
        """MACs before / after."""
        return self.before.macs / max(1, self.after.macs)

    @property
    def speedup(self) -> float | None:
        """Measured median latency before / after at the first batch size; None where it was not measured."""
        return None if self.benchmark is None else self.benchmark.row("after").speedup

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data |= {name: dataclasses.asdict(getattr(self, name)) for name in ("before", "after")}
        data |= {name: [dataclasses.asdict(item) for item in getattr(self, name)] for name in ("layers", "points")}
        ratios = "compression", "nonzero_compression", "byte_compression", "mac_reduction", "speedup"
        data |= {name: getattr(self, name) for name in ratios}
        data["sensitivity"] = {group: {str(r): v for r, v in c.items()} for group, c in self.sensitivity.items()}
        data["benchmark"] = None if self.benchmark is None else self.benchmark.to_dict()
        return {**data, "scores": dict(self.scores), "notes": list(self.notes)}

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The summary: what, before, after, ratio; formatted."""
        b, a = self.before, self.after
        out = [
            ("parameters", f"{b.parameters:,}", f"{a.parameters:,}", f"{self.compression:.2f}x fewer"),
            ("not zero", f"{b.nonzero:,}", f"{a.nonzero:,}", f"{self.nonzero_compression:.2f}x fewer"),
            ("bytes", f"{b.bytes:,}", f"{a.bytes:,}", f"{b.bytes / max(1, a.bytes):.2f}x fewer"),
            ("bytes, sparse file", "-", f"{a.sparse_bytes:,}", f"{b.bytes / max(1, a.sparse_bytes):.2f}x fewer"),
            ("sparsity", f"{b.sparsity:.1%}", f"{a.sparsity:.1%}", "-"),
            (f"MACs of one {self._call}", f"{b.macs:,}", f"{a.macs:,}", f"{self.mac_reduction:.2f}x fewer"),
        ]
        if self.batch_size:
            each = [f"{size.macs / self.batch_size:,.0f}" for size in (b, a)]
            out.append(("MACs per sample", each[0], each[1], f"{self.mac_reduction:.2f}x fewer"))
        if self.benchmark is not None:
            sizes = dict.fromkeys(row.batch_size for row in self.benchmark.rows)
            for size in sizes:
                old, new = (self.benchmark.row(name, size) for name in ("before", "after"))
                faster = f"{new.speedup:.2f}x faster [{new.speedup_low:.2f}, {new.speedup_high:.2f}]"
                at = "" if size is None else f", batch {size}"
                out.append((f"median ms{at}", f"{old.median_ms:.3f}", f"{new.median_ms:.3f}", faster))
        return out + self._score_rows()

    @property
    def _call(self) -> str:
        return f"call{at_batch_size(self.batch_size)}"

    @property
    def layers_title(self) -> str:
        """What stands above the layers."""
        return f"Layers (MACs of one {self._call})"

    def _score_rows(self) -> list[tuple[str, str, str, str]]:
        first = self.scores.get("before")
        known = "-" if first is None else f"{first:.4f}"
        out = []
        for name, score in self.scores.items():
            if name != "before":
                change = "-" if first is None else f"{score - first:+.4f}"
                out.append((f"{self.metric}, {name}", known, f"{score:.4f}", change))
        return out or ([(self.metric, known, "-", "-")] if first is not None else [])

    def tables(self) -> tuple[Table, Table]:
        """The summary and the layers, as `rich` tables."""
        whole = table(
            self.rows(), [Column(h, i, justify="right" if i else "left") for i, h in enumerate(HEADINGS)],
            title=self.title,
        )  # fmt: skip
        return whole, table(self.layers, LAYER_COLUMNS, title=self.layers_title)

    def __str__(self) -> str:
        return render(*self.tables(), *(f"note: {note}" for note in self.notes))

    def save(self, path: PathLike) -> Path:
        """Write the report; the ending of the path chooses: .json (everything), .csv (layers), .md, .txt, or .html, one
        page with plots that needs no other file (and matplotlib to be made).

        Raises GraphPruneError for other endings and where the path cannot be written; an old file then stays.
        """
        target = check_target(path)
        make = FORMS.get(target.suffix.lower())
        if make is None:
            raise GraphPruneError(f"cannot write {target}: its name must end in one of {FORMS.listed()}")
        text = make(self)
        with replacing(target) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
        return target


FORMS: Registry[Callable[[Report], str]] = Registry("form of a report")
"""Endings of file names and what makes the text for them; `documents` registers what it can make."""
form = FORMS.register

HEADINGS = ("", "before", "after", "change")
LAYER_COLUMNS = [
    Column("layer", "name", justify="left"),
    Column("kind", "kind", justify="left"),
    Column("width before", "width_before"),
    Column("after", "width_after"),
    Column("parameters before", "parameters_before", ","),
    Column("after", "parameters_after", ","),
    Column("MACs before", "macs_before", ","),
    Column("after", "macs_after", ","),
    Column("sparsity", "sparsity", ".1%"),
]


@door("model", "pruned", "unrecovered")
@reported("report")
def report(
    model: nn.Module,
    pruned: nn.Module,
    example_input: Any,
    *,
    scores: Mapping[str, float] | None = None,
    evaluate: Any = None,
    unrecovered: nn.Module | None = None,
    metric: str | None = None,
    speed: BenchmarkReport | Mapping[str, Any] | bool = False,
    curve: Iterable[Point] | Mapping[str, tuple[nn.Module, float]] = (),
    sensitivity: Sensitivity | Mapping[str, Mapping[float, float]] | None = None,
    title: str | None = None,
    notes: Sequence[str] = (),
    progress: ProgressOption = None,
) -> Report:
    """Compare `pruned` with the `model` it was made from. Both stay as they are.

    Parameters, bytes, MACs (of one call on the example, and per sample), widths and sparsity are counted in both
    networks, masks and zeros included; `sparse_bytes` is the size of a file that is really written, to a temporary
    place. Zeros that a folded batch norm leaves, because it scales by zero, are explained by a note.

    - `scores`: of stages "before", "after pruning", "after recovery", where you have them. `evaluate`: a function
      (model) -> number, or data for top-1 accuracy: it is asked for the stages that `scores` lacks, with `model`
      before, `unrecovered` after pruning, and `pruned` after recovery (after pruning, where no `unrecovered` is
      given). `metric`: what the number is called.
    - `speed`: True to measure both in ONNX Runtime, or options of `graphprune.benchmark` for that; or a BenchmarkReport
      whose models are called "before" and "after". Default: not measured.
    - `curve`: further networks for the plot of accuracy against cost: `Point` objects, or names -> (network, score).
    - `sensitivity`: what `graphprune.sensitivity` returned, or group -> {ratio: score or error}, for a plot.
    - `progress`: as in `graphprune.plan`.

    Raises GraphPruneError for unknown stages, scores that are not finite, and models that fail on the example.
    """
    found = _all_scores(model, pruned, unrecovered, scores, evaluate)
    with stage("counting"):
        counts = count(model, example_input), count(pruned, example_input)
        zeros = sparsity_of(model), sparsity_of(pruned)
    measured = _measured(model, pruned, example_input, speed)
    with stage("writing sparse files"):
        before, after = (_size(net, c, z) for net, c, z in zip((model, pruned), counts, zeros, strict=True))
    layers = _layers(model, pruned, *counts, zeros[1])
    last = next((s for s in reversed(STAGES) if s in found and s != "before"), None)
    points = [Point("before", found["before"], before.macs, before.parameters)] if "before" in found else []
    points += [Point("after", found[last], after.macs, after.parameters)] if last else []
    return Report(
        title=title or f"{type(model).__name__}, pruned",
        before=before,
        after=after,
        layers=layers,
        metric=metric or ("score" if evaluate is None else metric_name(evaluate)),
        scores=found,
        points=(*points, *_curve(curve, example_input)),
        sensitivity=_checked(sensitivity or {}),
        benchmark=measured,
        notes=(*map(str, notes), *_folded_zeros(model, pruned, layers)),
        batch_size=counts[0].batch_size,
    )


def _all_scores(
    model: nn.Module, pruned: nn.Module, unrecovered: nn.Module | None, given: Mapping[str, float] | None, evaluate: Any
) -> dict[str, float]:
    known = dict(given or {})
    for name, value in known.items():
        check_choice("scores", name, STAGES)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise GraphPruneError(f"scores: {name!r} must be a finite number, got {value!r}")
    ask = evaluator(evaluate)
    if ask is not None:
        last = "after pruning" if unrecovered is None and "after pruning" not in known else "after recovery"
        networks = {"before": model, **({} if unrecovered is None else {"after pruning": unrecovered}), last: pruned}
        for name, network in networks.items():
            if name not in known:
                with stage(f"scoring, {name}"):
                    known[name] = ask(network)
    return {name: float(known[name]) for name in STAGES if name in known}


def _measured(model: nn.Module, pruned: nn.Module, example_input: Any, speed: Any) -> BenchmarkReport | None:
    if isinstance(speed, BenchmarkReport):
        names = {row.model for row in speed.rows}
        if names != {"before", "after"} or speed.baseline != "before":
            raise GraphPruneError(
                f"speed: expected a benchmark of models called 'before' (the baseline) and 'after', it has "
                f"{sorted(names)}"
            )
        return speed
    if speed is False or speed is None:
        return None
    if speed is not True and not isinstance(speed, Mapping):
        raise GraphPruneError(f"speed: expected True, options of benchmark, or a BenchmarkReport, got {speed!r}")
    options = {} if speed is True else dict(speed)
    return benchmark({"before": model, "after": pruned}, example_input, **options)


def _size(model: nn.Module, counted: Count, zeros: SparsityReport) -> Size:
    tensors = {id(t): t for t in named_tensors(model).values()}.values()
    masks = {id(t) for n, t in named_tensors(model).items() if ".parametrizations." in f".{n}" and n.endswith(".mask")}
    stored = sum(t.numel() * t.element_size() for t in tensors if id(t) not in masks)
    sparse = stored
    if not any(t.is_meta for t in tensors):
        with tempfile.TemporaryDirectory(prefix="graphprune.") as folder:
            plain = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
            whole = len(plain) == len(model.state_dict())
            sparse = save_sparse(model if whole else plain, Path(folder) / "model.gps").stat().st_size
    share = zeros.zeros / counted.parameters if counted.parameters else 0.0
    return Size(counted.parameters, counted.parameters - zeros.zeros, stored, sparse, counted.macs, share)


def _width(module: nn.Module | None) -> int | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return None
    if isinstance(module, _ConvTransposeNd):
        return int(weight.shape[1]) * module.groups
    return int(weight.shape[0])


def _layers(
    model: nn.Module, pruned: nn.Module, before: Count, after: Count, zeros: SparsityReport
) -> tuple[Layer, ...]:
    old, new = all_modules(model), all_modules(pruned)
    first, second = _by_owner(before), _by_owner(after)
    sparse: dict[str, list[int]] = {}  # module path -> zeros and weights
    for tensor in zeros.layers:
        if tensor.weight:
            part = sparse.setdefault(tensor.name.rpartition(".")[0], [0, 0])
            part[0] += tensor.zeros
            part[1] += tensor.size
    out = []
    for path in {**first, **second}:
        widths = _width(old.get(path)), _width(new.get(path))
        a, b = first.get(path), second.get(path)
        none, size = sparse.get(path, (0, 0))
        left = new.get(path, old.get(path))
        kind = type(old[path] if type(left) is nn.Identity and path in old else left).__name__
        out.append(
            Layer(
                path or "(the model itself)", kind.removeprefix("Parametrized"), *widths,
                a.parameters if a else 0, b.parameters if b else 0, a.macs if a else 0, b.macs if b else 0,
                none / size if size else 0.0,
            )
        )  # fmt: skip
    return tuple(out)


def _folded_zeros(model: nn.Module, pruned: nn.Module, layers: Iterable[Layer]) -> list[str]:
    """Why layers are zero that nothing made sparse: a folded batch norm scales by zero (often from the start)."""
    old, sparse = all_modules(model), {layer.name: layer.sparsity for layer in layers if layer.sparsity}
    notes = []
    for path, history in histories(pruned).items():
        prefix = f"{path}." if path else ""
        for fold in (fold for plan in history.plans for fold in plan.folds):
            share, scale = sparse.get(prefix + fold.layer), getattr(old.get(prefix + fold.batch_norm), "weight", None)
            if share and isinstance(scale, Tensor) and not scale.is_meta and bool((scale == 0).any()):
                notes.append(
                    f"{share:.1%} of the weights of {prefix}{fold.layer} are zero because the batch norm "
                    f"{prefix}{fold.batch_norm}, folded into it, multiplies {'its' if share == 1 else 'some of its'} "
                    f"channels by 0"
                )
    return notes


def _by_owner(counted: Count) -> dict[str, LayerCount]:
    """Per layer, with the parameters under a mask or another parametrisation where they belong."""
    out: dict[str, LayerCount] = {}
    for path, part in counted.per_layer.items():
        owner = f".{path}".partition(".parametrizations.")[0].removeprefix(".")
        known = out.get(owner, LayerCount(part.kind, 0, 0))
        out[owner] = LayerCount(known.kind, known.parameters + part.parameters, known.macs + part.macs)
    return out


def _curve(curve: Any, example_input: Any) -> list[Point]:
    if not isinstance(curve, Mapping):
        points = list(curve)
        if not all(isinstance(point, Point) for point in points):
            raise GraphPruneError("curve: expected Points, or a dict from names to (network, score)")
        return points
    out = []
    for name, (network, score) in curve.items():
        counted = count(checked_model(network, f"curve[{name!r}]"), example_input)
        out.append(Point(str(name), float(score), counted.macs, counted.parameters))
    return out


def _checked(sensitivity: Sensitivity | Mapping[str, Mapping[float, float]]) -> dict[str, dict[float, float]]:
    if isinstance(sensitivity, Sensitivity):
        sensitivity = {
            curve.name: {gone / curve.size: error for gone, error in zip(curve.removed, curve.errors, strict=True)}
            for curve in sensitivity.curves
        }
    out = {str(g): {float(r): float(v) for r, v in sorted(c.items())} for g, c in sensitivity.items()}
    for group, found in out.items():
        if not found or not all(math.isfinite(n) for pair in found.items() for n in pair):
            raise GraphPruneError(f"sensitivity: {group} needs finite numbers, {{ratio: value}}")
    return out
