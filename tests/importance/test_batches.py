"""Whatever `finetune` takes, everything that takes data does: dicts with the model's labels, whose loss it returns,
give what the same inputs give as pairs, and what needs no labels does not look at them."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import graphprune
from graphprune import GraphPruneError, sparsity
from graphprune.importance.calibration import CalibrationData, batch_loss, logits_of, loss_in, without_loss
from graphprune.tracing.example import ExampleInput


class Classifier(nn.Module):
    """Takes labels and returns its loss as models of transformers do; `returns`: in which form."""

    def __init__(self, returns: Callable[..., Any] = SimpleNamespace) -> None:
        super().__init__()
        self.returns = returns
        self.stem, self.one, self.two, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        h = self.stem(x)
        h = h + self.two(self.one(h).relu())
        logits = self.head(h.relu())
        return self.returns(loss=None if labels is None else cross_entropy(logits, labels), logits=logits)


class Plain(Classifier):
    """The same, returning logits alone."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(x).logits


class Encoding(UserDict[str, Tensor]):
    """A mapping that is no dict, as a tokenizer's result."""


def made(kind: Callable[..., nn.Module] = Classifier) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


G = torch.Generator().manual_seed(1)
X = torch.randn(24, 6, generator=G)
Y = torch.randint(0, 3, (24,), generator=G)
PAIRS = list(zip(X.split(8), Y.split(8), strict=True))
DICTS = [{"x": x, "labels": y} for x, y in PAIRS]
EXAMPLE = {"x": X[:2]}
CRITERIA = ("taylor", "taylor_gate", "fisher", "hessian", "reconstruction", "activation_variance")


@pytest.mark.parametrize("criterion", CRITERIA)
def test_dicts_with_labels_rank_as_pairs_with_that_loss_do(criterion: str) -> None:
    def removed(net: nn.Module, example: Any, data: Any, **options: Any) -> Any:
        return graphprune.plan(net, example, 0.5, criterion=criterion, data=data, **options).removed

    want = removed(made(Plain), X[:2], PAIRS, loss_fn=cross_entropy)
    assert want
    assert removed(made(Plain), X[:2], PAIRS) == want  # class numbers: cross-entropy, as in finetune
    assert removed(made(), EXAMPLE, DICTS) == want
    assert removed(made(), EXAMPLE, [Encoding(batch) for batch in DICTS]) == want
    assert removed(made(lambda: Classifier(dict)), EXAMPLE, DICTS) == want
    assert removed(made(), EXAMPLE, [({"x": x}, y) for x, y in PAIRS]) == want
    by_hand = {"loss_fn": lambda out, batch: cross_entropy(out.logits, batch["labels"])}
    assert removed(made(), EXAMPLE, DICTS, **by_hand) == want
    assert removed(made(), EXAMPLE, DICTS, loss_fn=lambda out, _: out.loss) == want


