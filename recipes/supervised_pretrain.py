"""Train a Vim encoder from scratch with labels, as the paper does on ImageNet.

    accelerate launch --multi_gpu --num_processes 8 recipes/supervised_pretrain.py \\
        --preset vim_tiny_224 --data imagenet:ROOT --precision bf16
    python recipes/supervised_pretrain.py                            # digits, minutes on a CPU
    python recipes/supervised_pretrain.py --data FOLDER              # your labelled images

The settings are those of Vim's scripts (arXiv:2401.09417; Vim-B: FastVim's, arXiv:2502.00594),
except that the learning rate accounts for accumulation and A_log has no weight decay. With another
number of GPUs, keep batch_size x accumulation x processes constant. Results are not yet measured.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import torch

from vim_ssl.cli import guarded
from vim_ssl.data import ImageData, labelled_splits
from vim_ssl.evaluation.seen import earlier_trainings
from vim_ssl.tasks.classification import ClassificationConfig, build_classifier, train_classifier
from vim_ssl.training.accelerator import make_accelerator
from vim_ssl.training.presets import Defaults
from vim_ssl.training.run import stored_or
from vim_ssl.utils.config import opt, parse


@dataclass
class Config(ClassificationConfig):
    """Supervised training from scratch."""

    encoder: str = opt("vim_small_patch16_224", "preset, checkpoint, run or timm:NAME", "model")
    model_args: dict[str, Any] = opt({}, "additional arguments of the encoder", "model")


def demo() -> Config:
    """Handwritten digits: two minutes on two CPU cores."""
    return Config(
        data="sample:mnist5k", encoder="vim_nano_patch4_28", model_args={"embed_dim": 128},
        crop_scale=(0.6, 1.0), hflip=0.0, epochs=4, warmup_epochs=0.5, batch_size=32,
        base_lr=1.5e-3, lr_reference_batch=32, weight_decay=0.05, workers=0, eval_every=1,
    )  # fmt: skip


def cpu_supervised() -> Config:
    """Classification at 64 px with a 1.1 M-parameter encoder: your labelled images, on a CPU."""
    return Config(
        encoder="vim_nano_patch8_64", crop_scale=(0.4, 1.0), epochs=60, warmup_epochs=5,
        batch_size=32, base_lr=1e-3, lr_reference_batch=32, weight_decay=0.05, eval_every=10,
    )  # fmt: skip


def cpu_supervised_32() -> Config:
    """Classification at 32 px, patches of 4 px: your small labelled images, on a CPU."""
    return replace(cpu_supervised(), model_args={"img_size": 32, "patch_size": 4})


def vim_tiny_224() -> Config:
    """Vim-Ti, 300 epochs, effective batch 1024, lr 1e-3."""
    return Config(
        encoder="vim_tiny_patch16_224", epochs=300, warmup_epochs=5, batch_size=128, base_lr=5e-4,
        lr_reference_batch=512, min_lr=1e-5, warmup_lr=1e-6, weight_decay=0.1, betas=(0.9, 0.999),
        clip_grad=None, color_jitter=0.3, auto_augment="rand-m9-mstd0.5-inc1", erasing=0.25,
        repeats=3, mixup=0.8, cutmix=1.0, label_smoothing=0.1, ema=0.99996, workers=8,
        eval_every=10,
    )  # fmt: skip


def vim_small_224() -> Config:
    """Vim-S, 300 epochs, effective batch 512, lr 1e-3."""
    return replace(
        vim_tiny_224(), encoder="vim_small_patch16_224", batch_size=64, base_lr=1e-3,
        weight_decay=0.05, drop_path=0.05,
    )  # fmt: skip


def vim_base_224() -> Config:
    """Vim-B as in FastVim, with LayerNorm after the scan, effective batch 1024, lr 2e-3."""
    return replace(
        vim_tiny_224(), encoder="vim_base_patch16_224", model_args={"norm_after_scan": True},
        base_lr=1e-3, weight_decay=0.05, drop_path=0.4, ema=0.9999,
    )  # fmt: skip


PRESETS: dict[str, Callable[[], Config]] = {
    preset.__name__: preset
    for preset in (
        demo, cpu_supervised, cpu_supervised_32, vim_tiny_224, vim_small_224, vim_base_224,
    )
}  # fmt: skip


def training_split(given: dict[str, Any]) -> ImageData:
    """The labelled training images of the given settings."""
    settings = {"test": Config.test, "seed": Config.seed} | given
    return labelled_splits(settings["data"], settings["test"], settings["seed"])[0]


default_preset = Defaults(
    demo="demo", gpu="vim_small_224", cpu="cpu_supervised", cpu_small="cpu_supervised_32",
    presets=PRESETS, open=training_split,
)  # fmt: skip


def run(config: Config) -> dict[str, Any]:
    accelerator = make_accelerator(config)
    trainings = earlier_trainings(config, config.encoder)
    train, test = labelled_splits(config.data, config.test, config.seed, "", trainings)
    torch.manual_seed(config.seed)  # for the initial weights
    encoder = build_classifier(config.encoder, train, config, **config.model_args)
    return train_classifier(
        "supervised_pretrain", config, encoder, config.encoder, train, test, accelerator
    )


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(
        Config, PRESETS, argv, default_preset=stored_or(default_preset), description=__doc__
    )
    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
