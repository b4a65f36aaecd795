"""Pretrain a Vim encoder on images without labels.

    accelerate launch recipes/mim_pretrain.py                            # digits, minutes on a CPU
    accelerate launch recipes/mim_pretrain.py --data FOLDER              # your images
    accelerate launch --multi_gpu --num_processes 8 recipes/mim_pretrain.py \\
        --preset mae_small_224 --data imagenet/train --precision bf16
    accelerate launch recipes/mim_pretrain.py --preset mae_small_224 --mask tube \\
        --mask-ratio 0.9 --data 'video:ROOT?frames=16'                   # clips (mae, simmim)

Objectives: `mae` (arXiv:2111.06377, visible patches in scan order, Vim decoder as in
arXiv:2502.00594), `simmim` (arXiv:2111.09886), `ar` (clusters in sequence, arXiv:2406.07537),
`distill` (a teacher's features, arXiv:2202.03555). Results of the paper presets on ImageNet are not
yet measured.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import torch

from vim_ssl import load_encoder, save_encoder
from vim_ssl.cli import guarded
from vim_ssl.data import ImageData, ImageStream, band_arguments, open_data
from vim_ssl.data.transforms.clip import ClipTransform
from vim_ssl.data.transforms.image import pretrain_transform
from vim_ssl.evaluation.online import online_probe
from vim_ssl.models.protocol import Encoder
from vim_ssl.models.video import VideoEncoder
from vim_ssl.objectives.base import MASK_SETTINGS, OBJECTIVES, PretrainObjective, get_objective
from vim_ssl.objectives.distill import LOSSES, WHERE
from vim_ssl.objectives.masking import MASKS, RandomMask, TubeMask
from vim_ssl.tasks.runner import Training, train_run
from vim_ssl.training.accelerator import make_accelerator
from vim_ssl.training.config import TrainConfig
from vim_ssl.training.presets import Defaults
from vim_ssl.training.run import stored_or
from vim_ssl.utils.config import opt, parse


@dataclass
class Config(TrainConfig):
    """Pretraining of a Vim encoder without labels."""

    data: str = opt("", "images: a folder, hf:NAME, wds:SHARDS, sample:NAME …", "data")
    crop_scale: tuple[float, float] = opt(
        (0.2, 1.0), "range of the random crop's area, as a fraction of the image", "data"
    )
    hflip: float = opt(0.5, "probability of mirroring", "data")
    encoder: str = opt("vim_small_patch16_224", "preset, checkpoint, run or timm:NAME", "model")
    model_args: dict[str, Any] = opt({}, "additional arguments of the encoder", "model")
    tubelet: int = opt(2, "frames per token, if the data are videos", "model")
    objective: str = opt("mae", f"{', '.join(OBJECTIVES)}, or that of a plugin", "objective")
    objective_args: dict[str, Any] = opt({}, "additional arguments of the objective", "objective")
    decoder_dim: int = opt(512, "mae, ar: width of the decoder", "objective")
    decoder_depth: int = opt(2, "mae: Vim blocks of the decoder; ar: attention blocks", "objective")
    norm_pix_loss: bool = opt(True, "mae, simmim, ar: normalise targets per patch", "objective")
    keep_order: bool = opt(
        True, "mae: read visible patches in scan order; false: shuffled", "objective"
    )
    cluster: int = opt(4, "ar: side of a predicted cluster, in patches", "objective")
    teacher: str = opt(
        "ema", "distill: ema (the encoder's average), timm:NAME, run or preset", "objective"
    )
    teacher_layers: int = opt(
        4, "distill: number of final teacher blocks whose outputs are averaged", "objective"
    )
    teacher_momentum: float = opt(0.998, "distill: EMA momentum of the teacher", "objective")
    distill_loss: str = opt("smooth_l1", "distill: loss function", "objective", choices=LOSSES)
    distill_where: str = opt(
        "masked", "distill: patches included in the loss", "objective", choices=WHERE
    )
    mask: str = opt("random", "mask type; tube is for clips", "masking", choices=tuple(MASKS))
    mask_ratio: float = opt(0.75, "fraction of patches that are masked", "masking")
    mask_unit: int = opt(0, "side of a masked square in pixels; 0: one patch", "masking")

    def __post_init__(self):
        super().__post_init__()
        get_objective(self.objective)  # raises for an unknown name


def demo() -> Config:
    """Handwritten digits, 49 patches each, 0.8 M-parameter encoder: minutes on two CPU cores."""
    return Config(
        data="sample:mnist5k?split=train", crop_scale=(0.6, 1.0), hflip=0.0,
        encoder="vim_nano_patch4_28", model_args={"depth": 3}, decoder_dim=96, decoder_depth=1,
        norm_pix_loss=False,  # most patches of a digit are flat; normalised, they become noise
        epochs=4, warmup_epochs=1, batch_size=64, base_lr=2e-3, lr_reference_batch=64,
        workers=0, eval_every=1,
    )  # fmt: skip


def mae_minute() -> Config:
    """MAE on the digits with a 0.5 M-parameter encoder: about a minute on two CPU cores."""
    return Config(
        data="sample:mnist5k?split=train", crop_scale=(0.6, 1.0), hflip=0.0,
        encoder="vim_nano_patch4_28", model_args={"embed_dim": 128}, decoder_dim=64,
        decoder_depth=1, norm_pix_loss=False, epochs=4, warmup_epochs=0.2, batch_size=32,
        base_lr=1.5e-3, lr_reference_batch=32, workers=0, eval_every=4,
    )  # fmt: skip


def simmim_minute() -> Config:
    """SimMIM with the same encoder: about a minute."""
    return replace(mae_minute(), objective="simmim", mask_ratio=0.6, epochs=2)


def ar_minute() -> Config:
    """Autoregression, patch by patch, with the same encoder: about a minute."""
    return replace(mae_minute(), objective="ar", cluster=1, epochs=2)


def distill_minute() -> Config:
    """Distillation from the encoder's moving average: about a minute."""
    return replace(mae_minute(), objective="distill", teacher_layers=2, epochs=1.5)


