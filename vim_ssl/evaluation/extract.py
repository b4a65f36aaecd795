"""Extract the features of images with an encoder, in the order of the data."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from vim_ssl.data.images import BadImage
from vim_ssl.data.loading.workers import Loader


@dataclass
class Features:
    """Features of a data set.

    Attributes:
        x: (n, d) float32.
        y: labels int64, (n,) or (n, classes) of 0 and 1.
        ids: ids of the images.
        skipped: error texts of unreadable images.
        groups: groups that a split must not divide, or None.
    """

    x: Tensor
    y: Tensor
    ids: list[str]
    skipped: list[str]
    groups: list[str] | None = None


class Readable(Dataset):
    """(index, transformed image) of every image, or the error text of a broken one."""

    def __init__(self, data, transform):
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        try:
            return index, self.transform(self.data[index]["image"])
        except BadImage as bad:
            return str(bad)


def extract_features(
    encode: Callable[[Tensor], Tensor],
    data,
    transform: Callable,
    *,
    batch_size: int = 128,
    workers: int = 0,
    device: str | torch.device = "cpu",
) -> Features:
    """Run ``encode`` over map-style data.

    Args:
        encode: (b, c, h, w) -> (b, ...); flattened to (b, d) float32.
        data: map-style data of `vim_ssl.data.open_data`.
        transform: image -> (c, h, w).
    Raises: ValueError if no image can be read.
    """
    result = extract_rows(
        encode, data, transform, range(len(data)),
        batch_size=batch_size, workers=workers, device=device,
    )  # fmt: skip
    return features_of(data, *result)


def extract_rows(
    encode: Callable[[Tensor], Tensor],
    data,
    transform: Callable,
    indices: Sequence[int],
    *,
    batch_size: int,
    workers: int,
    device: str | torch.device,
) -> tuple[Tensor, list[int], list[str]]:
    """`extract_features` for some images: return the features (n, d) of the readable ones, their
    indices, and the error texts of the others."""
    subset = Subset(Readable(data, transform), indices)
    loader = Loader(subset, batch_size, num_workers=workers, collate_fn=list)
    x, rows, skipped = encode_batches(encode, loader, device)
    return x, [index for (index,) in rows], skipped


@torch.no_grad()
def encode_batches(
    encode: Callable[[Tensor], Tensor],
    batches: Iterable[Sequence[tuple | str]],
    device: str | torch.device,
) -> tuple[Tensor, list[tuple], list[str]]:
    """Encode batches of rows. A row is a tuple that ends in an image, or the error text of an
    unreadable one.

    Returns: features (n, d) float32 on the CPU, the rows without their images, the error texts.
    """
    xs, rows, skipped = [torch.empty(0, 0)], [], []
    for batch in batches:
        skipped += [row for row in batch if isinstance(row, str)]
        if readable := [row for row in batch if not isinstance(row, str)]:
            rows += [row[:-1] for row in readable]
            images = torch.stack([row[-1] for row in readable]).to(device)
            xs.append(encode_views(encode, images).flatten(1).float().cpu())
    return torch.cat(xs[1:] or xs), rows, skipped


def encode_views(encode: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``encode(x)``; for several clips per video, (b, clips, c, t, h, w), the mean over clips."""
    if x.dim() < 6:
        return encode(x)
    return encode(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)


def features_of(data, x: Tensor, rows: Sequence[int], skipped: list[str]) -> Features:
    """Combine features with the labels, ids and groups of the images at ``rows``."""
    if not rows:
        raise ValueError(f"none of the {len(data)} images can be read: {skipped[:3]}")
    labels = [-1] * len(rows) if data.labels is None else [data.labels[i] for i in rows]
    groups = None if data.groups is None else [data.groups[i] for i in rows]
    y = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    return Features(x, y, [data.ids[i] for i in rows], skipped, groups)
