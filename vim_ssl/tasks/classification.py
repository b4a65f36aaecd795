"""Supervised classification, from scratch or from a pretrained encoder: code shared by scripts.

targets      label                     loss
class        (b,) int64                cross-entropy, soft under mixup
multi-label  (b, classes) of 0 and 1   binary cross-entropy per label
ordinal      (b,) int64, ordered       classes - 1 binary cross-entropies: label > k
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vim_ssl.checkpoints.loading import is_of_timm, load_encoder, load_for_bands, save_encoder
from vim_ssl.data.bands import band_arguments
from vim_ssl.data.classes import match_classes
from vim_ssl.data.loading.indexed import SeededSamples
from vim_ssl.data.split import stratified_split
from vim_ssl.data.transforms.image import create_transform
from vim_ssl.evaluation.baselines import classification_baselines, compare_with
from vim_ssl.evaluation.embeddings import stream_features
from vim_ssl.evaluation.examples import Viewer, worst_mistakes, write_examples
from vim_ssl.evaluation.extract import extract_features
from vim_ssl.evaluation.seen import is_resumed
from vim_ssl.evaluation.validation import Validation
from vim_ssl.metrics.classification import (
    MAIN_METRIC,
    TARGETS,
    classification_metrics,
    outputs,
    predicted,
    probabilities,
    require_labels,
    summary,
    target_metrics,
    write_tables,
)
from vim_ssl.metrics.medmnist import medmnist_metrics
from vim_ssl.metrics.titles import RESULTS, split_name
from vim_ssl.models.protocol import Encoder
from vim_ssl.objectives.classification import Classification, LabelledTransform, balanced_weights
from vim_ssl.tasks.frozen import feature_samples
from vim_ssl.tasks.runner import Training, fingerprints, finish_run, train_run
from vim_ssl.training.augmentation import AugmentationConfig, training_transform
from vim_ssl.utils.config import opt, to_dict
from vim_ssl.utils.environment import environment
from vim_ssl.utils.files import optional_output


@dataclass
class ClassificationConfig(AugmentationConfig):
    """The options shared by training from scratch and fine-tuning."""

    data: str = opt("", "labelled images", group="data")
    test: float = opt(0.2, "fraction held out if the data has no test split", group="data")
    validation: float = opt(
        0.0, "fraction of the training split used to select the epoch; 0: use the last epoch",
        group="data",
    )  # fmt: skip
    patience: int = opt(
        0, "stop after this many evaluations without improvement; 0: no early stopping", group="run"
    )
    repeats: int = opt(1, "augmented copies of an image in one batch", group="data")
    judge_batch: int = opt(128, "samples per evaluation batch", group="data")
    mixup: float = opt(0.0, "alpha of mixup; 0: off", group="data")
    cutmix: float = opt(
        0.0, "alpha of cutmix; with mixup, each is used for half of the batches", group="data"
    )
    targets: str = opt("class", "type of the labels", group="model", choices=TARGETS)
    label_smoothing: float = opt(0.0, "probability spread over all classes", group="model")
    class_weights: bool = opt(False, "weight classes by inverse frequency", group="model")
    drop_path: float = opt(0.0, "rate of stochastic depth", group="model")

    @classmethod
    def derive_defaults(cls, defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Extend `TrainConfig`: evaluate a validation split every epoch if the default is to
        evaluate only at the end."""
        defaults = super().derive_defaults(defaults, given)
        settings = defaults | given
        if settings["validation"] and settings["eval_every"] > settings["epochs"]:
            return defaults | {"eval_every": 1.0}
        return defaults

    @property
    def augments(self) -> bool:
        return super().augments or bool(self.mixup or self.cutmix)

    def __post_init__(self):
        super().__post_init__()
        mixed = self.mixup > 0 or self.cutmix > 0
        if self.targets != "class" and (mixed or self.label_smoothing or self.class_weights):
            raise ValueError(
                "mixup, cutmix, label_smoothing and class_weights cannot be used with targets "
                f"{self.targets}; omit them."
            )
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}; it must be 1 or more.")
        if not 0 <= self.validation < 1 or (self.patience and not self.validation):
            raise ValueError(
                f"validation {self.validation:g} and patience {self.patience}: patience needs a "
                "validation fraction above 0 and below 1."
            )
        if self.patience and (self.patience + 1) * self.eval_every > self.epochs:
            raise ValueError(
                f"patience {self.patience}: {self.patience + 1} evaluations, one every "
                f"{self.eval_every:g} epochs, do not fit into {self.epochs:g} epochs; lower "
                "patience or eval_every."
            )


# ---------------------------------------------------------------- training


def class_names(data) -> list[str]:
    """Return the class names, or class numbers if the data have no names."""
    if data.classes:
        return list(data.classes)
    if data.multi_label:
        return [str(i) for i in range(len(data.labels[0]))]
    return [str(i) for i in range(max(data.labels or [-1]) + 1)]


