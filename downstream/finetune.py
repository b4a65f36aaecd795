"""Fine-tune an encoder for classification, on all labels or on a few per class.

    python downstream/finetune.py --labels-per-class 10                  # newest run, its data
    python downstream/finetune.py --encoder RUN_OR_FILE --data FOLDER
    python downstream/finetune.py --preset ssl_224 --encoder RUN --data imagenet:ROOT
    python downstream/finetune.py --eval-only --encoder vim_t_midclstok_76p1acc.pth \\
        --data imagenet:ROOT                                             # a released checkpoint

All blocks are trained, lower blocks with a lower learning rate (layer decay). The test split is
used once, at the end; --validation holds out part of the training split to select the epoch. The
run contains metrics.json, predictions.csv (a row per image) and classes.csv (a row per class).

--eval-only evaluates all labelled images of the split that --data names. Without ?split=, it uses
the test split if there is one, otherwise the validation split, otherwise all images. This also
holds for wds: shards. If the encoder was trained on some of these images, and they have no splits,
only the images held out in training are evaluated.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import torch

from vim_ssl import load_encoder
from vim_ssl.checkpoints.identity import model_hash
from vim_ssl.checkpoints.loading import made_by
from vim_ssl.checkpoints.released import RELEASED_FILES
from vim_ssl.cli import guarded
from vim_ssl.data import ImageData, ImageStream, labelled_splits
from vim_ssl.data.bands import check_bands
from vim_ssl.data.classes import with_classes
from vim_ssl.data.open import open_split
from vim_ssl.data.split import few_of_each
from vim_ssl.data.train_test import labelled_only
from vim_ssl.evaluation.seen import Exposure, earlier_trainings, part_to_evaluate
from vim_ssl.metrics.classification import outputs, summary
from vim_ssl.models.protocol import Encoder
from vim_ssl.tasks.classification import (
    ClassificationConfig,
    build_classifier,
    check_labels,
    evaluate,
    train_classifier,
)
from vim_ssl.tasks.config import TransferConfig
from vim_ssl.tasks.runner import finish_run
from vim_ssl.training.accelerator import make_accelerator
from vim_ssl.training.run import evaluation_folder, newest_run, stored_or, trained_on
from vim_ssl.utils.config import opt, parse, to_dict
from vim_ssl.utils.environment import environment


@dataclass
class Config(TransferConfig, ClassificationConfig):
    """Fine-tune a whole encoder."""

    data: str = opt("", "labelled data; default: the run's training data", "data")
    labels_per_class: int = opt(0, "training images per class; 0: all", "data")
    crop_scale: tuple[float, float] = opt(
        (0.6, 1.0), "range of the random crop's area, as a fraction of the image", "data"
    )
    hflip: float = opt(0.0, "probability of mirroring", "data")
    global_pool: str = opt("token+avg", "pooling before the head", "model")
    model_args: dict[str, Any] = opt({}, "additional arguments of the encoder", "model")
    img_size: int = opt(
        0, "input size in pixels; position embeddings are resampled; 0: the encoder's size", "model"
    )
    stride: int = opt(
        0, "patch stride in pixels; 8 for the paper's long-sequence fine-tuning", "model"
    )
    eval_only: bool = opt(False, "evaluate the encoder with its head, without training", "run")
    epochs: float = opt(60, "passes over the training split", "optimiser")
    batch_size: int = opt(20, "samples per process and micro-batch", "optimiser")
    base_lr: float = opt(1e-3, "learning rate per lr_reference_batch samples", "optimiser")
    lr_reference_batch: int = opt(
        64, "effective batch size for which base_lr is specified", "optimiser"
    )
    warmup_epochs: float = opt(5.0, "epochs of linear warm-up", "optimiser")

    def __post_init__(self):
        super().__post_init__()
        if self.labels_per_class and self.targets == "multi-label":
            raise ValueError("labels_per_class cannot be used with multi-label targets.")


def ssl_224() -> Config:
    """Fine-tuning after self-supervised pretraining, as in MAE: 100 epochs, batch 1024 (128 x 8
    processes)."""
    return Config(
        crop_scale=(0.08, 1.0), hflip=0.5, auto_augment="rand-m9-mstd0.5-inc1", erasing=0.25,
        mixup=0.8, cutmix=1.0, label_smoothing=0.1, drop_path=0.1, global_pool="avg", epochs=100,
        batch_size=128, base_lr=5e-4, lr_reference_batch=256, clip_grad=None, ema=0.9999,
        precision="bf16", workers=8, eval_every=5,
    )  # fmt: skip


def finer_224() -> Config:
    """The paper's fine-tuning at stride 8, 27 x 27 patches: 30 epochs at lr 1e-5, batch 1024 (128 x
    8 processes)."""
    return Config(
        crop_scale=(0.08, 1.0), hflip=0.5, color_jitter=0.3, auto_augment="rand-m9-mstd0.5-inc1",
        erasing=0.25, repeats=3, mixup=0.8, cutmix=1.0, label_smoothing=0.1, global_pool="token",
        stride=8, epochs=30, warmup_epochs=5, batch_size=128, base_lr=5e-6, lr_reference_batch=512,
        min_lr=1e-5, warmup_lr=1e-5, weight_decay=1e-8, layer_decay=None, clip_grad=None,
        ema=0.99996, workers=8, eval_every=5,
    )  # fmt: skip


PRESETS = {f.__name__: f for f in (ssl_224, finer_224)}


def run(config: Config) -> dict[str, Any]:
    accelerator = make_accelerator(config)
    source = config.encoder = config.encoder or str(newest_run())
    spec = config.data = config.data or trained_on(source)
    if config.eval_only:
        return evaluate_only(config, source, spec, accelerator.device)
    trainings = earlier_trainings(config, source)
    train, test = labelled_splits(spec, config.test, config.seed, "", trainings)
    if config.labels_per_class:
        train = train.subset(few_of_each(train.labels or [], config.labels_per_class, config.seed))
    torch.manual_seed(config.seed)
    encoder = build_encoder(config, source, train)
    return train_classifier("finetune", config, encoder, source, train, test, accelerator)


def build_encoder(config: Config, source: str, data: ImageData) -> Encoder:
    """Return the encoder with a head for these data; with ``from_scratch`` its weights are fresh.

    ``model_args`` override the other settings of the encoder.
    """
    sizes = {"img_size": config.img_size, "stride": config.stride}
    args: dict[str, Any] = {"global_pool": config.global_pool} | {
        k: v for k, v in sizes.items() if v
    }
    encoder = build_classifier(source, data, config, **args | config.model_args)
    return type(encoder)(**encoder.config) if config.from_scratch else encoder


def evaluate_only(config: Config, source: str, spec: str, device) -> dict[str, Any]:
    """Evaluate an encoder with its head; for a released file, also print the published top-1.

    Args:
        spec: labelled data; see `split_to_evaluate`.
    """
    weights = model_hash(source)
    size: dict[str, Any] = {"img_size": config.img_size or None}
    args = size | config.model_args | {"num_classes": None}
    encoder = load_encoder(source, **args).to(device)
    origin = made_by(source)
    test, split, exposure = split_to_evaluate(config, spec, source)
    count = encoder.num_classes + (config.targets == "ordinal")
    known = origin.get("classes")
    test = with_classes(test, known, source)
    classes = test.classes or known or [str(i) for i in range(count)]
    if encoder.num_classes != outputs(config.targets, len(classes)):
        raise ValueError(
            f"{source} has a head of {encoder.num_classes} outputs, but {test.name} has "
            f"{len(classes)} classes; evaluate on the classes it was trained on."
        )
    if not test.is_stream:
        check_labels(test.name, test.labels, config.targets, classes)
    check_bands(encoder, test)
    identity = to_dict(config) | {"encoder": source, "data": spec}
    folder = evaluation_folder(config.output, "evaluation", identity, {"test": test.fingerprint})
    metrics: dict[str, Any] = {
        "task": "evaluation", "data": test.name, "split": split, "encoder": source,
        "weights": weights, "fingerprints": {"test": test.fingerprint},
    }  # fmt: skip
    metrics |= evaluate(
        encoder, test, folder, config.targets, classes, batch_size=config.judge_batch,
        workers=config.workers,
    )  # fmt: skip
    published = RELEASED_FILES.get(Path(source).name)
    if published:
        metrics["published_top1"] = published[1]
    metrics |= {"protocol": to_dict(config), **environment()}
    beside = f" ({published[0]}, published: {published[1]} on ImageNet)" if published else ""
    return finish_run(
        folder, metrics, exposure=exposure,
        summary=lambda m: "\n".join([f"{summary(m)}{beside} · {folder}", *m.get("summary", [])]),
    )  # fmt: skip


def split_to_evaluate(
    config: Config, spec: str, source: str
) -> tuple[ImageData | ImageStream, str, Exposure]:
    """Return the labelled images to evaluate on, the name of their split, and what the encoder has
    seen of them.

    This is the split that ``spec`` names, otherwise the test split, otherwise the validation split,
    otherwise all images; of data without splits that the encoder was trained on, the images held
    out in training, see `part_to_evaluate`.

    Raises: ValueError if there are no labels.
    """
    for preferred in (("test", "validation"), ("validation", "test")):
        data = open_split(spec, preferred, streams=True)
        if not data.is_stream:  # a stream's labels are not known yet
            data = labelled_only(data)
        if len(data):
            return part_to_evaluate(
                data, spec, source,
                lambda trained: labelled_splits(trained, config.test, config.seed)[1].ids,
            )  # fmt: skip
    raise ValueError(
        f"{data.name} ({data.split}) has no labels; evaluation needs labelled images. To predict "
        f"their classes: vim-ssl predict --encoder {config.encoder or 'RUN'} --data {spec}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    run(parse(Config, PRESETS, argv, default_preset=stored_or(None), description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
