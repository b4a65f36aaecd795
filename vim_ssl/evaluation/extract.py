"""Extract features of a data set under an encoder, by readout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from vim_ssl.data.images import BadImage
from vim_ssl.models.encoder import VimEncoder

READOUTS = ("token", "avg", "token+avg", "layers")


@dataclass
class Features:
    """Features of a data set: ``x`` (n, d) float32, the labels ``y`` (n,) or (n, classes) of 0 and
    1, int64, ``ids``, the images that could not be read, and the ``groups`` that a split keeps
    whole, where the data have them."""

    x: Tensor
    y: Tensor
    ids: list[str]
    skipped: list[str]
    groups: list[str] | None = None


class Readable(Dataset):
    """Places and images through a transform; the text of its error for one that is broken."""

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
    """Run ``encode`` over a data set in order.

    Args:
        encode: (b, c, h, w) -> (b, ...); flattened to (b, d) float32.
        data: map-style data of `vim_ssl.data.open_data`.
        transform: image -> (c, h, w).
    Raises: ValueError when no image can be read.
    """
    found = extract_rows(
        encode, data, transform, range(len(data)),
        batch_size=batch_size, workers=workers, device=device,
    )  # fmt: skip
    return features_of(data, *found)


@torch.no_grad()
def extract_rows(
    encode: Callable[[Tensor], Tensor],
    data,
    transform: Callable,
    places: Sequence[int],
    *,
    batch_size: int,
    workers: int,
    device: str | torch.device,
) -> tuple[Tensor, list[int], list[str]]:
    """`extract_features` at some places: features (n, d) of those that can be read, float32 on the
    CPU, these places, and the errors of the others."""
    loader = DataLoader(
        Subset(Readable(data, transform), places),
        batch_size,
        num_workers=workers,
        collate_fn=list,
    )
    xs, rows, skipped = [torch.empty(0, 0)], [], []
    for batch in loader:
        skipped += [row for row in batch if isinstance(row, str)]
        if whole := [row for row in batch if not isinstance(row, str)]:
            rows += [place for place, _ in whole]
            images = torch.stack([image for _, image in whole]).to(device)
            xs.append(encode_views(encode, images).flatten(1).float().cpu())
    return torch.cat(xs[1:] or xs), rows, skipped


def encode_views(encode: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``encode(x)``; of several clips of each video, (b, clips, c, t, h, w), their mean."""
    if x.dim() < 6:
        return encode(x)
    return encode(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)


def features_of(data, x: Tensor, rows: Sequence[int], skipped: list[str]) -> Features:
    """Features with what the data know of the images at ``rows``."""
    if not rows:
        raise ValueError(f"none of the {len(data)} images could be read: {skipped[:3]}")
    labels = [-1] * len(rows) if data.labels is None else [data.labels[i] for i in rows]
    groups = None if data.groups is None else [data.groups[i] for i in rows]
    y = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    return Features(x, y, [data.ids[i] for i in rows], skipped, groups)


def read_all(encoder: VimEncoder, x: Tensor) -> Tensor:
    """Everything that `readout_columns` chooses from, of images (b, c, h, w), side by side.

    Columns of embed_dim each: the class token (if there is one), the patches' mean after the last
    block, then their means after a quarter, half and three quarters of the blocks.
    """
    depth = len(encoder.feature_info)
    quarters = [max(round(depth * q / 4) - 1, 0) for q in (1, 2, 3, 4)]
    taps = encoder.forward_intermediates(
        x, quarters, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    means = [patches.mean(1) for patches, _ in taps]
    token = [taps[-1][1].mean(1)] if taps[-1][1].shape[1] else []
    return torch.cat([*token, means[-1], *means[:-1]], dim=1)


def readout_columns(encoder: VimEncoder, readout: str) -> slice:
    """The columns of `read_all` that make up one of `READOUTS`.

    Raises: ValueError for an unknown readout, or a class token that the encoder does not have.
    """
    if readout not in READOUTS:
        raise ValueError(f"readout {readout!r} is not one of {', '.join(READOUTS)}.")
    has_token = bool(encoder.cls_names)
    if readout.startswith("token") and not has_token:
        raise ValueError(f"readout {readout!r} needs a class token; use 'avg' or 'layers'.")
    first, last = {"token": (0, 1), "avg": (1, 2), "token+avg": (0, 2), "layers": (0, 5)}[readout]
    shift = 0 if has_token else -1
    d = encoder.embed_dim
    return slice(max(first + shift, 0) * d, (last + shift) * d)
