"""Whole slides represented by the features of their tiles, and attention pooling over tiles.

Reference: gated attention pooling, arXiv:1802.04712, equation 9.
"""

import os
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from vim_ssl.checkpoints.files import check_values
from vim_ssl.checkpoints.task_models import load_head, save_head
from vim_ssl.data.classes import with_classes
from vim_ssl.data.dataset import ImageData
from vim_ssl.data.sources.slides import tile_origin
from vim_ssl.evaluation.embeddings import Embedded, read_embeddings
from vim_ssl.evaluation.linear_heads import moments
from vim_ssl.models.predictor import ClassPrediction, Predictor
from vim_ssl.objectives.base import StepOutput
from vim_ssl.utils.numbers import require_finite

FILE = "slide.safetensors"
FEATURES = ("weights", "readout", "transform")  # of `embed.py`; they determine the features
SAME = 0.01  # distance of equal features, in units of their spread over the slides


@dataclass
class Slide:
    """A slide: tile features ``x`` (tiles, d) float32, tile ``positions`` (tiles, 2) int64 (left
    and top in pixels), the label (-1: unknown), and the group, such as a patient."""

    id: str
    x: Tensor
    positions: Tensor
    label: int
    group: str


class Slides(Dataset):
    """Slides by index, as items with the slide as ``image``; ``made_of`` is the record of their
    embeddings."""

    is_stream, kind = False, "slide"

    def __init__(self, slides: list[Slide], name: str, made_of: Mapping[str, Any] | None = None):
        self.slides, self.name, self.made_of = slides, name, dict(made_of or {})

    def __len__(self) -> int:
        return len(self.slides)

    def __getitem__(self, index: int) -> dict[str, Any]:
        slide = self.slides[index]
        return {"id": slide.id, "image": slide, "label": slide.label}

    @property
    def ids(self) -> list[str]:
        return [slide.id for slide in self.slides]

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
        return Slides([self.slides[i] for i in indices], self.name, self.made_of)


def read_slides(folder: str | Path, made_of: Mapping[str, Any]) -> Slides:
    """Read all slides in a folder of embeddings, with or without a label.

    Args:
        made_of: record of the embeddings that the model was trained on.
    Raises: ValueError for features of another encoder; the errors of `read_embeddings`.
    """
    tiles = read_embeddings(Path(folder))
    if made_of and tiles.made_of:
        check_alike(("the training slides", str(folder)), made_of, tiles.made_of, FEATURES)
    return group_tiles(tiles, str(folder), labelled=False)


def check_alike(
    names: tuple[str, str],
    one: Mapping[str, Any],
    other: Mapping[str, Any],
    keys: Sequence[str],
) -> None:
    """Raise ValueError if the records of two folders of embeddings differ in one of ``keys``."""
    for key in keys:
        if one.get(key) != other.get(key):
            raise ValueError(
                f"{names[0]} and {names[1]} were made with different {key} ({one.get(key)}, "
                f"{other.get(key)}); embed both with the same encoder and classes."
            )


def with_classes_of(slides: Slides, others: Slides) -> Slides:
    """Return the slides with labels numbered by the classes of other slides; see `with_classes`.

    Raises: ValueError for a label of another class, or if only one of them names its classes.
    """
    names, known = slides.made_of.get("classes"), others.made_of.get("classes")
    if names == known:
        return slides
    if not names or not known:
        check_alike((others.name, slides.name), others.made_of, slides.made_of, ("classes",))
    labels = [slide.label for slide in slides.slides]
    data = ImageData(slides.ids, slides.ids, name=slides.name, labels=labels, classes=names)
    numbered = with_classes(data, known, others.name).labels or []
    renamed = [replace(s, label=n) for s, n in zip(slides.slides, numbered, strict=True)]
    return Slides(renamed, slides.name, {**slides.made_of, "classes": known})


