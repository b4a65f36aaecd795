"""Freeze a part of a model in training."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import nn


class Freezable(nn.Module):
    """A module whose parts can be frozen.

    A frozen part has no gradients, so the optimiser, DDP and the moving average leave it out. It
    stays in eval mode, whatever ``train`` sets: no drop path, no dropout, no BatchNorm updates.
    """

    _frozen: tuple[tuple[Any, nn.Module | None], ...] = ()  # (part, what of it is trained)

    def freeze(self, part: Any, but: nn.Module | None = None) -> None:
        """Freeze ``part`` except its submodule ``but``."""
        part.requires_grad_(False)
        if but is not None:
            but.requires_grad_(True)
        self._frozen = (*self._frozen, (part, but))
        self.train(self.training)

    def freeze_encoder(self) -> None:
        """Freeze the ``encoder`` except its classification head.

        Raises: ValueError for a head of several classifiers, which read different features.
        """
        encoder: Any = self.encoder
        classifier = encoder.get_classifier()
        if isinstance(classifier, nn.ModuleList):
            raise ValueError(
                f"the encoder's head has {len(classifier)} classifiers that read different tokens; "
                "frozen needs one. Train the whole encoder, or use linear_probe."
            )
        self.freeze(encoder, classifier)

    def is_frozen(self, part: Any) -> bool:
        return any(part is frozen for frozen, _ in self._frozen)

    def grad_of(self, part: Any) -> AbstractContextManager[Any]:
        """Context in which to run ``part``: without gradients if it is frozen."""
        return torch.no_grad() if self.is_frozen(part) else nullcontext()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for part, but in self._frozen:
            part.eval()
            if but is not None:
                but.train(mode)
        return self


def pooled_features(encoder: Any, images: torch.Tensor) -> torch.Tensor:
    """Return the input of the encoder's classification head, (b, num_features).

    Raises: ValueError for global_pool "max-logits", whose head reads every patch.
    """
    if getattr(encoder, "global_pool", None) == "max-logits":
        raise ValueError(
            "global_pool='max-logits' applies the head to every patch, so a frozen encoder has no "
            "pooled features for it; use global_pool='max', or train without frozen."
        )
    return encoder.forward_head(encoder.forward_features(images), pre_logits=True)
