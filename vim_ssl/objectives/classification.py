"""The objective of classification: cross-entropy on labels."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from vim_ssl.metrics.classification import TARGETS, predicted
from vim_ssl.models.freezing import Freezable, pooled_features
from vim_ssl.models.protocol import Encoder
from vim_ssl.objectives.base import StepOutput


class LabelledTransform:
    """Transform an item into ``image`` (c, h, w) and ``label``."""

    def __init__(self, image_transform):
        self.image_transform = image_transform

    def __call__(self, item: dict) -> dict:
        label = torch.as_tensor(item["label"])
        return {"image": self.image_transform(item["image"]), "label": label}


class Classification(Freezable):
    """Cross-entropy of ``encoder(image)`` against the labels.

    Args:
        encoder: encoder with a head of ``num_classes`` outputs; ordinal targets have one more class
            than outputs.
        targets: one of `TARGETS`.
        label_smoothing: probability spread over all classes.
        mixup, cutmix: alphas of timm's Mixup in training, sampled once per batch.
        class_weights: (classes,) float, factors on the loss; only for targets "class".
    Batches hold ``image`` (b, c, h, w), normalised, and ``label``. For a frozen encoder they
    may hold its pooled ``features`` (b, num_features) instead of images.
    Raises: ValueError for an encoder without a head, unknown targets, weights that do not fit.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        targets: str = "class",
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        class_weights: Tensor | None = None,
    ):
        super().__init__()
        if not encoder.num_classes:
            raise ValueError("The encoder has no head; load it with num_classes=….")
        if targets not in TARGETS:
            raise ValueError(f"targets {targets!r} is not one of {', '.join(TARGETS)}.")
        self.encoder, self.targets, self.label_smoothing = encoder, targets, label_smoothing
        self.mix: Any = None
        if mixup or cutmix:
            self.mix = Mixup(
                mixup, cutmix, label_smoothing=label_smoothing, num_classes=encoder.num_classes
            )
        if class_weights is not None and (
            targets != "class" or class_weights.shape != (encoder.num_classes,)
        ):
            raise ValueError(
                f"class_weights of shape {tuple(class_weights.shape)} with targets {targets!r}: "
                f"expected ({encoder.num_classes},) and 'class'."
            )
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> StepOutput:
        """Return the loss summed over the samples, and ``top1`` unless images are mixed."""
        labels = batch["label"]
        if self.targets == "class" and self.mix is not None and self.training:
            # timm draws from numpy's generator, which the trainer does not seed per step.
            np.random.seed(int(torch.randint(2**31, ())))  # noqa: NPY002
            images, soft = self._mixed(batch["image"], labels)
            logits = self._logits({"image": images})
            return StepOutput(self._cross_entropy(logits, soft), len(images))
        logits = self._logits(batch)
        if self.targets == "class":
            loss = self._cross_entropy(logits, labels)
        else:
            target = labels
            if self.targets == "ordinal":  # output k: is the class above k?
                target = labels[:, None] > torch.arange(logits.shape[1], device=labels.device)
            loss = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
            loss = loss.mean(1).sum()
        hits = (predicted(logits, self.targets) == labels).float()
        hits = hits.mean(1) if hits.dim() > 1 else hits
        return StepOutput(loss, len(logits), {"top1": 100.0 * hits.sum()})

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Return (b, num_classes) float32."""
        encoder = self.encoder
        if not self.is_frozen(encoder):
            return encoder(batch["image"]).float()
        pooled = batch.get("features")
        if pooled is None:
            with self.grad_of(encoder):
                pooled = pooled_features(encoder, batch["image"])
        return encoder.get_classifier()(pooled).float()

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix each image with another one; timm takes an even number, so one may be repeated."""
        odd = len(images) % 2
        images = torch.cat([images, images[:odd]])
        images, soft = self.mix(images, torch.cat([labels, labels[:odd]]))
        return images[: len(labels)], soft[: len(labels)]

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.label_smoothing if labels.dim() == 1 else 0.0  # Mixup already smooths
        return F.cross_entropy(
            logits, labels, self.class_weights, reduction="sum", label_smoothing=smoothing
        )


def balanced_weights(labels: list[int], classes: int) -> Tensor:
    """Return (classes,) float32: inverse class frequencies, with mean 1 over the samples."""
    counts = torch.bincount(torch.tensor(labels), minlength=classes).clamp(min=1)
    return (len(labels) / (classes * counts)).float()
