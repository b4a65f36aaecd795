"""What frozen features are worth: extraction, nearest neighbours, logistic regression."""

import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vim_ssl.data.images import BadImage
from vim_ssl.data.split import stratified_split
from vim_ssl.data.transforms import create_transform
from vim_ssl.encoder import VimEncoder

MANY = int(5e7)  # numbers, from which on one matrix product keeps several threads busy
SEARCH_TOL = 1e-3
C_GRID = tuple(10.0**k for k in range(-3, 3))
READOUTS = ("token", "avg", "token+avg", "layers")


@dataclass
class Features:
    """Features of a data set: ``x`` (n, d) float32, ``y`` (n,) int64, ``ids``, the pictures that
    could not be read, and the ``groups`` that a split keeps whole, where the data have them."""

    x: Tensor
    y: Tensor
    ids: list[str]
    skipped: list[str]
    groups: list[str] | None = None


class _Readable(Dataset):
    """Items through a transform; a picture that cannot be read becomes its error's text."""

    def __init__(self, data, transform):
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        try:
            item = self.data[index]
        except BadImage as bad:
            return str(bad)
        label, group = item.get("label", -1), item.get("group")
        return self.transform(item["image"]), label, item["id"], group


@torch.no_grad()
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
    """
    loader = DataLoader(
        _Readable(data, transform), batch_size, num_workers=workers, collate_fn=list
    )
    xs, skipped = [], []
    ys: list[int] = []
    ids: list[str] = []
    groups: list[str | None] = []
    for rows in loader:
        skipped += [row for row in rows if isinstance(row, str)]
        rows = [row for row in rows if not isinstance(row, str)]
        if not rows:
            continue
        images, labels, names, part_groups = zip(*rows, strict=True)
        xs.append(encode(torch.stack(images).to(device)).flatten(1).float().cpu())
        ys += labels
        ids += names
        groups += part_groups
    if not xs:
        raise ValueError(f"none of the {len(data)} pictures could be read: {skipped[:3]}")
    named = [group for group in groups if group is not None]
    whole = named if len(named) == len(groups) else None
    return Features(torch.cat(xs), torch.tensor(ys), ids, skipped, whole)


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
    """Vote of the k most similar by cosine, weighted by exp(similarity / temperature).

    Args:
        bank: (n, d).  labels: (n,) int64.  queries: (m, d).
        standardise: first take the bank's mean and deviation out of every feature: what all
            pictures have in common would otherwise make every cosine nearly 1.
    Returns: (m,) int64.
    Reference: the protocol of DINO, arXiv:2104.14294; k and temperature of DINOv2.
    """
    if standardise:
        mean, std = bank.mean(0), bank.std(0) + 1e-6
        bank, queries = (bank - mean) / std, (queries - mean) / std
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    classes = int(labels.max()) + 1
    predicted = []
    for part in queries.split(1024):  # the similarity matrix stays small
        similarity, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        weight = (similarity / temperature).exp()
        votes = weight.new_zeros(len(part), classes).scatter_add_(1, labels[nearest], weight)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def fit_logistic(x: Tensor | np.ndarray, y: Tensor | np.ndarray, C: float, tol: float = 1e-4):
    """Standardised features through scikit-learn's multinomial logistic regression (L-BFGS).

    In float32, which halves the time; a thousand iterations are enough for every C of `C_GRID` to
    be ranked, if not for the largest to converge.

    Args:
        tol: of the gradient. A tenth as strict takes half the time.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, tol=tol, max_iter=1000))
    x, y = np.asarray(x, np.float32), np.asarray(y)
    # Its many small matrix products lose far more to waking threads than they gain.
    with threadpool_limits(1 if x.size < MANY else None), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x, y)


def choose_readout(
    x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor, readouts: dict[str, slice]
) -> tuple[str, float, float]:
    """Which columns of the features, and which C, do best on the validation part.

    Small problems are fitted side by side, one a core.
    Returns: (readout, C, accuracy); the first of equals.
    """
    from threadpoolctl import threadpool_limits

    def search(columns: slice) -> tuple[float, float]:
        return choose_C(x[:, columns], y, x_val[:, columns], y_val)

    small = x.numel() < MANY
    # The limit is set here too: fits side by side would undo one another's.
    workers = torch.get_num_threads() if small else 1
    with threadpool_limits(1 if small else None), ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(search, readouts.values()))
    tried = [(score, name, C) for name, (C, score) in zip(readouts, found, strict=True)]
    score, name, C = max(tried, key=lambda one: one[0])
    return name, C, score


def choose_C(x, y, x_val, y_val, grid: tuple[float, ...] = C_GRID) -> tuple[float, float]:
    """The C that does best on the validation part (the smaller on a tie), and its accuracy.

    ``grid`` ascends; the search ends after two values in a row that did worse than the best, and
    fits less strictly than what is reported in the end.
    """
    best, best_C, worse = -1.0, grid[0], 0
    for C in grid:
        score = fit_logistic(x, y, C, SEARCH_TOL).score(x_val, y_val)
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
        data: map-style; with labels of two classes or more a part of at most ``queries`` is held
            out, and at most ``bank`` of the others teach. The encoder trains on both.
        seed: of that choice.

    Returns: a function without arguments. It gives ``feature_std``, the mean deviation of a
        feature over pictures, and ``effective_rank``, exp of the entropy of the singular values of
        the centred patch means (RankMe, arXiv:2210.02885): both fall if the features collapse. And
        with labels ``knn_top1`` and ``linear_top1``, per cent.
    """
    labels = data.labels or []
    known = data.subset(i for i, label in enumerate(labels) if label >= 0)
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
                linear = fit_logistic(kept.x[:, patches], kept.y, 0.1, SEARCH_TOL)
                guess = linear.predict(seen.x[:, patches].numpy())
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


def accuracy(predicted, truth) -> float:
    """Share of right answers, in per cent."""
    return 100.0 * float((torch.as_tensor(predicted) == torch.as_tensor(truth)).float().mean())


def wilson_interval(percent: float, n: int) -> tuple[float, float]:
    """95 % interval of a share measured on n samples, in per cent (Wilson 1927)."""
    z, p = 1.96, percent / 100
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return round(max(100 * (centre - half), 0.0), 2), round(100 * (centre + half), 2)
