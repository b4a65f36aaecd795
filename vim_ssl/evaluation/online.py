"""The online probe: evaluate features quickly while a run trains."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vim_ssl.data.split import is_known, stratified_split
from vim_ssl.data.transforms.image import create_transform
from vim_ssl.evaluation.extract import extract_features, read_all, readout_columns
from vim_ssl.evaluation.knn import knn_predict
from vim_ssl.evaluation.linear_heads import fit_logistic
from vim_ssl.metrics.classification import accuracy
from vim_ssl.models.encoder import VimEncoder

ONLINE_TOL = 1e-3  # of one fit while training


def online_probe(
    encoder: VimEncoder,
    data,
    device: str | torch.device,
    seed: int,
    *,
    bank: int = 2000,
    queries: int = 500,
) -> Callable[[], dict[str, float]]:
    """What watches the features while the encoder trains, on a part of its own images.

    Args:
        data: map-style; with labels, one an image, of two classes or more a part of at most
            ``queries`` is held out, and at most ``bank`` of the others teach. The encoder trains
            on both.
        seed: of that choice.

    Returns: a function without arguments. It gives ``feature_std``, the mean deviation of a
        feature over images, and ``effective_rank``, exp of the entropy of the singular values of
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
            figures["knn_top1"] = accuracy(voted, seen.y).value
            if len(kept.y.unique()) > 1:  # of rare classes the bank may hold none
                linear = fit_logistic(kept.x[:, patches], kept.y, 0.1, ONLINE_TOL)
                guess = linear.predict(seen.x[:, patches])
                figures["linear_top1"] = accuracy(guess, seen.y).value
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
