"""Does an exported file compute what the model computes?"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraphPruneError
from ..support.types import PathLike
from .arguments import FlatArguments, named_outputs
from .capture import inference_state, run_model
from .providers import resolve_provider
from .sessions import open_session, run_once

_TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
_FLOAT32_TOLERANCE = 1e-4


def default_tolerance(tensors: Sequence[Tensor]) -> float:
    """1e-4 for float32 and wider, 1e-2 where a tensor is float16, 5e-2 where one is bfloat16."""
    return max([_FLOAT32_TOLERANCE, *(_TOLERANCES.get(t.dtype, 0.0) for t in tensors)])


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 and no bfloat16 inside float32 matrix products: their error is larger than what parity allows.

    Settings are as before afterwards. Does nothing in versions of torch before 2.9, which have no such settings per
    operator.
    """
    operators = (("cuda", "matmul"), ("cudnn", "conv"), ("cudnn", "rnn"), ("mkldnn", "matmul"), ("mkldnn", "conv"))
    found = [getattr(getattr(torch.backends, backend), operator, None) for backend, operator in operators]
    places: list[Any] = [place for place in found if hasattr(place, "fp32_precision")]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max|actual - expected| / max|expected|, over the whole tensor; 0 where both are empty.

    Where `expected` is zero throughout, the absolute error. Infinite if shapes differ, integers or booleans are not
    all equal, or NaN and infinities are not in the same places.
    """
    if actual.shape != expected.shape:
        return math.inf
    a, b = actual.detach().cpu(), expected.detach().cpu()
    if not (a.is_floating_point() and b.is_floating_point()):
        return 0.0 if a.dtype == b.dtype and torch.equal(a, b) else math.inf
    a, b = a.double(), b.double()
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite) or not torch.equal(
        torch.nan_to_num(a[~finite]), torch.nan_to_num(b[~finite])
    ):
        return math.inf
    a, b = a[finite], b[finite]
    if not b.numel():
        return 0.0
    scale = float(b.abs().max())
    return float((a - b).abs().max()) / (scale if scale > 0 else 1.0)


def check_parity(
    path: PathLike,
    model: nn.Module,
    calls: Sequence[tuple[str, FlatArguments]],
    *,
    tolerance: float,
    provider: str = "cpu",
) -> tuple[float, list[str]]:
    """Run the file in ONNX Runtime and `model` in torch on the same input, for each of (sizes in words, call).

    Floating-point outputs may differ by `tolerance` (see `relative_error`), integer outputs not at all.

    Returns the largest relative error, and notes on outputs that prove nothing because they are zero throughout.

    Raises:
        GraphPruneError: ONNX Runtime cannot load or run the file, or an output differs.
    """
    chosen = resolve_provider(provider)
    session = open_session(path, chosen, threads=max(1, torch.get_num_threads()))
    worst = 0.0
    alive: dict[str, bool] = {}
    for number, (where, call) in enumerate(calls):
        with inference_state(model), exact_float32():
            names, expected = named_outputs(run_model(model, call, where))
        actual = run_once(session, call, chosen)
        if len(actual) != len(expected):
            raise GraphPruneError(f"the exported file has {len(actual)} outputs, the model {len(expected)}")
        for name, got, wanted in zip(names, actual, expected, strict=True):
            error = relative_error(got, wanted)
            if not error <= tolerance:
                what = _mismatch(name, got, wanted, error, tolerance, where)
                cause = _likely_cause(model, call, tolerance, resized=number > 0)
                raise GraphPruneError(f"no file was written: {what}. {cause}")
            worst = max(worst, error)
            informative = not wanted.is_floating_point() or not wanted.numel() or bool(torch.any(wanted != 0))
            alive[name] = alive.get(name, False) or informative
    notes = [f"output {name!r} is zero throughout, so its parity proves nothing" for name in alive if not alive[name]]
    return worst, notes


def _mismatch(name: str, got: Tensor, wanted: Tensor, error: float, tolerance: float, where: str) -> str:
    if got.shape != wanted.shape:
        return f"output {name!r} has shape {tuple(got.shape)} in ONNX Runtime and {tuple(wanted.shape)} in torch{where}"
    if not wanted.is_floating_point():
        return f"output {name!r} is not equal in ONNX Runtime and torch{where} ({wanted.dtype}, compared exactly)"
    return (
        f"output {name!r} differs between ONNX Runtime and torch{where}: relative error {error:.3g}, "
        f"allowed {tolerance:.3g}"
    )


def _likely_cause(model: nn.Module, call: FlatArguments, tolerance: float, *, resized: bool) -> str:
    """Why parity may have failed, found out by running the model twice more."""
    with inference_state(model), exact_float32():
        first, second = (named_outputs(run_model(model, call))[1] for _ in range(2))
    if any(not relative_error(a, b) <= tolerance for a, b in zip(first, second, strict=True)):
        return "Two runs of the model itself differ by more than that: remove what is random in its forward"
    if resized:
        return "If it is right at the example's own sizes (dynamic_batch=False), the model's code depends on the size"
    return "Raise the tolerance only if you know why; check=False writes the file as it is"
