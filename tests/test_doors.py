"""Every public function that takes a model: what it says of things that are none, what it does with wrapped models, and
that `torch.inference_mode()` changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError, sparsity
from graphprune.deployment import exporting
from graphprune.support.unwrapping import unwrapped
from tests.deployment.local import LocalWorker
from tests.public_api import public_modules

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1])
DATA = [(X, Y), (X + 1, Y)]


@torch.inference_mode(False)
def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 4)).eval()


def planned() -> graphprune.Plan:
    return graphprune.plan(network(), X, 0.5)


def small() -> nn.Module:
    return planned().apply(network())


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters() if isinstance(model, nn.Module) else network().parameters(), 0.1)


def loss(output: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, targets)


def train(model: nn.Module, first: int, last: int) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)


def masked() -> nn.Module:
    return sparsity.magnitude(network(), 0.5)


def _stepped(penalty: graphprune.GrowingPenalty) -> Any:
    penalty.step()
    return penalty.state_dict()


def _with_masks(model: Any) -> Any:
    return sparsity.magnitude(model, 0.5) if isinstance(model, nn.Module) else model


def saved_sparse(folder: Path) -> Path:
    return sparsity.save(masked(), folder / "model.gps")


# Every argument that is a model: (the model, a folder) -> the result. Whoever adds such a function adds a line.
def exported(model: Any, folder: Path) -> int:
    """The size of the file that is written, in this process."""
    with mock.patch.object(exporting, "Worker", LocalWorker):
        return graphprune.export(model, X, folder / "to.onnx", rounds=0).size


CALLS: dict[str, Callable[[Any, Path], Any]] = {
    "graphprune.trace.model": lambda m, _: [g.name for g in graphprune.trace(m, X).groups],
    "graphprune.plan.model": lambda m, _: graphprune.plan(m, X, 0.5),
    "graphprune.prune.model": lambda m, _: graphprune.prune(m, X, 0.5),
    "graphprune.Plan.apply.model": lambda m, _: planned().apply(m),
    "graphprune.Plan.operated.model": lambda m, _: planned().operated(m),
    "graphprune.Plan.check.model": lambda m, _: planned().check(m),
    "graphprune.verify.original": lambda m, _: graphprune.verify(m, small(), planned(), X).passed,
    "graphprune.verify.pruned": lambda m, _: graphprune.verify(
        network(), planned().apply(m) if isinstance(m, nn.Module) else m, planned(), X
    ).passed,
    "graphprune.save.model": lambda m, folder: graphprune.load(
        graphprune.save(m, folder / "m.safetensors"), network()
    ),
    "graphprune.load.build_model": lambda m, folder: graphprune.load(
        graphprune.save(small(), folder / "m.safetensors"), m
    ),
    "graphprune.export.model": exported,
    "graphprune.export_onnx.model": lambda m, folder: graphprune.export_onnx(m, X, folder / "m.onnx").nodes,
    "graphprune.benchmark.models": lambda m, _: (
        graphprune.benchmark({"m": m}, X, rounds=2, warmup=1).rows[0].parameters
    ),
    "graphprune.count.model": lambda m, _: graphprune.count(m, X).to_dict(),
    "graphprune.doctor.model": lambda m, _: graphprune.doctor(m, X).to_dict()["prunable"],
    "graphprune.advise.model": lambda m, _: str(graphprune.advise(m, X, "resources")),
    "graphprune.sensitivity.model": lambda m, _: graphprune.sensitivity(m, X, ratios=[0.5]).curves,
    "graphprune.Synthetic.inputs.model": lambda m, _: graphprune.Synthetic(4, steps=2).inputs(m, X)[0],
    "graphprune.synthesize.model": lambda m, _: graphprune.synthesize(m, X, 4, steps=2)[0],
    "graphprune.recover.model": lambda m, _: graphprune.recover(m, planned(), X, DATA).model,
    "graphprune.Evaluation.__call__.model": lambda m, _: graphprune.Evaluation(DATA)(m),
    "graphprune.finetune.model": lambda m, _: graphprune.finetune(m, DATA, epochs=1, progress=False).model,
    "graphprune.finetune.teacher": lambda m, _: graphprune.finetune(
        network(), DATA, epochs=1, teacher=m, progress=False
    ).model,
    "graphprune.GroupPenalty.__init__.model": lambda m, _: graphprune.GroupLasso(m, X).settings(),
    "graphprune.GroupPenalty.on.model": lambda m, _: graphprune.GroupLasso(network(), X).on(m).norms()[0][1],
    "graphprune.GroupLasso.__init__.model": lambda m, _: graphprune.GroupLasso(m, X).norms()[0][1],
    "graphprune.GrowingPenalty.__init__.model": lambda m, _: _stepped(graphprune.GrowingPenalty(m, X, steps=3)),
    "graphprune.carry_optimizer.model": lambda m, _: graphprune.carry_optimizer(sgd(m), m, small(), planned()),
    "graphprune.carry_optimizer.small": lambda m, _: _carried(m),
    "graphprune.fit_config.model": lambda m, _: _refused("has no configuration", lambda: graphprune.fit_config(m, X)),
    "graphprune.fold_conv_bn.model": lambda m, _: graphprune.fold_conv_bn(m, X),
    "graphprune.latency_table.model": lambda m, _: sorted(graphprune.latency_table(m, X).contexts),
    "graphprune.pipeline.model": lambda m, _: graphprune.pipeline(m, X, DATA, finetune_epochs=1, progress=False).model,
    "graphprune.plan_kernels.model": lambda m, _: graphprune.plan_kernels(m, X),
    "graphprune.shrink_kernels.model": lambda m, _: graphprune.shrink_kernels(m, X),
    "graphprune.prune_gradually.model": lambda m, _: graphprune.prune_gradually(m, X, 0.5, steps=2),
    "graphprune.report.model": lambda m, _: graphprune.report(m, small(), X).to_dict()["before"],
    "graphprune.report.pruned": lambda m, _: graphprune.report(network(), m, X).to_dict()["after"],
    "graphprune.report.unrecovered": lambda m, _: dict(
        graphprune.report(network(), small(), X, unrecovered=m, evaluate=DATA).scores
    ),
    "graphprune.report.curve": lambda m, _: graphprune.report(network(), small(), X, curve={"m": (m, 0.5)}).points,
    "graphprune.sparsity.Channels.__call__.model": lambda m, _: sparsity.Channels(X)(m, 0.5),
    "graphprune.sparsity.Scheduler.__init__.model": lambda m, _: sparsity.Scheduler(
        m, sparsity.schedule("linear", 0.0, 0.5, 1)
    ).step(),
    "graphprune.sparsity.blocks.model": lambda m, _: sparsity.blocks(m, 0.5, (2, 1)),
    "graphprune.sparsity.gradient.model": lambda m, _: sparsity.gradient(m, DATA, loss, 0.5),
    "graphprune.sparsity.load.model": lambda m, folder: sparsity.load(saved_sparse(folder), m),
    "graphprune.sparsity.lottery_ticket.model": lambda m, _: sparsity.lottery_ticket(
        m, train, 0.5, steps=2, rounds=1
    ).fresh(),
    "graphprune.sparsity.magnitude.model": lambda m, _: sparsity.magnitude(m, 0.5),
    "graphprune.sparsity.make_permanent.model": lambda m, _: sparsity.make_permanent(_with_masks(m)),
    "graphprune.sparsity.masks.model": lambda m, _: sparsity.masks(m),
    "graphprune.sparsity.match_statistics.model": lambda m, _: sparsity.match_statistics(
        _with_masks(m), network(), [X]
    ),
    "graphprune.sparsity.match_statistics.dense": lambda m, _: sparsity.match_statistics(masked(), m, [X]),
    "graphprune.sparsity.n_m.model": lambda m, _: sparsity.n_m(m, ignore="0"),
    "graphprune.sparsity.reconstruct.model": lambda m, _: sparsity.reconstruct(
        _with_masks(m), network(), X, DATA
    ),
    "graphprune.sparsity.reconstruct.dense": lambda m, _: sparsity.reconstruct(masked(), m, X, DATA),
    "graphprune.sparsity.report.model": lambda m, _: str(sparsity.report(m)),
    "graphprune.sparsity.save.model": lambda m, folder: sparsity.save(m, folder / "m.gps").read_bytes(),
    "graphprune.sparsity.semi_structured.model": lambda m, _: _refused(
        "no Linear weight keeps", lambda: sparsity.semi_structured(m)
    ),
    "graphprune.sparsity.set_masks.model": lambda m, _: sparsity.set_masks(m, sparsity.masks(masked())),
}
# A model whose result is a copy of what was handed over, wrapper and all: they train, and a wrapper is how.
KEEP = {"graphprune.finetune.model"}


def _carried(m: Any) -> Any:
    dense, given = network(), planned().apply(m) if isinstance(m, nn.Module) else m
    return graphprune.carry_optimizer(sgd(dense), dense, given, planned())


def _refused(message: str, call: Callable[[], Any]) -> str:
    """What is said of a network that was looked at and does not fit."""
    try:
        return str(call())
    except GraphPruneError as error:
        if message not in str(error):
            raise
        return str(error)


def _models_of(value: Any) -> Iterator[str]:
    for name, parameter in inspect.signature(value).parameters.items():
        told = re.sub(r"Callable\[.*?\], [^\]]*\]", "", str(parameter.annotation))
        if re.search(r"\b(nn\.Module|Model)\b", told) and name != "ignore":
            yield name


def arguments_that_are_models() -> set[str]:
    """Of every public function and method; results that hold a model are made by the library."""
    found = set()
    for module in public_modules():
        for name in module.__all__:
            value, path = getattr(module, name), f"{module.__name__}.{name}"
            if inspect.isfunction(value):
                found |= {(value, f"{path}.{p}") for p in _models_of(value)}
            elif inspect.isclass(value):
                for method, member in vars(value).items():
                    made = method == "__init__" and not dataclasses.is_dataclass(value)
                    if inspect.isfunction(member) and (made or method == "__call__" or not method.startswith("_")):
                        found |= {(member, f"{path}.{method}.{p}") for p in _models_of(member)}
    first: dict[Any, str] = {}
    for value, path in sorted(found, key=lambda item: item[1].count(".")):
        first.setdefault((value, path.rpartition(".")[2]), path)
    return set(first.values())


def test_every_argument_that_is_a_model_is_tested() -> None:
    # a context is made by the library, for criteria
    assert arguments_that_are_models() - {"graphprune.importance.ImportanceContext.__init__.model"} == set(CALLS)


class Pipeline:
    """As transformers and diffusers make them."""

    def __init__(self) -> None:
        self.scheduler = object()
        self.unet, self.vae = network(), network()


class Trainer:
    """As Lightning's: the network is behind a property, and others raise."""

    @property
    def lightning_module(self) -> nn.Module:
        return network()

    @property
    def model(self) -> nn.Module:
        raise RuntimeError("not attached")


