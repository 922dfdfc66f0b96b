"""Tables and plans of any runtime and precision: what is written stands for what it should, and its nodes are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphprune
from graphprune import Budget, GraphPruneError, Target
from graphprune.runtimes.adapters import openvino
from graphprune.runtimes.latency import by_adapter
from graphprune.runtimes.latency.by_adapter import AdapterRig
from graphprune.runtimes.latency.chains import KINDS, chain_file
from graphprune.runtimes.latency.kernels import Sample
from graphprune.runtimes.latency.modules import chain_module, sample_module
from graphprune.runtimes.latency.target import rig_of
from tests.deployment.local import LocalWorker

from .test_meters import SAMPLES, shape_in_torch

CELLS = [("openvino", "int8"), ("onnxruntime", "int8")]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Runtimes in this process, a few calls each, and widths that are not scanned."""
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(by_adapter, "Worker", LocalWorker)
    monkeypatch.setattr(by_adapter, "_RUNS", 6)
    monkeypatch.setattr(openvino, "_SITTINGS", 1)
    for name in ("_ALONE", "_CHAINS", "_NETWORKS"):
        monkeypatch.setattr(by_adapter, name, (1, 3, 1e-4))


def opened(runtime: str, precision: str) -> AdapterRig:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    return AdapterRig(runtime, precision, "auto", 1)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 48, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 5),
    ).eval()  # fmt: skip


X = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.kernel.op)
def test_modules_compute_what_the_files_do(sample: Sample) -> None:
    module, tensors = sample_module(sample)
    assert tuple(module(*tensors).shape) == shape_in_torch(sample)
    assert sum(p.numel() for p in module.parameters() if p.dim() > 1) == (
        0 if sample.kernel.op == "matmul" else sample.weights
    )


@pytest.mark.parametrize("kind", KINDS)
def test_chains_are_the_same_as_modules_and_as_files(kind: str) -> None:
    import onnx

    model, feeds, result = chain_file(kind, 37)
    graph = onnx.load_from_string(model).graph
    module, tensors = chain_module(kind, 37)
    assert [tuple(value.shape) for value in feeds.values()] == [tuple(t.shape) for t in tensors]
    known = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.output}
    assert known[result] == list(module(*tensors).shape)
    sizes = [sorted(tuple(w.dims) for w in graph.initializer), sorted(tuple(p.shape) for p in module.parameters())]
    elements = [sorted(torch.Size(s).numel() for s in found) for found in sizes]
    assert elements[0] == elements[1]


@pytest.mark.parametrize(("runtime", "precision"), CELLS)
def test_every_computation_is_found_among_the_nodes(runtime: str, precision: str) -> None:
    with opened(runtime, precision) as rig:
        found = rig.meter(SAMPLES)
        assert len(found) == len(SAMPLES) and all(seconds >= 0 for seconds, _ in found)
        assert all(node is not None and node.heavy for _, node in found)
        assert rig.about["runtime"] == runtime and rig.about["precision"] == precision


@pytest.mark.parametrize(("runtime", "precision"), CELLS)
def test_nodes_of_a_network_are_those_of_its_computations_alone(runtime: str, precision: str) -> None:
    from graphprune.dependency import trace
    from graphprune.runtimes.latency.forecast import network_units

    with opened(runtime, precision) as rig, rig.bench(net(), X) as bench:
        run = bench.profile()
        alone = [node for _, node in rig.meter([unit.sample for unit in network_units(trace(net(), X))])]
        inside = {node.signature for node in run.nodes if node.heavy}
        assert run.wall > 0 and sum(node is not None and node.signature in inside for node in alone) >= 2


def test_where_nodes_are_not_timed_each_computation_is_a_file() -> None:
    with AdapterRig("torch", "fp32", "auto", 1) as rig:
        found = rig.meter(SAMPLES[:2])
        assert all(seconds > 0 and node is None for seconds, node in found)
        assert all(seconds > 0 for seconds in rig.chain_meter("linear", [7, 9]))
        with rig.bench(net(), X) as bench:
            assert bench.profile().nodes == () and all(seconds > 0 for seconds in bench.compare(net()))


@pytest.mark.parametrize(("runtime", "precision"), [("openvino", "int8"), ("torch", "fp32")])
def test_a_plan_for_it(monkeypatch: pytest.MonkeyPatch, runtime: str, precision: str) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    monkeypatch.setattr(AdapterRig, "chain_meter", lambda self, kind, widths: [1e-6 * width for width in widths])
    model, target = net(), Target(runtime=runtime, precision=precision, attempts=1)
    plan = graphprune.plan(model, X, budget=Budget(latency=0.8), target=target)
    assert plan.latency is not None and plan.latency.measured_ms is not None
    assert (plan.latency.about["runtime"], plan.latency.about["precision"]) == (runtime, precision)
    graphprune.verify(model, plan.apply(model), plan, X).raise_on_failure()


def test_a_table_is_of_one_runtime_and_precision(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(AdapterRig, "chain_meter", lambda self, kind, widths: [1e-6 * width for width in widths])
    target = Target(runtime="onnxruntime", precision="int8")
    path = graphprune.latency_table(net(), X, target).save(tmp_path / "table.json")
    budget = Budget(latency=0.8)
    plan = graphprune.plan(net(), X, budget=budget, target=Target(precision="int8", table=path))
    assert plan.latency is not None and plan.latency.measured_ms is None
    with pytest.raises(GraphPruneError, match="made for onnxruntime in int8, not for openvino in int8"):
        graphprune.plan(net(), X, budget=budget, target=Target(runtime="openvino", precision="int8", table=path))
    with pytest.raises(GraphPruneError, match="not for onnxruntime in fp32"):
        graphprune.plan(net(), X, budget=budget, target=Target(table=path))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"runtime": "tensorflow"}, "target: runtime"),
        ({"precision": "int4"}, "target: precision"),
        ({"precision": "int8", "provider_options": {"a": 1}}, "provider_options are those of ONNX Runtime in fp32"),
    ],
)
def test_what_no_target_can_be(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(GraphPruneError, match=said):
        Target(**arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"precision": "fp16", "provider": "cpu"}, "precision 'fp16' is not offered"),
        ({"runtime": "openvino", "provider": "cuda"}, "OpenVINO runs on the CPU alone"),
        ({"runtime": "torch", "precision": "int8"}, "precision 'int8' is not offered for torch"),
    ],
)
def test_what_a_runtime_does_not_have(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(GraphPruneError, match=said):
        rig_of(Target(**arguments))


def test_files_and_processes_are_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = AdapterRig("onnxruntime", "int8", "cpu", 1)
    with rig, rig.bench(net(), X):
        folder = rig.folder
        assert any(folder.iterdir())
    assert not folder.exists()

    def unusable(self: LocalWorker, precision: str) -> dict[str, Any]:
        raise GraphPruneError("not there")

    monkeypatch.setattr(LocalWorker, "check", unusable)
    with pytest.raises(GraphPruneError, match="not there"), AdapterRig("onnxruntime", "int8", "cpu", 1):
        pass


