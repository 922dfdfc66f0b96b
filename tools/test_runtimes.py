"""The tests of every runtime, each in an environment that has its extra: which version passes, and what it offers.

    python -m tools.test_runtimes                                  # an environment per extra, in build/runtimes
    python -m tools.test_runtimes executorch litert --folder ~/runtimes --share
    make test-runtimes RUNTIMES_ARGS="ncnn --share"

`none` stands for the environment that runs this, with the runtimes that need no extra. An environment is used again
while what is installed into it stays the same. With `--share` it sees the packages of the environment that runs this,
torch among them, and installs only what the extra adds; otherwise it stands alone, with the torch of the Makefile's
`TORCH` (2 GB each). The tests are those of tests/runtimes/adapters and tests/deployment, with `--own` without those of
other runtimes, which have environments of their own; a runtime has passed when some of the tests that are its own ran
and none failed. Runtimes tested before are kept, and replaced one by one, in docs/runtimes-tested.json and
docs/runtimes-tested.md.

Ends with 1 if an environment could not be made or a test failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from graphprune.errors import GraphPruneError
from graphprune.runtimes.adapters import RUNTIMES, adapter
from graphprune.runtimes.adapters.workers import Worker
from tools._common import machine_line, markdown_table, write

ROOT = Path(__file__).resolve().parents[1]
DOCS = Path("docs")
TESTS = ("tests/runtimes/adapters", "tests/deployment")
HERE = "none"
# What the tests themselves import, of the extra "test".
_TESTING = ("pytest", "pytest-timeout", "hypothesis")
_STAMP = "graphprune-tested.json"
# Two distributions of one folder of modules overwrite each other.
_ONE_OF = ("onnxruntime", "onnxruntime-gpu")


class Failed(Exception):
    """An environment that could not be made or used, and the last lines of why."""


def extras() -> dict[str, list[str]]:
    """Name of each runtime that has an extra -> what the extra installs."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    return {name: list(declared[kind.extra]) for name, kind in RUNTIMES.items() if kind.extra is not None}


def choices() -> list[str]:
    """What can be asked for."""
    return [HERE, *extras()]


def tested_in(choice: str) -> list[str]:
    """The runtimes that an environment is made for."""
    return [name for name, kind in RUNTIMES.items() if kind.extra is None] if choice == HERE else [choice]


# -- environments


def environment(name: str, folder: Path, share: bool, torch: Sequence[str]) -> Path:
    """The interpreter of an environment with an extra, made unless it is there as wanted. Raises Failed."""
    place = folder / name
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = extras()[name] if share else [*torch, *extras()[name], *_testing()]
    stamp = place / _STAMP
    said = {"requirements": wanted, "shared": _packages() if share else None}
    if share and python.is_file():
        _share(python)
    if python.is_file() and stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == said:
        return python
    _call([sys.executable, "-m", "venv", "--clear", *(["--without-pip"] if share else []), str(place)])
    if share:
        _share(python)
    elif torch:
        # Alone and first: resolved with the rest, a package could bring another build of it.
        _call([str(python), "-m", "pip", "install", *torch])
    own = [] if share else ["-e", str(ROOT)]
    _call([str(python), "-m", "pip", "install", *own, *wanted])
    write(stamp, json.dumps(said))
    return python


def _testing() -> list[str]:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    return [text for text in declared["test"] if Requirement(text).name in _TESTING]


def _packages() -> str:
    """Where the packages of this environment lie."""
    return str(Path(str(importlib.metadata.distribution("torch").locate_file(""))))