def group_tiles(tiles: Embedded, name: str, *, labelled: bool = True) -> Slides:
    """Group tiles by slide, sorted by slide name.

    Args:
        tiles: embeddings of ``slide:`` data, whose ids contain the positions of tiles.
        name: name of the data in messages.
        labelled: skip slides without a label, with a warning.
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
        if label is None and labelled:
            unknown.append(slide)
            continue
        corners = torch.tensor([positions[row] for row in of_slide])
        number = -1 if label is None else int(label)
        slides.append(Slide(slide, tiles.x[of_slide], corners, number, group or slide))
    if unknown:
        warnings.warn(
            f"Skipped {len(unknown)} slides of {name} without a label, for example {unknown[:3]}.",
            stacklevel=2,
        )
    return Slides(slides, name, tiles.made_of)


def copies(one: Slides, other: Slides) -> list[tuple[str, str]]:
    """Return pairs of slides, one of each, with equal features, whatever their names.

    Features are equal but for the rounding of another batch or device: the slides have as many
    tiles, with the same mean and standard deviation.
    """
    of_size: dict[int, list[int]] = defaultdict(list)
    for i, slide in enumerate(one.slides):
        of_size[len(slide.x)].append(i)
    if not one.slides or not other.slides:
        return []
    first, second = (torch.stack([_moments(s.x) for s in split.slides]) for split in (one, other))
    spread = first.std(0, correction=0).clamp_min(first.abs().max() * 1e-4)
    pairs = []
    for j, slide in enumerate(other.slides):
        rows = of_size.get(len(slide.x), [])
        apart = ((first[rows] - second[j]).abs() / spread).amax(1) if rows else torch.ones(1)
        if apart.min() < SAME:
            pairs.append((one.slides[rows[int(apart.argmin())]].id, slide.id))
    return pairs


def _moments(x: Tensor) -> Tensor:
    return torch.cat([x.double().mean(0), x.double().std(0, correction=0)])


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


class SlideClassifier(Predictor, nn.Module):
    """Attention pooling over the tiles of a slide, and the names of its classes.

    Args:
        classes: class names.
        dim, hidden, dropout: see `AttentionPool`.
        made_of: record of the embeddings of the training slides.
    ``encoder`` and ``transform`` are None, because the features come from `embed.py`.
    """

    task = "slide"
    encoder = transform = None

    def __init__(
        self,
        classes: Sequence[str],
        *,
        dim: int,
        hidden: int = 128,
        dropout: float = 0.25,
        made_of: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.classes = list(classes)
        self.pool = AttentionPool(dim, len(classes), hidden, dropout)
        self.dim, self.made_of = dim, dict(made_of or {})
        self.config = {
            "classes": self.classes, "dim": dim, "hidden": hidden, "dropout": dropout,
            "made_of": self.made_of,
        }  # fmt: skip

    def predict(self, x: Any) -> Any:
        """Predict slides.

        Args:
            x: a folder of embeddings that `embed.py` wrote for ``slide:`` data; or a `Slide`, or
                the features (tiles, d) of one, or a list of them.
        Returns: for a folder, a dict of `ClassPrediction` by slide; otherwise one, or a list.
        """
        if not isinstance(x, str | Path):
            return super().predict(x)
        slides = read_slides(x, self.made_of).slides
        return dict(zip([slide.id for slide in slides], super().predict(slides), strict=True))

    def load(self, x: Any) -> Any:
        return x

    def prepare(self, image: Any) -> Tensor:
        x = torch.as_tensor(image.x if isinstance(image, Slide) else image, dtype=torch.float32)
        if x.dim() != 2 or x.shape[1] != self.dim or not len(x):
            raise ValueError(
                f"a slide's features have shape {tuple(x.shape)}; expected (tiles, {self.dim})."
            )
        require_finite(x, "the features of a slide", "embed it again")
        return x

    @torch.no_grad()
    def predict_prepared(self, inputs: Sequence[Tensor]) -> list[ClassPrediction]:
        device = self.pool.mean.device
        logits = torch.cat([self.pool(x[None].to(device))[0] for x in inputs])
        rows = logits.float().softmax(1).cpu().numpy()
        return [ClassPrediction(int(row.argmax()), row, self.classes) for row in rows]

    def save(self, folder: str | os.PathLike) -> None:
        """Write the model for `load_slide`."""
        save_head(self, folder, FILE)


def load_slide(
    folder: str | os.PathLike, *, device: str | torch.device | None = None
) -> SlideClassifier:
    """Load the attention model of a slide run, in eval mode.

    Raises: FileNotFoundError for a folder without one; ValueError if it is damaged.
    """
    config, state = load_head(folder, FILE, "slide")
    model = SlideClassifier(config.pop("classes"), **config)
    check_values(Path(folder) / FILE, state, model.state_dict())
    model.load_state_dict(state)
    return model.to(device).eval()
