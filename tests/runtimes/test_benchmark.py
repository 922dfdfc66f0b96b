from __future__ import annotations

import gc
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphprune.runtimes.measure as measure
from graphprune import benchmark
from graphprune.errors import GraphPruneError
from graphprune.runtimes import BenchmarkReport, Provider, export_onnx
from graphprune.runtimes.measure import Settings, alternate
from graphprune.runtimes.providers import CPU, CUDA, why_not
from graphprune.runtimes.statistics import schedule, speedup_interval, spread
from tests.runtimes import nets

QUICK: dict[str, Any] = {"warmup": 1, "rounds": 3, "min_time": 0.0, "provider": "cpu"}


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made, to see that nothing stays there."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def left_in(folder: Path) -> list[str]:
    """What graphprune left there; torch keeps a cache of its own among temporary files."""
    return [name for name in os.listdir(folder) if "torchinductor" not in name]


def settings(**changes: Any) -> Settings:
    values: dict[str, Any] = {
        "provider": Provider(CPU),
        "options": {},
        "threads": 1,
        "cuda_graph": False,
        "warmup": 4,
        "rounds": 6,
        "min_time": 10.0,
        "seed": 7,
    }
    return Settings(**{**values, **changes})


def test_models_alternate_and_samples_are_means() -> None:
    """Against a clock that only the models move: everything that is measured can be predicted."""
    now, log = [0.0], []
    costs = [3.0, 0.5, 25.0]
    drift = [1.0]

    def model(i: int) -> Any:
        def run() -> None:
            log.append(i)
            now[0] += costs[i] * drift[0]

        return run

    def advance() -> None:
        drift[0] += 1

    calls, samples = alternate([model(i) for i in range(3)], settings(), advance, clock=lambda: now[0])
    # As many calls as take the 10 seconds asked for: 4 x 3, 20 x 0.5, 1 x 25.
    assert calls == [4, 20, 1]
    assert samples == [[cost * factor for factor in range(1, 7)] for cost in costs]
    expected = [i for i in range(3) for _ in range(4)] + [i for i in range(3) for _ in range(3)]
    for order in schedule(3, 6, seed=7):
        expected += [i for i in order for _ in range(calls[i])]
    assert log == expected


def test_the_garbage_collector_rests_and_comes_back() -> None:
    seen = []

    def fail() -> None:
        seen.append(gc.isenabled())
        if len(seen) > 4:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        alternate([fail], settings(warmup=1, min_time=0.0), lambda: None)
    assert seen == [True, False, False, False, False] and gc.isenabled()


def test_a_benchmark(scratch: Path, tmp_path: Path) -> None:
    x = torch.randn(1, 3, 8, 8)
    file = export_onnx(nets.ConvNet(width=4), x, tmp_path / "small.onnx")
    models: dict[str, Any] = {"dense": nets.ConvNet(), "half": nets.ConvNet(width=4), "file": file}
    report = benchmark(models, x, batch_sizes=[1, 3], threads=2, baseline="half", **QUICK)
    assert left_in(scratch) == []
    assert [(row.model, row.batch_size) for row in report.rows] == [(m, b) for b in (1, 3) for m in models]
    for row in report.rows:
        samples = row.samples_ms
        assert len(samples) == 3 and min(samples) > 0 and row.calls == 1
        assert (row.median_ms, row.p10_ms, row.p90_ms) == pytest.approx(spread(samples))
        other = report.row("half", row.batch_size)
        expected = speedup_interval(other.samples_ms, samples, seed=0)
        assert (row.speedup, row.speedup_low, row.speedup_high) == pytest.approx(expected)
        assert set(row.nodes) == {CPU} and row.share_on(CPU) == 1
        assert row.items_per_second == pytest.approx(1000 * row.batch_size / row.median_ms)
    dense, half, given = (report.row(name) for name in models)
    assert (half.speedup, half.speedup_low, half.speedup_high) == (1, 1, 1)
    assert dense.parameters == sum(p.numel() for p in models["dense"].parameters()) > half.parameters
    assert given.parameters == 4 * 27 + 4 + 6 * 36 + 6 + 24 + 4
    assert dense.max_relative_error is not None and dense.max_relative_error < 1e-4
    assert given.max_relative_error is None
    assert given.file_mib == pytest.approx(file.path.stat().st_size / 2**20)
    assert report.baseline == "half" and report.threads == 2 and report.provider == CPU
    assert report.machine["cpu"] and report.machine["gpu"] is None and report.versions["torch"] == torch.__version__
    assert report.notes == () or "share" in report.notes[0]
    with pytest.raises(GraphPruneError, match="no row for model 'dense' at batch size 2"):
        report.row("dense", 2)


