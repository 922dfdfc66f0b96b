"""Prune all of torchvision's classification networks, prove every result, and do the same with Torch-Pruning.

    python -m tools.sweep                                   # what is not done yet, then docs/sweep.md
    python -m tools.sweep --only 'resnet*' vgg11 --ratio 0.5
    python -m tools.sweep --report                          # docs/sweep.md from what is there

Every network runs in a process of its own, with a limit on memory and time, ours and Torch-Pruning's apart. Results
are kept in build/sweep/results.jsonl; one is used again only if it was made by the same source code.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import graphprune
from tools import _sweep_page
from tools._common import all_networks, parameter_count, write
from tools._results import ResultFile

RATIOS = (0.3, 0.5)
TOOLS = ("ours", "peer")
# Larger networks are planned, cut and run on the meta device: there are shapes, but no numbers to compare.
META_ABOVE = 200_000_000
RESULTS = ResultFile(Path("build/sweep/results.jsonl"), ("tool", "name", "ratio"))
OUTPUT = Path("docs/sweep.md")

Result = dict[str, Any]
Results = dict[tuple[str, str, float], Result]


def fingerprint(tool: str) -> str:
    """Which code a result depends on."""
    here = Path(__file__).parent
    files = [here / "_common.py", here / ("_sweep_case.py" if tool == "ours" else "_peer.py")]
    digest = hashlib.sha256("".join(importlib.metadata.version(p) for p in ("torch", "torchvision")).encode())
    if tool == "ours":
        package = Path(graphprune.__file__).parent
        later = ("runtimes", "workflows", "cli", "__init__.py", "_version.py")
        files += [f for f in sorted(package.rglob("*.py")) if f.relative_to(package).parts[0] not in later]
    else:
        digest.update(importlib.metadata.version("torch-pruning").encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def limits(memory: float) -> Callable[[], None]:
    """What a child does before it starts: step back behind others and take at most `memory` GiB."""

    def apply() -> None:
        os.nice(10)
        resource.setrlimit(resource.RLIMIT_AS, (int(memory * 2**30), int(memory * 2**30)))

    return apply


def run_case(tool: str, name: str, ratios: Sequence[float], meta: bool, options: argparse.Namespace) -> list[Result]:
    """Examine one network in a child process; one result for every ratio, whatever happens to the child."""
    command = [sys.executable, "-m", "tools._sweep_case", tool, name, *map(str, ratios), *(["--meta"] if meta else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    version = fingerprint(tool)
    started = time.perf_counter()
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=limits(options.memory),
    )
    try:
        output, errors = child.communicate(timeout=options.timeout)
        ending = f"the process ended with status {child.returncode}: {(errors.strip().splitlines() or [''])[-1]}"[:160]
    except subprocess.TimeoutExpired:
        child.kill()
        output, _ = child.communicate()
        ending = f"not done after {options.timeout:g} s"
    results = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    seen = {r["ratio"] for r in results}
    results += [{"ratio": ratio, "failure": ending} for ratio in ratios if ratio not in seen]
    wall = time.perf_counter() - started
    return [{"tool": tool, "name": name, "fingerprint": version, "wall": wall, **r} for r in results]


def work(names: Sequence[str], ratios: Sequence[float], options: argparse.Namespace) -> Results:
    """Run everything that is missing, small networks first, and return what was asked for."""
    prints = {tool: fingerprint(tool) for tool in TOOLS}
    done = RESULTS.load(None if options.any_version else prints)
    if options.fresh:
        done = {}
    if options.failed:
        bad = {(name, ratio) for name, ratio, _ in _sweep_page.problems(done, names, ratios)}
        done = {key: r for key, r in done.items() if key[0] == "peer" or (key[1], key[2]) not in bad}
    for number, name in enumerate(names, 1):
        meta = parameter_count(name) > META_ABOVE
        for tool in options.tools:
            missing = [ratio for ratio in ratios if (tool, name, ratio) not in done]
            if not missing or (tool == "peer" and meta):
                continue
            for result in run_case(tool, name, missing, meta, options):
                RESULTS.store(result)
                done[(tool, name, result["ratio"])] = result
                text = _sweep_page.one_line(result)
                print(f"[{number}/{len(names)}] {name} {result['ratio']:g} {tool}: {text}", flush=True)
        if options.failures:
            write(options.failures, _sweep_page.problem_page(done, names[:number], ratios))
    return done


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; exit status 1 if any of our results is missing, wrong or too small."""
    parser = argparse.ArgumentParser(prog="python -m tools.sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="networks or patterns (default: all)")
    parser.add_argument("--ratio", nargs="+", type=float, default=list(RATIOS), help="default 0.3 0.5")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS), help="default: both")
    parser.add_argument("--memory", type=float, default=10, help="GiB of address space for a process (default 10)")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for a process (default 1200)")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--fresh", action="store_true", help="use no earlier results")
    parser.add_argument("--failed", action="store_true", help="run what failed again")
    parser.add_argument("--any-version", action="store_true", help="use results of other versions of the source code")
    parser.add_argument("--report", action="store_true", help="run nothing, write the page from what is there")
    parser.add_argument("--failures", type=Path, help="keep a list of everything that failed in this file")
    parser.add_argument("--output", type=Path, help=f"Markdown page (default: {OUTPUT} if all networks are asked for)")
    options = parser.parse_args(argv)

    names = all_networks()
    if options.only:
        names = [n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in options.only)]
        if not names:
            parser.error(f"no network is called {' or '.join(options.only)}")
    ratios = sorted(set(options.ratio))
    done = RESULTS.load(None) if options.report else work(names, ratios, options)
    print(_sweep_page.summary(done, names, ratios))
    found = _sweep_page.problems(done, names, ratios)
    for name, ratio, what in found:
        print(f"{name} {ratio:g}: {what}")
    output = options.output or (OUTPUT if not options.only and ratios == list(RATIOS) else None)
    if output:
        write(output, _sweep_page.page(done, names, ratios, options))
        print(f"written: {output}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
