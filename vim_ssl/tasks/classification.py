"""Supervised classification, from scratch or from a pretrained encoder: what the scripts share.

targets      label                     loss
class        (b,) int64                cross-entropy, soft under mixup
multi-label  (b, classes) of 0 and 1   binary cross-entropy, each alone
ordinal      (b,) int64, ordered       classes - 1 binary questions: is it more than k?
"""

import contextlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vim_ssl.checkpoints.loading import load_for_bands, save_encoder
from vim_ssl.data.bands import band_arguments
from vim_ssl.data.loading.indexed import SeededSamples
from vim_ssl.data.split import stratified_split
from vim_ssl.data.transforms.image import create_transform
from vim_ssl.evaluation.embeddings import stream_features
from vim_ssl.evaluation.extract import extract_features
from vim_ssl.evaluation.validation import Validation
from vim_ssl.metrics.classification import (
    TARGETS,
    classification_metrics,
    outputs,
    probabilities,
    summary,
    write_tables,
)
from vim_ssl.metrics.medmnist import medmnist_metrics
from vim_ssl.models.encoder import VimEncoder
from vim_ssl.objectives.classification import Classification, LabelledTransform, balanced_weights
from vim_ssl.report import write_report
from vim_ssl.training.accelerator import make_average
from vim_ssl.training.augmentation import AugmentationConfig, training_transform
from vim_ssl.training.loop import fit
from vim_ssl.training.run import Run
from vim_ssl.utils.config import opt, to_dict
from vim_ssl.utils.environment import environment


