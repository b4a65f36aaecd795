"""Baselines of classification: raw pixels, and the most frequent class.

They are computed on the same splits as the result beside which they stand, so the difference has a
paired interval.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from vim_ssl.data.transforms.clip import ClipTransform
from vim_ssl.data.transforms.image import Transform, create_transform
from vim_ssl.evaluation.extract import Features, extract_features
from vim_ssl.evaluation.knn import choose_neighbours, evaluate_neighbours
from vim_ssl.metrics.bootstrap import Metric
from vim_ssl.metrics.classification import answer_metrics
from vim_ssl.metrics.sentences import Gain, result_sentence
from vim_ssl.models.protocol import Encoder

MAX_PIXELS = 64 * 64 * 3  # values per image; above it, regression on raw pixels takes too long
SHRUNK = 32  # side in pixels to which larger images are resized
MAX_IMAGES, MAX_VALUES = 20_000, 10**8  # above either, raw pixels are no cheap baseline
MOST_FREQUENT, KNN_PIXELS = "the most frequent class", "kNN on raw pixels"


def raw_pixels(encoder: Encoder) -> tuple[str, Transform]:
    """Return name and transform of the raw pixels of an encoder's input, as features; large images
    are resized."""
    config = dict(encoder.data_config)
    if math.prod(encoder.input_shape) <= MAX_PIXELS:
        return "raw pixels", create_transform(encoder)
    config["input_size"] = (encoder.in_chans, SHRUNK, SHRUNK)
    transform = create_transform(config)
    if encoder.reads_clips:
        transform = ClipTransform(transform, training=False)
    return f"raw pixels, {SHRUNK}x{SHRUNK}", transform


def pixel_features(encoder: Encoder, splits: Any, **loading: Any) -> tuple[str, list[Features]]:
    """Return the name of the raw pixels, and those of every split.

    Args:
        loading: arguments of `extract_features`.
    """
    name, transform = raw_pixels(encoder)
    return name, [extract_features(nn.Identity(), split, transform, **loading) for split in splits]


def most_frequent(labels: Tensor, count: int) -> Tensor:
    """Answer ``count`` queries without looking: with the most frequent label (count,), or for
    several labels per image with the frequency of each, (count, classes)."""
    if labels.ndim == 1:
        return labels.bincount().argmax().expand(count)
    return labels.double().mean(0).expand(count, -1)


def classification_baselines(
    encoder: Encoder, train, test, truth: Tensor, *, seed: int = 0, **loading: Any
) -> dict[str, Metric]:
    """Evaluate the most frequent class and, if there are few enough images, kNN on raw pixels; not
    if all training images are of one group, since then there is nothing to choose its k on.

    Args:
        encoder: determines bands and size of the raw pixels.
        train, test: labelled, map-style data.
        truth: labels of the readable test images.
        seed: see `choose_neighbours`.
        loading: arguments of `extract_features`.
    Returns: name -> accuracy, or macro mAP for several labels per image.
    """
    labels = torch.as_tensor(train.labels)
    metrics_of = {MOST_FREQUENT: answer_metrics(most_frequent(labels, len(truth)), truth)["main"]}
    values = len(train) * min(math.prod(encoder.input_shape), MAX_PIXELS)
    if len(train) + len(test) <= MAX_IMAGES and values <= MAX_VALUES:
        _, (bank, queries) = pixel_features(encoder, (train, test), **loading)
        readouts = {"pixels": slice(None)}
        if len(set(bank.groups or bank.ids)) > 1:  # k is chosen on a part with other groups
            chosen, _ = choose_neighbours(bank, readouts, seed=seed)
            _, metrics = evaluate_neighbours(chosen, bank, queries, readouts)
            metrics_of[KNN_PIXELS] = metrics["main"]
    return metrics_of


def compare_with(
    title: str, metric: Metric, baselines: dict[str, Metric], key: str, groups: Any, seed: int = 0
) -> dict[str, Any]:
    """Return entries of metrics.json: ``baselines``, name -> the `Metric.entries` of ``key``, and
    ``summary``, the sentence that compares ``metric`` with them.

    Args:
        groups, seed: see `Metric.estimate`.
    """
    rows, gains = {}, []
    for name, other in baselines.items():
        rows[name] = other.entries(key, groups, seed=seed)
        gains.append(Gain.of(name, metric - other, groups, seed=seed))
    return {"baselines": rows, "summary": [result_sentence(title, metric.value, gains)]}
