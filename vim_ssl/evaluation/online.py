"""The online probe: a quick evaluation of the features during training."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vim_ssl.data.split import is_known, stratified_split
from vim_ssl.data.transforms.image import create_transform
from vim_ssl.evaluation.extract import extract_features
from vim_ssl.evaluation.knn import knn_predict
from vim_ssl.evaluation.linear_heads import fit_logistic
from vim_ssl.evaluation.readout import all_readouts, readout_columns
from vim_ssl.metrics.classification import accuracy
from vim_ssl.metrics.titles import CHECK_GROUPS, CHECK_SIZE, CHECK_TRAIN, ONLINE_C, ONLINE_K
from vim_ssl.models.protocol import Encoder

ONLINE_TOL = 1e-3  # tolerance of the fit during training


def online_probe(
    encoder: Encoder,
    data,
    device: str | torch.device,
    seed: int,
    *,
    bank: int = 2000,
    queries: int = 500,
) -> Callable[[], dict[str, float]]:
    """Prepare a quick evaluation of the features on a subset of the training images.

    Args:
        data: map-style data. If it has single labels of at least two classes, up to ``queries``
            images are held out and up to ``bank`` others train the classifiers. The encoder trains
            on both.
        seed: seed of this selection.

    Returns: a function without arguments that returns ``feature_std`` (the mean standard deviation
        of a feature over images) and ``effective_rank``, both of the patch means; both fall if the
        features collapse. With labels also ``knn_top1`` and ``linear_top1``, in per cent, and the
        numbers of held-out and of other images, ``check_images`` and ``check_train_images``, and
        for data with groups that of the held-out ones, ``check_groups``;
        `vim_ssl.metrics.titles` has their titles. The metrics are not those of the final probe,
        which selects its settings and uses all images.
    """
    labels = data.labels or []
    known = data.subset(
        i for i, label in enumerate(labels) if is_known(label) and not data.multi_label
    )
    one_group = known.groups is not None and len(set(known.groups)) < 2
    labelled = len(known) >= 10 and len(set(known.labels or [])) > 1 and not one_group
    if labelled:
        share = min(0.2, queries / len(known))
        rest, out = stratified_split(known.labels, share, seed, known.groups)
        subsets = [known.subset(rest[:: -(-len(rest) // bank)]), known.subset(out)]
    else:
        subsets = [data.subset(range(0, len(data), -(-len(data) // bank)))]
    transform = create_transform(encoder)
    patches = readout_columns(encoder, "avg")

    def evaluate() -> dict[str, float]:
        training = encoder.training
        encoder.eval()
        train, *held_out = (
            extract_features(lambda x: all_readouts(encoder, x), subset, transform, device=device)
            for subset in subsets
        )
        encoder.train(training)
        metrics = {"feature_std": train.x.std(0, correction=0).mean().item()}
        if not all(bool(split.x.isfinite().all()) for split in (train, *held_out)):
            return {"feature_std": math.nan}  # training goes on, and the loss tells
        metrics["effective_rank"] = effective_rank(train.x[:, patches])
        for test in held_out:
            k = min(ONLINE_K, len(train.y))
            predicted = knn_predict(train.x, train.y, test.x, k=k)
            metrics["knn_top1"] = accuracy(predicted, test.y).value
            if len(train.y.unique()) > 1:  # the subset may lack rare classes
                linear = fit_logistic(train.x[:, patches], train.y, ONLINE_C, ONLINE_TOL)
                metrics["linear_top1"] = accuracy(linear.predict(test.x[:, patches]), test.y).value
            metrics |= {CHECK_SIZE: len(test.y), CHECK_TRAIN: len(train.y)}
            if test.groups is not None:
                metrics[CHECK_GROUPS] = len(set(test.groups))
        return metrics

    return evaluate


def effective_rank(x: Tensor) -> float:
    """Return exp of the entropy of the singular values of centred features (n, d): d if all
    directions vary equally, 1 if only one varies, 0 if none varies. RankMe, arXiv:2210.02885."""
    values = torch.linalg.svdvals((x - x.mean(0)).double())
    if not values.sum() > 0:
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())
