"""Train a head on features of a frozen encoder that are computed once, not in every step."""

import copy
from typing import Any

import torch

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import BadImage
from vim_ssl.data.loading.indexed import SeededSamples
from vim_ssl.evaluation.extract import Features
from vim_ssl.evaluation.features import encode_data
from vim_ssl.models.freezing import pooled_features
from vim_ssl.utils.distributed import Processes


class FeatureSamples(SeededSamples):
    """Samples with ``features`` (d,) in place of ``image``, and the ``label``.

    Args:
        data: the images.
        features: those of ``data``. An image without features is replaced as a broken one.
        seed, repeats: see `SeededSamples`.
    """

    def __init__(self, data: ImageData, features: Features, seed: int, *, repeats: int = 1):
        super().__init__(data, dict, seed, repeats=repeats)
        self.x, self.rows = features.x, {name: row for row, name in enumerate(features.ids)}

    def _load(self, index: int) -> dict[str, Any]:
        name, labels = self.data.ids[index], self.data.labels
        if name not in self.rows:
            raise BadImage(name, "it has no features, because it cannot be read")
        return {"features": self.x[self.rows[name]], "label": torch.as_tensor(labels[index])}


def feature_samples(
    encoder: Any,
    data: ImageData,
    accelerator: Any,
    seed: int,
    *,
    repeats: int = 1,
    workers: int = 0,
) -> FeatureSamples:
    """Compute the pooled features of the images, transformed as in evaluation, in float32; see
    `encode_data`, which caches them. The processes of the accelerator divide the work."""
    headless = copy.deepcopy(encoder).to(accelerator.device).eval()
    headless.reset_classifier(0)  # so that the cached features do not depend on the head
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    if processes.main:
        print(f"Features of {len(data):,} training images, computed once", flush=True)
    features = encode_data(
        headless, data, readout=pooled_features, workers=workers, device=accelerator.device,
        processes=processes,
    )  # fmt: skip
    return FeatureSamples(data, processes.broadcast(features), seed, repeats=repeats)