def _share(python: Path) -> None:
    """Let it see this checkout and the packages that lie here."""
    own = _call([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    (Path(own) / "graphprune-shared.pth").write_text(f"{ROOT}\n{_packages()}\n", encoding="utf-8")


def _call(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise Failed(f"{' '.join(command[1:4])} ended with {done.returncode}: {' '.join(lines[-2:])[:400]}")
    return done.stdout


# -- tests


@dataclasses.dataclass(frozen=True)
class Counts:
    """How tests ended."""

    passed: int = 0
    skipped: int = 0
    failed: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = f"{self.passed} passed, {self.skipped} skipped"
        return said + (f", **{len(self.failed)} failed**" if self.failed else "")


def run_tests(python: Path, arguments: Sequence[str]) -> list[tuple[str, str]]:
    """(test, how it ended: "passed", "skipped" or "failed") of pytest in an environment. Raises Failed."""
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        report = Path(folder) / "report.xml"
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            encoding="utf-8", errors="replace", check=False,
        )  # fmt: skip
        if done.returncode not in (0, 1) or not report.is_file():
            lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
            raise Failed(f"pytest ended with {done.returncode}: {' '.join(lines[-2:])[:400]}")
        return read_report(report.read_text(encoding="utf-8"))


def read_report(text: str) -> list[tuple[str, str]]:
    """(test, how it ended) of a JUnit report."""
    found = []
    for case in ElementTree.fromstring(text).iter("testcase"):
        kinds = {child.tag for child in case}
        ended = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found.append((f"{case.get('classname', '')}::{case.get('name', '')}", ended))
    return found


def without_others(runtimes: Sequence[str]) -> list[str]:
    """Arguments of pytest that leave out the tests of all other runtimes."""
    others = [name for name in RUNTIMES if name not in runtimes]
    return ["-k", " and ".join(f"not test_{name}.py and not [{name}" for name in others)]


def is_of(test: str, runtime: str) -> bool:
    """Whether a test is one of that runtime's own: of its file, or with its name among the parameters."""
    place, _, name = test.partition("::")
    of_file = re.search(rf"\btest_{runtime}\b", place) is not None
    return of_file or re.search(rf"[\[-]{runtime}[\]-]", name) is not None


def counted(tests: Iterable[tuple[str, str]]) -> Counts:
    """Numbers of those that passed and were skipped, names of those that failed."""
    ended = list(tests)
    kinds = [kind for _, kind in ended]
    return Counts(
        kinds.count("passed"), kinds.count("skipped"), tuple(sorted({name for name, kind in ended if kind == "failed"}))
    )


def examine(choice: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each runtime of an environment."""
    runtimes = tested_in(choice)
    try:
        if choice == HERE:
            python = Path(sys.executable)
        else:
            print(f"{choice}: making its environment", flush=True)
            python = environment(choice, options.folder, options.share, options.torch)
        both = clashing(python)
        described = {name: describe(name, python) for name in runtimes}
        print(f"{choice}: testing", flush=True)
        left_out = without_others(runtimes) if options.own else []
        tests = run_tests(python, [*TESTS, *left_out, *shlex.split(options.pytest)])
        torch = version_of("torch", python)
    except (Failed, GraphPruneError, OSError) as error:
        return [{"runtime": name, "environment": choice, "why": str(error), "passed": False} for name in runtimes]
    return [row(name, choice, described[name], tests, both, torch) for name in runtimes]


def describe(name: str, python: Path) -> dict[str, Any]:
    """What a worker in that environment says of its runtime."""
    with Worker(name, python=python) as worker:
        return worker.describe("fp32")


def version_of(distribution: str, python: Path) -> str:
    """Of a package in that environment."""
    return _call([str(python), "-c", f"import importlib.metadata as m; print(m.version({distribution!r}))"]).strip()


def clashing(python: Path) -> str | None:
    """Distributions that must not be there together and are, in words."""
    code = (
        "import importlib.metadata, sys\n"
        f"print(*sorted({set(_ONE_OF)!r} & {{d.metadata['Name'] for d in importlib.metadata.distributions()}}))"
    )
    there = _call([str(python), "-c", code]).split()
    return f"{' and '.join(there)} are both installed, and overwrite each other" if len(there) > 1 else None


def row(
    name: str, choice: str, described: dict[str, Any], tests: Sequence[tuple[str, str]], both: str | None, torch: str
) -> dict[str, Any]:
    """What is kept of one runtime."""
    own = counted(test for test in tests if is_of(test[0], name))
    whole = counted(tests)
    why = described["missing"] or both
    if why is None and not own.passed:
        why = "none of its tests ran"
    return {
        "runtime": name, "environment": choice, "why": why, "passed": why is None and not whole.failed,
        "versions": described["versions"], "precisions": list(adapter(name).precisions()),
        "own": dataclasses.asdict(own), "all": dataclasses.asdict(whole),
        "python": ".".join(map(str, sys.version_info[:3])), "torch": torch,
        "machine": machine_line(1),
    }  # fmt: skip


# -- the page


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The table, and what failed."""
    cells = [[r["runtime"], *_cells(r), "yes" if r["passed"] else "**no**"] for r in rows]
    headings = ["runtime", "versions", "precisions offered", "its tests", "all tests there", "passed"]
    said = sorted({f"{r['machine']}; Python {r['python']}, torch {r['torch']}" for r in rows if "own" in r})
    commands = sorted({f"`{r['command']}`" for r in rows})
    text = [
        "# Every runtime, tested in an environment of its own",
        "",
        "Each runtime of an extra in an environment with that extra, the others in one with none. Its tests: those of "
        "its own file, and those that every adapter has to pass. Beside them run those that belong to no runtime and, "
        "unless it was called with `--own`, those of all other runtimes whose packages are there. What a runtime, or "
        "this CPU, does not offer is skipped.",
        "",
        f"Written by {', '.join(commands)} ({'; '.join(said) or 'nothing ran'}); `make test-runtimes` does the same.",
        "",
        markdown_table(headings, cells),
    ]
    failures = [f"- {r['runtime']}: {text}" for r in rows for text in _failures(r)]
    return "\n".join([*text, *(["", "## What failed", "", *failures] if failures else [])]) + "\n"


def _cells(found: dict[str, Any]) -> list[str]:
    if "own" not in found:
        return ["", "", "", ""]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    counts = [str(Counts(c["passed"], c["skipped"], tuple(c["failed"]))) for c in (found["own"], found["all"])]
    return [versions, ", ".join(found["precisions"]), *counts]


def _failures(found: dict[str, Any]) -> list[str]:
    failed = found["all"]["failed"] if "all" in found else []
    return [*([found["why"]] if found["why"] else []), *(f"`{name}`" for name in failed)]


def keep(new: Sequence[dict[str, Any]], docs: Path) -> list[dict[str, Any]]:
    """Put rows in the place of those of the same runtimes, and write the page; all rows."""
    target = docs / "runtimes-tested.json"
    rows: list[dict[str, Any]] = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else []
    fresh = {r["runtime"] for r in new}
    order = list(RUNTIMES)
    rows = [r for r in rows if r["runtime"] not in fresh and r["runtime"] in order] + list(new)
    rows.sort(key=lambda r: order.index(r["runtime"]))
    write(target, json.dumps(rows, indent=1) + "\n")
    write(docs / "runtimes-tested.md", page(rows))
    return rows


def _without_places(options: argparse.Namespace) -> list[str]:
    """The arguments that say what was tested, but not where it lies."""
    flags = [f"--{name}" for name in ("share", "own") if getattr(options, name)]
    more = ["--torch", *options.torch] if options.torch else []
    return [*options.runtimes, *flags, *more, *(["--pytest", options.pytest] if options.pytest else [])]


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtimes", nargs="*", metavar="RUNTIME", help=f"of {', '.join(choices())}; default: all")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "runtimes", help="of the environments")
    parser.add_argument("--share", action="store_true", help="see this environment's packages, torch among them")
    parser.add_argument("--torch", nargs="*", default=[], metavar="REQUIREMENT", help="installed first")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder that the result is written to")
    parser.add_argument("--own", action="store_true", help="leave out the tests of other runtimes")
    parser.add_argument("--pytest", default="", metavar="ARGUMENTS", help="for pytest, such as '-x -k int8'")
    options = parser.parse_args(given)
    unknown = sorted(set(options.runtimes) - set(choices()))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(choices())}")
    options.folder = options.folder.expanduser().absolute()
    passed = True
    command = shlex.join(["python", "-m", "tools.test_runtimes", *_without_places(options)])
    for choice in options.runtimes or choices():
        rows = [{**found, "command": command} for found in examine(choice, options)]
        keep(rows, options.docs)
        for found in rows:
            print(f"{found['runtime']}: {'passed' if found['passed'] else 'FAILED'}", *_failures(found), sep="\n  ")
        passed = passed and all(found["passed"] for found in rows)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
