"""Nearest-neighbour classification of features: search and vote."""

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES, BANK = 1024, 2**16  # rows compared at a time: a quarter of a gigabyte


def knn_predict(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    standardise: bool = True,
) -> Tensor:
    """Predict the class (m,) int64 with the most votes of the ``k`` nearest neighbours; see
    `nearest` and `knn_votes`."""
    neighbours = nearest(bank, queries, k=k, standardise=standardise)
    return knn_votes(labels, *neighbours, temperature=temperature).argmax(1)


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
    """
    if standardise:
        mean, std = bank.mean(0), bank.std(0) + 1e-6
        bank, queries = (bank - mean) / std, (queries - mean) / std
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    return search(bank, queries, k=k, device=device)


def search(
    bank: Tensor, queries: Tensor, *, k: int, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """Find the ``k`` rows of the bank (n, d) with the largest dot product with each query (m, d).

    At most `QUERIES` x `BANK` similarities are in memory at a time, so a million images fit.

    Returns: similarities and indices into the bank, (m, min(k, n)), most similar first, on the CPU.
    """
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


def knn_votes(
    labels: Tensor, similarity: Tensor, indices: Tensor, *, temperature: float = 0.07
) -> Tensor:
    """Compute each class's share of the neighbours' votes, weighted by exp(similarity /
    temperature).

    Args:
        labels: labels of the bank, (n,) int64, or (n, classes) of 0 and 1.
        similarity, indices: from `nearest`; their first k columns give the votes of k neighbours.
    Returns: (m, classes).
    Reference: DINO's protocol, arXiv:2104.14294; k and temperature as in DINOv2.
    """
    weight = (similarity / temperature).softmax(1)
    if labels.ndim == 1:
        votes = weight.new_zeros(len(weight), int(labels.max()) + 1)
        return votes.scatter_add_(1, labels[indices], weight)
    parts = zip(weight.split(QUERIES), indices.split(QUERIES), strict=True)
    return torch.cat([torch.einsum("mk,mkc->mc", w, labels[p].to(w)) for w, p in parts])
