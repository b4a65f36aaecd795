"""Pretrain a Vim encoder on images and captions by contrastive learning.

    accelerate launch recipes/clip_pretrain.py                     # emoji, minutes on a CPU
    accelerate launch recipes/clip_pretrain.py --data pairs:FOLDER # your images and captions
    accelerate launch --multi_gpu --num_processes 8 recipes/clip_pretrain.py \\
        --preset cc12m_small_224 --data 'wds:cc12m/{0000..2175}.tar' --accumulation 1

Losses: `clip` (arXiv:2103.00020), `siglip` (arXiv:2303.15343). `--lock-image` on a trained encoder
is LiT (arXiv:2111.07991); `--encoder RUN` starts from any run. The loss compares the pairs of the
whole effective batch: processes and accumulation change memory and time, not the gradient.
`vim_ssl.load_clip(RUN)` loads the model. Results of the large presets are not yet measured.
"""

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import torch

from vim_ssl import load_encoder
from vim_ssl.cli import guarded
from vim_ssl.data import BadImage, ImageData, ImageStream, open_data
from vim_ssl.data.dataset import captions_of
from vim_ssl.data.open import open_split
from vim_ssl.evaluation.retrieval import embed_pairs, recall
from vim_ssl.models.protocol import Encoder
from vim_ssl.models.text import HubText, TextEncoder, load_hub_text
from vim_ssl.models.tokenizers import (
    BytePairs,
    Tokenizer,
    load_tokenizer,
    named_tokenizer,
    train_bpe,
)
from vim_ssl.objectives.clip import LOSSES, Clip, save_clip
from vim_ssl.tasks.runner import Training, train_run
from vim_ssl.training.accelerator import make_accelerator
from vim_ssl.training.augmentation import AugmentationConfig, training_transform
from vim_ssl.training.presets import Defaults
from vim_ssl.training.run import Run, stored_or
from vim_ssl.utils.config import opt, parse


