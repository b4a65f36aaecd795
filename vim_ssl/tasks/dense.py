"""Code shared by the dense tasks, segmentation and detection.

A model has ``encoder``, ``classes``, ``config`` (the arguments to rebuild it), ``predict`` and
``save``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from vim_ssl.checkpoints.identity import model_hash
from vim_ssl.checkpoints.loading import load_for_bands
from vim_ssl.data.classes import with_classes
from vim_ssl.data.images import BadImage, clean_image
from vim_ssl.data.loading.indexed import SeededSamples
from vim_ssl.data.transforms.dense import DensePixels
from vim_ssl.data.transforms.image import denormalize
from vim_ssl.evaluation.seen import Exposure, part_to_evaluate
from vim_ssl.metrics.titles import measured_on, split_name
from vim_ssl.models.predictor import Predictor
from vim_ssl.models.protocol import Encoder
from vim_ssl.tasks.config import TransferConfig
from vim_ssl.tasks.runner import Training, fingerprints, finish_run, train_run
from vim_ssl.training.run import Run, evaluation_folder
from vim_ssl.utils.config import check_between, opt, to_dict
from vim_ssl.utils.drawing import GRID_ROWS
from vim_ssl.utils.environment import environment


@dataclass
class DenseConfig(TransferConfig):
    """The options of every dense task."""

    data: str = opt("", "training data", "data")
    test: float = opt(0.2, "fraction held out if the data has no test split", "data")
    hflip: float = opt(0.5, "probability of mirroring", "data")
    drop_path: float = opt(0.0, "rate of stochastic depth", "model")
    eval_only: bool = opt(False, "evaluate a run of this script without training", "run")
    epochs: float = opt(30, "passes over the training split", "optimiser")
    base_lr: float = opt(1e-3, "learning rate per lr_reference_batch samples", "optimiser")
    ema: float = opt(
        0.0, "decay of the saved moving average of encoder and heads; 0: none", "optimiser"
    )

    def __post_init__(self):
        super().__post_init__()
        check_between(self, 0, 1, "hflip", "drop_path")


def fresh_encoder(config: DenseConfig, source: str, side: int, bands: Mapping[str, Any]) -> Encoder:
    """Load the encoder that ``source`` names, for training on squares of ``side`` pixels.

    Args:
        bands: see `load_for_bands`.
    """
    # A mask token is not used here, and DDP fails on parameters without a gradient.
    encoder = load_for_bands(
        source, bands, num_classes=0, img_size=side, drop_path_rate=config.drop_path,
        use_mask_token=False,
    )  # fmt: skip
    return type(encoder)(**encoder.config) if config.from_scratch else encoder


def map_strides(encoder: Encoder) -> list[int]:
    """Return the stride of the map after every block, in pixels. Raises: ValueError for an encoder
    that gives no maps."""
    if not encoder.feature_info:
        raise ValueError(
            "the encoder gives no maps of its stages, which dense tasks need; use another one."
        )
    return [int(info["reduction"]) for info in encoder.feature_info]


@dataclass(frozen=True)
class DenseTask:
    """The training and evaluation functions of one dense-prediction task.

    Attributes:
        name: script name.
        load: loads a model from a run directory.
        open_splits, open_split: open the training and test split of a spec, and the images of a
            spec to evaluate.
        evaluate: (model, data, folder) -> metrics, and scores with a ``table``.
        watched: metrics logged in training.
        summary: formats the metrics for printing.
        compare: (scores, training data) -> entries of metrics.json: ``baselines``, and ``summary``,
            the sentences that compare the result with them.
    """

    name: str
    load: Callable[[str], Any]
    open_splits: Callable[..., tuple[Any, Any]]
    open_split: Callable[[str], Any]
    evaluate: Callable[[Any, Any, Path], tuple[dict[str, Any], Any]]
    watched: tuple[str, ...]
    summary: Callable[[dict[str, Any]], str]
    compare: Callable[[Any, Any], dict[str, Any]]

    def train(
        self, config: DenseConfig, model: Any, source: str, transform, train, test, accelerator
    ) -> dict[str, Any]:
        """Train ``model`` in a run directory and evaluate it, or its moving average, on ``test``
        once, at the end.

        Returns: the content of metrics.json, on the main process.
        """

        def save(folder: Path, ema: Any, record: dict[str, Any]) -> None:
            (model if ema is None else ema).save(folder, record)

        def validate(training: Training) -> Callable[[], dict[str, float]]:
            def evaluate() -> dict[str, float]:
                metrics, _ = self.evaluate(training.model, test, training.run.folder)
                return {f"test_{name}": metrics[name] for name in self.watched if name in metrics}

            return evaluate

        def conclude(training: Training) -> dict[str, Any]:
            return self._finish(
                config, training.model, source, train, test, training.run, training.exposure,
                training.scope,
            )  # fmt: skip

        return train_run(
            self.name, config, model, SeededSamples(train, transform, config.seed), accelerator,
            model=model, data=train.name, splits=(train, test), source=source, save=save,
            what="model",
            conclude=conclude, evaluate=validate if config.eval_every <= config.epochs else None,
            depends_on={"test data": test.fingerprint},
        )  # fmt: skip

    def evaluate_only(
        self, config: DenseConfig, source: str, spec: str, device: torch.device
    ) -> dict[str, Any]:
        """Evaluate a run with the heads and sizes that it was trained with, on the images that
        `part_to_evaluate` returns.

        Raises: ValueError if the images have a class that the model lacks; FileNotFoundError if
            ``source`` is not a run of this task.
        """
        opened, weights = self.open_split(spec), model_hash(source)
        model = self.load(source).to(device)
        test, split, exposure = part_to_evaluate(
            with_classes(opened, model.classes, source), spec, source,
            lambda trained: self.open_splits(trained, config.test, config.seed)[1].ids,
        )  # fmt: skip
        identity = to_dict(config) | {"encoder": source}
        folder = evaluation_folder(config.output, self.name, identity, {"test": test.fingerprint})
        more = {"split": split, "weights": weights}
        return self._finish(config, model, source, None, test, folder, exposure, more)

    def _finish(
        self,
        config: DenseConfig,
        model,
        source: str,
        train,
        test,
        where: Run | Path,
        exposure: Exposure | None,
        more: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Evaluate, and write the results; without ``train`` the model was trained before."""
        folder = where.folder if isinstance(where, Run) else where
        metrics, scores = self.evaluate(model, test, folder)
        compared = self.compare(scores, train) if train is not None else {}
        metrics = {
            "task": self.name, "data": test.name, "encoder": source, "train": len(train or ()),
            "classes": model.classes, "split": split_name(test), "n": metrics["test"], **metrics,
            **compared, **fingerprints(train, test), **(more or {}), "protocol": to_dict(config),
            **environment(),
        }  # fmt: skip

        def summary(metrics: dict[str, Any]) -> str:
            line = f"{self.summary(metrics)} · {measured_on(metrics['split'], metrics['n'])}"
            return "\n".join([scores.table(), f"{line} · {folder}", *metrics.get("summary", [])])

        return finish_run(where, metrics, summary, exposure=exposure)


