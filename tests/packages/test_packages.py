"""Networks of packages that may be missing: pruned, proven, and trained on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def removed(model: nn.Module, example: Any, **options: Any) -> tuple[nn.Module, float]:
    """The pruned network, proven by `prune` itself, and the share of parameters that is gone."""
    small = graphprune.prune(model.eval(), example, 0.5, **options)
    return small, 1 - parameters(small) / parameters(model)


def learns(model: nn.Module, example: Any, loss: Any, steps: int = 40) -> None:
    """Training in training mode brings the loss down; nothing is left without a gradient."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        found = loss(model(*example))
        found.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(float(found.detach()))
    assert losses[-1] < 0.7 * losses[0], losses


class Graph(nn.Module):
    """Two convolutions over edges and a layer for every node."""

    def __init__(self, first: nn.Module, second: nn.Module, width: int) -> None:
        super().__init__()
        self.first, self.second, self.head = first, second, nn.Linear(width, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(x, edges).relu(), edges).relu())
        return out


def _graph_network(kind: str) -> nn.Module:
    layers = pytest.importorskip("torch_geometric.nn")
    if kind == "GCN":
        return Graph(layers.GCNConv(6, 32), layers.GCNConv(32, 32), 32)
    if kind == "GAT":
        return Graph(layers.GATConv(6, 8, heads=4), layers.GATConv(32, 8, heads=4), 32)
    if kind == "GAT, mean of heads":
        return Graph(layers.GATConv(6, 8, heads=4), layers.GATConv(32, 16, heads=4, concat=False), 16)
    return Graph(layers.SAGEConv(6, 32, aggr="max"), layers.SAGEConv(32, 32, aggr="mean"), 32)


@pytest.mark.parametrize("kind", ["GCN", "GAT", "GAT, mean of heads", "SAGE"])
def test_graph_networks(kind: str) -> None:
    torch.manual_seed(0)
    model, example = _graph_network(kind), (torch.randn(15, 6), torch.randint(0, 15, (2, 50)))
    small, share = removed(model, example)
    assert share > 0.6, share  # without a rule for scattering nothing went: the layer before it, and so all layers
    found = graphprune.doctor(model, example)
    assert found.prunable_parameters > 0.9 * found.parameters
    more = torch.randn(9, 6), torch.randint(0, 9, (2, 20))  # another graph
    assert small(*more).shape == (9, 3)
    plan = graphprune.plan(model, example, 0.5)
    assert graphprune.verify(model, plan.apply(model), plan, more).passed
    learns(small, example, lambda out: F.cross_entropy(out, torch.arange(15) % 3), 80)


@pytest.mark.parametrize("supervised", [False, True])
@pytest.mark.parametrize("norm", ["INSTANCE", "batch"])
def test_monai_dynunet_trains(supervised: bool, norm: str) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    model = nets.DynUNet(
        2, 1, 2, kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2], filters=[8, 16, 24],
        norm_name=norm, deep_supervision=supervised, deep_supr_num=1, res_block=True,
    )  # fmt: skip
    x = torch.randn(2, 1, 16, 16)
    small, share = removed(model, x)
    assert share > 0.6, share
    wanted = (x[:, 0] > 0).long()

    def loss(out: Tensor) -> Tensor:
        heads = out.unbind(1) if supervised else [out]
        return torch.stack([F.cross_entropy(head, wanted) for head in heads]).sum()

    assert small.train()(x).shape == model.train()(x).shape
    learns(small, (x,), loss)


class Density(nn.Module):
    """What a flow is trained for: the log probability of samples."""

    def __init__(self, flow: Any) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.flow.log_prob(x)
        return out