class YOLO(nn.Module):
    __module__ = "ultralytics.engine.model"

    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def forward(self, source: Any = None) -> list[Any]:
        raise NotImplementedError


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: nn.Module = torch.jit.script(network())
    return found


def exported() -> Any:
    return torch.export.export(network(), (X,))


THINGS: dict[str, tuple[Callable[[], Any], str]] = {
    "class": (lambda: nn.Linear, r"the class Linear; make an instance: Linear\(\.\.\.\)"),
    "none": (lambda: None, "got None; pass the network"),
    "state dict": (lambda: network().state_dict(), r"an OrderedDict, a state dict; build the network and load it"),
    "checkpoint": (lambda: {"model": network().state_dict(), "epoch": 3}, r"load checkpoint\['model'\] into it first"),
    "dict of modules": (lambda: {"ema": network()}, r"a dict that holds modules; pass one of them: \['ema'\]"),
    "path": (lambda: "model.pt", r"the path 'model.pt'; build the network and load the file"),
    "function": (lambda: network, "the function network; pass the network that it makes"),
    "method": (lambda: network().forward, "the method forward of a Sequential; pass the network itself"),
    "list": (lambda: [network()], "a list; pass one network at a time"),
    "tensor": (lambda: X, "a tensor; .* comes before its inputs"),
    "number": (lambda: 3, "an int; pass the network itself"),
    "pipeline": (Pipeline, r"a Pipeline, which holds networks and is none; pass its \.unet or \.vae"),
    "trainer": (Trainer, r"a Trainer, which holds networks and is none; pass its \.lightning_module"),
    "yolo": (YOLO, r"a YOLO of ultralytics.*pass its \.model"),
    "scripted": (scripted, r"is TorchScript \(a RecursiveScriptModule\).*pass the Python module"),
    "scripted part": (lambda: nn.Sequential(scripted(), nn.ReLU()), r"\.0 is TorchScript"),
    "exported": (exported, "an ExportedProgram of torch.export; pass the module that it was exported from"),
}
# What can be run and cannot be pruned: good enough for a teacher, and for a score.
ONLY_RUN = ("scripted", "scripted part", "yolo")
# What the argument takes beside a module that can be pruned.
TAKEN = {
    "graphprune.sparsity.save.model": ("state dict", "checkpoint", "dict of modules"),
    "graphprune.load.build_model": ("class", "function", "method", "exported"),
    "graphprune.benchmark.models": ("path",),
    "graphprune.finetune.teacher": ("none", *ONLY_RUN),
    "graphprune.Evaluation.__call__.model": ONLY_RUN,
    "graphprune.report.unrecovered": ("none",),
    "graphprune.sparsity.load.model": ("none",),
}


