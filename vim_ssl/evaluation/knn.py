"""Nearest neighbours on features: search and vote."""

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES, BANK = 1024, 2**16  # images that are compared with one another at once


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

    No more than `QUERIES` x `BANK` similarities exist at a time: a million images fit.

    Args:
        standardise: first take the bank's mean and deviation out of every feature: what all
            images have in common would otherwise make every cosine nearly 1.
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
