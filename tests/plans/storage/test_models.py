"""What was saved comes back: structure, values, types, sharing - for every small network, in every output mode."""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import graphprune
from graphprune import Budget, GraphPruneError
from graphprune.plans.history import history_of
from graphprune.support.walking import named_tensors
from tests import oracles
from tests.networks import NETWORKS


def same(a: nn.Module, b: nn.Module) -> None:
    """Equal names, types, values and sharing."""
    mine, theirs = named_tensors(a), named_tensors(b)
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert type(tensor) is type(theirs[name]), name
        assert torch.equal(tensor, theirs[name]), name
        shared = [other for other, t in mine.items() if t is tensor]
        assert shared == [other for other, t in theirs.items() if t is theirs[name]], name


def trained(model: nn.Module) -> nn.Module:
    """Other values everywhere, as training leaves them."""
    with torch.no_grad():
        for tensor in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values():
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.randn_like(tensor))
    return model


class Classifier(nn.Module):
    """Convolutions with batch norms, then a layer without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
        )
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).mean((2, 3)))
        return out


IMAGE = torch.randn(2, 3, 9, 9)


def pruned(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return graphprune.prune(Classifier().eval(), IMAGE, 0.5, **options)


@pytest.mark.parametrize("output", ["module", "hybrid", "graph"])
@pytest.mark.parametrize("name", list(NETWORKS)[::4])
def test_small_networks(name: str, output: str, tmp_path: Path) -> None:
    network = NETWORKS[name]
    model, example = network()
    try:
        small = graphprune.prune(model, example, 0.5, output=output, ignore=network.ignore, verify=False)
    except GraphPruneError as error:
        assert "the model cannot become one graph" in str(error)
        return
    trained(small)
    graphprune.save(small, tmp_path / "small.safetensors")
    found = graphprune.load(tmp_path / "small.safetensors", lambda: network()[0])
    same(small, found)
    expected = oracles.call(small, example)
    assert oracles.relative_error(oracles.call(found, example), expected) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: graphprune.fold_conv_bn(Classifier().eval(), IMAGE),
        lambda: graphprune.prune(pruned(output="graph"), IMAGE, 0.3, output="graph"),
        lambda: graphprune.prune(pruned(fold_bn=False), IMAGE, 0.3),
        lambda: graphprune.fold_conv_bn(pruned(fold_bn=False), IMAGE),
        lambda: pruned(recover="least_squares", data=[torch.randn(8, 3, 9, 9)]),
        lambda: pruned(recover="batchnorm", data=[torch.randn(8, 3, 9, 9)]),
        lambda: graphprune.prune(Classifier().eval(), IMAGE, budget=Budget(macs=0.6)),
        lambda: copy.deepcopy(pruned()),
        lambda: copy.copy(pruned()),
        lambda: pickle.loads(pickle.dumps(pruned(output="hybrid"))),
        lambda: pruned().to(memory_format=torch.channels_last),
        lambda: pruned().half(),
        lambda: pruned().double(),
        lambda: Classifier(),
    ],
)
def test_whatever_was_done_before(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(1)
    small = trained(make())
    path = graphprune.save(small, tmp_path / "small.safetensors")
    found = graphprune.load(path, Classifier).train(small.training)
    same(small, found)
    dtype = next(small.parameters()).dtype
    # the weights are the same bit for bit; in another memory format (channels_last) another kernel adds them up
    torch.testing.assert_close(found(IMAGE.to(dtype)), small(IMAGE.to(dtype)))
    assert history_of(found) is not None or history_of(small) is None
    graphprune.save(found, tmp_path / "again.safetensors")
    same(small, graphprune.load(tmp_path / "again.safetensors", Classifier))
    assert sorted(os.listdir(tmp_path)) == ["again.safetensors", "small.safetensors"]


def test_parts_pruned_before_and_after_the_whole(tmp_path: Path) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Classifier(), nn.Linear(5, 4)
            self.rest = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.rest(self.second(self.first(x)).relu())
            return out

    torch.manual_seed(0)
    model = Whole().eval()
    model.first = graphprune.prune(model.first, IMAGE, 0.25, round_to=1)
    model = graphprune.prune(model, IMAGE, 0.5, round_to=1)
    width = model.rest[0].in_features
    model.rest = graphprune.prune(model.rest, torch.randn(2, width), 0.5, round_to=1)
    path = graphprune.save(trained(model), tmp_path / "small.safetensors")
    for build in (Whole, Whole().eval()):
        found = graphprune.load(path, build).eval()
        same(model, found)
        assert torch.equal(found(IMAGE), model(IMAGE))

    def built_pruned() -> nn.Module:
        torch.manual_seed(0)
        made = Whole().eval()
        made.first = graphprune.prune(made.first, IMAGE, 0.25, round_to=1)
        return made

    same(model, graphprune.load(path, built_pruned))


def test_a_model_given_to_load_is_not_touched(tmp_path: Path) -> None:
    path = graphprune.save(Classifier(), tmp_path / "dense.safetensors")
    for dense in (Classifier(), pruned()):
        before = {k: v.clone() for k, v in dense.state_dict().items()}
        try:
            found = graphprune.load(path, dense)
        except GraphPruneError:
            assert history_of(dense) is not None
        else:
            assert found is not dense
        assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())


class Tied(nn.Module):
    """A table that is also the last layer; a position table in no state dict; integer and boolean buffers."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.out = nn.Linear(6, 11, bias=False)
        if tie:
            self.out.weight = self.table.weight
        self.register_buffer("positions", torch.randn(7, 6), persistent=False)
        self.register_buffer("seen", torch.tensor(3))
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.out(self.body(self.table(tokens) + self.positions[: tokens.shape[1]]).relu())
        return out


