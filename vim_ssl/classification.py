"""Supervised classification with an encoder and its head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim_ssl.encoder import VimEncoder
from vim_ssl.objective import StepOutput


class Classification(nn.Module):
    """Cross-entropy on ``encoder(image)``.

    Args:
        encoder: with a head of ``num_classes``.
        label_smoothing: share of the target spread over all classes.
    Batches hold ``image`` (b, c, h, w), normalised, and ``label`` (b,) int64.
    Raises: ValueError for an encoder without a head.
    """

    def __init__(self, encoder: VimEncoder, *, label_smoothing: float = 0.0):
        super().__init__()
        if not encoder.num_classes:
            raise ValueError("The encoder has no head; load it with num_classes=….")
        self.encoder, self.label_smoothing = encoder, label_smoothing

    def forward(self, batch: dict[str, Tensor]) -> StepOutput:
        """The loss summed over the samples; ``top1`` beside it."""
        logits = self.encoder(batch["image"]).float()
        loss = F.cross_entropy(
            logits, batch["label"], reduction="sum", label_smoothing=self.label_smoothing
        )
        hits = (logits.argmax(1) == batch["label"]).sum()
        return StepOutput(loss, len(logits), {"top1": 100.0 * hits.to(torch.float32)})
