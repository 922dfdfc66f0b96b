"""Rows sent to different places: experts picked by a router, results written where an index tensor says."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision.ops  # noqa: F401  (registers torch.ops.torchvision)
from torch import Tensor, nn

from .registry import image, network, tokens, variant


@network(tokens(6, 10), batch_axis=None)
class ExpertsInALoop(nn.Module):
    """A router picks two of four gated experts for each token; their outputs are added up by index."""

    def __init__(self, experts: int = 4, width: int = 14, hidden: int = 9) -> None:
        super().__init__()
        self.experts = experts
        self.embed = nn.Linear(10, width)
        self.router = nn.Linear(width, experts)
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * hidden, width) * 0.4)
        self.down = nn.Parameter(torch.randn(experts, width, hidden) * 0.4)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x).flatten(0, 1)
        # picked by position, so that every choice of channels sends the tokens to the same experts
        chosen = torch.arange(2 * len(rows), device=x.device).view(-1, 2) % self.experts
        weights = self.router(rows).sigmoid().gather(1, chosen)
        out = torch.zeros_like(rows)
        for expert in range(self.experts):
            row, place = torch.where(chosen == expert)
            gate, up = F.linear(rows[row], self.gate_up[expert]).chunk(2, -1)
            made = F.linear(F.silu(gate) * up, self.down[expert]) * weights[row, place, None]
            out.index_add_(0, row, made)
        return self.head(rows + out)


class WritesByIndex(nn.Module):
    """Some tokens are replaced by what another layer makes of them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed, self.other = nn.Linear(10, 12), nn.Linear(12, 12)
        self.out = nn.Linear(12, 4)
        self.register_buffer("places", torch.tensor([4, 1, 3]))
        self.places: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x).relu()
        made = self.other(y[:, self.places])
        if self.how == "put":
            y = y.clone()
            y[:, self.places] = made
        elif self.how == "accumulate":
            y = y.index_put((torch.zeros_like(self.places), self.places), made[0], accumulate=True)
        elif self.how == "one_value":
            y = y.clone()
            y[:, self.places] = made[:, :1]
        else:
            y = y.index_copy(1, self.places, made)
        return self.out(y)


for _how in ("put", "accumulate", "one_value", "copy"):
    variant(f"writes_by_index_{_how}", lambda how=_how: WritesByIndex(how), tokens(), batch_axis=None)  # type: ignore[misc]


def _ring() -> tuple[Tensor, Tensor]:
    """Eight nodes in a ring with some chords, and the edges between them."""
    edges = [(i, (i + step) % 8) for i in range(8) for step in (1, 3) if (i + step) % 5]
    return torch.randn(8, 10), torch.tensor(edges).t()


@network(_ring, batch_axis=None, statistics=True)
class GraphAttention(nn.Module):
    """Every node weighs the messages of its neighbours by a softmax over its own edges, head by head."""

    def __init__(self, heads: int = 4, features: int = 6) -> None:
        super().__init__()
        self.heads, self.features = heads, features
        self.first, self.last = nn.Linear(10, heads * features), nn.Linear(heads * features, 5)
        self.into, self.out_of = nn.Parameter(torch.randn(heads, features)), nn.Parameter(torch.randn(heads, features))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        y = self.first(x).view(-1, self.heads, self.features)
        source, target = edges
        score = F.leaky_relu((y * self.out_of).sum(-1)[source] + (y * self.into).sum(-1)[target])
        index = target[:, None].expand_as(score)
        largest = torch.full_like(score[: len(x)], -9.0).scatter_reduce(0, index, score, "amax")
        weight = (score - largest[target]).exp()
        total = torch.zeros_like(largest).scatter_add_(0, index, weight)
        messages = y[source] * (weight / total[target])[..., None]
        out = torch.zeros_like(y).index_add(0, target, messages)
        return self.last(out.flatten(1).relu())


class GraphConvolution(nn.Module):
    """Messages are added up, averaged or compared at nodes, twice."""

    def __init__(self, reduce: str) -> None:
        super().__init__()
        self.reduce = reduce
        self.first, self.second, self.last = nn.Linear(10, 14), nn.Linear(14, 12), nn.Linear(12, 5)

    def spread(self, y: Tensor, edges: Tensor) -> Tensor:
        index = edges[1].view(-1, 1).expand(-1, y.size(-1))
        out = y.new_zeros(y.shape).scatter_reduce_(0, index, y[edges[0]], self.reduce, include_self=False)
        return y + out

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        y = self.spread(self.first(x), edges).relu()
        return self.last(self.spread(self.second(y), edges).relu())


for _reduce in ("sum", "mean", "amax"):
    variant(f"graph_convolution_{_reduce}", lambda how=_reduce: GraphConvolution(how), _ring, batch_axis=None)  # type: ignore[misc]


def _words_and_pictures() -> tuple[Tensor, Tensor]:
    return torch.tensor([[3, 19, 19, 4], [19, 5, 6, 19]]), torch.randn(4, 7)


@network(_words_and_pictures, batch_axis=None)
class PicturesInText(nn.Module):
    """What is seen takes the places that the text keeps for it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.look, self.mix = nn.Embedding(20, 12), nn.Linear(7, 12), nn.Linear(12, 12)
        self.out = nn.Linear(12, 5)

    def forward(self, ids: Tensor, pictures: Tensor) -> Tensor:
        text = self.words(ids)
        places = (ids == 19).unsqueeze(-1).expand_as(text)
        return self.out(self.mix(text.masked_scatter(places, self.look(pictures))).relu())


@network(image(3, 12), batch_axis=None)
class RegionHead(nn.Module):
    """Features read in rectangles, as in the second stage of a detector."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 8, 3, padding=1))
        self.hidden, self.out = nn.Linear(8 * 9, 11), nn.Linear(11, 5)
        self.register_buffer("boxes", torch.tensor([[0, 1.0, 1.0, 7.0, 9.0], [1, 3.0, 0.0, 11.0, 6.0]]))
        self.boxes: Tensor

    def forward(self, x: Tensor) -> Tensor:
        read = torch.ops.torchvision.roi_align(self.backbone(x), self.boxes, 1.0, 3, 3, 2, False)
        return self.out(self.hidden(read.flatten(1)).relu())


@network(image(3, 9))
class MovedTaps(nn.Module):
    """A deformable convolution with taps weighted by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.taps = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(10, 27, 3, padding=1)
        self.weight, self.bias = nn.Parameter(torch.randn(12, 10, 3, 3) * 0.2), nn.Parameter(torch.randn(12))
        self.out = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        offset, mask = self.taps(y).split([18, 9], 1)
        y = torch.ops.torchvision.deform_conv2d(
            y, self.weight, 0.3 * offset, mask.sigmoid(), self.bias, 1, 1, 1, 1, 1, 1, 1, 1, True
        )
        return self.out(y.relu())