def test_sharing_buffers_and_types(tmp_path: Path) -> None:
    tokens = torch.randint(0, 11, (2, 5))
    torch.manual_seed(0)
    dense = Tied()
    small = graphprune.prune(dense, tokens, 0.5)
    assert small.out.weight is small.table.weight and small.positions.shape == (7, 3)
    small.bfloat16()
    small.seen += 4
    path = graphprune.save(small, tmp_path / "small.safetensors")
    assert sorted(safetensors.torch.load_file(path)) == ["body.bias", "body.weight", "mask", "seen", "table.weight"]

    def build() -> nn.Module:
        made = Tied()
        made.positions = dense.positions.clone()
        return made

    found = graphprune.load(path, build)
    same(small, found)
    assert torch.equal(found(tokens), small(tokens)) and found.positions.dtype == torch.bfloat16
    small.out.weight = nn.Parameter(small.out.weight * 2)  # no longer one
    graphprune.save(small, path)
    same(small, graphprune.load(path, build))
    graphprune.save(dense, path)
    found = graphprune.load(path, lambda: Tied(tie=False))
    assert found.out.weight is found.table.weight


def test_frozen_parameters_stay_as_built(tmp_path: Path) -> None:
    path = graphprune.save(pruned(), tmp_path / "small.safetensors")
    assert all(not p.requires_grad for p in graphprune.load(path, Classifier().requires_grad_(False)).parameters())
    assert all(p.requires_grad for p in graphprune.load(path, Classifier).parameters())


def test_the_loaded_model_trains_and_prunes_on(tmp_path: Path) -> None:
    path = graphprune.save(pruned(), tmp_path / "small.safetensors")
    found = graphprune.load(path, Classifier)
    found(IMAGE).square().mean().backward()
    assert all(p.grad is not None for p in found.parameters())
    smaller = graphprune.prune(found.eval(), IMAGE, 0.5, round_to=1)
    graphprune.save(smaller, path)
    same(smaller, graphprune.load(path, Classifier))


def test_devices(tmp_path: Path) -> None:
    path = graphprune.save(pruned(), tmp_path / "small.safetensors")
    assert next(graphprune.load(path, Classifier, device="cpu").parameters()).device.type == "cpu"
    for device, message in (
        ("meta", "have no values"),
        ("nowhere", "cannot be used here"),
        ("cuda:99", "cannot be used here"),
        (3.5, "3.5"),
    ):
        with pytest.raises(GraphPruneError, match=message):
            graphprune.load(path, Classifier, device=device)  # type: ignore[arg-type]
    with torch.device("meta"):
        bare = Classifier()
    with pytest.raises(GraphPruneError, match="on the meta device; let build_model build a real model"):
        graphprune.load(path, bare)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_saved_on_a_gpu_loads_on_the_cpu(tmp_path: Path) -> None:
    small = pruned()
    path = graphprune.save(copy.deepcopy(small).cuda(), tmp_path / "small.safetensors")
    same(small, graphprune.load(path, Classifier))
    assert next(graphprune.load(path, Classifier, device="cuda").parameters()).is_cuda
    assert next(graphprune.load(path, lambda: Classifier().cuda()).parameters()).is_cuda


