"""What frozen features are worth: extraction, readouts, nearest neighbours, choice of a head."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from vim_ssl.data.images import BadImage
from vim_ssl.data.split import is_known, stratified_split
from vim_ssl.data.transforms.image import create_transform
from vim_ssl.evaluation.linear_heads import MANY, fit_logistic
from vim_ssl.metrics.bootstrap import accuracy
from vim_ssl.models.encoder import VimEncoder

SEARCH_TOL, GLANCE_TOL = 3e-4, 1e-3  # of a sweep, which starts warm; of one fit while training
QUERIES, BANK = 1024, 2**16  # pictures that are compared with one another at once
C_GRID = tuple(10.0**k for k in range(-3, 3))
READOUTS = ("token", "avg", "token+avg", "layers")


@dataclass
class Features:
    """Features of a data set: ``x`` (n, d) float32, the labels ``y`` (n,) or (n, classes) of 0 and
    1, int64, ``ids``, the pictures that could not be read, and the ``groups`` that a split keeps
    whole, where the data have them."""

    x: Tensor
    y: Tensor
    ids: list[str]
    skipped: list[str]
    groups: list[str] | None = None


class Readable(Dataset):
    """Places and pictures through a transform; the text of its error for one that is broken."""

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
        transform: picture -> (c, h, w).
    Raises: ValueError when no picture can be read.
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
    """Features with what the data know of the pictures at ``rows``."""
    if not rows:
        raise ValueError(f"none of the {len(data)} pictures could be read: {skipped[:3]}")
    labels = [-1] * len(rows) if data.labels is None else [data.labels[i] for i in rows]
    groups = None if data.groups is None else [data.groups[i] for i in rows]
    y = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    return Features(x, y, [data.ids[i] for i in rows], skipped, groups)


def read_all(encoder: VimEncoder, x: Tensor) -> Tensor:
    """Everything that `readout_columns` chooses from, of pictures (b, c, h, w), side by side.

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


def knn_predict(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    standardise: bool = True,
) -> Tensor:
    """The class (m,) int64 that the ``k`` nearest vote for; see `nearest` and `knn_votes`."""
    found = nearest(bank, queries, k=k, standardise=standardise)
    return knn_votes(labels, *found, temperature=temperature).argmax(1)