def test_the_report_as_text_json_and_plot(scratch: Path, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    report = benchmark({"[a]": nets.ConvNet(), "b": nets.ConvNet(width=4)}, x, check=False, **QUICK)
    text = str(report)
    for part in ("[a]", "b", "speed-up", CPU, "1 thread,", "torch", report.machine["cpu"], "3 rounds"):
        assert part in text
    assert len(list(report.table().columns)) == 11 and report.table().row_count == 2
    path = report.to_json(tmp_path / "report.json")
    data = json.loads(path.read_text())
    assert data == json.loads(json.dumps(report.to_dict()))
    assert data["rows"][1]["model"] == "b" and data["rows"][1]["nodes"] == dict(report.row("b").nodes)
    assert np.median(data["rows"][0]["samples_ms"]) == pytest.approx(report.row("[a]").median_ms)
    assert data["rows"][0]["max_relative_error"] is None and data["baseline"] == "[a]"
    pytest.importorskip("matplotlib")
    assert report.plot(tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path)) == ["report.json", "report.png", "scratch"]


def test_rows_with_nodes_elsewhere_are_said(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = measure.probe

    def some_elsewhere(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        return type(found)({CPU: 3, "OtherProvider": 1}, found.outputs)

    monkeypatch.setattr(measure, "probe", some_elsewhere)
    report = benchmark({"a": nets.ConvNet()}, torch.randn(2, 3, 8, 8), check=False, **QUICK)
    assert f"'a' runs 75 % of its nodes on {CPU} (1 on OtherProvider)" in report.notes
    assert "3 of 4" in str(report) and report.rows[0].share_on("OtherProvider") == 0.25


@pytest.mark.skipif(why_not(CUDA) is None, reason="CUDA loads here")
def test_auto_says_what_it_took(scratch: Path) -> None:
    quick = {**QUICK, "provider": "auto"}
    report = benchmark({"a": nets.ConvNet()}, torch.randn(2, 3, 8, 8), check=False, **quick)
    assert report.provider == CPU and CUDA in report.notes[0] and "note: provider 'auto'" in str(report)
    with pytest.raises(GraphPruneError, match="cuda_graph needs the CUDA provider, but provider 'auto'"):
        benchmark({"a": nets.ConvNet()}, torch.randn(2, 3, 8, 8), cuda_graph=True, **quick)
    with pytest.raises(GraphPruneError, match=f"provider 'cuda' is not usable here.*{CPU}"):
        benchmark({"a": nets.ConvNet()}, torch.randn(2, 3, 8, 8), **{**QUICK, "provider": "cuda"})


def test_a_model_with_a_fixed_batch(scratch: Path) -> None:
    report = benchmark({"fixed": nets.FixedBatch()}, torch.randn(2, 4), **QUICK)
    assert report.rows[0].batch_size == 2
    assert "'fixed' was exported once per batch size" in report.notes[0]
    with pytest.raises(GraphPruneError, match=r"model 'fixed'.*cannot be run on example_input at batch size 3"):
        benchmark({"fixed": nets.FixedBatch()}, torch.randn(2, 4), batch_sizes=[2, 3], **QUICK)
    assert left_in(scratch) == []


def test_a_file_with_a_fixed_batch(scratch: Path, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    path = export_onnx(nets.ConvNet(), x, tmp_path / "net.onnx", dynamic_batch=False).path
    assert benchmark({"file": str(path)}, x, **QUICK).rows[0].batch_size == 2
    with pytest.raises(GraphPruneError, match=r"model 'file': input 'x' of the file has shape \[2, 3, 8, 8\]"):
        benchmark({"file": path}, x, batch_sizes=4, **QUICK)


def test_dict_inputs_without_batch(scratch: Path) -> None:
    class Scalar(nn.Module):
        def forward(self, a: torch.Tensor, *, b: torch.Tensor) -> torch.Tensor:
            return a * b + 1

    report = benchmark({"s": Scalar()}, {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}, **QUICK)
    assert report.rows[0].batch_size is None and report.rows[0].items_per_second > 0
    ids = torch.zeros(1, 5, dtype=torch.long)
    report = benchmark({"t": nets.TokenNet()}, {"ids": ids}, batch_sizes=[1, 2], **QUICK)
    assert [row.batch_size for row in report.rows] == [1, 2]


X = torch.randn(2, 3, 8, 8)
NET: dict[str, Any] = {"a": nets.ConvNet()}


@pytest.mark.parametrize(
    ("models", "changes", "message"),
    [
        ({}, {}, "at least one entry"),
        (nets.ConvNet(), {}, "at least one entry"),
        ({"a": 3}, {}, "models\\['a'\\]: expected a torch.nn.Module or the path of an ONNX file, got an int"),
        ({3: nets.ConvNet()}, {}, "name must be a string"),
        ({"a": "missing.onnx"}, {}, "there is no file missing.onnx"),
        ({"a": __file__}, {}, "is no ONNX file"),
        (NET, {"baseline": "b"}, "baseline 'b' is not among the models: a"),
        (NET, {"threads": 0}, "threads: expected an integer of at least 1"),
        (NET, {"threads": True}, "threads: expected"),
        (NET, {"rounds": 1}, "rounds: expected an integer of at least 2"),
        (NET, {"warmup": -1}, "warmup: expected"),
        (NET, {"min_time": -0.1}, "min_time: expected"),
        (NET, {"min_time": math.inf}, "min_time: expected"),
        (NET, {"seed": -1}, "seed: expected"),
        (NET, {"batch_sizes": []}, "batch_sizes is empty"),
        (NET, {"batch_sizes": [1, 0]}, "batch size: expected an integer of at least 1"),
        (NET, {"batch_sizes": [1, 1]}, "an entry twice"),
        (NET, {"provider": "nonsense"}, "provider 'nonsense' is not usable here"),
        (NET, {"provider_options": {"a": 1}}, f"{CPU} has no options"),
        (NET, {"cuda_graph": True}, "cuda_graph needs the CUDA provider"),
        ({"a": nets.Unsupported()}, {}, "model 'a'"),
    ],
)
def test_bad_input(scratch: Path, models: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphPruneError, match=message):
        benchmark(models, X, **{**QUICK, **changes})
    assert left_in(scratch) == []


def test_an_example_that_cannot_be_resized(scratch: Path) -> None:
    with pytest.raises(GraphPruneError, match="cannot be resized"):
        benchmark(NET, torch.tensor(1.0), batch_sizes=[2], **QUICK)


def test_progress_goes_to_standard_error(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = benchmark(NET, X, check=False, progress=True, **QUICK)
    assert capsys.readouterr().out == ""
    assert isinstance(report, BenchmarkReport)


@pytest.mark.skipif(why_not(CUDA) is not None, reason="needs CUDA")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_on_a_gpu(scratch: Path, cuda_graph: bool) -> None:
    models: dict[str, Any] = {"dense": nets.ConvNet(), "half": nets.ConvNet(width=4)}
    quick = {**QUICK, "provider": "auto"}
    report = benchmark(models, X, batch_sizes=[1, 4], cuda_graph=cuda_graph, **quick)
    assert report.provider == CUDA and report.machine["gpu"]
    assert all(row.nodes.get(CUDA, 0) > 0 for row in report.rows)
