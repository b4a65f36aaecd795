"""Whole slides represented by the features of their tiles, and attention pooling over tiles.

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

from vim_ssl.data.sources.slides import tile_origin
from vim_ssl.evaluation.embeddings import Embedded
from vim_ssl.evaluation.linear_heads import moments
from vim_ssl.objectives.base import StepOutput


@dataclass
class Slide:
    """A slide: tile features ``x`` (tiles, d) float32, tile ``positions`` (tiles, 2) int64 (left
    and top in pixels), the label, and the group, such as a patient."""

    id: str
    x: Tensor
    positions: Tensor
    label: int
    group: str


class Slides(Dataset):
    """Slides by index, as items for the trainer with the slide as ``image``."""

    def __init__(self, slides: list[Slide], name: str):
        self.slides, self.name = slides, name

    def __len__(self) -> int:
        return len(self.slides)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.slides[index], "label": self.slides[index].label}

    @property
    def labels(self) -> list[int]:
        return [slide.label for slide in self.slides]

    @property
    def groups(self) -> list[str]:
        return [slide.group for slide in self.slides]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the slides, their labels or features."""
        digest = blake2b(digest_size=8)
        for slide in self.slides:
            digest.update(f"{slide.id}\0{slide.label}\n".encode(errors="surrogateescape"))
            digest.update(slide.x.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def subset(self, indices) -> "Slides":
        return Slides([self.slides[i] for i in indices], self.name)


def group_tiles(tiles: Embedded, name: str) -> Slides:
    """Group tiles by slide, sorted by slide name; skip slides without a label, with a warning.

    Args:
        tiles: embeddings of ``slide:`` data, whose ids contain the positions of tiles.
        name: name of the data in messages.
    Raises: ValueError for other ids, and for a slide whose tiles have several labels or groups.
    """
    rows: dict[str, list[int]] = {}
    positions = []
    for row, id in enumerate(tiles.ids):
        try:
            slide, left, top = tile_origin(id)
        except ValueError:
            raise ValueError(
                f"{name} contains {id!r}, which is not a tile of a slide; embed slide:FILES data."
            ) from None
        rows.setdefault(slide, []).append(row)
        positions.append((left, top))
    slides, unknown = [], []
    for slide, of_slide in sorted(rows.items()):
        labels, groups = ({of[row] for row in of_slide} for of in (tiles.labels, tiles.groups))
        for what, several in (("labels", labels), ("groups", groups)):
            if len(several) > 1:
                raise ValueError(f"{name}: the tiles of {slide} have several {what}, {several}.")
        label, group = labels.pop(), groups.pop()
        if label is None:
            unknown.append(slide)
            continue
        corners = torch.tensor([positions[row] for row in of_slide])
        slides.append(Slide(slide, tiles.x[of_slide], corners, int(label), group or slide))
    if unknown:
        warnings.warn(
            f"Skipped {len(unknown)} slides of {name} without a label, for example {unknown[:3]}.",
            stacklevel=2,
        )
    return Slides(slides, name)


class DrawTiles:
    """Transform a slide into ``x`` (tiles, d), random tiles drawn at each call, and ``label``."""

    def __init__(self, tiles: int):
        self.tiles = tiles

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        x = item["image"].x
        order = torch.randperm(len(x))
        # Small slides repeat their tiles.
        order = order.repeat(-(-self.tiles // len(x)))[: self.tiles]
        return {"x": x[order], "label": item["label"]}


class AttentionPool(nn.Module):
    """Compute the logits of a slide from its tiles, and the weight of each tile.

    Args:
        dim: width of the features.
        classes: number of classes.
        hidden: width of the attention.
        dropout: dropout on the features.
    The buffers ``mean`` and ``std``, (d,) each, standardise features; see `standardise_by`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, classes: int, hidden: int = 128, dropout: float = 0.25):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.dropout = nn.Dropout(dropout)
        self.value, self.gate = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)  # a bias has no effect on the softmax
        self.head = nn.Linear(dim, classes)

    def standardise_by(self, slides: Slides) -> None:
        """Set ``mean`` and ``std`` to those of all tiles of these training slides."""
        mean, std = moments(torch.cat([slide.x for slide in slides.slides]))
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b, tiles, d) -> logits (b, classes) and weights (b, tiles), which sum to one."""
        x = self.dropout((x - self.mean) / self.std)
        scores = self.score(torch.tanh(self.value(x)) * torch.sigmoid(self.gate(x)))[..., 0]
        weights = scores.softmax(1)
        return self.head((weights[..., None] * x).sum(1)), weights


class SlideObjective(nn.Module):
    """Cross-entropy of `AttentionPool` on batches ``x`` (b, tiles, d) and ``label`` (b,)."""

    def __init__(self, pool: AttentionPool):
        super().__init__()
        self.pool = pool

    def forward(self, batch: dict[str, Tensor]) -> StepOutput:
        logits, _ = self.pool(batch["x"])
        loss = F.cross_entropy(logits.float(), batch["label"], reduction="sum")
        hits = (logits.argmax(1) == batch["label"]).float()
        return StepOutput(loss, len(logits), {"top1": 100.0 * hits.sum()})
