"""Train an encoder to detect objects and their masks: Cascade Mask R-CNN or Mask R-CNN.

    python downstream/detection.py --data coco:FOLDER                # newest run; works on a CPU
    python downstream/detection.py --encoder RUN_OR_FILE --data coco:FOLDER --head rcnn --no-masks
    accelerate launch downstream/detection.py --preset coco_cascade_tiny \\
        --encoder vim_t_midclstok_76p1acc.pth --data coco:COCO2017
    python downstream/detection.py --eval-only --encoder RUN --data coco:FOLDER

Requires pycocotools: pip install 'vim-ssl[detection]'. The test split is used once, at the end,
unless --eval-every sets more evaluations. The run contains metrics.json (COCO's average precision
of boxes and masks), results.json (readable by pycocotools), classes.csv and predictions.png.

The paper's COCO result, 45.7 box AP and 39.2 mask AP for Vim-Ti, took 4 GPUs; hours and results of
the presets here are not yet measured.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import torch

from vim_ssl.cli import guarded
from vim_ssl.data import ImageData, boxed_splits
from vim_ssl.data.sources.coco import mask_tools
from vim_ssl.data.train_test import boxed_split
from vim_ssl.data.transforms.dense import LargeScaleJitter
from vim_ssl.evaluation.seen import earlier_trainings
from vim_ssl.tasks.dense import DenseConfig, DenseTask, fresh_encoder
from vim_ssl.tasks.detection import HEADS, Detection, compare, evaluate, load_detection
from vim_ssl.training.accelerator import make_accelerator
from vim_ssl.training.run import newest_run, stored_or, trained_on
from vim_ssl.utils.config import check_between, opt, parse

# The 117,266 images of train2017 that contain an object, in batches of 64.
COCO_STEPS_AN_EPOCH = 1832
COCO_STEPS = 184_375


@dataclass
class Config(DenseConfig):
    """Train an encoder to detect objects."""

    data: str = opt("", "coco:ROOT", "data")
    size: int = opt(128, "side of the square canvas for images, in pixels", "data")
    scale: tuple[float, float] = opt((0.5, 1.5), "range of random resizing", "data")
    empty: bool = opt(False, "also train on images without an object", "data")
    head: str = opt(
        "cascade", "cascade: three box heads; rcnn: one box head", "model", choices=HEADS
    )
    masks: bool = opt(True, "also predict masks, if the data have outlines", "model")
    channels: int = opt(64, "width of the pyramid and the heads", "model")
    convs: int = opt(0, "number of 3x3 convolutions in each box head and the mask head", "model")
    hidden: int = opt(128, "width of a box head's last layer", "model")
    anchor: int = opt(16, "side of the smallest anchors in pixels; doubled per level", "model")
    samples: int = opt(64, "number of proposals per image that train the heads", "model")
    score: float = opt(0.05, "minimum score of a detection", "model")
    most: int = opt(100, "maximum number of detections per image", "model")
    batch_size: int = opt(4, "samples per process and micro-batch", "optimiser")
    lr_reference_batch: int = opt(
        4, "effective batch size for which base_lr is specified", "optimiser"
    )
    warmup_epochs: float = opt(1.0, "epochs of linear warm-up", "optimiser")

    def __post_init__(self):
        super().__post_init__()
        check_between(self, 0, 1, "score")
        check_between(self, 0, math.inf, "convs")
        check_between(self, 1, math.inf, "channels", "hidden", "anchor", "samples", "most")


def _coco(**settings: Any) -> Config:
    """Settings shared by the paper's runs: ViTDet's schedule of 100 epochs in batches of 64, on 4
    GPUs, without a moving average."""
    return Config(
        size=1024, scale=(0.1, 2.0), channels=256, convs=4, hidden=1024, anchor=32, samples=512,
        epochs=COCO_STEPS / COCO_STEPS_AN_EPOCH, warmup_epochs=250 / COCO_STEPS_AN_EPOCH,
        base_lr=1e-4, lr_reference_batch=64, warmup_lr=1e-7, batch_size=16, schedule="steps",
        weight_decay=0.1, layer_decay=0.837, drop_path=0.1, clip_grad=None, precision="bf16",
        workers=8, **settings,
    )  # fmt: skip


def coco_cascade_tiny() -> Config:
    """COCO with Vim-Ti as in the paper, 4 GPUs x 16; see coco_cascade_small for differences."""
    return _coco()


def coco_cascade_small() -> Config:
    """COCO with Vim-S, 4 GPUs x 16.

    Differences from upstream: the class token stays in the sequence; the map is the normalised
    residual stream; positions are a table without rotation, as in the released weights (upstream's
    detector expects weights with rotation, which were never released); bf16 replaces fp16; the
    proposals' boxes have a smooth L1 loss.
    """
    return _coco()


PRESETS = {f.__name__: f for f in (coco_cascade_tiny, coco_cascade_small)}


def build_model(
    config: Config, source: str, classes: Sequence[str], outlines: bool = True
) -> Detection:
    """Build a new detector on the encoder ``source``; masks require data with ``outlines``."""
    encoder = fresh_encoder(config, source, config.size, {})
    names = ("head", "size", "channels", "convs", "hidden", "anchor", "samples", "score", "most")
    return Detection(
        encoder, classes, masks=config.masks and outlines,
        **{name: getattr(config, name) for name in names},
    )  # fmt: skip


def run(config: Config) -> dict[str, Any]:
    accelerator = make_accelerator(config)
    mask_tools()  # fail now if pycocotools is missing, not at the end of a long run
    source = config.encoder = config.encoder or str(newest_run())
    config.data = config.data or trained_on(source)
    if config.eval_only:
        return TASK.evaluate_only(config, source, config.data, accelerator.device)
    trainings = earlier_trainings(config, source)
    train, test = boxed_splits(config.data, config.test, config.seed, trainings)
    check_objects(test)
    if not config.empty:
        filled = [i for i in range(len(train)) if train.box_count(i)]
        if empty := len(train) - len(filled):
            print(f"{empty:,} of {len(train):,} training images have no box and are left out; "
                  "--empty trains on them too.", flush=True)  # fmt: skip
        train = train.subset(filled)
    if not len(train):
        raise ValueError(f"no image of {train.name} contains an object; there is nothing to learn.")
    torch.manual_seed(config.seed)
    model = build_model(config, source, train.classes or [], train.has_outlines)
    transform = LargeScaleJitter(
        model.encoder.data_config, config.size, scale=config.scale, hflip=config.hflip
    )
    return TASK.train(config, model, source, transform, train, test, accelerator)


def open_test(spec: str) -> ImageData:
    """`boxed_split`; raises ValueError if no image contains an object."""
    return check_objects(boxed_split(spec))


def check_objects(test: ImageData) -> ImageData:
    """Raise ValueError if no test image contains an object."""
    if not any(test.box_count(i) for i in range(len(test))):
        raise ValueError(
            f"none of the {len(test):,} test images of {test.name} contains an object; there is "
            "nothing to evaluate. Annotate some, or hold out others (--test, --seed)."
        )
    return test


def summary(metrics: dict[str, Any]) -> str:
    """Format the average precision of boxes and, if present, masks."""
    return "; ".join(
        f"{kind} AP {metrics[f'{kind}_ap']:.1f}, AP50 {metrics[f'{kind}_ap50']:.1f}, "
        f"AP75 {metrics[f'{kind}_ap75']:.1f}"
        for kind in ("box", "mask") if f"{kind}_ap" in metrics
    )  # fmt: skip


TASK = DenseTask(
    "detection", load_detection, boxed_splits, open_test, evaluate,
    ("box_ap", "mask_ap"), summary, compare,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    run(parse(Config, PRESETS, argv, default_preset=stored_or(None), description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
