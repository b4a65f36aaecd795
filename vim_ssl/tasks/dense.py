"""Dense tasks, a class for every pixel or boxes round objects: what their scripts share.

A model has ``encoder``, ``classes``, ``config`` (all that builds it again) and ``save``.
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vim_ssl.checkpoints.loading import load_for_bands
from vim_ssl.data.loading.indexed import SeededSamples
from vim_ssl.models.encoder import VimEncoder
from vim_ssl.report import write_report
from vim_ssl.training.accelerator import make_average
from vim_ssl.training.config import TrainConfig
from vim_ssl.training.loop import fit
from vim_ssl.training.run import Run, evaluation_folder
from vim_ssl.utils.config import check_between, opt, to_dict
from vim_ssl.utils.environment import environment


@dataclass
class DenseConfig(TrainConfig):
    """The options of every dense task."""

    encoder: str = opt("", "run, checkpoint, preset or Hub id; default: the newest run", "data")
    data: str = opt("", "what it learns from", "data")
    test: float = opt(0.2, "share held out if the data has no test split", "data")
    hflip: float = opt(0.5, "probability of mirroring", "data")
    drop_path: float = opt(0.0, "stochastic depth", "model")
    from_scratch: bool = opt(False, "forget the weights: the baseline", "model")
    eval_only: bool = opt(False, "judge a run of this script as it was trained", "run")
    epochs: float = opt(30, "passes over the training part", "optimiser")
    base_lr: float = opt(1e-3, "learning rate per lr_reference_batch samples", "optimiser")
    betas: tuple[float, float] = opt((0.9, 0.999), "of AdamW", "optimiser")
    layer_decay: float | None = opt(0.8, "lr factor from a block to the one below", "optimiser")
    ema: float = opt(
        0.0, "decay of a moving average of encoder and heads, which is kept; 0: none", "optimiser"
    )
    workers: int = opt(0, "data loading processes a rank", "run")
    eval_every: float = opt(1e9, "epochs between evaluations", "run")

    def __post_init__(self):
        super().__post_init__()
        check_between(self, 0, 1, "hflip", "drop_path")


def fresh_encoder(
    config: DenseConfig, source: str, side: int, bands: Mapping[str, Any]
) -> VimEncoder:
    """The encoder that ``source`` names, to be trained on squares of ``side`` pixels.

    Args:
        bands: see `load_for_bands`.
    """
    # A mask token is of no use here, and DDP refuses parameters without a gradient.
    encoder = load_for_bands(
        source, bands, num_classes=0, img_size=side, drop_path_rate=config.drop_path,
        use_mask_token=False,
    )  # fmt: skip
    return type(encoder)(**encoder.config) if config.from_scratch else encoder


@dataclass(frozen=True)
class DenseTask:
    """A script's part in training and judging.

    Attributes:
        name: the script's.
        load: a run's folder -> model.
        evaluate: (model, data, folder) -> figures, and scores that have a ``table``.
        watched: figures that are logged while training.
        summary: metrics -> lines for a person.
    """

    name: str
    load: Callable[[str], Any]
    evaluate: Callable[[Any, Any, Path], tuple[dict[str, Any], Any]]
    watched: tuple[str, ...]
    summary: Callable[[dict[str, Any]], str]

    def train(
        self, config: DenseConfig, model: Any, source: str, transform, train, test, accelerator
    ) -> dict[str, Any]:
        """Train ``model`` in a run of its own and judge it on ``test``, once, at the end: its
        average, where the configuration asks for one.

        Returns: the metrics that the run's metrics.json holds, on the main process.
        """
        run = Run.open(self.name, config, accelerator)
        record = {"recipe": self.name, "data": train.name, **environment()}
        average = make_average(model, config)
        final: Any = model if average is None else average.module

        def write_model() -> None:
            with run.writing("the model"):
                final.save(run.folder, record)

        def figures() -> dict[str, float]:
            found, _ = self.evaluate(final, test, run.folder)
            return {f"test_{name}": found[name] for name in self.watched if name in found}

        metrics: dict[str, Any] = {}
        with contextlib.closing(run):
            fit(
                model.train(), SeededSamples(train, transform, config.seed), config, run,
                accelerator, average=average, on_save=write_model,
                evaluate=figures if config.eval_every <= config.epochs else None,
            )  # fmt: skip
            if accelerator.is_main_process:
                metrics = self._judge(config, final, source, test, run.folder, len(train))
                with run.writing("report.html"):
                    print(f"Report: {write_report(run.folder)}")
        accelerator.end_training()
        return metrics

    def evaluate_only(
        self, config: DenseConfig, source: str, test, device: torch.device
    ) -> dict[str, Any]:
        """Evaluate a run with the heads and sizes that it was trained with.

        Raises: ValueError if ``test`` has other classes; FileNotFoundError if ``source`` is no run
            of this task.
        """
        model = self.load(source).to(device)
        if model.classes != test.classes:
            raise ValueError(
                f"{source} knows the classes {model.classes[:5]} …, {test.name} has "
                f"{test.classes[:5]} …; evaluate on the classes it was trained on."
            )
        return self._judge(config, model, source, test, evaluation_folder(config.output), 0)

    def _judge(self, config, model, source: str, test, folder: Path, seen: int) -> dict[str, Any]:
        """Evaluate, write metrics.json and print the table."""
        figures, scores = self.evaluate(model, test, folder)
        metrics: dict[str, Any] = {
            "task": self.name, "data": test.name, "encoder": source, "train": seen,
            "classes": model.classes, **figures, "protocol": to_dict(config), **environment(),
        }  # fmt: skip
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        print(scores.table())
        print(f"{self.summary(metrics)} on {metrics['test']:,} test images · {folder}")
        return metrics