@pytest.mark.parametrize("criterion", ["loss", "taylor", "output"])
def test_layers_are_ranked_by_that_loss_too(criterion: str) -> None:
    class Deep(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            logits = self.head(self.two(self.one(self.stem(x))))
            return self.returns(loss=None if labels is None else cross_entropy(logits, labels), logits=logits)

    def layers(data: Any, **options: Any) -> Any:
        return graphprune.plan(
            made(Deep), EXAMPLE, 0.5, granularity="layer", criterion=criterion, data=data, **options
        ).layers

    pairs = [({"x": x}, y) for x, y in PAIRS]
    want = layers(pairs, loss_fn=lambda out, y: cross_entropy(out.logits, y))
    assert len(want) == 1 and layers(pairs) == layers(DICTS) == want


def same_values(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["least_squares", "mean"])
def test_repair_looks_at_no_labels(method: str) -> None:
    plan = graphprune.plan(made(), EXAMPLE, 0.5)

    def repaired(data: Any) -> graphprune.Recovery:
        return graphprune.recover(made(), plan, EXAMPLE, data, method)

    want = repaired([{"x": x} for x, _ in PAIRS])
    for data in (DICTS, [({"x": x}, y) for x, y in PAIRS], [Encoding(batch) for batch in DICTS]):
        found = repaired(data)
        assert same_values(found.model, want.model)
        assert (found.before, found.after) == (want.before, want.after)


@pytest.mark.filterwarnings("ignore:reconstruct")
def test_nor_do_the_others_that_need_none() -> None:
    bare, masked = [{"x": x} for x, _ in PAIRS], sparsity.magnitude(made(), 0.5)
    fitted = [sparsity.reconstruct(copy.deepcopy(masked), made(), EXAMPLE, data) for data in (bare, DICTS)]
    assert same_values(*fitted) and not same_values(fitted[0], masked)
    curves = [graphprune.sensitivity(made(), EXAMPLE, data, ratios=[0.5]).curves for data in (bare, DICTS)]
    assert curves[0] == curves[1]
    asked = [graphprune.advise(made(), EXAMPLE, data=data).options for data in (bare, DICTS)]
    assert asked[0] == asked[1]


def test_masks_by_gradient_take_the_same() -> None:
    def zeros(net: nn.Module, data: Any, loss: Any) -> list[Tensor]:
        masked = sparsity.make_permanent(sparsity.gradient(net, data, loss, 0.5))
        return [p == 0 for p in masked.parameters()]

    want = zeros(made(Plain), PAIRS, cross_entropy)
    loader = DataLoader(TensorDataset(X, Y), batch_size=8)
    for net, data in ((made(), DICTS), (made(), iter(DICTS)), (made(Plain), PAIRS), (made(Plain), loader)):
        assert all(map(torch.equal, zeros(net, data, None), want))


def test_training_and_scores_take_them() -> None:
    options: dict[str, Any] = {"epochs": 1, "lr": 0.1}
    want = graphprune.finetune(made(Plain), PAIRS, evaluate=PAIRS, **options)
    found = graphprune.finetune(made(), DICTS, evaluate=DICTS, **options)
    by_hand = graphprune.finetune(
        made(), DICTS, loss_fn=lambda out, batch: cross_entropy(out.logits, batch["labels"]), **options
    )
    assert same_values(found.model, want.model) and same_values(by_hand.model, want.model)
    assert found.score == want.score is not None
    teacher = made()
    learnt = graphprune.finetune(made(), DICTS, teacher=teacher, **options)
    pairs = graphprune.finetune(made(), [({"x": x}, y) for x, y in PAIRS], teacher=teacher, **options)
    assert same_values(learnt.model, pairs.model)


def test_a_pipeline_does_all_of_it() -> None:
    made_by = [
        graphprune.pipeline(net, example, data, options={"criterion": "taylor"}, finetune_epochs=1, evaluate=data)
        for net, example, data in ((made(), EXAMPLE, DICTS), (made(Plain), X[:2], PAIRS))
    ]
    assert same_values(made_by[0].model, made_by[1].model)
    assert made_by[0].report.scores == made_by[1].report.scores


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([{"x": X}], {}, "no targets, and the model returns no loss of its own; yield .*labels, or pass loss_fn"),
        ([X], {}, "yields no targets"),
        ([X], {"loss_fn": cross_entropy}, r"batch 0 has no targets, and loss_fn\(output, None\) failed"),
        ([(X, Y.float())], {}, "not class numbers; pass loss_fn"),
        (iter(DICTS), {}, "can be read only once"),
        ([{"x": X, "unknown": Y}], {}, "unknown"),
        ([{"x": X, "labels": Y}], {"loss_fn": lambda out, batch: batch["missing"]}, "failed on batch 0: KeyError"),
        ([{"x": X, "labels": Y}], {"loss_fn": lambda out, batch: out.logits}, "returned a tensor of shape"),
        ([{"x": X, "labels": Y}], {"loss_fn": lambda out, batch: batch["labels"].sum()}, "a torch.int64 tensor"),
    ],
)
def test_what_is_missing_is_named(data: Any, options: dict[str, Any], message: str) -> None:
    net = made()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(GraphPruneError, match=message):
        graphprune.plan(net, EXAMPLE, 0.5, criterion="taylor", data=data, **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_the_parts_of_an_output() -> None:
    loss, logits = torch.tensor(1.0), torch.ones(2, 3)
    for output in (SimpleNamespace(loss=loss, logits=logits), {"loss": loss, "logits": logits}):
        assert loss_in(output) is loss and logits_of(output) is logits
        assert without_loss([loss, logits], output) == [logits]
    assert without_loss([loss], {"loss": loss}) == [loss]  # all there is
    assert loss_in(logits) is None and loss_in(SimpleNamespace(loss=torch.tensor(1))) is None
    assert batch_loss(None, {"loss": loss}, ExampleInput.of({"x": X}), None) == loss


def test_how_many_batches_there_are_is_known_where_data_say_so() -> None:
    def length(data: Any) -> int | None:
        return CalibrationData(data, ExampleInput.of(X), made()).length

    class Unsized:
        def __iter__(self) -> Any:
            return iter(PAIRS)

    assert length(PAIRS) == length(DataLoader(TensorDataset(X, Y), batch_size=8)) == 3
    assert length(X) == 1 and length(Unsized()) is None
