"""Validate a model in training, and keep the best one."""

import math
from pathlib import Path

from vim_ssl.data.transforms.image import create_transform
from vim_ssl.evaluation.extract import extract_features
from vim_ssl.metrics.classification import (
    MAIN_FIGURE,
    figures,
    values,
)
from vim_ssl.models.encoder import VimEncoder
from vim_ssl.training.run import read_metrics
from vim_ssl.utils.files import atomic_path

BEST = "best.safetensors"


class Validation:
    """For `fit`: figures of the validation part while training, the best weights so far in the
    run's folder, and whether it is time to stop.

    Args:
        encoder: the one that will be used, which is the average where there is one.
        data: labelled, map-style.
        folder: the run's.
        targets: one of `TARGETS`.
        keep_best: whether `take_best` will be asked for.
        patience: evaluations without a better one after which it is enough; 0: never.
        batch_size: samples at once.
        workers: data loading processes.
    """

    def __init__(
        self, encoder: VimEncoder, data, folder: Path, targets: str, *, keep_best: bool,
        patience: int, batch_size: int = 128, workers: int = 0,
    ):  # fmt: skip
        self.encoder, self.data, self.folder = encoder, data, Path(folder)
        self.targets, self.keep_best, self.patience = targets, keep_best, patience
        self.figure = f"val_{MAIN_FIGURE[targets]}"
        self.loading = {"batch_size": batch_size, "workers": workers}

    def __call__(self) -> dict[str, float]:
        from safetensors.torch import save_file

        training = self.encoder.training
        device = next(self.encoder.parameters()).device
        found = extract_features(
            self.encoder.eval(), self.data, create_transform(self.encoder), device=device,
            **self.loading,
        )  # fmt: skip
        self.encoder.train(training)
        judged = values(figures(found.x, found.y, self.targets))
        logged = {f"val_{name}": value for name, value in judged.items()}
        if self.keep_best and logged[self.figure] > max(self._logged(), default=-math.inf):
            state = {k: v.cpu().contiguous() for k, v in self.encoder.state_dict().items()}
            with atomic_path(self.folder / BEST, shared=False) as partial:
                save_file(state, partial)
        return logged

    def should_stop(self) -> bool:
        logged = self._logged()
        return bool(self.patience and logged) and (
            len(logged) - 1 - logged.index(max(logged)) >= self.patience
        )

    def take_best(self) -> None:
        """Put the best weights into the encoder."""
        from safetensors.torch import load_file

        self.encoder.load_state_dict(load_file(self.folder / BEST))

    def _logged(self) -> list[float]:
        # What the log says is what a resumed run knows too: it is cut back to the checkpoint.
        if not (self.folder / "metrics.jsonl").exists():
            return []
        return [row[self.figure] for row in read_metrics(self.folder) if self.figure in row]
