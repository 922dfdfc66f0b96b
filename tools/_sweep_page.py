"""Results of the sweep as text: lines of progress, what went wrong, and the page in docs/."""

from __future__ import annotations

import argparse
import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tools._common import machine_line, markdown_table, versions_line

# Torch-Pruning's result counts as right up to this relative error against its own cuts set to zero.
RIGHT = 1e-4
# A pruned network whose output is this close to the dense one's: nothing that matters was cut, nothing was proven.
VACUOUS = 1e-3
# Removing less than this share of what Torch-Pruning removes needs a reason.
ENOUGH = 0.98

# Why less is removed than by Torch-Pruning, or less than the ratio: network (pattern), ratio, reason.
REASONS: tuple[tuple[str, float, str], ...] = (
    (
        "regnet_y_400mf",
        0.3,
        "Its grouped convolutions have 8 channels in a group: 0.3 of 8 is 2 to the nearest here, 3 in Torch-Pruning, "
        "which rounds up.",
    ),
    (
        "regnet_?_1_6gf",
        0.3,
        "24 channels in a group: 0.3 of 24 is 7 to the nearest here, 8 in Torch-Pruning, which rounds up.",
    ),
    (
        "regnet_y_3_2gf",
        0.3,
        "24 channels in a group: 0.3 of 24 is 7 to the nearest here, 8 in Torch-Pruning, which rounds up.",
    ),
    (
        "regnet_x_3_2gf",
        0.3,
        "48 channels in a group: 0.3 of 48 is 14 to the nearest here, 15 in Torch-Pruning, which rounds up.",
    ),
    (
        "densenet161",
        0.3,
        "Each of its 78 layers adds 48 channels: 0.3 of 48 is 14 to the nearest here, 15 in Torch-Pruning, which "
        "rounds up.",
    ),
)
Result = Mapping[str, Any]
Results = Mapping[tuple[str, str, float], Result]


def share(result: Result) -> float:
    """Removed parameters / all parameters."""
    removed = result["removed"] if "removed" in result else result["parameters"] - result["left"]
    return float(removed / result["parameters"])


def fault(result: Result) -> str | None:
    """What is wrong with a result of ours, None if nothing is."""
    if "failure" in result:
        return str(result["failure"])
    failed = [f"{name}: error {error}, {detail}" for name, passed, error, detail in result["checks"] if not passed]
    if failed:
        return "not proven: " + "; ".join(failed)
    if not result["removed"]:
        return "nothing is removed"
    if not result["meta"] and result["effect"] < VACUOUS:
        return f"the cut changes the output by {result['effect']:.1e} only, so the proof says little"
    if result["backward"]:
        return f"backward: {result['backward']}"
    if result["training"]:
        return f"in training mode: {result['training']}"
    return None


def peer_fault(result: Result) -> str | None:
    """What is wrong with a result of Torch-Pruning, None if it is right."""
    if "failure" in result:
        stage = result.get("stage", "pruning")
        return f"fails ({stage}): {result['failure']}"
    if "unchecked" in result:
        return f"runs, not checked: {result['unchecked']}"
    return None if result["error"] <= RIGHT else f"wrong: differs from its own cuts by {result['error']:.1e}"


def reason_for(name: str, ratio: float) -> str | None:
    """The entry of `REASONS` for a network at a ratio."""
    return next((text for pattern, at, text in REASONS if at == ratio and fnmatch.fnmatch(name, pattern)), None)


def behind(ours: Result | None, peer: Result | None) -> bool:
    """Whether ours removes clearly less than Torch-Pruning where that is right."""
    if ours is None or peer is None or "removed" not in ours or peer_fault(peer) is not None:
        return False
    return share(ours) < ENOUGH * share(peer)


def too_little(ours: Result | None, peer: Result | None, ratio: float) -> str | None:
    """Whether ours removes less than the ratio or clearly less than Torch-Pruning, and how much less."""
    if ours is None or not ours.get("removed"):
        return None
    if peer is not None and behind(ours, peer):
        return f"{share(ours):.1%} of the parameters against Torch-Pruning's {share(peer):.1%}"
    # Taking a share of the channels takes more than that share of most layers: of inputs and of outputs.
    return f"{share(ours):.1%} of the parameters, less than the ratio" if share(ours) < ratio else None


