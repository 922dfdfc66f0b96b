"""The reference networks: shapes, reproducible weights, trainable on real digits, and pruned exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import graphprune
import models

FACTORIES = [models.digits_resnet, models.digits_mobilenet, models.tiny_vit]


@pytest.fixture(params=FACTORIES, ids=lambda factory: factory.__name__)
def factory(request):
    return request.param


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def digit_batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:count], dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels[:count])


def with_statistics(model: nn.Module) -> nn.Module:
    """Batch norms of a new network do nothing; a few batches give each channel its own mean, scale and shift."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    model.train()
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(32, 1, 8, 8))
    return model.eval()


def test_factory_returns_model_in_eval_mode_and_matching_example(factory):
    model, example = factory(batch=3)
    assert not any(module.training for module in model.modules())
    assert example.shape == (3, 1, 8, 8)
    assert model(example).shape == (3, 10)
    assert factory(classes=7)[0](example).shape == (3, 7)


def test_images_of_a_batch_do_not_influence_each_other(factory):
    model, example = factory(batch=4)
    with torch.no_grad():
        whole = model(example)
        alone = torch.cat([model(image) for image in example.split(1)])
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-5)


def test_weights_follow_the_seed_and_leave_the_global_state_alone(factory):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, first_example = factory(seed=1)
    assert torch.equal(torch.rand(3), expected)
    torch.rand(17)
    again, again_example = factory(seed=1)
    other, _ = factory(seed=2)
    assert torch.equal(first_example, again_example)
    for (name, a), (_, b) in zip(first.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_learns_real_digits(factory):
    model, _ = factory()
    images, labels = digit_batch(256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    right = 0.0
    for _ in range(30):
        model.train()
        for rows in torch.randperm(256).split(64):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            right = (model(images).argmax(1) == labels).double().mean().item()
        if right > 0.9:
            break
    assert right > 0.9
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_sizes_are_arguments():
    narrow, _ = models.digits_resnet((8, 16), blocks=1)
    assert [stage[0].conv2.out_channels for stage in narrow.stages] == [8, 16]
    assert len(models.digits_resnet((8, 16, 24, 32), blocks=3)[0].stages) == 4
    assert models.digits_mobilenet(width=8)[0].stem[0].out_channels == 8
    assert len(models.tiny_vit(depth=2)[0].layers) == 2


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_pruning_makes_it_smaller_and_exact(factory, ratio):
    model, example = factory(batch=2)
    model = with_statistics(model)
    untouched = copy.deepcopy(model.state_dict())
    plan = graphprune.plan(model, example, ratio)
    pruned = plan.apply(model)
    report = graphprune.verify(model, pruned, plan, example)
    assert report.passed, str(report)
    # Cutting both sides of a matrix at `ratio` leaves (1 - ratio)^2 of it; inputs, outputs and residuals keep more.
    assert parameters(pruned) < parameters(model) * (1 - ratio)
    assert pruned(example).shape == (2, 10)
    for name, value in model.state_dict().items():
        assert torch.equal(value, untouched[name]), name


def test_pruned_network_trains(factory):
    model, example = factory(batch=8)
    pruned = graphprune.prune(model, example, 0.5, fold_bn=False)
    pruned.train()
    F.cross_entropy(pruned(example), torch.arange(8)).backward()
    gradients = {name: parameter.grad for name, parameter in pruned.named_parameters()}
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values())
