"""What is shipped: metadata, dependencies, type information, and nothing else."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

PUBLIC = {
    "DependencyGraph",
    "GraphPruneError",
    "Plan",
    "benchmark",
    "count",
    "export_onnx",
    "fold_conv_bn",
    "plan",
    "prune",
    "trace",
    "verify",
}


def test_public_names_are_there_and_documented():
    package = importlib.import_module("graphprune")
    missing = PUBLIC - set(package.__all__)
    assert not missing
    undocumented = [name for name in package.__all__ if not name.startswith("_") and not getattr(package, name).__doc__]
    assert not undocumented


def test_installed_metadata_matches_pyproject():
    assert importlib.metadata.version("graphprune") == PROJECT["version"]
    assert importlib.import_module("graphprune").__version__ == PROJECT["version"]
    running = ".".join(map(str, sys.version_info[:3]))
    assert running in SpecifierSet(PROJECT["requires-python"])


def test_command_line_entry_point_is_callable():
    (entry,) = [e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "graphprune"]
    assert callable(entry.load())


@pytest.mark.parametrize(
    ("platform", "machine", "expected"),
    [
        ("linux", "x86_64", "onnxruntime-gpu"),
        ("win32", "AMD64", "onnxruntime-gpu"),
        ("linux", "aarch64", "onnxruntime"),
        ("win32", "ARM64", "onnxruntime"),
        ("darwin", "arm64", "onnxruntime"),
        ("darwin", "x86_64", "onnxruntime"),
    ],
)
def test_exactly_one_onnx_runtime_on_every_platform(platform, machine, expected):
    # Both packages fill the same folder: installed together, they overwrite each other.
    environment = {"sys_platform": platform, "platform_machine": machine}
    chosen = [
        requirement.name
        for requirement in map(Requirement, PROJECT["dependencies"])
        if requirement.name.startswith("onnxruntime")
        and requirement.marker is not None
        and requirement.marker.evaluate(environment)
    ]
    assert chosen == [expected]


def test_modules_import_only_declared_dependencies():
    # Two packages provide the module onnxruntime.
    declared = {Requirement(text).name.replace("-", "_") for text in PROJECT["dependencies"]} | {"graphprune"}
    undeclared = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / "graphprune").rglob("*.py"))
        for name in re.findall(r"^(?:from|import) ([A-Za-z_]\w*)", path.read_text(encoding="utf-8"), flags=re.M)
        if name not in declared and name not in sys.stdlib_module_names
    ]
    assert not undeclared, "optional packages are imported by the function that needs them, all others are declared"


def test_import_needs_no_extra():
    code = (
        "import sys\n"
        "for name in ('matplotlib', 'psutil', 'sklearn', 'torchvision'):\n"
        "    sys.modules[name] = None  # importing it fails, as where it is not installed\n"
        "import graphprune, graphprune.cli\n"
        "assert graphprune.prune and graphprune.cli.main\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_wheel_holds_the_typed_package_and_the_licence_only(tmp_path):
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("graphprune", "models", "tools", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("graphprune-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "graphprune/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "graphprune").rglob("*.py")}
    shipped = {name for name in names if name.endswith(".py")}
    assert shipped == modules


def test_licence_is_complete():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text and len(text) > 11_000


def run_pytest(tmp_path: Path, folder: Path | None, body: str) -> subprocess.CompletedProcess[str]:
    """A pytest run of one file under a copy of this checkout's conftest."""
    checkout = tmp_path / "checkout"
    (checkout / "tests").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "conftest.py", checkout / "tests")
    shutil.copy(ROOT / "pyproject.toml", checkout)
    (checkout / "tests" / "test_it.py").write_text(body, encoding="utf-8")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    if folder is not None:
        environment["GRAPHPRUNE_SHARED_DATA"] = str(folder)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)


SHARED_TEST = """
import pytest

@pytest.mark.shared_data
def test_reads(shared_data):
    assert (shared_data / "here.txt").read_text() == "yes"
"""


def test_shared_data_is_found_beside_the_checkout_or_by_variable_and_else_skipped(tmp_path):
    missing = run_pytest(tmp_path / "a", None, SHARED_TEST)
    assert missing.returncode == 0 and "1 skipped" in missing.stdout, missing.stdout

    (tmp_path / "b" / "shared" / "data").mkdir(parents=True)
    (tmp_path / "b" / "shared" / "data" / "here.txt").write_text("yes")
    beside = run_pytest(tmp_path / "b", None, SHARED_TEST)
    assert "1 passed" in beside.stdout, beside.stdout

    named = run_pytest(tmp_path / "c", tmp_path / "b" / "shared" / "data", SHARED_TEST)
    assert "1 passed" in named.stdout, named.stdout

    misspelt = run_pytest(tmp_path / "d", tmp_path / "nowhere", SHARED_TEST)
    assert misspelt.returncode != 0 and "GRAPHPRUNE_SHARED_DATA" in misspelt.stderr, misspelt.stderr


def test_shared_data_without_the_marker_fails_where_there_is_none(tmp_path):
    unmarked = run_pytest(tmp_path, None, "def test_reads(shared_data):\n    assert shared_data\n")
    assert unmarked.returncode == 1 and "not marked shared_data" in unmarked.stdout, unmarked.stdout
