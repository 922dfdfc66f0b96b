"""Results of the coverage sweep as text: lines of progress, counts, and the page in docs/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tools._common import markdown_table

# Torch-Pruning's result counts as right up to this relative error against its own cuts set to zero: more than what is
# left of rounding in double precision, less than what a wrong cut leaves where random attention is nearly uniform.
RIGHT = 1e-6
# A pruned network whose output is this close to the dense one's: nothing that matters was cut, nothing was proven.
VACUOUS = 1e-3

Result = Mapping[str, Any]
Results = Mapping[tuple[str, str], Result]


def share(result: Result) -> float:
    """Removed parameters / all parameters."""
    removed = result["removed"] if "removed" in result else result["parameters"] - result["left"]
    return float(removed / result["parameters"])


def fault(result: Result | None) -> str | None:
    """What is wrong with a result of ours, None if nothing is."""
    if result is None:
        return "not run"
    if "failure" in result:
        return f"{result.get('stage', '')}: {'RAW ' if result.get('raw') else ''}{result['failure']}"
    failed = [f"{name}: error {error}, {detail}" for name, passed, error, detail in result["checks"] if not passed]
    if failed:
        return "not proven: " + "; ".join(failed)
    if not result["removed"]:
        return f"nothing is removed: {result['reason']}"
    if result["effect"] < VACUOUS:
        return f"the cut changes the output by {result['effect']:.1e} only, so the proof says little"
    if result["backward"]:
        return f"backward: {result['backward']}"
    if result.get("training"):
        return f"in training mode: {result['training']}"
    return None


def peer_fault(result: Result) -> str | None:
    """What is wrong with a result of Torch-Pruning, None if it is right."""
    if "failure" in result:
        return f"fails ({result.get('stage', 'pruning')}): {result['failure']}"
    if result["left"] >= result["parameters"]:
        return "removes nothing"
    if "unchecked" in result:
        return f"runs, not checked: {result['unchecked']}"
    return None if result["error"] <= RIGHT else f"wrong: differs from its own cuts by {result['error']:.1e}"


def one_line(result: Result) -> str:
    """A result for the log."""
    bad = fault(result) if result["tool"] == "ours" else peer_fault(result)
    parts = []
    if "left" in result:
        parts.append(f"{share(result):.1%} removed")
    if "seconds" in result:
        parts.append("traced in {:.2f} s, planned in {:.2f} s".format(*result["seconds"]))
    if "kinds" in result:
        parts.append(", ".join(f"{n - k}/{n} {kind}" for kind, (n, k) in result["kinds"].items()))
    if "frozen" in result:
        parts.append(f"{result['frozen']:.0%} frozen ({result['reason']})")
    parts.append(f"{result['wall']:.0f} s in all")
    return (f"BAD: {bad}; " if bad else "ok: ") + ", ".join(parts)


def summary(done: Results, names: Sequence[str]) -> str:
    """The counts, by library."""
    libraries = list(dict.fromkeys(name.partition("/")[0] for name in names))
    lines = []
    for library in libraries:
        mine = [name for name in names if name.startswith(f"{library}/")]
        good = sum(fault(done.get(("ours", name))) is None for name in mine)
        peers = [p for name in mine if (p := done.get(("peer", name))) is not None]
        right = sum(peer_fault(p) is None for p in peers)
        lines.append(f"{library}: {good} of {len(mine)} pruned and proven; Torch-Pruning {right} of {len(peers)}")
    return "\n".join(lines)


def _ours(result: Result | None) -> tuple[str, ...]:
    """Cells of a row: proof, parameters and MACs removed, what stays and why, seconds, ONNX parity."""
    if result is None:
        return ("not run", "", "", "", "", "")
    bad = fault(result)
    if "left" not in result:
        return (f"**{bad}**", "", "", "", "", "")
    worst = max((e for _, _, e, _ in result.get("checks", ()) if e is not None), default=0.0)
    before, after = result.get("macs", (0, 0))
    return (
        f"**{bad}**" if bad else f"{worst:.0e}",
        f"{share(result):.1%}",
        f"{1 - after / before:.1%}" if before else "",
        f"{result['frozen']:.0%}" + (f": {result['reason']}" if result["reason"] and result["frozen"] > 0.005 else ""),
        "{:.2f} + {:.2f}".format(*result["seconds"]),
        f"{result['onnx']:.0e}" if result.get("onnx") is not None else "",
    )


def _theirs(result: Result | None) -> str:
    if result is None:
        return ""
    bad = peer_fault(result)
    return (f"{share(result):.1%}" if "left" in result else "") + (f" {bad}" if bad else "")


HEADINGS = (
    "model", "proof: largest relative error", "parameters removed", "MACs removed", "frozen, and the main reason",
    "trace + plan, s", "ONNX parity", "Torch-Pruning: parameters removed",
)  # fmt: skip


def page(done: Results, names: Sequence[str], ratio: float, versions: str, machine: str) -> str:
    """The whole Markdown page; models that were not run are counted and not shown."""
    run = [name for name in names if ("ours", name) in done]
    lines = [
        "# Coverage: every network people bring",
        "",
        f"`python -m tools.coverage`, ratio {ratio:g}, one process per model. Weights, scales and statistics are "
        "random, so that a wrong cut shows. *Proof*: the permutation and the zero-equivalence check of "
        "`graphprune.verify`; after it one backward pass in eval and one in training mode. *Frozen*: the share of the "
        "indices of parameter axes, kernel positions aside, that cannot be removed, and the reason that holds most of "
        "them (inputs, outputs and vocabularies aside). Torch-Pruning gets the plain one-line use, and is told which "
        "modules make the output.",
        "",
        f"{versions}. {machine}.",
        "",
        "```",
        summary(done, run),
        "```",
        "",
    ]
    if len(run) < len(names):
        lines += [f"Not run yet: {len(names) - len(run)} of {len(names)} models.", ""]
    for library in dict.fromkeys(name.partition("/")[0] for name in run):
        rows = [
            (name.partition("/")[2], *_ours(done.get(("ours", name))), _theirs(done.get(("peer", name))))
            for name in run
            if name.startswith(f"{library}/")
        ]
        lines += [f"## {library}", "", markdown_table(HEADINGS, rows), ""]
    return "\n".join(lines)