class DensePredictor(Predictor):
    """What the models of dense tasks have in common.

    Attributes:
        encoder, pixels: the encoder, and the transform to its input.
    """

    encoder: Encoder
    pixels: DensePixels

    @property
    def transform(self) -> DensePixels:
        """The transform from an image of any size, without cropping, to (c, h, w)."""
        return self.pixels

    def predict_prepared(self, inputs: Sequence[Any]) -> Iterator[Any]:
        return map(self.predict_image, inputs)

    def predict_image(self, image: Image.Image | np.ndarray) -> Any:
        """Predict one image of any size, or bands (h, w, bands)."""
        raise NotImplementedError

    def displayed(self, image: Image.Image | np.ndarray) -> Image.Image:
        """Return the upright image that `predict` reads; for other bands a visible rendering."""
        if isinstance(image, Image.Image):
            return clean_image(image)
        return to_pil_image(denormalize(self.pixels(image)[None], self.encoder.data_config)[0])


def predictions(
    model: Any, data, skipped: list[str]
) -> Iterator[tuple[int, dict[str, Any], Any, bool]]:
    """Predict all images of ``data`` in eval mode.

    Args:
        skipped: receives the errors of images that cannot be read.
    Yields: the index, the item, the output of ``model.predict_image``, and whether to draw it.
    Raises: ValueError if no image can be read.
    """
    training = model.training
    model.eval()
    drawn = {i * len(data) // GRID_ROWS for i in range(GRID_ROWS)}
    for i in range(len(data)):
        try:
            item = data[i]
        except BadImage as bad:
            skipped.append(str(bad))
            continue
        yield i, item, model.predict_image(item["image"]), i in drawn
    model.train(training)
    if len(skipped) == len(data):
        raise ValueError(f"none of the {len(data)} images could be read: {skipped[:3]}")
