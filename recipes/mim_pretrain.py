"""Pretrain a Vim encoder by masked image modelling.

    accelerate launch recipes/mim_pretrain.py                            # digits, minutes, a CPU
    accelerate launch recipes/mim_pretrain.py --data FOLDER              # your images, 224 px
    accelerate launch --multi_gpu --num_processes 8 recipes/mim_pretrain.py \\
        --preset mae_small_224 --data imagenet/train --precision bf16
    accelerate launch recipes/mim_pretrain.py --preset mae_small_224 --mask tube \\
        --mask-ratio 0.9 --data 'video:ROOT?frames=16'                   # clips (mae, simmim)

`mae` (arXiv:2111.06377, visible patches in scan order, Vim decoder as in arXiv:2502.00594),
`simmim` (arXiv:2111.09886), `ar` (clusters one after another, arXiv:2406.07537) and `distill` (a
teacher's features, arXiv:2202.03555). The paper presets' results on ImageNet: not yet measured.
"""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vim_ssl import VimEncoder, load_encoder, save_encoder
from vim_ssl.cli import guarded
from vim_ssl.data import ImageData, ImageStream, band_arguments, open_data
from vim_ssl.data.clips import VideoData
from vim_ssl.data.loading.indexed import SeededSamples
from vim_ssl.data.loading.streamed import StreamSamples
from vim_ssl.data.transforms.clip import ClipTransform
from vim_ssl.data.transforms.image import pretrain_transform
from vim_ssl.evaluation.online import online_probe
from vim_ssl.models.video import VideoEncoder, reading
from vim_ssl.objectives.ar import AutoRegressive
from vim_ssl.objectives.distill import LOSSES, WHERE, Distill
from vim_ssl.objectives.mae import MAE
from vim_ssl.objectives.masking import MASKS, RandomMask
from vim_ssl.objectives.simmim import SimMIM
from vim_ssl.report import write_report
from vim_ssl.training.accelerator import make_accelerator, make_average
from vim_ssl.training.config import TrainConfig
from vim_ssl.training.loop import fit
from vim_ssl.training.run import Run, stored_or
from vim_ssl.utils.config import opt, parse
from vim_ssl.utils.environment import environment
from vim_ssl.utils.names import did_you_mean

OBJECTIVES = {"mae": MAE, "simmim": SimMIM, "ar": AutoRegressive, "distill": Distill}


@dataclass
class Config(TrainConfig):
    """Masked image modelling on a Vim encoder."""

    data: str = opt("", "images: a folder, hf:NAME, wds:SHARDS, sample:NAME …", group="data")
    crop_scale: tuple[float, float] = opt((0.2, 1.0), "share of the image's area", group="data")
    hflip: float = opt(0.5, "probability of mirroring", group="data")
    encoder: str = opt("vim_small_patch16_224", "preset, checkpoint or run", group="model")
    model_args: dict[str, Any] = opt({}, "more arguments of the encoder", group="model")
    tubelet: int = opt(2, "frames that make a token, where the data are videos", group="model")
    objective: str = opt("mae", "what to learn from", group="model", choices=tuple(OBJECTIVES))
    decoder_dim: int = opt(512, "width of the decoder of mae and ar", group="model")
    decoder_depth: int = opt(2, "its blocks: Vim for mae, attention for ar", group="model")
    norm_pix_loss: bool = opt(True, "targets normalised per patch", group="model")
    keep_order: bool = opt(
        True, "mae reads visible patches in scan order; false: shuffled", group="model"
    )
    cluster: int = opt(4, "side of what ar predicts at once, patches", group="model")
    teacher: str = opt(
        "ema", "of distill: ema (the encoder's average), timm:NAME, run or preset", group="model"
    )
    teacher_layers: int = opt(4, "its last blocks, averaged into targets", group="model")
    teacher_momentum: float = opt(0.998, "of the moving average", group="model")
    distill_loss: str = opt("smooth_l1", "of distill", group="model", choices=LOSSES)
    distill_where: str = opt("masked", "patches that distill counts", group="model", choices=WHERE)
    mask: str = opt("random", "which patches go together", group="masking", choices=tuple(MASKS))
    mask_ratio: float = opt(0.75, "share of the patches that is hidden", group="masking")
    mask_unit: int = opt(0, "side of what is masked as one, pixels; 0: a patch", group="masking")