def build_classifier(source: str, data, config: ClassificationConfig, **args: Any) -> Encoder:
    """Load an encoder with a head for the classes of ``data`` and inputs for its bands.

    An encoder for other bands gets a new patch embedding (see `vim_ssl.checkpoints.adapt`) and the
    statistics of the data; an encoder for the same bands keeps its statistics. A head for the same
    classes is kept, its outputs in the order of the data; a head for others is replaced.

    Args:
        args: arguments of `load_encoder`.
    Raises: ValueError for an argument that it does not have.
    """
    args |= {
        "num_classes": outputs(config.targets, len(class_names(data))),
        "drop_path_rate": config.drop_path,
        "use_mask_token": False,  # it would have no gradient without masks, and DDP would fail
    }
    if "+" in (args.get("global_pool") or "") and is_of_timm(source):
        print(f"timm has no pool {args.pop('global_pool')}; {source} keeps its pool.", flush=True)
    try:
        encoder = load_for_bands(source, band_arguments(data), **args)
    except TypeError as error:  # an unknown name
        raise ValueError(f"model_args: {error}") from error
    _match_head(encoder, source, class_names(data), config.targets)
    return encoder


def _match_head(encoder: Encoder, source: str, classes: list[str], targets: str) -> None:
    """Bring the outputs of a stored head into the order of ``classes``, or replace the head."""
    stored = encoder.classes
    if stored is None or stored == classes:
        return
    numbers = match_classes(classes, stored)
    if targets != "ordinal" and sorted(numbers) == list(range(len(stored))):
        head = encoder.get_classifier()
        with torch.no_grad():
            for part in head if isinstance(head, nn.ModuleList) else (head,):
                # A norm of features may come before the layer of the classes.
                *_, last = (m for m in part.modules() if isinstance(m, nn.Linear | nn.Conv2d))
                for parameter in last.parameters():  # (outputs, features), (outputs,)
                    parameter.copy_(parameter[numbers])
    else:
        warnings.warn(
            f"{source} has a head for other classes ({', '.join(stored[:5])} …); it is replaced by "
            "a fresh one.",
            stacklevel=3,
        )
        encoder.reset_classifier(encoder.num_classes)
    encoder.classes = list(classes)


def train_classifier(
    recipe: str, config: ClassificationConfig, encoder: Encoder, source: str, train, test,
    accelerator,
) -> dict[str, Any]:  # fmt: skip
    """Train ``encoder`` in a run directory and evaluate it on ``test``, once, at the end.

    Args:
        recipe: the script's name, for the record.
        encoder: an encoder with a head; see `outputs`.
        source: its source, for the record.
        train, test: labelled, map-style data with the same classes.
    Returns: the content of metrics.json, on the main process.
    """
    classes = class_names(train)
    for split in (train, test):
        check_labels(split.name, split.labels, config.targets, classes)
    if config.targets != "multi-label":
        _warn_of_unseen(train, test, classes)
    weights = balanced_weights(train.labels, len(classes)) if config.class_weights else None
    objective = Classification(
        encoder, targets=config.targets, label_smoothing=config.label_smoothing,
        mixup=config.mixup, cutmix=config.cutmix, class_weights=weights,
    )  # fmt: skip
    labelled = train
    train, validation = _hold_out(config, train, classes)
    loading: dict[str, Any] = {"batch_size": config.judge_batch, "workers": config.workers}

    def validate(training: Training) -> Validation:
        return Validation(
            training.model, validation or test, training.run.folder, config.targets,
            keep_best=validation is not None, patience=config.patience,
            frozen=getattr(config, "frozen", False), **loading,
        )  # fmt: skip

    def conclude(training: Training) -> dict[str, Any]:
        if validation is not None:
            training.evaluator.take_best()
            training.save()
        folder = training.run.folder
        metrics = {
            "task": recipe, "data": train.name, "encoder": source, "train": len(train),
            "split": split_name(test),
            **evaluate(
                training.model, test, folder, config.targets, classes, train=labelled, **loading
            ),
            **fingerprints(train, test), **training.scope, "protocol": to_dict(config),
            **environment(),
        }  # fmt: skip
        return finish_run(
            training.run,
            metrics,
            lambda m: (
                f"{summary(m)}, trained on {len(train):,} · {folder}\n" + "\n".join(m["summary"])
            ),
            exposure=training.exposure,
        )

    if config.targets == "ordinal" and accelerator.is_main_process:
        print(f"ranks: {' < '.join(classes)}", flush=True)
    validates = validation is not None or config.eval_every <= config.epochs
    outside_data = {"test data": test.fingerprint}
    if validation is not None:
        outside_data["validation data"] = validation.fingerprint
    samples = training_samples(config, encoder, train, accelerator)
    return train_run(
        recipe, config, objective, samples, accelerator,
        model=encoder, data=train.name, splits=(labelled, test), source=source,
        record={"classes": train.classes, "targets": config.targets},
        save=partial(save_encoder, encoder), evaluate=validate if validates else None,
        should_stop=(lambda training: training.evaluator.should_stop()) if validates else None,
        conclude=conclude, depends_on=outside_data,
    )  # fmt: skip