def problems(done: Results, names: Sequence[str], ratios: Sequence[float]) -> list[tuple[str, float, str]]:
    """Network, ratio and symptom of everything of ours that is missing, wrong, or too small without a reason."""
    found = []
    for name in names:
        for ratio in ratios:
            ours, peer = done.get(("ours", name, ratio)), done.get(("peer", name, ratio))
            text = "not run" if ours is None else fault(ours)
            if text:
                found.append((name, ratio, text))
            less = too_little(ours, peer, ratio)
            if less and not reason_for(name, ratio):
                found.append((name, ratio, f"too little: {less}"))
    return found


def problem_page(done: Results, names: Sequence[str], ratios: Sequence[float]) -> str:
    """`problems` as Markdown, with where an exception came from."""
    lines = ["# Networks that fail, are wrong or lose too little", ""]
    for name, ratio, text in problems(done, names, ratios):
        lines.append(f"- {name} {ratio:g}: {text}")
        trace = done.get(("ours", name, ratio), {}).get("traceback")
        if trace:
            lines += ["", *("      " + line for line in trace.splitlines()[-8:]), ""]
    return "\n".join([*lines, ""])


def one_line(result: Result) -> str:
    """A result for the log."""
    bad = fault(result) if result["tool"] == "ours" else peer_fault(result)
    parts = []
    if "left" in result and "failure" not in result:
        parts.append(f"{share(result):.1%} removed")
    if "seconds" in result:
        parts.append(f"planned in {result['seconds'][0]:.2f} s, cut in {result['seconds'][1]:.2f} s")
    if "checks" in result:
        parts.append(f"{proof(result)}")
    parts.append(f"{result['wall']:.0f} s in all")
    return (f"BAD: {bad}; " if bad else "ok: ") + ", ".join(parts)


def proof(result: Result) -> str:
    """The largest error of all checks, and which they were."""
    errors = [error for _, _, error, _ in result["checks"] if error is not None]
    if not errors:
        return "shapes"
    return f"{max(errors):.0e}{'' if any(c[0] == 'zero equivalence' for c in result['checks']) else ' (graph)'}"


def summary(done: Results, names: Sequence[str], ratios: Sequence[float]) -> str:
    """The counts."""
    lines = []
    for ratio in ratios:
        ours = [done.get(("ours", name, ratio)) for name in names]
        peers = [done.get(("peer", name, ratio)) for name in names]
        good = [r for r in ours if r is not None and fault(r) is None]
        shapes = sum(bool(r["meta"]) for r in good)
        kinds = Counter(peer_kind(p) for p in peers)
        kinds.pop("not run", None)
        pairs = [(o, p) for o, p in zip(ours, peers, strict=True) if o is not None and p is not None and "removed" in o]
        right = [(o, p) for o, p in pairs if peer_fault(p) is None]
        lines.append(
            f"Ratio {ratio:g}: of {len(names)} networks {len(good)} pruned, run forward and backward, "
            f"{len(good) - shapes} of them proven and {shapes} on the meta device, where there are only shapes. "
            f"Torch-Pruning, on {sum(kinds.values())}: "
            + ", ".join(f"{kinds.get(kind, 0)} {kind}" for kind in ("right", "wrong", "unchecked", "failed"))
            + f". Where it is right, ours removes at least {ENOUGH:.0%} of what it does on "
            f"{sum(not behind(o, p) for o, p in right)} of {len(right)}."
        )
    return "\n\n".join(lines)


def peer_kind(result: Result | None) -> str:
    """One word for a result of Torch-Pruning."""
    text = None if result is None else peer_fault(result)
    if result is None:
        return "not run"
    return "right" if text is None else {"fails": "failed", "wrong:": "wrong", "runs,": "unchecked"}[text.split()[0]]


def _percent(result: Result | None) -> str:
    return "-" if result is None or "left" not in result or "failure" in result else f"{share(result):.1%}"