def cpu_mae() -> Config:
    """MAE at 64 px with a 1.1 M-parameter encoder: your images, on a CPU."""
    return Config(
        encoder="vim_nano_patch8_64", decoder_dim=96, decoder_depth=1, epochs=100,
        warmup_epochs=5, batch_size=64, base_lr=1e-3, lr_reference_batch=64,
    )  # fmt: skip


def cpu_mae_32() -> Config:
    """MAE at 32 px, patches of 4 px: your small images, such as icons or cells, on a CPU."""
    return replace(cpu_mae(), model_args={"img_size": 32, "patch_size": 4})


def cpu_mae_96() -> Config:
    """MAE at 96 px with a 2.2 M-parameter encoder: your images, on a CPU; four times slower."""
    return replace(cpu_mae(), encoder="vim_mini_patch8_96")


def offline_rgb() -> Config:
    """MAE at 96 px with a 2.2 M-parameter encoder, on data from registry packages.

    The data are emoji of three vendors, aerial tiles and photographs, without the splits used in
    downstream tests. It takes about an hour on one CPU core. `make offline-rgb` stores the weights
    that load_encoder("vim_mini_patch8_96.offline_rgb") loads.
    """
    emoji = " + ".join(f"sample:{name}-emoji?split=train" for name in ("noto", "fluent"))
    return Config(
        data=f"{emoji} + sample:twemoji?split=train + sample:aerial?split=train "
        "+ 40 * sample:photos",
        crop_scale=(0.3, 1.0), encoder="vim_mini_patch8_96", decoder_dim=96, decoder_depth=1,
        norm_pix_loss=False,  # large parts of a drawing are flat
        epochs=6, warmup_epochs=0.5, batch_size=64, base_lr=1e-3, lr_reference_batch=64, threads=1,
        workers=0, eval_every=3,
    )  # fmt: skip


def mae_tiny_224() -> Config:
    """MAE with FastVim's settings on Vim-Ti; the paper's effective batch is 4096."""
    return Config(
        encoder="vim_tiny_patch16_224", epochs=1600, warmup_epochs=40, batch_size=128,
        base_lr=1.5e-4, weight_decay=0.05, clip_grad=None, workers=8,
    )  # fmt: skip