def training_samples(
    config: ClassificationConfig, encoder: Encoder, train, accelerator
) -> SeededSamples:
    """Return the samples of `Classification`: images, or for a frozen encoder without augmentation
    its features."""
    if getattr(config, "frozen", False) and not config.augments and train.kind == "image":
        # A run that goes on has the weights of its checkpoint, whatever its source has now.
        frozen = load_encoder(config.output, num_classes=0) if is_resumed(config) else encoder
        return feature_samples(
            frozen, train, accelerator, config.seed, repeats=config.repeats,
            workers=config.workers,
        )  # fmt: skip
    transform = LabelledTransform(training_transform(encoder, config))
    return SeededSamples(train, transform, config.seed, repeats=config.repeats)


def _hold_out(config: ClassificationConfig, train, classes: Sequence[str]) -> tuple[Any, Any]:
    """Split ``train`` by ``config.validation`` into the remaining and the validation images."""
    if not config.validation:
        return train, None
    kept, held_out = stratified_split(train.labels, config.validation, config.seed, train.groups)
    validation = train.subset(held_out)
    name = f"the validation split of {train.name}"
    check_labels(name, validation.labels, config.targets, classes)
    return train.subset(kept, "held out for validation"), validation


def check_labels(name: str, labels: Any, targets: str, classes: Sequence[str]) -> None:
    """Check that the labels of ``name`` fit the targets and the classes.

    Args:
        labels: one per image, at least one; see `vim_ssl.data.ImageData`.
    Raises: ValueError if they do not.
    """
    labels = torch.as_tensor(np.asarray(labels))
    if (labels.dim() == 2) != (targets == "multi-label"):
        raise ValueError(
            f"{name}: labels have shape {tuple(labels.shape)}, which does not match --targets "
            f"{targets}. Use multi-label for several labels per image, class for one."
        )
    if labels.dim() == 2 and labels.shape[1] != len(classes):
        raise ValueError(
            f"{name} has {labels.shape[1]} labels per image; expected one for each of "
            f"{len(classes)} classes."
        )
    require_labels(labels, name)
    if labels.dim() == 1 and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise ValueError(
            f"{name} has labels from {int(labels.min())} to {int(labels.max())}; expected 0 to "
            f"{len(classes) - 1} for {len(classes)} classes."
        )


def _warn_of_unseen(train, test, classes: Sequence[str]) -> None:
    unseen = sorted(set(test.labels) - set(train.labels))
    if unseen:
        names = ", ".join(classes[i] for i in unseen[:5])
        warnings.warn(
            f"{len(unseen)} classes of the test split have no training image: {names}.",
            stacklevel=2,
        )


# ---------------------------------------------------------------- evaluation


def evaluate(
    encoder: Encoder, data, folder: Path, targets: str, classes: list[str], *, train=None,
    **loading: Any,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate an encoder with a head on labelled images; write the tables and the worst mistakes
    to ``folder``.

    Args:
        data: map-style data, or a stream.
        train: the labelled training images, for baselines; None: without baselines.
        loading: arguments of `extract_features`.
    Returns: the metrics, with ``n``, the number of images; for MedMNIST also its ``auc`` and
        ``acc``; with ``train`` also the entries of `compare_with`.
    """
    extract = stream_features if data.is_stream else extract_features
    device = next(encoder.parameters()).device
    answers = extract(encoder.eval(), data, create_transform(encoder), device=device, **loading)
    check_labels(data.name, answers.y, targets, classes)  # a stream's labels are known only now
    metrics = classification_metrics(answers.x, answers.y, targets, answers.groups)
    with optional_output("predictions.csv or classes.csv"):
        write_tables(
            folder, metrics, answers.x, answers.y, answers.ids, classes, targets, answers.groups
        )
    if targets != "multi-label" and not data.is_stream:  # a stream has no access by id
        guess, likely = predicted(answers.x, targets), probabilities(answers.x, targets)
        with optional_output("the worst mistakes"):
            view = Viewer(data, encoder)
            mistakes = worst_mistakes(view, answers.ids, answers.y, guess, likely, classes)
            write_examples(folder, mistakes=mistakes)
    if task := getattr(data, "task", None):
        scores = probabilities(answers.x, targets).numpy()
        metrics |= medmnist_metrics(answers.y.numpy(), scores, task, answers.groups)
    if train is not None:
        key = MAIN_METRIC[targets]
        metric = target_metrics(answers.x, answers.y, targets)[key]
        baselines = classification_baselines(encoder, train, data, answers.y, **loading)
        metrics |= compare_with(RESULTS[key].text, metric, baselines, key, answers.groups)
    count = len(answers.y)
    return {"test": count, "n": count, **metrics, "skipped": answers.skipped}