@pytest.mark.parametrize("thing", THINGS)
def test_what_is_no_network_is_named(thing: str, tmp_path: Path) -> None:
    make, message = THINGS[thing]
    value = make()
    for name, call in CALLS.items():
        if thing not in TAKEN.get(name, ()):
            with pytest.raises(GraphPruneError, match=message):
                call(value, tmp_path)
                raise AssertionError(f"{name} takes a {thing}")


def test_modules_with_networks_inside_are_networks() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.unet = network(), None

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    assert len(graphprune.prune(Own(), X, 0.5).model[0].weight) == 4


def digest(value: Any) -> Any:
    """Something to compare: values of a network by name, data of a plan."""
    if isinstance(value, nn.Module):
        return {name: tensor.clone() for name, tensor in unwrapped(value).state_dict().items()}
    if isinstance(value, graphprune.Plan):
        return {"removed": value.removed, "groups": value.groups, "folds": value.folds}  # without lines of code
    return value


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    found: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every function makes of the network itself."""
    return {name: digest(call(network(), tmp_path_factory.mktemp("plain"))) for name, call in CALLS.items()}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "wrap", [nn.parallel.DistributedDataParallel, lambda m: nn.DataParallel(compiled(m))]
)
def test_wrapped_models_are_as_the_network_inside(
    wrap: Callable[[nn.Module], nn.Module], plain: dict[str, Any], tmp_path: Path
) -> None:
    for name, call in CALLS.items():
        model = wrap(network())
        made = call(model, tmp_path)
        assert same(digest(made), plain[name]), name
        if isinstance(made, nn.Module) and made is not model and name not in KEEP:
            assert type(made) is nn.Sequential, f"{name}: not in a wrapper"


@pytest.mark.usefixtures("process_group")
def test_in_place_functions_return_what_they_were_given() -> None:
    for wrap in (nn.DataParallel, nn.parallel.DistributedDataParallel):
        model = wrap(network())
        assert sparsity.magnitude(model, 0.5) is model and sparsity.make_permanent(model) is model
        assert type(graphprune.finetune(model, DATA, epochs=1, progress=False).model) is wrap


def test_inference_mode_changes_nothing(plain: dict[str, Any], tmp_path: Path) -> None:
    for name, call in CALLS.items():
        model = network()
        with torch.inference_mode():
            made = call(model, tmp_path)
        assert same(digest(made), plain[name]), name
        if isinstance(made, nn.Module):
            assert not any(t.is_inference() for t in made.state_dict().values()), name
            loss(made.train()(X), Y).backward()


def test_everything_made_in_inference_mode(plain: dict[str, Any], tmp_path: Path) -> None:
    """Parameters, inputs and data that are inference tensors, in the mode and outside it."""
    with torch.inference_mode():
        x, y = X.clone(), Y.clone()
        model = network()
    data = [(x, y), (x + 1, y)]
    for inside in (False, True):
        with torch.inference_mode(inside):
            plan = graphprune.plan(model, x, 0.5)
            made = [
                graphprune.prune(model, x, 0.5),
                graphprune.recover(model, plan, x, data).model,
                graphprune.finetune(model, data, epochs=1, progress=False).model,
                graphprune.prune(model, x, 0.5, criterion="taylor", data=data, loss_fn=loss),
            ]
            graphprune.verify(model, plan.apply(model), plan, x).raise_on_failure()
            path = graphprune.save(made[0], tmp_path / "m.safetensors")
            made.append(graphprune.load(path, model))
            graphprune.export_onnx(model, x, tmp_path / "m.onnx")
            graphprune.count(model, x), graphprune.doctor(model, x)
        assert same(digest(plan), plain["graphprune.plan.model"])
        assert same(digest(made[0]), plain["graphprune.prune.model"])
        assert same(digest(made[2]), plain["graphprune.finetune.model"])
        for result in made:
            assert not any(t.is_inference() for t in result.state_dict().values())
            loss(result.train()(X), Y).backward()


def test_what_cannot_be_changed_in_place_is_named() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(GraphPruneError, match=r"model: 0\.weight was made under torch\.inference_mode.*copy\.deepcopy"):
        sparsity.magnitude(model, 0.5)
    assert sparsity.masks(sparsity.magnitude(copy.deepcopy(model), 0.5)), "the cure"


@pytest.mark.usefixtures("process_group")
def test_sharded_models_are_refused_by_name(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole, part = network(), network()
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(whole, mesh=mesh)
    fully_shard(part[3], mesh=mesh)
    for model, place in ((whole, "is sharded"), (part, r"\.3 is sharded")):
        for name, call in CALLS.items():
            if "scripted" in TAKEN.get(name, ()):
                continue
            with pytest.raises(GraphPruneError, match=f"{place} over processes .*prune before sharding"):
                call(model, tmp_path)
                raise AssertionError(name)


@pytest.mark.usefixtures("process_group")
def test_distributed_tensors_are_refused_by_name() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    model = network()
    weight = distribute_tensor(model[3].weight.detach(), init_device_mesh("cpu", (1,)))
    model[3].weight = nn.Parameter(weight)
    with pytest.raises(GraphPruneError, match=r"parameter 3\.weight is a DTensor.*prune before sharding"):
        graphprune.prune(model, X, 0.5)


@pytest.mark.usefixtures("process_group")
def test_a_distributed_part_is_refused_by_name() -> None:
    model = network()
    model[3] = nn.parallel.DistributedDataParallel(model[3])
    with pytest.raises(GraphPruneError, match=r"model\.3 is a DistributedDataParallel inside .*model\.3 = model\.3\.m"):
        graphprune.prune(model, X, 0.5)


def test_a_data_parallel_part_is_pruned() -> None:
    model = network()
    model[3] = nn.DataParallel(model[3])
    made = graphprune.prune(model, X, 0.5)
    assert len(made[3].module.weight) == 4 and len(made[0].weight) == 4


@pytest.mark.parametrize("part", ["", "0", "3"])
def test_copies_of_modules_compiled_in_place_do_not_run_the_original(part: str) -> None:
    model = network()
    model.get_submodule(part).compile(backend="eager")
    dense = model(X)
    made = graphprune.prune(model, X, 0.5, recover=None)
    assert len(made[0].weight) == 4 and made(X).shape == dense.shape
    with torch.no_grad():
        made[7].bias.add_(1)
    assert not torch.allclose(made(X), dense), "its own weights are what it computes with"
    expected = graphprune.prune(network(), X, 0.5, recover=None)
    with torch.no_grad():
        expected[7].bias.add_(1)
    assert torch.allclose(made(X), expected(X), atol=1e-6) and torch.equal(model(X), dense)
