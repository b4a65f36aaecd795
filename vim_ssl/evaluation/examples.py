"""Images that explain an evaluation: mistakes, nearest neighbours, maps of patch features.

Each function returns rows of text, numbers and PIL images; `write_examples` writes them to
``FOLDER/examples``, where the report of a run finds them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from vim_ssl.data.transforms.image import create_transform, denormalize
from vim_ssl.evaluation.knn import nearest
from vim_ssl.models.protocol import Encoder
from vim_ssl.utils.files import atomic_write
from vim_ssl.utils.numbers import REMEDY, require_finite

SIDE = 128  # longer side of a stored image in pixels
MISTAKES = 24
QUERIES, NEIGHBOURS = 6, 6
MAPS = 6
FOLDER, FILE = "examples", "examples.json"


class Viewer:
    """Images of map-style data as an encoder sees them: resized, cropped, in visible colours.

    Of a clip, the frame in the middle.

    Args:
        data: map-style data of `vim_ssl.data.open_data`.
        encoder: determines size, crop and bands.
    """

    def __init__(self, data, encoder: Encoder):
        self.data, self.config = data, encoder.data_config
        self.transform = create_transform(encoder)
        self.index = {id: i for i, id in enumerate(data.ids)}

    def input(self, id: str) -> Tensor:
        """Return the encoder's input for one image, (c, h, w), or (clips, c, t, h, w)."""
        return self.transform(self.data[self.index[id]]["image"])

    def __call__(self, id: str) -> Image.Image:
        """Return the image with this id. Raises: BadImage, KeyError."""
        x = self.input(id)
        if x.dim() == 5:
            x = x[0]
        if x.dim() == 4:
            x = x[:, x.shape[1] // 2]
        visible = denormalize(x[None].float(), self.config)[0]
        return to_pil_image((255 * visible).round().to(torch.uint8))


def worst_mistakes(
    view: Viewer,
    ids: Sequence[str],
    labels: Tensor,
    predicted: Tensor,
    probabilities: Tensor,
    classes: Sequence[str],
    most: int = MISTAKES,
) -> list[dict[str, Any]]:
    """Find the wrong predictions with the highest probability of the predicted class.

    Args:
        ids: ids of n images of ``view``.
        labels, predicted: (n,) int64.
        probabilities: (n, classes).
    Returns: rows of ``id``, ``image``, ``label``, ``predicted``, and the probabilities of both
        classes, ``label_probability`` and ``predicted_probability``.
    """
    wrong = (predicted != labels).nonzero()[:, 0]
    sure = probabilities[wrong, predicted[wrong]]
    rows = []
    for i in wrong[sure.argsort(descending=True, stable=True)][:most].tolist():
        label, guess = int(labels[i]), int(predicted[i])
        rows.append({
            "id": ids[i], "image": view(ids[i]), "label": classes[label],
            "predicted": classes[guess],
            "predicted_probability": round(float(probabilities[i, guess]), 4),
            "label_probability": round(float(probabilities[i, label]), 4),
        })  # fmt: skip
    return rows


def nearest_neighbours(
    bank_view: Viewer,
    query_view: Viewer,
    bank: tuple[Sequence[str], Tensor, Tensor],
    queries: tuple[Sequence[str], Tensor, Tensor],
    classes: Sequence[str],
    *,
    standardise: bool = True,
) -> list[dict[str, Any]]:
    """Find the nearest images of the bank to `QUERIES` evenly spaced queries, by cosine similarity.

    Args:
        bank, queries: ids, features (n, d) and labels (n,) int64; labels of another shape, as of
            multi-label data, are not named.
    Returns: rows of ``id``, ``image`` and ``label`` of the query, and ``neighbours``, the nearest
        first, each with the same keys and ``similarity``.
    """
    (bank_ids, bank_x, bank_y), (ids, x, y) = bank, queries
    chosen = sorted({i * len(ids) // QUERIES for i in range(QUERIES)})
    matches = nearest(bank_x, x[chosen], k=NEIGHBOURS, standardise=standardise)

    def described(view: Viewer, id: str, label: Tensor) -> dict[str, Any]:
        known = label.ndim == 0 and label >= 0
        return {"id": id, "image": view(id), "label": classes[int(label)] if known else ""}

    rows = []
    for i, values, indices in zip(chosen, *(part.tolist() for part in matches), strict=True):
        neighbours = [
            described(bank_view, bank_ids[j], bank_y[j]) | {"similarity": round(value, 3)}
            for value, j in zip(values, indices, strict=True)
        ]
        rows.append(described(query_view, ids[i], y[i]) | {"neighbours": neighbours})
    return rows


@torch.no_grad()
def feature_maps(view: Viewer, encoder: Encoder, ids: Sequence[str]) -> dict[str, Any]:
    """Show the three main components of the patch features of a few images as red, green and blue.

    The components are those of all patches of these images together, so that equal colours mean
    similar features.

    Args:
        encoder: an encoder of images, in eval mode; clips and encoders without maps give {}.
        ids: images to choose `MAPS` evenly spaced ones from.
    Returns: ``share``, the part of the variance in the three components, and ``rows`` of ``image``
        and ``map``, one pixel per patch.
    """
    if encoder.reads_clips or not ids or not encoder.feature_info:
        return {}
    chosen = [ids[i] for i in sorted({i * len(ids) // MAPS for i in range(MAPS)})]
    device = next(encoder.parameters()).device
    x = torch.stack([view.input(id) for id in chosen]).to(device)
    (maps,) = encoder.forward_intermediates(x, 1, norm=True, intermediates_only=True)
    colours, share = principal_colours(maps.float().cpu())
    rows = [
        {"id": id, "image": view(id), "map": Image.fromarray(colour)}
        for id, colour in zip(chosen, colours, strict=True)
    ]
    return {"share": round(share, 3), "rows": rows}


def principal_colours(maps: Tensor) -> tuple[np.ndarray, float]:
    """Convert maps (n, d, h, w) to the colours of their three main components.

    Each component is scaled from its 2nd to its 98th percentile; its largest weight is positive.

    Returns: uint8 (n, h, w, 3), and the share of the variance in these components, 0 to 1.
    """
    require_finite(maps, "the patch features", REMEDY)
    n, d, h, w = maps.shape
    x = maps.permute(0, 2, 3, 1).reshape(-1, d).double()
    x = x - x.mean(0)
    values, axes = torch.linalg.eigh(x.T @ x)  # ascending
    axes = axes.flip(1)[:, :3]
    signs = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    components = torch.nn.functional.pad(x @ (axes * signs), (0, 3 - axes.shape[1]))
    low, high = np.percentile(components.numpy(), [2, 98], axis=0)
    scaled = (components.numpy() - low) / np.maximum(high - low, 1e-12)
    share = float(values.flip(0)[:3].sum() / values.sum().clamp(min=1e-12))
    return (255 * scaled.clip(0, 1)).round().astype(np.uint8).reshape(n, h, w, 3), share


def write_examples(folder: Path, **parts: Any) -> None:
    """Write ``folder/examples``: PNG files of at most `SIDE` pixels, and examples.json, in which
    each PIL image of ``parts`` (nested lists and dicts) is the name of its file.

    The images of an earlier evaluation are deleted; other files are kept."""
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    if (target / FILE).exists():
        for path in target.glob("[0-9][0-9][0-9].png"):
            path.unlink()
    count = 0

    def stored(value: Any) -> Any:
        nonlocal count
        if isinstance(value, dict):
            return {key: stored(part) for key, part in value.items()}
        if isinstance(value, list):
            return [stored(part) for part in value]
        if not isinstance(value, Image.Image):
            return value
        name, count = f"{count:03d}.png", count + 1
        image = value.copy()
        image.thumbnail((SIDE, SIDE))
        image.save(target / name)
        return name

    text = json.dumps(stored(parts), indent=1, ensure_ascii=False)
    atomic_write(target / FILE, text.encode("utf-8", "backslashreplace"))