@dataclass
class ClassificationConfig(AugmentationConfig):
    """What training from scratch and fine-tuning have in common."""

    data: str = opt("", "labelled images", group="data")
    test: float = opt(0.2, "share held out if the data has no test split", group="data")
    validation: float = opt(
        0.0, "share of the training part that chooses the best epoch; 0: the last", group="data"
    )
    patience: int = opt(0, "evaluations without a better one before the end; 0: all", group="run")
    repeats: int = opt(1, "augmentations of an image in one batch", group="data")
    judge_batch: int = opt(128, "samples at once where they are judged", group="data")
    mixup: float = opt(0.0, "alpha of mixup; 0: off", group="data")
    cutmix: float = opt(0.0, "alpha of cutmix, half the batches beside mixup", group="data")
    targets: str = opt("class", "what the labels are", group="model", choices=TARGETS)
    label_smoothing: float = opt(0.0, "spread over all classes", group="model")
    class_weights: bool = opt(False, "rare classes count for more, all alike", group="model")
    drop_path: float = opt(0.0, "stochastic depth", group="model")

    @classmethod
    def derive_defaults(cls, defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Beside what `TrainConfig` says: a validation part is looked at after every epoch, where
        by default nothing would be before the end."""
        defaults = super().derive_defaults(defaults, given)
        asked = defaults | given
        if asked["validation"] and asked["eval_every"] > asked["epochs"]:
            return defaults | {"eval_every": 1.0}
        return defaults

    def __post_init__(self):
        super().__post_init__()
        mixed = self.mixup > 0 or self.cutmix > 0
        if mixed and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix mix pairs: batch_size {self.batch_size} is odd.")
        if self.targets != "class" and (mixed or self.label_smoothing or self.class_weights):
            raise ValueError(
                "mixup, cutmix, label_smoothing and class_weights do not go with targets "
                f"{self.targets}; leave them out."
            )
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}; it must be 1 or more.")
        if not 0 <= self.validation < 1 or (self.patience and not self.validation):
            raise ValueError(
                f"validation {self.validation:g} and patience {self.patience}: patience needs a "
                "share above 0 and below 1 of the training part to watch."
            )
        if self.patience and (self.patience + 1) * self.eval_every > self.epochs:
            raise ValueError(
                f"patience {self.patience}: {self.patience + 1} evaluations, one every "
                f"{self.eval_every:g} epochs, do not fit into {self.epochs:g} epochs; lower "
                "patience or eval_every."
            )


# ---------------------------------------------------------------- a run


def class_names(data) -> list[str]:
    """The classes' names; numbers where the data have none."""
    if data.classes:
        return list(data.classes)
    if data.multi_label:
        return [str(i) for i in range(len(data.labels[0]))]
    return [str(i) for i in range(max(data.labels or [-1]) + 1)]


def load_classifier(source: str, data, config: ClassificationConfig, **args: Any) -> VimEncoder:
    """An encoder with a head for the classes of ``data``, that reads its bands.

    An encoder of other bands gets a patch embedding for them (see `vim_ssl.checkpoints.adapt`) and their
    statistics; one of the same bands keeps its own.

    Args:
        args: of `load_encoder`.
    """
    args |= {
        "num_classes": outputs(config.targets, len(class_names(data))),
        "drop_path_rate": config.drop_path,
        "use_mask_token": False,  # without masks it would have no gradient, which DDP refuses
    }
    return load_for_bands(source, band_arguments(data), **args)


def train_classifier(
    recipe: str, config: ClassificationConfig, encoder: VimEncoder, source: str, train, test,
    accelerator,
) -> dict[str, Any]:  # fmt: skip
    """Train ``encoder`` in a run of its own and judge it on ``test``, once, at the end.

    Args:
        recipe: the script's name, for the record.
        encoder: with a head; see `outputs`.
        source: where it came from, for the record.
        train, test: labelled, map-style, of the same classes.
    Returns: the metrics that the run's metrics.json holds; figures on the main process alone.
    """
    classes = class_names(train)
    for part in (train, test):
        check_labels(part.name, part.labels, config.targets, classes)
    if config.targets != "multi-label":
        _warn_of_unseen(train, test, classes)
    weights = balanced_weights(train.labels, len(classes)) if config.class_weights else None
    objective = Classification(
        encoder, targets=config.targets, label_smoothing=config.label_smoothing,
        mixup=config.mixup, cutmix=config.cutmix, class_weights=weights,
    )  # fmt: skip
    average = make_average(encoder, config)
    averaged: Any = None if average is None else average.module
    final: VimEncoder = encoder if averaged is None else averaged
    watched = test
    if config.validation:
        kept, held_out = stratified_split(
            train.labels, config.validation, config.seed, train.groups
        )
        train, watched = train.subset(kept), train.subset(held_out)
        name = f"the validation part of {train.name}"
        check_labels(name, watched.labels, config.targets, classes)
    folder = Run.open(recipe, config, accelerator)
    validation = Validation(
        final, watched, folder.folder, config.targets, keep_best=config.validation > 0,
        patience=config.patience, batch_size=config.judge_batch, workers=config.workers,
    )  # fmt: skip
    watching = config.validation > 0 or config.eval_every <= config.epochs
    samples = SeededSamples(
        train,
        LabelledTransform(training_transform(encoder, config)),
        config.seed,
        repeats=config.repeats,
    )
    record = {
        "recipe": recipe, "data": train.name, "classes": train.classes, **environment(),
    }  # fmt: skip

    def write_encoder() -> None:
        with folder.writing("the encoder"):
            save_encoder(encoder, folder.folder, ema=averaged, record=record)

    metrics: dict[str, Any] = {
        "task": recipe, "data": train.name, "encoder": source, "train": len(train),
    }  # fmt: skip
    if config.targets == "ordinal" and accelerator.is_main_process:
        print(f"ranks: {' < '.join(classes)}", flush=True)
    with contextlib.closing(folder):
        fit(
            objective.train(), samples, config, folder, accelerator, average=average,
            evaluate=validation if watching else None, should_stop=validation.should_stop,
            on_save=write_encoder,
        )  # fmt: skip
        if accelerator.is_main_process:
            if config.validation:
                validation.take_best()
                write_encoder()
            metrics |= evaluate(
                final, test, folder.folder, config.targets, classes,
                batch_size=config.judge_batch, workers=config.workers,
            )  # fmt: skip
            metrics |= {"protocol": to_dict(config), **environment()}
            with folder.writing("metrics.json"):
                (folder.folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
            print(f"{summary(metrics)}, trained on {len(train):,} · {folder.folder}")
            with folder.writing("report.html"):
                print(f"Report: {write_report(folder.folder)}")
    accelerator.end_training()
    return metrics


def check_labels(name: str, labels: Any, targets: str, classes: Sequence[str]) -> None:
    """Raises: ValueError where the labels of ``name`` fit neither the targets nor the classes.

    Args:
        labels: one an image, at least one; see `vim_ssl.data.ImageData`.
    """
    labels = torch.as_tensor(np.asarray(labels))
    if (labels.dim() == 2) != (targets == "multi-label"):
        raise ValueError(
            f"{name} has labels of shape {tuple(labels.shape)}, which are no targets {targets!r}; "
            "several labels an image are --targets multi-label, one is class."
        )
    if labels.dim() == 2 and labels.shape[1] != len(classes):
        raise ValueError(
            f"{name} has {labels.shape[1]} labels an image; expected one for each of "
            f"{len(classes)} classes."
        )
    if labels.dim() == 2 and not labels.any():
        raise ValueError(
            f"no image of {name} ({len(labels)}) has any of the labels, so that their average "
            "precision is not defined; hold out more, or draw by another --seed."
        )
    if labels.dim() == 1 and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise ValueError(
            f"{name} has labels from {int(labels.min())} to {int(labels.max())}; expected those of "
            f"the {len(classes)} classes it is about, 0 to {len(classes) - 1}."
        )


def _warn_of_unseen(train, test, classes: Sequence[str]) -> None:
    unseen = sorted(set(test.labels) - set(train.labels))
    if unseen:
        names = ", ".join(classes[i] for i in unseen[:5])
        warnings.warn(
            f"{len(unseen)} classes of the test part have no training image: {names}.",
            stacklevel=2,
        )


# ---------------------------------------------------------------- evaluation


def evaluate(
    encoder: VimEncoder, data, folder: Path, targets: str, classes: list[str], **more: Any
) -> dict[str, Any]:
    """Figures of an encoder with a head on labelled images, of MedMNIST its own ``auc`` and
    ``acc`` too; the tables go to ``folder``.

    Args:
        data: map-style, or a stream.
        more: arguments of `extract_features`.
    """
    extract = stream_features if data.is_stream else extract_features
    device = next(encoder.parameters()).device
    found = extract(encoder.eval(), data, create_transform(encoder), device=device, **more)
    check_labels(data.name, found.y, targets, classes)  # those of a stream are known only now
    judged = classification_metrics(found.x, found.y, targets, found.groups)
    write_tables(folder, judged, found.x, found.y, found.ids, classes, targets)
    if task := getattr(data, "task", None):
        scores = probabilities(found.x, targets).numpy()
        judged |= medmnist_metrics(found.y.numpy(), scores, task, found.groups)
    return {"test": len(found.y), **judged, "skipped": found.skipped}