@pytest.mark.parametrize("kind", ["coupling", "spline"])
def test_normflows(kind: str) -> None:
    nf = pytest.importorskip("normflows")
    torch.manual_seed(0)
    flows: list[Any] = []
    for _ in range(2):
        if kind == "coupling":
            perceptron = nf.nets.MLP([1, 24, 24, 2], init_zeros=False)
            flows += [nf.flows.AffineCouplingBlock(perceptron), nf.flows.Permute(2, mode="swap")]
        else:
            flows += [nf.flows.AutoregressiveRationalQuadraticSpline(2, 1, 24), nf.flows.LULinearPermute(2)]
    model = Density(nf.NormalizingFlow(nf.distributions.base.DiagGaussian(2), flows))
    x = torch.randn(16, 2)
    small, share = removed(model, x)
    assert share > 0.5, share
    samples, density = small.flow.sample(8)  # the other direction
    assert samples.shape == (8, 2)
    torch.testing.assert_close(small(samples), density, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["decoder", "rotary", "vision"])
def test_x_transformers(kind: str) -> None:
    xt = pytest.importorskip("x_transformers")
    torch.manual_seed(0)
    sizes = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8}
    if kind == "vision":
        model = xt.ViTransformerWrapper(image_size=16, patch_size=4, num_classes=5, attn_layers=xt.Encoder(**sizes))
        example, longer = torch.randn(2, 3, 16, 16), torch.randn(3, 3, 16, 16)
    else:
        more = {"rotary_pos_emb": True, "ff_glu": True, "use_rmsnorm": True} if kind == "rotary" else {}
        model = xt.TransformerWrapper(num_tokens=40, max_seq_len=24, attn_layers=xt.Decoder(**sizes, **more))
        example, longer = torch.randint(0, 40, (2, 10)), torch.randint(0, 40, (1, 24))
    _, share = removed(model, example)
    assert share > 0.5, share
    plan = graphprune.plan(model, example, 0.5)
    assert graphprune.verify(model, plan.apply(model), plan, longer).passed
    heads = graphprune.plan(model, example, 0.5, granularity="head")
    assert {g.kept for g in heads.groups if g.kind == "head"} == {2}


def test_conformer_with_einops() -> None:
    conformer = pytest.importorskip("conformer")
    torch.manual_seed(0)
    block = conformer.ConformerBlock(
        dim=24, dim_head=6, heads=4, ff_mult=2, conv_expansion_factor=2, conv_kernel_size=5
    )
    model = nn.Sequential(nn.Linear(10, 24), block, nn.Linear(24, 4))
    example = torch.randn(2, 12, 10)
    small, share = removed(model, example)
    assert share > 0.45, share
    assert small(torch.randn(1, 20, 10)).shape == (1, 20, 4)
    learns(small, (example,), lambda out: F.cross_entropy(out.flatten(0, 1), torch.arange(24) % 4), 80)


TEXT = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
IDS = torch.tensor([[1, 43, 45, 45, 45, 45, 44, 2, 3]])


def _llava() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**TEXT), image_token_index=45
    )
    return transformers.LlavaForConditionalGeneration(config), {"pixel_values": torch.randn(1, 3, 8, 8)}


def _qwen() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
              "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}  # fmt: skip
    text = {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=45, video_token_id=46, vision_start_token_id=43,
        vision_end_token_id=44,
    )  # fmt: skip
    images = {"pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return transformers.Qwen2VLForConditionalGeneration(config), {**images, "mm_token_type_ids": (IDS == 45).int()}


class Logits(nn.Module):
    """Without the image features among the outputs, which would hold the width of the text."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **inputs: Any) -> Tensor:
        out: Tensor = self.net(**inputs, use_cache=False).logits
        return out


@pytest.mark.parametrize("build", [_llava, _qwen])
def test_placeholders_of_images_in_text(build: Any) -> None:
    """Image features are written where the text has placeholders, by a mask that is the same along the features: the
    width of the text goes like that of a plain language model."""
    torch.manual_seed(0)
    net, images = build()
    small, _ = removed(Logits(net), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), **images})
    assert small.net.get_input_embeddings().weight.shape == (50, 16)  # type: ignore[union-attr, operator]
