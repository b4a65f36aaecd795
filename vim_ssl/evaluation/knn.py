"""Nearest-neighbour classification of features: search, vote, and the choice of its settings."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_ssl.data.split import stratified_split
from vim_ssl.evaluation.extract import Features
from vim_ssl.metrics.bootstrap import Metric
from vim_ssl.metrics.classification import answer_metrics, require_labels
from vim_ssl.utils.numbers import REMEDY, require_finite

QUERIES, BANK = 1024, 2**16  # rows compared at a time: a quarter of a gigabyte
K_GRID = (10, 20, 100, 200)  # numbers of neighbours to choose from, as in papers
TEMPERATURE = 0.07
MAX_VALIDATION = 10_000  # images to choose by, so that a million images take minutes


@dataclass(frozen=True)
class Neighbours:
    """The settings of a kNN classifier.

    Attributes:
        readout: name of the features.
        standardise: see `nearest`.
        k: number of neighbours.
        temperature: see `knn_votes`.
    """

    readout: str
    standardise: bool
    k: int
    temperature: float = TEMPERATURE

    @property
    def metric(self) -> str:
        return "cosine of standardised features" if self.standardise else "cosine"


def usable_k(given: Sequence[int], bank: int) -> list[int]:
    """Return the numbers of neighbours that ``bank`` images can give: those given, by default
    `K_GRID`, or 1 if the bank is smaller than all of these.

    Raises: ValueError if all given numbers exceed the bank.
    """
    fitting = [k for k in given or K_GRID if k <= bank]
    if given and not fitting:
        raise ValueError(
            f"k is {', '.join(map(str, given))}, but there are only {bank:,} training images; use "
            f"a k of at most {bank}."
        )
    return fitting or [1]


def choose_neighbours(
    train: Features,
    readouts: dict[str, slice],
    *,
    k: Sequence[int] = (),
    standardise: Sequence[bool] = (True, False),
    validation: float = 0.2,
    seed: int = 0,
    temperature: float = TEMPERATURE,
    device: str | torch.device = "cpu",
) -> tuple[Neighbours, float]:
    """Choose readout, metric and k by their score on a validation split of the training images.

    Args:
        readouts: name -> columns of the features.
        k: candidates; see `usable_k`.
        standardise: candidates for the metric.
        validation: share of ``train`` in the validation split, which keeps groups together; at most
            `MAX_VALIDATION` of its images are used.
        seed: seed of this split.
    Returns: the first candidate with the best score (ordered by readout, metric, k), and its score
        in per cent.
    """
    rest, held_out = stratified_split(train.y.tolist(), validation, seed, train.groups)
    kept, queries = (_rows(train, rows) for rows in (rest, held_out))
    return choose_neighbours_on(
        kept, queries, readouts, candidates=usable_k(k, len(train.y)), standardise=standardise,
        temperature=temperature, device=device,
    )  # fmt: skip


def choose_neighbours_on(
    bank: Features,
    validation: Features,
    readouts: dict[str, slice],
    *,
    candidates: Sequence[int] = (),
    standardise: Sequence[bool] = (True, False),
    temperature: float = TEMPERATURE,
    device: str | torch.device = "cpu",
) -> tuple[Neighbours, float]:
    """`choose_neighbours` with a given validation split.

    Args:
        candidates: numbers of neighbours; those of the bank by default. One that exceeds the bank
            counts as all of it.
    """
    queries = _rows(
        validation, range(0, len(validation.y), -(-len(validation.y) // MAX_VALIDATION))
    )
    require_labels(queries.y, "the validation split")
    candidates = candidates or usable_k((), len(bank.y))
    # A given k may exceed the rest, though not the whole training split.
    tried_k = [min(one, len(bank.y)) for one in candidates]
    tried = []
    for readout, columns in readouts.items():
        for way in standardise:
            similarity, indices = nearest(
                bank.x[:, columns], queries.x[:, columns], k=max(tried_k), standardise=way,
                device=device,
            )  # fmt: skip
            for one, number in zip(candidates, tried_k, strict=True):
                answers = knn_votes(
                    bank.y, similarity[:, :number], indices[:, :number], temperature=temperature
                )
                score = answer_metrics(answers, queries.y)["main"].value
                tried.append((score, Neighbours(readout, way, one, temperature)))
    score, best = max(tried, key=lambda one: one[0])
    return best, score


def _rows(features: Features, rows: Sequence[int]) -> Features:
    rows = list(rows)
    groups = None if features.groups is None else [features.groups[i] for i in rows]
    return Features(
        features.x[rows], features.y[rows], [features.ids[i] for i in rows], features.skipped,
        groups,
    )  # fmt: skip


def evaluate_neighbours(
    chosen: Neighbours,
    train: Features,
    test: Features,
    readouts: dict[str, slice],
    device: str | torch.device = "cpu",
) -> tuple[Tensor, dict[str, Metric]]:
    """Classify the test images with the training images as bank.

    Returns: the answers, see `knn_answers`, and the `answer_metrics` of the votes.
    """
    columns = readouts[chosen.readout]
    similarity, indices = nearest(
        train.x[:, columns], test.x[:, columns], k=chosen.k, standardise=chosen.standardise,
        device=device,
    )  # fmt: skip
    votes = knn_votes(train.y, similarity, indices, temperature=chosen.temperature)
    return _answers(train.y, votes), answer_metrics(votes, test.y)


def knn_predict(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    k: int = 20,
    temperature: float = TEMPERATURE,
    standardise: bool = True,
) -> Tensor:
    """Predict the class (m,) int64 with the most votes of the ``k`` nearest neighbours; see
    `nearest` and `knn_votes`.

    Raises: ValueError if ``k`` exceeds the bank.
    """
    usable_k([k], len(bank))
    neighbours = nearest(bank, queries, k=k, standardise=standardise)
    return knn_answers(labels, *neighbours, temperature=temperature)


def nearest(
    bank: Tensor,
    queries: Tensor,
    *,
    k: int,
    standardise: bool = True,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """Find the ``k`` rows of the bank (n, d) with the largest cosine similarity to each query
    (m, d).

    Args:
        standardise: first standardise every feature with the bank's mean and standard deviation;
            otherwise a component common to all images makes every cosine nearly 1.
    Returns: see `search`.
    Raises: ValueError for an empty bank, and for features that are not finite.
    """
    if not len(bank):
        raise ValueError("the bank of neighbours is empty; expected at least one image.")
    require_finite(bank, "the features of the bank", REMEDY)
    require_finite(queries, "the features of the queries", REMEDY)
    if standardise:
        # A single image has no deviation.
        mean, std = bank.mean(0), bank.std(0, correction=min(1, len(bank) - 1)) + 1e-6
        bank, queries = (bank - mean) / std, (queries - mean) / std
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    return search(bank, queries, k=k, device=device)


def search(
    bank: Tensor, queries: Tensor, *, k: int, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """Find the ``k`` rows of the bank (n, d) with the largest dot product with each query (m, d).

    At most `QUERIES` x `BANK` similarities are in memory at a time, so a million images fit.

    Returns: similarities and indices into the bank, (m, min(k, n)), most similar first, on the CPU.
    Raises: ValueError for values that are not finite.
    """
    require_finite(bank, "the features of the bank", REMEDY)
    require_finite(queries, "the features of the queries", REMEDY)
    k = min(k, len(bank))
    results = []
    for query in queries.split(QUERIES):
        query = query.to(device)
        best = query.new_empty(len(query), 0)
        indices = torch.empty(len(query), 0, dtype=torch.int64, device=device)
        for begin in range(0, len(bank), BANK):
            similarity = query @ bank[begin : begin + BANK].to(device).T
            top, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
            best, indices = torch.cat([best, top], 1), torch.cat([indices, index + begin], 1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            indices = indices.gather(1, order)
        results.append((best.cpu(), indices.cpu()))
    similarities, all_indices = zip(*results, strict=True)
    return torch.cat(similarities), torch.cat(all_indices)


def knn_answers(
    labels: Tensor, similarity: Tensor, indices: Tensor, *, temperature: float = TEMPERATURE
) -> Tensor:
    """Return the predicted classes (m,), or with several labels per image their scores (m,
    classes): the votes of `knn_votes`, which has the same arguments."""
    return _answers(labels, knn_votes(labels, similarity, indices, temperature=temperature))


def _answers(labels: Tensor, votes: Tensor) -> Tensor:
    return votes.argmax(1) if labels.ndim == 1 else votes


def knn_votes(
    labels: Tensor, similarity: Tensor, indices: Tensor, *, temperature: float = TEMPERATURE
) -> Tensor:
    """Compute each class's share of the neighbours' votes, weighted by exp(similarity /
    temperature).

    Args:
        labels: labels of the bank, (n,) int64, or (n, classes) of 0 and 1.
        similarity, indices: from `nearest`; their first k columns give the votes of k neighbours.
    Returns: (m, classes).
    Reference: DINO's protocol, arXiv:2104.14294; k and temperature as in DINOv2.
    """
    if labels.ndim == 1 and int(labels.min()) < 0:
        raise ValueError("the bank has images without a label (-1); vote with labelled ones only.")
    weight = (similarity / temperature).softmax(1)
    if labels.ndim == 1:
        votes = weight.new_zeros(len(weight), int(labels.max()) + 1)
        return votes.scatter_add_(1, labels[indices], weight)
    parts = zip(weight.split(QUERIES), indices.split(QUERIES), strict=True)
    return torch.cat([torch.einsum("mk,mkc->mc", w, labels[p].to(w)) for w, p in parts])
