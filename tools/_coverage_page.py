"""Results of the coverage sweep as text: lines of progress, counts, and the page in docs/."""

from __future__ import annotations

from collections import Counter
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
    alone = result.get("heads", (0, 0, ()))[2]
    if any(not passed for _, passed, *_ in alone):
        return "heads alone not proven: " + "; ".join(f"{name}: error {error}" for name, _, error, _ in alone)
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


def peer_kind(result: Result) -> str:
    """A result of Torch-Pruning in a few words: "right", "wrong", "not compared", "removes nothing" or "fails"."""
    bad = peer_fault(result)
    if bad is None:
        return "right"
    known = {"wrong": "wrong", "runs": "not compared", "removes": "removes nothing"}
    return known.get(bad.split(maxsplit=1)[0].strip(":,"), "fails")


def summary(done: Results, names: Sequence[str]) -> str:
    """The counts, by library."""
    lines = []
    for library in dict.fromkeys(name.partition("/")[0] for name in names):
        mine = [name for name in names if name.startswith(f"{library}/")]
        results = [r for name in mine if (r := done.get(("ours", name))) is not None]
        good = sum(fault(r) is None for r in results)
        parts = [f"{good} of {len(results)} pruned and proven" + _not_run(len(mine) - len(results))]
        cut = [r for r in results if r.get("heads", (0, 0))[1]]
        if cut:
            parts.append(f"heads alone {sum(fault(r) is None for r in cut)} of {len(cut)}")
        exported = [r for r in results if "onnx" in r]
        if exported:
            parts.append(f"ONNX parity {sum(r['onnx'] is not None for r in exported)} of {len(exported)}")
        kinds = Counter(peer_kind(p) for name in mine if (p := done.get(("peer", name))) is not None)
        if kinds:
            total = sum(kinds.values())
            counts = ", ".join(f"{kinds[kind]} {kind}" for kind in _PEER_KINDS if kinds[kind])
            parts.append(f"Torch-Pruning {counts}, of {total}" + _not_run(len(mine) - total))
        lines.append(f"{library}: " + "; ".join(parts))
    return "\n".join(lines)


_PEER_KINDS = ("right", "wrong", "not compared", "removes nothing", "fails")


def _not_run(number: int) -> str:
    return f" ({number} not run)" if number else ""