def demo() -> Config:
    """Handwritten digits, 49 patches each, a 0.8 M-parameter encoder: minutes on two CPU cores."""
    return Config(
        data="sample:mnist5k?split=train", crop_scale=(0.6, 1.0), hflip=0.0,
        encoder="vim_nano_patch4_28", model_args={"depth": 3}, decoder_dim=96, decoder_depth=1,
        norm_pix_loss=False,  # most patches of a digit are flat: normalised, they are noise
        epochs=4, warmup_epochs=1, batch_size=64, base_lr=2e-3, lr_reference_batch=64,
        workers=0, eval_every=4,
    )  # fmt: skip


def mae_minute() -> Config:
    """MAE on the digits in about a minute on two CPU cores, a 0.5 M-parameter encoder."""
    return Config(
        data="sample:mnist5k?split=train", crop_scale=(0.6, 1.0), hflip=0.0,
        encoder="vim_nano_patch4_28", model_args={"embed_dim": 128}, decoder_dim=64,
        decoder_depth=1, norm_pix_loss=False, epochs=4, warmup_epochs=0.2, batch_size=32,
        base_lr=1.5e-3, lr_reference_batch=32, workers=0, eval_every=4,
    )  # fmt: skip


def simmim_minute() -> Config:
    """SimMIM in the same minute."""
    return replace(mae_minute(), objective="simmim", mask_ratio=0.6, epochs=2)


def ar_minute() -> Config:
    """Autoregression, patch by patch, in the same minute."""
    return replace(mae_minute(), objective="ar", cluster=1, epochs=2)


def distill_minute() -> Config:
    """Distillation from the encoder's own average in the same minute."""
    return replace(mae_minute(), objective="distill", teacher_layers=2, epochs=1.5)


def mae_nano_64() -> Config:
    """MAE at 64 px with a 1 M-parameter encoder: your own images on a CPU."""
    return Config(
        encoder="vim_nano_patch8_64", decoder_dim=96, decoder_depth=1, epochs=100,
        warmup_epochs=5, batch_size=64, base_lr=1e-3, lr_reference_batch=64,
    )  # fmt: skip


def offline_rgb() -> Config:
    """The suite's own encoder, 2.2 M parameters: MAE at 96 px on what registry packages hold.

    Emoji of three vendors, aerial tiles and photographs, without the parts that downstream tests
    use; about an hour of one CPU core. `make offline-rgb` keeps its weights, which
    load_encoder("vim_mini_patch8_96.offline_rgb") gives.
    """
    emoji = " + ".join(f"sample:{name}-emoji?split=train" for name in ("noto", "fluent"))
    return Config(
        data=f"{emoji} + sample:twemoji?split=train + sample:aerial?split=train "
        "+ 40 * sample:photos",
        crop_scale=(0.3, 1.0), encoder="vim_mini_patch8_96", decoder_dim=96, decoder_depth=1,
        norm_pix_loss=False,  # much of a drawing is flat
        epochs=6, warmup_epochs=0.5, batch_size=64, base_lr=1e-3, lr_reference_batch=64, threads=1,
        workers=0, eval_every=3,
    )  # fmt: skip


def mae_tiny_224() -> Config:
    """MAE with FastVim's numbers on Vim-Ti; lr for the effective batch, 4096 in the paper."""
    return Config(
        encoder="vim_tiny_patch16_224", epochs=1600, warmup_epochs=40, batch_size=128,
        base_lr=1.5e-4, weight_decay=0.05, clip_grad=None, workers=8,
    )  # fmt: skip


def mae_small_224() -> Config:
    """MAE with FastVim's numbers on Vim-S."""
    config = mae_tiny_224()
    config.encoder = "vim_small_patch16_224"
    return config


def mae_base_224() -> Config:
    """MAE with FastVim's numbers on Vim-B, LayerNorm after the scan as there."""
    config = mae_tiny_224()
    config.encoder, config.model_args = "vim_base_patch16_224", {"norm_after_scan": True}
    return config


def simmim_small_224() -> Config:
    """SimMIM's own numbers on Vim-S: 32-px units, 60 % masked, L1.

    A cosine to min_lr where SimMIM divides the learning rate by ten at epoch 700.
    """
    return Config(
        objective="simmim", encoder="vim_small_patch16_224", norm_pix_loss=False,
        model_args={"drop_path_rate": 0.1}, mask_ratio=0.6, mask_unit=32,
        crop_scale=(0.67, 1.0), epochs=800, warmup_epochs=10, batch_size=128, base_lr=1e-4,
        lr_reference_batch=512, betas=(0.9, 0.999), clip_grad=5.0, min_lr=5e-6, workers=8,
    )  # fmt: skip


