"""NaN and infinity are refused or counted by every reader of features and outputs.

argmax, topk and sort answer them as if they were numbers.
"""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from vim_ssl import VimEncoder
from vim_ssl.data import ImageData, open_data
from vim_ssl.evaluation.examples import principal_colours
from vim_ssl.evaluation.knn import knn_predict, nearest
from vim_ssl.evaluation.linear_heads import fit_lars, fit_logistic
from vim_ssl.evaluation.online import online_probe
from vim_ssl.evaluation.retrieval import PairFeatures, recall
from vim_ssl.metrics.classification import answer_metrics, classification_metrics, target_metrics
from vim_ssl.metrics.detection import DetectionMetrics
from vim_ssl.metrics.medmnist import MULTI_CLASS, medmnist_metrics
from vim_ssl.models.sliding_window import label_pixels
from vim_ssl.tasks.slides import SlideClassifier

X = torch.arange(12.0).reshape(6, 2).sin()
Y = torch.tensor([0, 1] * 3)


def pairs(images: torch.Tensor, texts: torch.Tensor) -> PairFeatures:
    names = [str(i) for i in range(6)]
    return PairFeatures(images, texts, torch.arange(6), names, names, [])


def detections(boxes: torch.Tensor) -> None:
    data = ImageData([], ["a.png"], name="test")
    row = {"boxes": boxes.numpy(), "scores": boxes[:, 0].numpy(), "labels": np.zeros(6, int)}
    DetectionMetrics(data, masks=False).add(0, row)


READERS = {
    "classes": lambda x: classification_metrics(x, Y, "class"),
    "ordinal": lambda x: classification_metrics(x, Y, "ordinal"),
    "multi-label": lambda x: classification_metrics(x, torch.stack([Y, 1 - Y], 1), "multi-label"),
    "validation": lambda x: target_metrics(x, Y, "class"),
    "scores": lambda x: answer_metrics(x, torch.stack([Y, 1 - Y], 1)),
    "votes": lambda x: answer_metrics(x, Y),
    "medmnist": lambda x: medmnist_metrics(Y.numpy(), x.numpy(), MULTI_CLASS),
    "detections": detections,
    "bank": lambda x: knn_predict(x, Y, X, k=2),
    "queries": lambda x: nearest(X, x, k=2, standardise=False),
    "linear head": lambda x: fit_logistic(x, Y, 1.0),
    "LARS": lambda x: fit_lars(x, Y, epochs=1),
    "predicted features": lambda x: fit_logistic(X, Y, 1.0).scores(x),
    "image features": lambda x: recall(pairs(x, X)),
    "text features": lambda x: recall(pairs(X, x)),
    "maps": lambda x: principal_colours(x.reshape(1, 2, 2, 3)),
    "pixels": lambda x: label_pixels(
        lambda w: w, x.reshape(2, 2, 3), (2, 3), classes=2, window=3, stride=3
    ),
    "tiles of a slide": lambda x: SlideClassifier(["a", "b"], dim=2).prepare(x),
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_value_that_is_not_finite_is_refused(reader, value):
    x = X.clone()
    x[3, 1] = value
    with pytest.raises(ValueError, match=r"1 of .* not finite"):
        reader(x)


def test_the_online_probe_reports_it_and_training_goes_on(tmp_path):
    draw = np.random.default_rng(0)
    for i in range(24):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        image = Image.fromarray(draw.integers(0, 255, (8, 8), dtype=np.uint8))
        image.save(tmp_path / "ab"[i % 2] / f"{i}.png")
    encoder = VimEncoder(img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=1, num_classes=0)
    probe = online_probe(encoder, open_data(str(tmp_path)), "cpu", 0)
    assert set(probe()) > {"feature_std", "knn_top1"}
    with torch.no_grad():
        encoder.norm_f.weight[0] = math.nan
    figures = probe()
    assert list(figures) == ["feature_std"]
    assert math.isnan(figures["feature_std"])