def _row(done: Results, name: str, ratios: Sequence[float]) -> list[str]:
    ours = [done.get(("ours", name, ratio)) for ratio in ratios]
    peers = [done.get(("peer", name, ratio)) for ratio in ratios]
    faults = ["not run" if r is None else fault(r) for r in ours]
    complete = [r for r in ours if r is not None and "checks" in r]
    last = complete[-1] if complete else None
    kinds = list(dict.fromkeys(peer_kind(p) for p in peers))
    proofs = list(dict.fromkeys(proof(r) for r in complete)) or ["-"]
    return [
        name,
        "-" if last is None else f"{last['parameters'] / 1e6:.1f}",
        "FAILED" if any(faults) else " / ".join(proofs),
        *(_percent(r) for r in ours),
        "-" if last is None or "macs" not in last else f"{1 - last['macs'][1] / last['macs'][0]:.1%}",
        "-" if last is None else f"{last['frozen']:.1%}",
        "-" if last is None else f"{last['seconds'][0]:.2f}",
        "-" if last is None else f"{last['seconds'][1]:.2f}",
        " / ".join(kinds),
        *(_percent(r) for r in peers),
    ]


EXPLANATION = """
Every network runs in a process of its own. Before anything is pruned, all constant parameters (scales, zero biases,
layer scales of 1e-6) get random values and the batch statistics become those of random images, somewhat disturbed, so
that no proof is about zeros.

- *proof*: the largest relative error of all checks at these ratios: permuting the units of every group changes nothing,
  and the pruned network equals the original with the removed slices set to zero. "(graph)": a norm runs over removed
  channels, so zeroing is no reference; the pruned network is compared with the recorded graph run on the cut tensors.
  "shapes": on the meta device, where there are no numbers.
- Also asked of each: a forward and a backward pass with finite gradients, in eval and (exceptions below) in training
  mode, and an output that differs from the dense network's.
- *removed*: parameters taken away by the cut, of all parameters; what folding batch norms saves is not counted.
- *frozen*: indices of parameter axes that cannot be removed, the network's inputs and outputs included and kernel
  positions left out.
- *plan, s* and *cut, s*: seconds for tracing and planning, and for the pruned copy.
- *Torch-Pruning*: its pruner as documented (`GroupMagnitudeImportance(p=2)`, the classifier ignored), on the same
  weights and the same image. "right": it runs, forward and backward, and equals the original with everything that its
  record says it removed set to zero (norms leaving those channels out). "-": not run, on the meta device.
""".strip()


def page(done: Results, names: Sequence[str], ratios: Sequence[float], options: argparse.Namespace) -> str:
    """The whole Markdown page."""
    headings = ["network", "M params", "proof", *(f"removed at {r:g}" for r in ratios)]
    headings += [f"MACs removed at {ratios[-1]:g}", "frozen", "plan, s", "cut, s", "Torch-Pruning"]
    headings += [f"it removes at {r:g}" for r in ratios]
    prints = {r["fingerprint"] for key, r in done.items() if key[0] == "ours" and key[1] in names}
    parts = [
        "# All torchvision classification networks",
        "    python -m tools.sweep",
        f"Made on: {machine_line(options.threads)}, at most {options.memory:g} GiB and {options.timeout:g} s for a "
        f"process. {versions_line('torch', 'torchvision', 'torch-pruning')}.",
        *(["Made with more than one version of the source code."] if len(prints) > 1 else []),
        summary(done, names, ratios),
        markdown_table(headings, [_row(done, name, ratios) for name in names]),
        EXPLANATION,
    ]
    bad = problems(done, names, ratios)
    if bad:
        parts += ["## What fails", "\n".join(f"- {name}, ratio {ratio:g}: {text}" for name, ratio, text in bad)]
    less = []
    for name in names:
        for ratio in ratios:
            text = too_little(done.get(("ours", name, ratio)), done.get(("peer", name, ratio)), ratio)
            if text:
                why = reason_for(name, ratio) or "No reason is known."
                less.append(f"- {name}, ratio {ratio:g}: {text}. {why}")
    if less:
        parts += ["## Where less is removed than by Torch-Pruning, or less than the ratio", "\n".join(less)]
    peers = []
    for name in names:
        found = [peer_fault(p) for r in ratios if (p := done.get(("peer", name, r))) is not None]
        texts = list(dict.fromkeys(text for text in found if text))
        if texts:
            peers.append(f"- {name}: {'; '.join(texts)}")
    if peers:
        parts += ["## Where Torch-Pruning does not get there", "\n".join(peers)]
    return "\n\n".join(parts) + "\n"
