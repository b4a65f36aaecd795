"""Validate a model during training, keep its best weights, and stop early."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vim_ssl.checkpoints.files import check_values
from vim_ssl.data.transforms.image import create_transform
from vim_ssl.evaluation.extract import Features, extract_features
from vim_ssl.metrics.classification import MAIN_METRIC, rounded, target_metrics
from vim_ssl.models.freezing import pooled_features
from vim_ssl.models.protocol import Encoder
from vim_ssl.training.run import read_metrics
from vim_ssl.utils.files import atomic_path, reading

BEST = "best.safetensors"


class Validation:
    """Callback ``evaluate`` of `fit`: compute metrics on the validation split, and save the best
    weights so far to the run directory.

    Args:
        encoder: the model to evaluate: the weight average if there is one.
        data: labelled map-style data.
        folder: the run directory.
        targets: one of `TARGETS`.
        keep_best: save the best weights for `take_best`.
        patience: stop after this many evaluations without improvement; 0: no early stopping.
        batch_size: samples per evaluation batch.
        workers: number of data loading processes.
        frozen: only the head changes, so the features are computed once.
    """

    def __init__(
        self, encoder: Encoder, data, folder: Path, targets: str, *, keep_best: bool,
        patience: int, batch_size: int = 128, workers: int = 0, frozen: bool = False,
    ):  # fmt: skip
        self.encoder, self.data, self.folder = encoder, data, Path(folder)
        self.targets, self.keep_best, self.patience = targets, keep_best, patience
        self.metric = f"val_{MAIN_METRIC[targets]}"
        self.loading = {"batch_size": batch_size, "workers": workers}
        self.frozen = frozen
        self._features: Features | None = None

    def __call__(self) -> dict[str, float]:
        from safetensors.torch import save_file

        training = self.encoder.training
        logits, labels = self._predict(self.encoder.eval())
        self.encoder.train(training)
        metrics = rounded(target_metrics(logits, labels, self.targets))
        logged = {f"val_{name}": value for name, value in metrics.items()}
        if self.keep_best and logged[self.metric] > max(self._logged(), default=-math.inf):
            state = {k: v.cpu().contiguous() for k, v in self.encoder.state_dict().items()}
            with atomic_path(self.folder / BEST, shared=False) as partial:
                save_file(state, partial)
        return logged

    @torch.no_grad()
    def _predict(self, encoder: Any) -> tuple[Tensor, Tensor]:
        """Return logits and labels of the validation split."""
        device = next(encoder.parameters()).device
        features = self._features
        if features is None:
            encode = partial(pooled_features, encoder) if self.frozen else encoder
            features = extract_features(
                encode, self.data, create_transform(encoder), device=device, **self.loading
            )
        if not self.frozen:
            return features.x, features.y
        self._features = features
        return encoder.get_classifier()(features.x.to(device)).float().cpu(), features.y

    def should_stop(self) -> bool:
        logged = self._logged()
        return bool(self.patience and logged) and (
            len(logged) - 1 - logged.index(max(logged)) >= self.patience
        )

    def take_best(self) -> None:
        """Load the best weights into the encoder."""
        from safetensors.torch import load_file

        with reading(self.folder / BEST, "the best weights of this run", "train anew"):
            state = load_file(self.folder / BEST)
            check_values(self.folder / BEST, state, self.encoder.state_dict())
            self.encoder.load_state_dict(state)

    def _logged(self) -> list[float]:
        # Read the log, which a resumed run continues: resuming truncates it to the checkpoint.
        if not (self.folder / "metrics.jsonl").exists():
            return []
        return [row[self.metric] for row in read_metrics(self.folder) if self.metric in row]
