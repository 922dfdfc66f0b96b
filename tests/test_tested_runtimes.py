"""`make test-runtimes`: environments as wanted, failures as rows, and a page of what ended how."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from graphprune.runtimes.adapters import RUNTIMES
from tools import test_runtimes as tool

REPORT = """<testsuites><testsuite>
<testcase classname="tests.runtimes.adapters.test_mnn" name="test_integers"/>
<testcase classname="tests.runtimes.adapters.test_every_adapter" name="test_matches[mnn-residual]"/>
<testcase classname="tests.runtimes.adapters.test_every_adapter" name="test_matches[mnn]"><skipped/></testcase>
<testcase classname="tests.runtimes.adapters.test_every_adapter" name="test_matches[ncnn]"><skipped/></testcase>
<testcase classname="tests.deployment.test_export" name="test_it"><failure/></testcase>
<testcase classname="tests.deployment.test_export" name="test_it"><error/></testcase>
</testsuite></testsuites>"""
DESCRIBED = {"missing": None, "versions": {"MNN": "3.6.1"}, "layout": "NCHW"}


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Nothing is made or run; what pytest would get."""
    asked: list[Sequence[str]] = []

    def run_tests(python: Path, arguments: Sequence[str]) -> Any:
        asked.append(arguments)
        return tool.read_report(REPORT)

    monkeypatch.setattr(tool, "environment", lambda *_: Path("python"))
    monkeypatch.setattr(tool, "clashing", lambda _: None)
    monkeypatch.setattr(tool, "version_of", lambda *_: "2.14.1")
    monkeypatch.setattr(tool, "describe", lambda *_: DESCRIBED)
    monkeypatch.setattr(tool, "run_tests", run_tests)
    return asked


def test_a_report_is_read_and_counted() -> None:
    tests = tool.read_report(REPORT)
    assert str(tool.counted(tests)) == "2 passed, 2 skipped, **1 failed**"
    own = [name.rsplit("::")[-1] for name, _ in tests if tool.is_of(name, "mnn")]
    assert own == ["test_integers", "test_matches[mnn-residual]", "test_matches[mnn]"]
    assert not tool.is_of("tests.test_torch_more::test_a[executorch]", "torch")


def test_every_runtime_has_one_environment() -> None:
    tested = [name for choice in tool.choices() for name in tool.tested_in(choice)]
    assert sorted(tested) == sorted(RUNTIMES)
    assert all(tool.extras().values())


def test_failures_are_rows_and_the_status(
    prepared: list[Sequence[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["mnn", "--own", "--docs", str(tmp_path)]) == 1
    assert "not test_ncnn.py and not [ncnn" in " ".join(prepared[0]) and "[mnn" not in " ".join(prepared[0])
    monkeypatch.setattr(tool, "read_report", lambda _: [("tests.test_mnn::test_it", "passed")])
    assert tool.main(["mnn", "--docs", str(tmp_path)]) == 0

    def broken(*_: Any) -> Path:
        raise tool.Failed("pip install ended with 1: no matching distribution")

    monkeypatch.setattr(tool, "environment", broken)
    assert tool.main(["ncnn", "--docs", str(tmp_path)]) == 1
    rows = {row["runtime"]: row for row in json.loads((tmp_path / "runtimes-tested.json").read_text())}
    assert rows["mnn"]["passed"] and rows["mnn"]["precisions"] == ["fp32", "fp16"] and not rows["ncnn"]["passed"]
    page = (tmp_path / "runtimes-tested.md").read_text()
    assert "| mnn | MNN 3.6.1 | fp32, fp16 | 1 passed, 0 skipped |" in page
    assert "- ncnn: pip install ended with 1: no matching distribution" in page
    assert "ncnn: FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(("described", "both", "said"), [
    ({**DESCRIBED, "missing": "MNN is not installed"}, None, "MNN is not installed"),
    (DESCRIBED, "onnxruntime and onnxruntime-gpu are both installed", "both installed"),
])  # fmt: skip
def test_what_cannot_be_used_has_not_passed(described: dict[str, Any], both: str | None, said: str) -> None:
    found = tool.row("mnn", "mnn", described, [("tests.test_mnn::test_it", "passed")], both, "2.14.1")
    assert not found["passed"] and said in found["why"]
    untested = tool.row("mnn", "mnn", DESCRIBED, [("tests.test_mnn::test_it", "skipped")], None, "2.14.1")
    assert not untested["passed"] and untested["why"] == "none of its tests ran"


def test_an_environment_is_used_again_while_it_is_as_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Sequence[str]] = []

    def call(command: Sequence[str]) -> str:
        called.append(command)
        if "venv" in command:
            (tmp_path / "mnn" / "bin").mkdir(parents=True, exist_ok=True)
            (tmp_path / "mnn" / "bin" / "python").touch()
        return f"{tmp_path}\n"

    monkeypatch.setattr(tool, "_call", call)
    for share, torch in ((True, []), (True, []), (False, ["torch==2.14.1"]), (False, ["torch==2.14.1"])):
        tool.environment("mnn", tmp_path, share, torch)
    installed = [list(command[2:]) for command in called if "pip" in command]
    assert installed[0] == ["pip", "install", *tool.extras()["mnn"]]
    assert installed[1] == ["pip", "install", "torch==2.14.1"] and len(installed) == 3
    assert installed[2][2] == "-e" and any(text.startswith("pytest") for text in installed[2])
    shared = (tmp_path / "graphprune-shared.pth").read_text().splitlines()
    assert shared[0] == str(tool.ROOT) and Path(shared[1], "torch").is_dir()


def test_an_unknown_runtime_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.main(["nccn"])
    assert "unknown: nccn; there are none, openvino" in capsys.readouterr().err