def nearest(
    bank: Tensor,
    queries: Tensor,
    *,
    k: int,
    standardise: bool = True,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """The ``k`` of the bank (n, d) most similar to each of the queries (m, d) by cosine.

    No more than `QUERIES` x `BANK` similarities exist at a time: a million pictures fit.

    Args:
        standardise: first take the bank's mean and deviation out of every feature: what all
            pictures have in common would otherwise make every cosine nearly 1.
    Returns: similarities and places in the bank, (m, min(k, n)), the most similar first.
    """
    if standardise:
        mean, std = bank.mean(0), bank.std(0) + 1e-6
        bank, queries = (bank - mean) / std, (queries - mean) / std
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    k = min(k, len(bank))
    found = []
    for asked in queries.split(QUERIES):
        asked = asked.to(device)
        best = asked.new_empty(len(asked), 0)
        places = torch.empty(len(asked), 0, dtype=torch.int64, device=device)
        for begin in range(0, len(bank), BANK):
            similarity = asked @ bank[begin : begin + BANK].to(device).T
            top, place = similarity.topk(min(k, similarity.shape[1]), dim=1)
            best, places = torch.cat([best, top], 1), torch.cat([places, place + begin], 1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            places = places.gather(1, order)
        found.append((best.cpu(), places.cpu()))
    similarities, all_places = zip(*found, strict=True)
    return torch.cat(similarities), torch.cat(all_places)


def knn_votes(
    labels: Tensor, similarity: Tensor, places: Tensor, *, temperature: float = 0.07
) -> Tensor:
    """The neighbours' votes, weighted by exp(similarity / temperature), as shares of all.

    Args:
        labels: of the bank, (n,) int64, or (n, classes) of 0 and 1.
        similarity, places: from `nearest`; their first k columns are the vote of k.
    Returns: (m, classes).
    Reference: the protocol of DINO, arXiv:2104.14294; k and temperature of DINOv2.
    """
    weight = (similarity / temperature).softmax(1)
    if labels.ndim == 1:
        votes = weight.new_zeros(len(weight), int(labels.max()) + 1)
        return votes.scatter_add_(1, labels[places], weight)
    parts = zip(weight.split(QUERIES), places.split(QUERIES), strict=True)
    return torch.cat([torch.einsum("mk,mkc->mc", w, labels[p].to(w)) for w, p in parts])


def choose_readout(
    x: Tensor,
    y: Tensor,
    x_val: Tensor,
    y_val: Tensor,
    readouts: dict[str, slice],
    grid: Sequence[float] = C_GRID,
) -> tuple[str, float, float]:
    """Which columns of the features, and which C, do best on the validation part.

    Small problems are fitted side by side, one a core.
    Returns: (readout, C, score of `LinearHead`); the first of equals.
    """
    from threadpoolctl import threadpool_limits

    def search(columns: slice) -> tuple[float, float]:
        return choose_C(x[:, columns], y, x_val[:, columns], y_val, grid)

    small = x.numel() < MANY
    # The limit is set here too: fits side by side would undo one another's.
    workers = torch.get_num_threads() if small else 1
    with threadpool_limits(1 if small else None), ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(search, readouts.values()))
    tried = [(score, name, C) for name, (C, score) in zip(readouts, found, strict=True)]
    score, name, C = max(tried, key=lambda one: one[0])
    return name, C, score


def choose_C(x, y, x_val, y_val, grid: Sequence[float] = C_GRID) -> tuple[float, float]:
    """The C that does best on the validation part (the smaller on a tie), and its score.

    ``grid`` ascends, and each fit starts where the one before ended; the search ends after two
    values in a row that did worse than the best, and fits less strictly than what is reported in
    the end.
    """
    best, best_C, worse, head = -1.0, grid[0], 0, None
    for C in grid:
        head = fit_logistic(x, y, C, SEARCH_TOL, head)
        score = head.score(x_val, y_val)
        worse = worse + 1 if score < best else 0
        if score > best:
            best, best_C = score, C
        if worse == 2:
            break
    return best_C, best


def online_probe(
    encoder: VimEncoder,
    data,
    device: str | torch.device,
    seed: int,
    *,
    bank: int = 2000,
    queries: int = 500,
) -> Callable[[], dict[str, float]]:
    """What watches the features while the encoder trains, on a part of its own pictures.

    Args:
        data: map-style; with labels, one a picture, of two classes or more a part of at most
            ``queries`` is held out, and at most ``bank`` of the others teach. The encoder trains
            on both.
        seed: of that choice.

    Returns: a function without arguments. It gives ``feature_std``, the mean deviation of a
        feature over pictures, and ``effective_rank``, exp of the entropy of the singular values of
        the centred patch means (RankMe, arXiv:2210.02885): both fall if the features collapse. And
        with labels ``knn_top1`` and ``linear_top1``, per cent.
    """
    labels = data.labels or []
    known = data.subset(
        i for i, label in enumerate(labels) if is_known(label) and not data.multi_label
    )
    alone = known.groups is not None and len(set(known.groups)) < 2
    labelled = len(known) >= 10 and len(set(known.labels or [])) > 1 and not alone
    if labelled:
        share = min(0.2, queries / len(known))
        rest, held_out = stratified_split(known.labels, share, seed, known.groups)
        parts = [known.subset(rest[:: -(-len(rest) // bank)]), known.subset(held_out)]
    else:
        parts = [data.subset(range(0, len(data), -(-len(data) // bank)))]
    transform = create_transform(encoder)
    patches = readout_columns(encoder, "avg")

    def evaluate() -> dict[str, float]:
        training = encoder.training
        encoder.eval()
        kept, *asked = (
            extract_features(lambda x: read_all(encoder, x), part, transform, device=device)
            for part in parts
        )
        encoder.train(training)
        figures = {"feature_std": kept.x.std(0, correction=0).mean().item()}
        if not math.isfinite(figures["feature_std"]):
            return figures
        figures["effective_rank"] = effective_rank(kept.x[:, patches])
        for seen in asked:
            voted = knn_predict(kept.x, kept.y, seen.x)
            figures["knn_top1"] = accuracy(voted, seen.y)
            if len(kept.y.unique()) > 1:  # of rare classes the bank may hold none
                linear = fit_logistic(kept.x[:, patches], kept.y, 0.1, GLANCE_TOL)
                guess = linear.predict(seen.x[:, patches])
                figures["linear_top1"] = accuracy(guess, seen.y)
        return figures

    return evaluate


def effective_rank(x: Tensor) -> float:
    """exp of the entropy of the singular values of (n, d) features, their mean taken out: d where
    all directions vary alike, 1 where one does, 0 where none does. RankMe, arXiv:2210.02885."""
    values = torch.linalg.svdvals((x - x.mean(0)).double())
    if not values.sum() > 0:
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())