def ar_small_192() -> Config:
    """ARM's numbers on Vim-S: 3x3 clusters of 64 px, read forward."""
    return Config(
        objective="ar", encoder="vim_small_patch16_224", model_args={"img_size": 192}, cluster=4,
        decoder_depth=4, epochs=1600, warmup_epochs=40, batch_size=256, base_lr=1.5e-4,
        clip_grad=3.0, workers=8,
    )  # fmt: skip


def distill_small_224() -> Config:
    """After UMT, on Vim-S: a CLIP ViT-B/16 by timm teaches, 80 % masked, cosine.

    UMT's student reads the visible patches only, ours mask tokens too; the batch is our choice.
    """
    return Config(
        objective="distill", encoder="vim_small_patch16_224", model_args={"drop_path_rate": 0.4},
        teacher="timm:vit_base_patch16_clip_224.openai", teacher_layers=1, distill_loss="cosine",
        distill_where="all", mask_ratio=0.8, epochs=800, warmup_epochs=40, batch_size=128,
        base_lr=1.5e-4, precision="bf16", workers=8,
    )  # fmt: skip


PRESETS = {
    preset.__name__: preset
    for preset in (
        demo, mae_minute, simmim_minute, ar_minute, distill_minute, mae_nano_64, offline_rgb,
        mae_tiny_224, mae_small_224, mae_base_224, simmim_small_224, ar_small_192,
        distill_small_224,
    )
}  # fmt: skip


def default_preset(given: dict[str, Any]) -> str:
    return "mae_small_224" if "data" in given else "demo"


class MimTransform:
    """An item to ``image`` (c, h, w), normalised, and ``mask`` (m,) bool, True = masked.

    Without a mask to draw, for `ar`, to the image alone.
    """

    def __init__(self, image_transform, mask: RandomMask | None):
        self.image_transform, self.mask = image_transform, mask

    def __call__(self, item: dict) -> dict:
        image = {"image": self.image_transform(item["image"])}
        return image if self.mask is None else image | {"mask": self.mask()}


def build_model(config: Config, data: ImageData | ImageStream | None = None) -> VimEncoder:
    # Rasters have bands of their own, and the encoder keeps their names and statistics.
    args = band_arguments(data) if isinstance(data, ImageData) else {}
    args |= config.model_args
    # Fresh where a checkpoint has none; dropped for objectives that would never train it.
    args.setdefault("use_mask_token", config.objective in ("simmim", "distill"))
    if config.objective == "ar":
        args.setdefault("directions", "forward")
    try:
        encoder = load_encoder(config.encoder, **args)
    except TypeError as error:  # an unknown name
        raise ValueError(f"model_args: {error}") from error
    encoder = reading(encoder, data, tubelet=config.tubelet)
    if isinstance(encoder, VideoEncoder) and config.objective not in ("mae", "simmim"):
        raise ValueError(f"{config.objective} reads images, not clips; use mae or simmim.")
    return encoder


def build_objective(config: Config, encoder: VimEncoder):
    args: dict[str, Any] = {}
    if config.objective == "distill":
        args |= {"teacher": load_teacher(config.teacher), "layers": config.teacher_layers,
                 "momentum": config.teacher_momentum, "loss": config.distill_loss,
                 "where": config.distill_where}  # fmt: skip
    else:
        args["norm_pix_loss"] = config.norm_pix_loss
    if config.objective in ("mae", "ar"):
        args |= {"decoder_dim": config.decoder_dim, "decoder_depth": config.decoder_depth}
    if config.objective == "mae":
        args["keep_order"] = config.keep_order
    if config.objective == "ar":
        args["cluster"] = config.cluster
    objective = OBJECTIVES[config.objective](encoder, **args)
    # These tell before training what does not fit.
    if config.objective == "ar":
        objective.order(encoder.grid_size)
    if config.objective == "distill":
        objective.targets(torch.zeros(1, *encoder.data_config["input_size"]))
    return objective


def load_teacher(name: str):
    """The frozen network that ``name`` means, or None for the encoder's own average.

    Raises: ValueError for a name that timm does not know, or a network without patches.
    """
    if name == "ema":
        return None
    if not name.startswith("timm:"):
        return load_encoder(name)
    import timm

    name = name.removeprefix("timm:")
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}. {did_you_mean(name, timm.list_models())}")
    try:
        return timm.create_model(name, pretrained=True, num_classes=0, dynamic_img_size=True)
    except TypeError as error:
        raise ValueError(
            f"the teacher timm:{name} takes no images of any size; choose a vision transformer."
        ) from error


