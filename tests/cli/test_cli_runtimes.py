"""The commands that know runtimes: runtimes, export --runtime, bench --runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from graphprune.deployment import across, exporting
from graphprune.runtimes import listing
from graphprune.runtimes.adapters import RUNTIMES
from tests.cli.command_line import as_json, failed, ok, wrong, zoo_folder
from tests.deployment.local import LocalWorker


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for room in (across, exporting, listing):
        monkeypatch.setattr(room, "Worker", LocalWorker)
    yield from zoo_folder(tmp_path, monkeypatch)


def test_every_runtime_is_listed_with_what_is_missing() -> None:
    found = {entry["name"]: entry for entry in as_json("runtimes")["runtimes"]}
    assert set(found) == set(RUNTIMES) and found["onnxruntime"]["missing"] is None
    for entry in found.values():
        assert entry["missing"] is None or "pip install" in entry["missing"] or entry["name"] == "inductor"
        assert set(entry["offered"]) | set(entry["refused"]) == {"fp32", "bf16", "fp16", "int8"}
    assert "onnxruntime" in ok("runtimes")


def test_export_for_a_runtime_and_bench_over_runtimes() -> None:
    made = as_json("export", "zoo:net", "small.pt2", "--runtime", "torch", "--precision", "bf16", "--ratio", "0.5")
    assert made["runtime"] == "torch" and made["in_force"] and made["verification"]["passed"]
    assert Path("small.pt2").is_file() and made["latency_ms"] > 0
    quick = ["--rounds", "2", "--warmup", "0", "--min-time", "0"]
    report = as_json("bench", "zoo:net", "small=small.pt2", "--runtime", "torch", *quick)
    assert [row["model"] for row in report["rows"]] == ["net", "small"]
    assert {row["runtime"] for row in report["rows"]} == {"torch"}


@pytest.mark.parametrize(("given", "python"), [("torch=/envs/a=b/python", "/envs/a=b/python"), ("torch", None)])
def test_export_by_the_interpreter_of_another_environment(
    given: str, python: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def named(runtime: str, **settings: object) -> LocalWorker:
        asked.append(settings["python"])
        return LocalWorker(runtime)

    monkeypatch.setattr(exporting, "Worker", named)
    assert as_json("export", "zoo:net", "small.pt2", "--runtime", given)["runtime"] == "torch"
    assert asked == [python]


def test_mistakes_are_one_line() -> None:
    assert "did you mean 'torch'" in failed("export", "zoo:net", "a.pt2", "--runtime", "torhc")
    assert "data: int8 needs inputs" in failed("export", "zoo:net", "a.onnx", "--precision", "int8")
    assert "plain ONNX files" in wrong("export", "zoo:net", "a.onnx", "--runtime", "onnxruntime", "--opset", "18")
    assert "add --input-shape" in failed("bench", "a.pt2", "--runtime", "torch")
    assert not Path("a.pt2").exists() and not Path("a.onnx").exists()