@dataclass
class Config(AugmentationConfig):
    """Contrastive pretraining of a Vim encoder on images and captions."""

    data: str = opt("", "images with captions: pairs:FOLDER, hf:NAME, wds:SHARDS …", "data")
    val: str = opt("", "pairs to evaluate retrieval on; default: none", "data")
    crop_scale: tuple[float, float] = opt(
        (0.9, 1.0), "range of the random crop's area, as a fraction of the image", "data"
    )
    hflip: float = opt(0.0, "probability of mirroring; captions may mention left, right", "data")
    encoder: str = opt("vim_small_patch16_224", "preset, checkpoint, run or timm:NAME", "model")
    model_args: dict[str, Any] = opt({}, "additional arguments of the encoder", "model")
    text: str = opt("transformer", "text tower: transformer, or hf:NAME (pretrained)", "model")
    text_width: int = opt(512, "width of the text transformer", "model")
    text_depth: int = opt(12, "number of blocks of the text transformer", "model")
    text_heads: int = opt(8, "attention heads of the text transformer", "model")
    text_dropout: float = opt(0.0, "dropout of the text transformer", "model")
    embed_dim: int = opt(512, "dimension of the shared embedding space", "model")
    loss: str = opt("clip", "contrastive loss", "model", choices=LOSSES)
    lock_image: bool = opt(False, "freeze the encoder", "model")
    lock_text: bool = opt(False, "freeze the text tower", "model")
    tokenizer: str = opt(
        "", "bpe (trained on the captions), clip or hf:NAME; default: the tokenizer of an hf: text "
        "tower, otherwise bpe", "text",
    )  # fmt: skip
    vocab_size: int = opt(49408, "maximum vocabulary size of bpe", "text")
    tokenizer_captions: int = opt(1_000_000, "maximum number of captions to train bpe on", "text")
    context_length: int = opt(77, "maximum number of tokens per caption", "text")

    @classmethod
    def derive_defaults(cls, defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Extend `TrainConfig`: if ``data`` is given, drop the preset's ``val``."""
        defaults = super().derive_defaults(defaults, given)
        return defaults | {"val": ""} if "data" in given else defaults

    def __post_init__(self):
        super().__post_init__()
        if self.tokenizer_captions < 1:
            raise ValueError(
                f"tokenizer_captions is {self.tokenizer_captions}; it must be 1 or more."
            )


def emoji_clip() -> Config:
    """Emoji of two vendors and their names, 64 px, a 0.7 M-parameter encoder: minutes on two cores.

    Retrieval is evaluated on one vendor's drawings of held-out emoji. A third vendor's drawings are
    reserved for the final test.
    """
    return Config(
        data="sample:noto-emoji?split=train&tones=none + sample:twemoji?split=train&tones=none",
        val="sample:twemoji?split=test&tones=none", crop_scale=(0.6, 1.0), color_jitter=0.4,
        encoder="vim_nano_patch16_64", model_args={"depth": 2},
        text_width=256, text_depth=2, text_heads=4, embed_dim=256, vocab_size=2048,
        context_length=24, epochs=18, warmup_epochs=0.5, batch_size=128, base_lr=7e-4,
        lr_reference_batch=128, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6, workers=0,
        eval_every=4,
    )  # fmt: skip


def cpu_clip() -> Config:
    """CLIP at 64 px with a 0.7 M-parameter encoder: your images and captions, on a CPU."""
    return Config(
        crop_scale=(0.6, 1.0), encoder="vim_nano_patch16_64", model_args={"depth": 2},
        text_width=256, text_depth=2, text_heads=4, embed_dim=256, vocab_size=4096,
        context_length=32, epochs=100, warmup_epochs=5, batch_size=128, base_lr=7e-4,
        lr_reference_batch=128, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6, eval_every=10,
    )  # fmt: skip


def cpu_clip_32() -> Config:
    """CLIP at 32 px, patches of 8 px: your small images and captions, on a CPU."""
    return replace(cpu_clip(), model_args={"depth": 2, "img_size": 32, "patch_size": 8})


def cc3m_small_224() -> Config:
    """CLIP's optimiser with Vim-S on 3 M pairs, batch 1024; 40 epochs, as in SLIP."""
    return Config(
        epochs=40, warmup_epochs=1, batch_size=256, accumulation=4, base_lr=5e-4,
        lr_reference_batch=1024, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6, precision="bf16",
        workers=8,
    )  # fmt: skip


def cc12m_small_224() -> Config:
    """CLIP's optimiser with Vim-S on 12 M pairs, batch 4096; 35 epochs, as in SLIP."""
    return replace(
        cc3m_small_224(), epochs=35, batch_size=512, accumulation=8, base_lr=1e-3,
        lr_reference_batch=4096, tokenizer="clip",
    )  # fmt: skip


def datacomp_small_224() -> Config:
    """DataComp's small scale with Vim-S: 12.8 M samples seen, batch 4096, 500 steps of warm-up.

    This is one epoch of the full pool; with a filtered subset, increase the epochs accordingly.
    """
    return replace(cc12m_small_224(), epochs=1, warmup_epochs=0.16, base_lr=5e-4)


PRESETS: dict[str, Callable[[], Config]] = {
    preset.__name__: preset
    for preset in (
        emoji_clip, cpu_clip, cpu_clip_32, cc3m_small_224, cc12m_small_224, datacomp_small_224,
    )
}  # fmt: skip

default_preset = Defaults(
    demo="emoji_clip", gpu="cc3m_small_224", cpu="cpu_clip", cpu_small="cpu_clip_32",
    presets=PRESETS, open=lambda given: open_data(given["data"], streams=True),
)  # fmt: skip


class PairTransform:
    """Transform an item into ``image`` (c, h, w), normalised, ``tokens`` (l,) int64 of a random
    caption, and ``cut``, True if it was truncated. Raises: BadImage without a caption."""

    def __init__(self, image_transform, tokenizer: Tokenizer):
        self.image_transform, self.tokenizer = image_transform, tokenizer

    def __call__(self, item: dict) -> dict:
        if not (captions := captions_of(item.get("caption"))):
            raise BadImage(item["id"], "it has no caption")
        image = self.image_transform(item["image"])
        row, cut = self.tokenizer.row(random.choice(captions))
        return {"image": image, "tokens": torch.tensor(row), "cut": cut}


def build_model(config: Config) -> Encoder:
    fixed = {"use_mask_token": False, "num_classes": 0}
    try:
        return load_encoder(config.encoder, **fixed | config.model_args)
    except TypeError as error:  # an unknown name
        raise ValueError(f"model_args: {error}") from error


def build_data(config: Config) -> ImageData | ImageStream:
    data = open_data(config.data, streams=True)
    if len(data) < 2:
        raise ValueError(f"{data.name} has only one pair; contrastive training needs two or more.")
    return data if data.is_stream else with_captions(data)


def build_val(config: Config) -> ImageData | None:
    """Open ``config.val``; without ``?split=`` its validation split, otherwise its test split."""
    if not config.val:
        return None
    return with_captions(open_split(config.val, ("validation", "test")))


def with_captions(data: ImageData) -> ImageData:
    """Return the data. Raises: ValueError for images without captions."""
    if not data.has_captions:
        raise ValueError(
            f"{data.name} has no captions; name their column with ?caption=COLUMN, or use "
            "pairs:FOLDER with a text file next to each image."
        )
    return data


def read_captions(data: ImageData | ImageStream) -> Iterator[str]:
    """Yield all captions: in shard order for a stream, otherwise in random order."""
    if data.is_stream:
        for shard in range(len(data.shards)):
            for record in data.records(shard):
                yield from captions_of(record.get("caption"))
        return
    for index in torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist():
        with contextlib.suppress(BadImage):
            yield from data.captions(index)


def build_tokenizer(config: Config, data: ImageData | ImageStream, accelerator) -> Tokenizer:
    """Return the tokenizer of a resumed run, or a new one, trained on the main process."""
    from accelerate.utils import broadcast_object_list

    name = config.tokenizer or (config.text if config.text.startswith("hf:") else "bpe")
    if name != "bpe":
        return named_tokenizer(name, config.context_length)
    if config.resume == "auto" and config.output and Run(Path(config.output)).checkpoints():
        return load_tokenizer(config.output)
    models = [""]
    if accelerator.is_main_process:
        models = [
            train_bpe(
                islice(read_captions(data), config.tokenizer_captions),
                vocab_size=config.vocab_size, context_length=config.context_length,
            ).model
        ]  # fmt: skip
    broadcast_object_list(models)
    return BytePairs(models[0], config.context_length)


def build_text(config: Config, tokenizer: Tokenizer) -> TextEncoder | HubText:
    if config.text.startswith("hf:"):
        return load_hub_text(config.text.removeprefix("hf:"), tokenizer.eos_id)
    if config.text != "transformer":
        raise ValueError(f"text is {config.text!r}; expected transformer, or hf:NAME.")
    return TextEncoder(
        tokenizer.vocab_size, eos_id=tokenizer.eos_id, context_length=config.context_length,
        width=config.text_width, depth=config.text_depth, heads=config.text_heads,
        dropout=config.text_dropout,
    )  # fmt: skip


def build_objective(config: Config, encoder: Encoder, tokenizer: Tokenizer) -> Clip:
    return Clip(
        encoder, build_text(config, tokenizer), embed_dim=config.embed_dim, loss=config.loss,
        lock_image=config.lock_image, lock_text=config.lock_text, tokenizer=tokenizer,
    )  # fmt: skip


def build_samples(config: Config, data: ImageData | ImageStream, clip: Clip, tokenizer: Tokenizer):
    transform = PairTransform(training_transform(clip.encoder, config), tokenizer)
    return data.samples(transform, config.seed)


def measure_retrieval(clip: Clip, data: ImageData, device) -> dict[str, float]:
    return recall(embed_pairs(clip, data, device=device))


def run(config: Config) -> dict[str, Any]:
    accelerator = make_accelerator(config)
    if config.batch_size * config.accumulation * accelerator.num_processes < 2:
        raise ValueError(
            "the effective batch is a single pair, without negatives; use a batch_size above 1."
        )
    torch.manual_seed(config.seed)  # for the initial weights
    encoder = build_model(config)
    data, val = build_data(config), build_val(config)
    tokenizer = build_tokenizer(config, data, accelerator)
    objective = build_objective(config, encoder, tokenizer)
    samples = build_samples(config, data, objective, tokenizer)

    def prepare(run: Run) -> None:
        with run.writing("tokenizer.json"):
            tokenizer.save(run.folder)
        run.count_skipped(data.faults)

    def retrieval(_: Training) -> Callable[[], dict[str, float]]:
        assert val is not None  # it is called only then, see below
        return partial(measure_retrieval, objective, val, accelerator.device)

    return train_run(
        "clip_pretrain", config, objective, samples, accelerator, model=objective.encoder,
        data=data.name, what="model", record={"figures": {}}, prepare=prepare,
        save=partial(save_clip, objective),
        evaluate=None if val is None else retrieval,
        depends_on={} if val is None else {"validation data": val.fingerprint},
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(
        Config, PRESETS, argv, default_preset=stored_or(default_preset), description=__doc__
    )
    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