# What only some objectives use.
USED_BY = {
    "mae": ("decoder_dim", "decoder_depth", "norm_pix_loss", "keep_order"),
    "simmim": ("norm_pix_loss",),
    "ar": ("decoder_dim", "decoder_depth", "norm_pix_loss", "cluster"),
    "distill": ("teacher", "teacher_layers", "teacher_momentum", "distill_loss", "distill_where"),
}
MASKING = ("mask", "mask_ratio", "mask_unit")


def not_used(config: Config) -> list[str]:
    """Settings that differ from the defaults, and that the objective will not look at."""
    used = {*USED_BY[config.objective], *(() if config.objective == "ar" else MASKING)}
    if config.teacher != "ema":
        used -= {"teacher_momentum"}
    default = Config()
    names = sorted({name for names in USED_BY.values() for name in names} | set(MASKING))
    return [n for n in names if n not in used and getattr(config, n) != getattr(default, n)]


def build_data(config: Config, encoder: VimEncoder, data: ImageData | ImageStream | None = None):
    """The images, opened unless they are given, and how they reach the objective."""
    data = open_data(config.data, streams=True) if data is None else data
    patch = encoder.patch_embed.patch_size
    if config.mask_unit % patch:
        raise ValueError(f"mask_unit {config.mask_unit} px is no multiple of the {patch}-px patch.")
    unit = max(config.mask_unit // patch, 1)
    grid, more, draws = encoder.grid_size, {}, None
    image: Any = pretrain_transform(
        encoder.data_config, crop_scale=config.crop_scale, hflip=config.hflip
    )
    if isinstance(encoder, VideoEncoder):
        if not isinstance(data, VideoData):
            raise ValueError(f"the encoder reads clips, {data.name} are images: use video:ROOT.")
        image, times = ClipTransform(image, training=True), data.sampling.frames // encoder.tubelet
        if config.mask == "tube":
            more = {"times": times}
        else:  # one below the other, as `fold_time` has them
            grid = (times * grid[0], grid[1])
    if config.objective != "ar":
        draws = MASKS[config.mask](grid, config.mask_ratio, unit, **more)
    transform = MimTransform(image, draws)
    if isinstance(data, ImageStream):
        return data, StreamSamples(data, transform, config.seed)
    return data, SeededSamples(data, transform, config.seed)


def run(config: Config) -> dict[str, Any]:
    accelerator = make_accelerator(config)
    if (idle := not_used(config)) and accelerator.is_main_process:
        print(f"Not used by {config.objective}: {', '.join(idle)}.", flush=True)
    data = open_data(config.data, streams=True)
    torch.manual_seed(config.seed)  # of the initial weights
    encoder = build_model(config, data)
    objective = build_objective(config, encoder)
    data, samples = build_data(config, encoder, data)
    folder = Run.open("mim_pretrain", config, accelerator)
    with contextlib.closing(folder):
        figures = train(config, encoder, objective, data, samples, folder, accelerator)
    accelerator.end_training()
    return {"run": str(folder.folder), **figures}


def train(config: Config, encoder, objective, data, samples, folder: Run, accelerator) -> dict:
    """Train in an open run; returns the last figures."""
    average = make_average(encoder, config)
    averaged: Any = None if average is None else average.module
    evaluate = None
    if not isinstance(data, ImageStream):  # of a stream no part can be set aside
        evaluate = online_probe(averaged or encoder, data, accelerator.device, config.seed)
    if accelerator.is_main_process:
        folder.count_skipped(data.faults)
    record = {"recipe": "mim_pretrain", "data": data.name, **environment()}

    def write_encoder(figures: dict[str, float] | None = None) -> None:
        with folder.writing("the encoder"):
            save_encoder(
                encoder, folder.folder, ema=averaged, record=record | {"figures": figures or {}}
            )

    figures = fit(
        objective.train(), samples, config, folder, accelerator, average=average,
        evaluate=evaluate, on_save=write_encoder,
    )  # fmt: skip
    if accelerator.is_main_process:
        if figures:  # none: the run had ended before
            write_encoder(figures)
        with folder.writing("report.html"):
            print(f"Encoder: {folder.folder} · report: {write_report(folder.folder)}")
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(
        Config, PRESETS, argv, default_preset=stored_or(default_preset), description=__doc__
    )
    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
