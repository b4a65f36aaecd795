"""Bags: slides as the features of their tiles, and a classifier that weighs the tiles.

Reference: gated attention pooling, arXiv:1802.04712, equation 9.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from vim_ssl.data.sources.slides import tile_place
from vim_ssl.evaluation.embeddings import Embedded
from vim_ssl.evaluation.linear_heads import moments
from vim_ssl.objectives.base import StepOutput


@dataclass
class Bag:
    """A slide: its tiles' features ``x`` (tiles, d) float32, where they lie (``places``, (tiles, 2)
    int64, left and top in pixels), its label, and the group (a patient) that it belongs to."""

    id: str
    x: Tensor
    places: Tensor
    label: int
    group: str


class Bags(Dataset):
    """Bags by index, as items for the trainer: ``image`` is the bag."""

    def __init__(self, bags: list[Bag], name: str):
        self.bags, self.name = bags, name

    def __len__(self) -> int:
        return len(self.bags)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.bags[index], "label": self.bags[index].label}

    @property
    def labels(self) -> list[int]:
        return [bag.label for bag in self.bags]

    @property
    def groups(self) -> list[str]:
        return [bag.group for bag in self.bags]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the slides, their labels or features."""
        digest = blake2b(digest_size=8)
        for bag in self.bags:
            digest.update(f"{bag.id}\0{bag.label}\n".encode(errors="surrogateescape"))
            digest.update(bag.x.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def subset(self, indices) -> "Bags":
        return Bags([self.bags[i] for i in indices], self.name)


def bags_of(tiles: Embedded, name: str) -> Bags:
    """The tiles of each slide together, slides in the order of their names.

    Args:
        tiles: embeddings of ``slide:`` data, whose ids say where a tile lies.
        name: for messages.
    Raises: ValueError for ids of something else, and where a slide's tiles have several labels or
        groups; slides without a label are left out, with a warning.
    """
    rows: dict[str, list[int]] = {}
    places = []
    for row, id in enumerate(tiles.ids):
        try:
            slide, left, top = tile_place(id)
        except ValueError:
            raise ValueError(
                f"{name} holds {id!r}, which is no tile of a slide; embed data slide:FILES."
            ) from None
        rows.setdefault(slide, []).append(row)
        places.append((left, top))
    bags, unknown = [], []
    for slide, own in sorted(rows.items()):
        labels, groups = ({of[row] for row in own} for of in (tiles.labels, tiles.groups))
        for what, several in (("labels", labels), ("groups", groups)):
            if len(several) > 1:
                raise ValueError(f"{name}: the tiles of {slide} have several {what}, {several}.")
        label, group = labels.pop(), groups.pop()
        if label is None:
            unknown.append(slide)
            continue
        where = torch.tensor([places[row] for row in own])
        bags.append(Bag(slide, tiles.x[own], where, int(label), group or slide))
    if unknown:
        warnings.warn(f"{len(unknown)} slides of {name} have no label: {unknown[:3]}", stacklevel=2)
    return Bags(bags, name)


class DrawTiles:
    """A bag to ``x`` (tiles, d) of as many tiles, drawn anew each time, and ``label``."""

    def __init__(self, tiles: int):
        self.tiles = tiles

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        x = item["image"].x
        order = torch.randperm(len(x))
        # Of a small slide some come twice.
        order = order.repeat(-(-self.tiles // len(x)))[: self.tiles]
        return {"x": x[order], "label": item["label"]}


class AttentionPool(nn.Module):
    """A slide's logits from its tiles, and how much each tile weighs.

    Args:
        dim: width of the features.
        classes: outputs.
        hidden: width of the attention.
        dropout: of the features.
    Its ``mean`` and ``std``, (d,) each, standardise features; see `standardise_by`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, classes: int, hidden: int = 128, dropout: float = 0.25):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.dropout = nn.Dropout(dropout)
        self.value, self.gate = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)  # softmax does not see an offset
        self.head = nn.Linear(dim, classes)

    def standardise_by(self, bags: Bags) -> None:
        """Take mean and deviation from all tiles of these slides, the training part's."""
        mean, std = moments(torch.cat([bag.x for bag in bags.bags]))
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b, tiles, d) -> logits (b, classes) and weights (b, tiles), which add up to one."""
        x = self.dropout((x - self.mean) / self.std)
        scores = self.score(torch.tanh(self.value(x)) * torch.sigmoid(self.gate(x)))[..., 0]
        weights = scores.softmax(1)
        return self.head((weights[..., None] * x).sum(1)), weights


class BagObjective(nn.Module):
    """Cross-entropy of `AttentionPool` on batches ``x`` (b, tiles, d) and ``label`` (b,)."""

    def __init__(self, pool: AttentionPool):
        super().__init__()
        self.pool = pool

    def forward(self, batch: dict[str, Tensor]) -> StepOutput:
        logits, _ = self.pool(batch["x"])
        loss = F.cross_entropy(logits.float(), batch["label"], reduction="sum")
        hits = (logits.argmax(1) == batch["label"]).float()
        return StepOutput(loss, len(logits), {"top1": 100.0 * hits.sum()})
