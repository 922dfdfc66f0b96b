"""Prune networks of every library people bring, prove every result, and do the same with Torch-Pruning.

    python -m tools.coverage                                  # what is not done yet, then docs/coverage.md
    python -m tools.coverage --only 'transformers/*' --tools ours
    python -m tools.coverage --report                         # docs/coverage.md from what is there

Needs `pip install graphprune[coverage]`. Weights are random: nothing is downloaded. Every model runs in a process of
its own, with a limit on memory and time, ours and Torch-Pruning's apart. Results are kept in
build/coverage/results.jsonl; one is used again only if it was made by the same source code.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import graphprune
from tools import _coverage_case, _coverage_models, _coverage_page
from tools._common import machine_line, versions_line, write
from tools._results import ResultFile

TOOLS = ("ours", "peer")
RESULTS = ResultFile(Path("build/coverage/results.jsonl"), ("tool", "name"))
OUTPUT = Path("docs/coverage.md")
_PACKAGES = "torch torchvision transformers timm diffusers segmentation-models-pytorch ultralytics torch-pruning"
_BUILDERS = tuple(f"_coverage_{name}.py" for name in ("case", "images", "language", "models", "networks"))

Result = dict[str, Any]
Results = dict[tuple[str, str], Result]


def fingerprint(tool: str) -> str:
    """Which code a result depends on."""
    here = Path(__file__).parent
    files = [here / name for name in ("_common.py", "_peer.py", "_sweep_case.py", *_BUILDERS)]
    digest = hashlib.sha256("".join(importlib.metadata.version(p) for p in _PACKAGES.split()).encode())
    if tool == "ours":
        package = Path(graphprune.__file__).parent
        later = ("workflows", "cli", "__init__.py", "_version.py")
        files += [f for f in sorted(package.rglob("*.py")) if f.relative_to(package).parts[0] not in later]
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _child(pipe: Connection, tool: str, case: _coverage_models.Case, options: argparse.Namespace) -> None:
    os.nice(10)
    size = int(options.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(options.timeout), math.ceil(options.timeout) + 10))
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    if tool == "ours":
        found = _coverage_case.ours(case.build, case.onnx, case.only_eval, case.heads)
    else:
        found = _coverage_case.peer(case.build)
    pipe.send(found)
    pipe.close()


def run_case(tool: str, case: _coverage_models.Case, options: argparse.Namespace) -> Result:
    """Examine one model in a child process; a result whatever happens to the child.

    The child is forked, so that the libraries are imported once for all models. Its limit counts processor time, which
    other work on the machine does not use up; a child that waits for something for 20 times as long is ended too.
    """
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    version = fingerprint(tool)
    started = time.perf_counter()
    child = context.Process(target=_child, args=(theirs, tool, case, options))
    child.start()
    theirs.close()
    found: Result
    try:
        if mine.poll(20 * options.timeout):
            found = mine.recv()
        else:
            child.kill()
            found = {"failure": f"not done after {20 * options.timeout:g} s"}
    except EOFError:
        child.join()
        found = {"failure": f"the process ended with status {child.exitcode}"}
        if child.exitcode == -signal.SIGXCPU:
            found = {"failure": f"not done after {options.timeout:g} s of processor time"}
    child.join()
    about = {"wall": time.perf_counter() - started, "limits": [options.timeout, options.memory]}
    return {"tool": tool, "name": case.name, "fingerprint": version, **about, **found}


def work(cases: Sequence[_coverage_models.Case], options: argparse.Namespace) -> Results:
    """Run everything that is missing and return what was asked for."""
    prints = {tool: fingerprint(tool) for tool in TOOLS}
    done = {} if options.fresh else RESULTS.load(None if options.any_version else prints)
    for number, case in enumerate(cases, 1):
        for tool in options.tools:
            earlier = done.get((tool, case.name))
            again = options.failed and tool == "ours" and earlier and _coverage_page.fault(earlier)
            if earlier and not again:
                continue
            result = run_case(tool, case, options)
            RESULTS.store(result)
            done[(tool, case.name)] = result
            text = _coverage_page.one_line(result)
            print(f"[{number}/{len(cases)}] {case.name} {tool}: {text}", flush=True)
    return done


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; exit status 1 if any of our results is missing or wrong."""
    parser = argparse.ArgumentParser(prog="python -m tools.coverage", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="models or patterns (default: all)")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS), help="default: both")
    parser.add_argument("--memory", type=float, default=12, help="GiB of address space for a process (default 12)")
    parser.add_argument("--timeout", type=float, default=600, help="processor seconds for a process (default 600)")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--fresh", action="store_true", help="use no earlier results")
    parser.add_argument("--failed", action="store_true", help="run what failed again")
    parser.add_argument("--any-version", action="store_true", help="use results of other versions of the source code")
    parser.add_argument("--report", action="store_true", help="run nothing, write the page from what is there")
    parser.add_argument("--list", action="store_true", help="print the names of the models and stop")
    parser.add_argument("--output", type=Path, help=f"page, and results beside it (default: {OUTPUT})")
    options = parser.parse_args(argv)

    cases = _coverage_models.cases(options.only)
    if not cases:
        parser.error(f"no model is called {' or '.join(options.only)}")
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    done = RESULTS.load(None) if options.report else work(cases, options)
    names = [case.name for case in cases]
    print(_coverage_page.summary(done, names))
    output = options.output or (None if options.only else OUTPUT)
    if output:
        about = versions_line(*_PACKAGES.split()), machine_line(options.threads)
        exported = [case.name for case in cases if case.onnx]
        current = {tool: fingerprint(tool) for tool in TOOLS}
        write(output, _coverage_page.page(done, names, _coverage_case.RATIO, *about, exported, current))
        write(output.with_suffix(".json"), json.dumps(_coverage_page.slim(done, names), indent=0) + "\n")
        print(f"written: {output}")
    return 1 if any(_coverage_page.fault(done.get(("ours", name))) for name in names) else 0


if __name__ == "__main__":
    sys.exit(main())