def mae_small_224() -> Config:
    """MAE with FastVim's settings on Vim-S."""
    return replace(mae_tiny_224(), encoder="vim_small_patch16_224")


def mae_base_224() -> Config:
    """MAE with FastVim's settings on Vim-B, with LayerNorm after the scan."""
    return replace(
        mae_tiny_224(), encoder="vim_base_patch16_224", model_args={"norm_after_scan": True}
    )


def simmim_small_224() -> Config:
    """SimMIM's settings on Vim-S: 32-px units, 60 % masked, L1.

    Unlike SimMIM, which divides the learning rate by ten at epoch 700, this uses a cosine schedule.
    """
    return Config(
        objective="simmim", encoder="vim_small_patch16_224", norm_pix_loss=False,
        model_args={"drop_path_rate": 0.1}, mask_ratio=0.6, mask_unit=32,
        crop_scale=(0.67, 1.0), epochs=800, warmup_epochs=10, batch_size=128, base_lr=1e-4,
        lr_reference_batch=512, betas=(0.9, 0.999), clip_grad=5.0, min_lr=5e-6, workers=8,
    )  # fmt: skip


def ar_small_192() -> Config:
    """ARM's settings on Vim-S: 3x3 clusters of 64 px, read forward."""
    return Config(
        objective="ar", encoder="vim_small_patch16_224", model_args={"img_size": 192}, cluster=4,
        decoder_depth=4, epochs=1600, warmup_epochs=40, batch_size=256, base_lr=1.5e-4,
        clip_grad=3.0, workers=8,
    )  # fmt: skip


def distill_small_224() -> Config:
    """UMT's settings on Vim-S: timm's CLIP ViT-B/16 as the teacher, 80 % masked, cosine loss.

    UMT's student reads only visible patches, ours also mask tokens; the batch size is our choice.
    """
    return Config(
        objective="distill", encoder="vim_small_patch16_224", model_args={"drop_path_rate": 0.4},
        teacher="timm:vit_base_patch16_clip_224.openai", teacher_layers=1, distill_loss="cosine",
        distill_where="all", mask_ratio=0.8, epochs=800, warmup_epochs=40, batch_size=128,
        base_lr=1.5e-4, precision="bf16", workers=8,
    )  # fmt: skip


PRESETS: dict[str, Callable[[], Config]] = {
    preset.__name__: preset
    for preset in (
        demo, mae_minute, simmim_minute, ar_minute, distill_minute, cpu_mae, cpu_mae_32, cpu_mae_96,
        offline_rgb, mae_tiny_224, mae_small_224, mae_base_224, simmim_small_224, ar_small_192,
        distill_small_224,
    )
} | {"mae_nano_64": cpu_mae}  # fmt: skip

default_preset = Defaults(
    demo="demo", gpu="mae_small_224", cpu="cpu_mae", cpu_small="cpu_mae_32", presets=PRESETS,
    open=lambda given: open_data(given["data"], streams=True),
)  # fmt: skip


class MimTransform:
    """Transform a data item into the sample described by `PretrainObjective.views`.

    ``mask`` generates its mask; None means no mask.
    """

    def __init__(self, image_transform, views: str, mask: RandomMask | None = None):
        self.image_transform, self.views, self.mask = image_transform, views, mask

    def __call__(self, item: dict) -> dict:
        if self.views == "crops":
            crops = [self.image_transform(item["image"]) for _ in range(2)]
            return {"image": torch.stack(crops)}
        image = {"image": self.image_transform(item["image"])}
        return image if self.mask is None else image | {"mask": self.mask()}