def versions(done: Results, names: Sequence[str], current: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """The version of the source code that most results of each tool come from, and a sentence about all of them.

    `current`: the version of each tool's code that is there now.
    """
    most: dict[str, str] = {}
    sentences = []
    for tool, title in (("ours", "graphprune's"), ("peer", "Torch-Pruning's")):
        found = Counter(r["fingerprint"] for name in names if (r := done.get((tool, name))) is not None)
        if not found:
            continue
        (most[tool], number), total = found.most_common(1)[0], sum(found.values())
        if number == total:
            sentences.append(f"All {total} results of {title} come from one version of the source code ({most[tool]}).")
        else:
            sentences.append(
                f"Of {title} {total} results {number} come from one version of the source code ({most[tool]}); those "
                f"marked {OLDER} ({total - number}) come from other versions ({len(found) - 1})."
            )
        if most[tool] != current[tool]:
            sentences.append("That code has changed since.")
    return most, " ".join(sentences)


OLDER = "†"


def _ours(result: Result | None) -> tuple[str, ...]:
    """Cells of a row: proof, parameters and MACs removed, what stays and why, seconds, ONNX parity."""
    if result is None:
        return ("not run", "", "", "", "", "", "")
    bad = fault(result)
    if "left" not in result:
        return (f"**{bad}**", "", "", "", "", "", "")
    worst = max((e for _, _, e, _ in result.get("checks", ()) if e is not None), default=0.0)
    before, after = result.get("macs", (0, 0))
    return (
        f"**{bad}**" if bad else f"{worst:.0e}",
        f"{share(result):.1%}",
        f"{1 - after / before:.1%}" if before else "",
        _heads(result),
        f"{result['frozen']:.0%}" + (f": {result['reason']}" if result["reason"] and result["frozen"] > 0.005 else ""),
        "{:.2f} + {:.2f}".format(*result["seconds"]),
        f"{result['onnx']:.0e}" if result.get("onnx") is not None else "",
    )


def _heads(result: Result) -> str:
    """Heads that went, of all, where heads alone were to go, and the error of the proof."""
    if not result.get("heads", (0,))[0]:
        return ""
    total, removed, checks = result["heads"]
    worst = max((e for _, _, e, _ in checks if e is not None), default=0.0)
    return f"{removed}/{total}, {worst:.0e}" if removed else f"0/{total}"


def _theirs(result: Result | None) -> str:
    if result is None:
        return "not run"
    bad = peer_fault(result)
    return (f"{share(result):.1%}" if "left" in result else "") + (f" {bad}" if bad else "")


HEADINGS = (
    "model", "proof: largest relative error", "parameters removed", "MACs removed", "heads alone: removed, error",
    "frozen, and the main reason", "trace + plan, s", "ONNX parity", "Torch-Pruning: parameters removed",
)  # fmt: skip
ABOUT = """\
Weights, scales and statistics are random, so that a wrong cut shows. *Proof*: the permutation and the zero-equivalence
check of `graphprune.verify`; after it one backward pass in eval and one in training mode (detectors, which want targets
there, in eval mode only). *Heads alone*: for the models of transformers, a second plan that removes half of the
attention heads and nothing else, and its proof; empty where there are none that could go. *Frozen*: the share of the
indices of parameter axes, kernel positions aside, that cannot be removed, and the reason that holds most of them.
Parameters that the run never reads are never removed. *ONNX parity*: max|onnx - torch| / max|torch| of the exported
pruned model in ONNX Runtime, for the subset listed below.

*Torch-Pruning* gets the plain one-line use (`BasePruner(model, example, GroupMagnitudeImportance(p=2),
pruning_ratio=0.5, ignored_layers=...)` and one `step()`), and is told which modules make the output. Language models
are called without their cache (`use_cache=False`), and `output_transform` hands it the tensors of the output. Right
means: the pruned model runs forward and backward, and differs from the original with the same slices set to zero by
less than 1e-6 in double precision. Not compared: it runs, and there is no such reference (a norm lost channels, or the
record of what it cut cannot be replayed)."""


def _limits(results: Sequence[Result]) -> str:
    """The limits under which these results were made."""
    found = sorted({tuple(r["limits"]) for r in results if "limits" in r})
    return " or ".join(f"{seconds:g} s of processor time and {size:g} GiB" for seconds, size in found) or "not run"


def page(
    done: Results,
    names: Sequence[str],
    ratio: float,
    versions_line: str,
    machine: str,
    exported: Sequence[str],
    current: Mapping[str, str],
) -> str:
    """The whole Markdown page. `exported`: the models whose pruned form goes to ONNX; `current`: see `versions`."""
    most, sentence = versions(done, names, current)
    later = [name for name in exported if not _has_export(done, name)]
    allowed = "; ".join(
        f"{who}: {_limits([r for (tool, _), r in done.items() if tool == key])}"
        for key, who in (("ours", "graphprune"), ("peer", "Torch-Pruning"))
    )
    lines = [
        "# Coverage: every network people bring",
        "",
        f"`python -m tools.coverage`, ratio {ratio:g}, one process per model and tool, with limits ({allowed}). "
        "The machine was shared with other work, so the seconds are upper bounds.",
        "",
        ABOUT,
        "",
        f"Exported to ONNX: {', '.join(n for n in exported if _has_export(done, n)) or 'none'}."
        + (f" Not yet: {', '.join(later)}." if later else ""),
        "",
        f"{versions_line}. {machine}. {sentence}",
        "",
        "```",
        summary(done, names),
        "```",
        "",
    ]
    for library in dict.fromkeys(name.partition("/")[0] for name in names):
        rows = [_row(done, name, most) for name in names if name.startswith(f"{library}/")]
        lines += [f"## {library}", "", markdown_table(HEADINGS, rows), ""]
    return "\n".join(lines)


def _has_export(done: Results, name: str) -> bool:
    return "onnx" in done.get(("ours", name), {})


def _row(done: Results, name: str, most: Mapping[str, str]) -> tuple[str, ...]:
    ours, theirs = done.get(("ours", name)), done.get(("peer", name))
    cells = [*_ours(ours), _theirs(theirs)]
    for place, result in ((0, ours), (-1, theirs)):
        if result is not None and result["fingerprint"] != most[result["tool"]]:
            cells[place] += f" {OLDER}"
    return (name.partition("/")[2], *cells)


def slim(done: Results, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The results of the page as data, without tracebacks, by tool and name of the model."""
    hidden = ("traceback", "where", "tool", "name")
    return {
        f"{tool} {name}": {key: value for key, value in result.items() if key not in hidden}
        for name in names
        for tool in ("ours", "peer")
        if (result := done.get((tool, name))) is not None
    }