def test_wrappers_are_left_out(tmp_path: Path) -> None:
    small = pruned()
    compiled = torch.compile(small, backend="eager")
    for wrapped in (nn.DataParallel(small), compiled, nn.DataParallel(compiled)):
        path = graphprune.save(wrapped, tmp_path / "small.safetensors")
        same(small, graphprune.load(path, lambda: nn.DataParallel(Classifier())))


def test_another_dense_network_is_named(tmp_path: Path) -> None:
    path = graphprune.save(pruned(), tmp_path / "small.safetensors")
    wider, deeper = Classifier(), Classifier()
    wider.body[3] = nn.Conv2d(8, 16, 3)
    wider.head = nn.Linear(16, 5)
    deeper.body.append(nn.Linear(3, 3))
    for build, message in (
        (wider, r"small.safetensors: .*body.3.weight has shape \(16, 8, 3, 3\), the plan expects \(8, 8, 3, 3\)"),
        (deeper, "it knows no body.5.weight"),
        (nn.Linear(3, 4), "this one has no body.0.weight"),
        (lambda: 3, "what build_model returned: expected a torch.nn.Module, got an int"),
        (lambda: 1 / 0, "build_model failed: ZeroDivisionError"),
        (None, "build_model: expected a function or a torch.nn.Module, got None"),
        (graphprune.fold_conv_bn(Classifier().eval(), IMAGE), "pruned already"),
    ):
        with pytest.raises(GraphPruneError, match=message):
            graphprune.load(path, build)  # type: ignore[arg-type]


class Headed(nn.Module):
    """The same shapes whatever the number of heads."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(6, 48), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y: Tensor = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


def test_the_same_shapes_are_not_the_same_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    small = graphprune.prune(Headed(), x, 0.5, granularity="heads")
    assert small.heads == 2
    path = graphprune.save(small, tmp_path / "small.safetensors")
    assert torch.equal(graphprune.load(path, Headed)(x), small(x))
    with pytest.raises(GraphPruneError, match="expected heads: 4 -> 2, found 8"):
        graphprune.load(path, lambda: Headed(8))


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> object:
            return {"a": 1}

    replaced, grown, bare = pruned(), pruned(), pruned().to("meta")
    replaced.head = nn.Linear(3, 2)
    grown.adapter = nn.Linear(3, 2)
    sparse = nn.Linear(2, 2)
    sparse.weight = nn.Parameter(torch.eye(2).to_sparse())
    for thing, message in (
        (replaced, r"changed after it was pruned \(head.weight has shape"),
        (grown, "adapter.weight was added"),
        (graphprune.sparsity.magnitude(pruned(), 0.5), "body.0.weight is gone"),
        (bare, "on the meta device and has no values"),
        (Extra(2, 2), "_extra_state is no tensor"),
        (sparse, "weight: only ordinary tensors"),
        ({"w": torch.zeros(2)}, "expected a torch.nn.Module, got a dict, a state dict; build the network"),
    ):
        with pytest.raises(GraphPruneError, match=message):
            graphprune.save(thing, tmp_path / "small.safetensors")  # type: ignore[arg-type]
    with pytest.raises(GraphPruneError, match="does not exist"):
        graphprune.save(pruned(), tmp_path / "no" / "small.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = graphprune.save(pruned(), tmp_path / "small.safetensors")
    before = path.read_bytes()
    with pytest.raises(GraphPruneError):
        graphprune.save(pruned().to("meta"), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["small.safetensors"]


def test_the_state_dict_shows_no_history() -> None:
    small = pruned()
    assert history_of(small) is not None and all(isinstance(v, Tensor) for v in small.state_dict().values())
    buffer = io.BytesIO()
    torch.save(small.state_dict(), buffer)
    assert b"graphprune" not in buffer.getvalue()