def build_model(config: Config, data: ImageData | ImageStream | None = None) -> Encoder:
    objective = get_objective(config.objective)
    # By default no mask token, because most objectives would never train it.
    args: dict[str, Any] = {"use_mask_token": False, "num_classes": 0} | objective.encoder_args
    if data is not None and not data.is_stream:
        args |= band_arguments(data)  # the encoder stores the bands and statistics of rasters
    try:
        encoder = load_encoder(config.encoder, **args | config.model_args)
    except TypeError as error:  # an unknown name
        raise ValueError(f"model_args: {error}") from error
    if data is not None:
        encoder = encoder.for_data(data, tubelet=config.tubelet)
    if encoder.reads_clips and not objective.reads_clips:
        names = [name for name in OBJECTIVES if get_objective(name).reads_clips]
        raise ValueError(f"{config.objective} reads images, not clips; use {' or '.join(names)}.")
    return encoder


def build_objective(config: Config, encoder: Encoder) -> PretrainObjective:
    try:
        return get_objective(config.objective).from_config(encoder, config)
    except TypeError as error:
        if not config.objective_args:
            raise
        raise ValueError(f"objective_args: {error}") from error  # an unknown name


def not_used(config: Config) -> list[str]:
    """Return the settings that differ from the defaults but are not used by the objective."""
    used = get_objective(config.objective).used_settings(config)
    settings = {name for known in OBJECTIVES for name in get_objective(known).settings}
    default = Config()
    return [
        name
        for name in sorted(settings.union(MASK_SETTINGS) - used)
        if getattr(config, name) != getattr(default, name)
    ]


def build_mask(config: Config, encoder: Encoder, times: int) -> RandomMask:
    """Build the mask generator for images, or for clips of ``times`` tubelets."""
    patch, (rows, columns) = encoder.patch_embed.patch_size, encoder.grid_size
    if config.mask_unit % patch:
        raise ValueError(
            f"mask_unit {config.mask_unit} px is not a multiple of the {patch}-px patch."
        )
    unit = max(config.mask_unit // patch, 1)
    if config.mask == "tube":
        return TubeMask((rows, columns), config.mask_ratio, unit, times=times)
    # Tubelets are stacked vertically, as in `fold_time`.
    return MASKS[config.mask]((times * rows, columns), config.mask_ratio, unit)


def build_data(config: Config, encoder: Encoder, data: ImageData | ImageStream | None = None):
    """Return the images (``data``, or opened from the config) and the training samples."""
    data = open_data(config.data, streams=True) if data is None else data
    views, times = get_objective(config.objective).views, 1
    image: Any = pretrain_transform(
        encoder.data_config, crop_scale=config.crop_scale, hflip=config.hflip
    )
    if encoder.reads_clips:
        if data.kind != "video":
            raise ValueError(
                f"the encoder expects clips, but {data.name} contains images; "
                "use --data video:ROOT."
            )
        clips = cast(VideoEncoder, encoder)
        image, times = ClipTransform(image, training=True), data.sampling.frames // clips.tubelet
    mask = build_mask(config, encoder, times) if views == "mask" else None
    transform = MimTransform(image, views, mask)
    return data, data.samples(transform, config.seed)


def run(config: Config) -> dict[str, Any]:
    accelerator = make_accelerator(config)
    if (idle := not_used(config)) and accelerator.is_main_process:
        print(f"Not used by {config.objective}: {', '.join(idle)}.", flush=True)
    data = open_data(config.data, streams=True)
    torch.manual_seed(config.seed)  # for the initial weights
    encoder = build_model(config, data)
    objective = build_objective(config, encoder)
    data, samples = build_data(config, encoder, data)

    def probe(training: Training) -> Callable[[], dict[str, float]]:
        return online_probe(training.model, data, accelerator.device, config.seed)

    result = train_run(
        "mim_pretrain", config, objective, samples, accelerator, model=encoder, data=data.name,
        save=partial(save_encoder, encoder), record={"figures": {}},
        prepare=lambda run: run.count_skipped(data.faults),
        evaluate=None if data.is_stream else probe,  # a stream has no held-out images
    )  # fmt: skip
    if result:  # on the main process
        folder = shlex.quote(result["run"])
        print(f"Next: vim-ssl linear-probe (or finetune) --encoder {folder} --data LABELLED_IMAGES")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(
        Config, PRESETS, argv, default_preset=stored_or(default_preset), description=__doc__
    )
    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
