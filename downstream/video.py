"""Classify videos: fine-tune an encoder on clips, or train only a head.

    python downstream/video.py --encoder RUN_OR_FILE --data 'video:ROOT?frames=16'
    python downstream/video.py --data 'video:ROOT?frames=8&fps=5&clips=4'  # dense sampling, 4 clips
    python downstream/video.py --frozen --encoder RUN --data video:ROOT         # a linear probe

An image encoder is inflated: its patches become tubelets, its positions are kept, and a time table
starts at zero (`vim_ssl/models/video.py`). Training draws one clip per video and one augmentation
per clip; evaluation averages the logits over all ``clips`` of the data spec. The run contains
metrics.json, predictions.csv and classes.csv, as for images, and the encoder, which then reads
clips. `linear_probe.py`, `knn.py` and `embed.py` also accept videos.

Following VideoMamba, arXiv:2403.06977: layer decay 0.8, drop path and a tubelet of one frame.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import torch

from vim_ssl.cli import guarded
from vim_ssl.data import ImageData, labelled_splits
from vim_ssl.evaluation.seen import earlier_trainings
from vim_ssl.models.protocol import Encoder
from vim_ssl.models.video import INFLATIONS
from vim_ssl.tasks.classification import ClassificationConfig, build_classifier, train_classifier
from vim_ssl.tasks.config import TransferConfig
from vim_ssl.training.accelerator import make_accelerator
from vim_ssl.training.run import newest_run, stored_or
from vim_ssl.utils.config import opt, parse


@dataclass
class Config(TransferConfig, ClassificationConfig):
    """Fine-tune an encoder on videos."""

    data: str = opt("", "labelled videos, video:ROOT?frames=8&clips=4", "data")
    crop_scale: tuple[float, float] = opt(
        (0.4, 1.0), "range of the random crop's area, as a fraction of the frames", "data"
    )
    hflip: float = opt(0.5, "probability of mirroring; 0 if left and right matter", "data")
    judge_batch: int = opt(4, "videos per evaluation batch", "data")
    tubelet: int = opt(1, "frames per token, if the encoder reads images", "model")
    inflation: str = opt("centre", "how patches become tubelets", "model", choices=INFLATIONS)
    global_pool: str = opt("token+avg", "pooling before the head", "model")
    img_size: int = opt(
        0, "input size in pixels; position embeddings are resampled; 0: the encoder's size", "model"
    )
    epochs: float = opt(30, "passes over the training split", "optimiser")
    batch_size: int = opt(8, "clips per process and micro-batch", "optimiser")
    base_lr: float = opt(5e-4, "learning rate per lr_reference_batch clips", "optimiser")
    lr_reference_batch: int = opt(
        32, "effective batch size for which base_lr is specified", "optimiser"
    )
    warmup_epochs: float = opt(3.0, "epochs of linear warm-up", "optimiser")

    def __post_init__(self):
        super().__post_init__()
        if self.mixup or self.cutmix:
            raise ValueError("mixup and cutmix are for images, not clips; omit them.")


def kinetics_small() -> Config:
    """VideoMamba's settings for its S model, pretrained on images: 16 frames at 224 px."""
    return Config(
        crop_scale=(0.08, 1.0), auto_augment="rand-m7-mstd0.5-inc1", erasing=0.25, drop_path=0.35,
        label_smoothing=0.1, global_pool="token", epochs=50, warmup_epochs=5, batch_size=16,
        base_lr=1e-4, lr_reference_batch=512, weight_decay=0.05, layer_decay=0.8, min_lr=1e-6,
        precision="bf16", workers=8, eval_every=5,
    )  # fmt: skip


PRESETS = {f.__name__: f for f in (kinetics_small,)}


def run(config: Config) -> dict[str, Any]:
    accelerator = make_accelerator(config)
    source = config.encoder = config.encoder or str(newest_run())
    trainings = earlier_trainings(config, source)
    train, test = labelled_splits(config.data, config.test, config.seed, "", trainings)
    if train.kind != "video":
        raise ValueError(f"{config.data} does not contain videos; use video:FOLDER.")
    torch.manual_seed(config.seed)
    encoder = build_encoder(config, source, train)
    return train_classifier("video", config, encoder, source, train, test, accelerator)


def build_encoder(config: Config, source: str, data: ImageData) -> Encoder:
    """Return a video encoder with a head."""
    size = {"img_size": config.img_size} if config.img_size else {}
    images = build_classifier(source, data, config, global_pool=config.global_pool, **size)
    encoder = images.for_data(data, tubelet=config.tubelet, inflation=config.inflation)
    if config.from_scratch:
        encoder = type(encoder)(**encoder.config)
    return encoder


def main(argv: Sequence[str] | None = None) -> int:
    run(parse(Config, PRESETS, argv, default_preset=stored_or(None), description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
