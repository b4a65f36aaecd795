"""Fine-tune an encoder for classification, on all labels or on a few of each class.

    python downstream/finetune.py --labels-per-class 10                  # newest run, its data
    python downstream/finetune.py --encoder RUN_OR_FILE --data FOLDER

Every block is trained, the lower ones more gently (layer decay); the head reads class token and
patches together. The test set is used once, at the end.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vim_ssl import create_transform, load_encoder, save_encoder
from vim_ssl.classification import Classification
from vim_ssl.cli import guarded
from vim_ssl.config import opt, parse, to_dict
from vim_ssl.data import labelled_parts
from vim_ssl.data.loader import SeededSamples
from vim_ssl.data.split import few_of_each
from vim_ssl.data.transforms import pretrain_transform
from vim_ssl.probes import extract_features
from vim_ssl.runs import Run, environment, newest_run, stored_or, trained_on
from vim_ssl.scores import accuracy, wilson_interval
from vim_ssl.training import TrainConfig, fit, make_accelerator


@dataclass
class Config(TrainConfig):
    """Fine-tune all of an encoder."""

    encoder: str = opt("", "run, checkpoint, preset or Hub id; default: the newest run", "data")
    data: str = opt("", "labelled data; default: what the run was trained on", "data")
    test: float = opt(0.2, "share held out if the data has no test split", "data")
    labels_per_class: int = opt(0, "train on so many of each class; 0: on all", "data")
    crop_scale: tuple[float, float] = opt((0.6, 1.0), "share of the picture's area", "data")
    hflip: float = opt(0.0, "probability of mirroring", "data")
    global_pool: str = opt("token+avg", "what the head reads", "model")
    from_scratch: bool = opt(False, "forget the weights: the baseline", "model")
    epochs: int = opt(60, "passes over the training part", "optimiser")
    batch_size: int = opt(20, "samples a process and micro-batch", "optimiser")
    base_lr: float = opt(1e-3, "learning rate per lr_reference_batch samples", "optimiser")
    lr_reference_batch: int = opt(64, "samples that base_lr is meant for", "optimiser")
    warmup_epochs: float = opt(5.0, "linear warm-up", "optimiser")
    betas: tuple[float, float] = opt((0.9, 0.999), "of AdamW", "optimiser")
    layer_decay: float | None = opt(0.8, "lr factor from a block to the one below", "optimiser")
    workers: int = opt(0, "data loading processes a rank", "run")
    eval_every: float = opt(1e9, "epochs between evaluations", "run")


class ClassificationTransform:
    """An item to ``image`` (c, h, w) and ``label``."""

    def __init__(self, image_transform):
        self.image_transform = image_transform

    def __call__(self, item: dict) -> dict:
        return {"image": self.image_transform(item["image"]), "label": item["label"]}


def run(config: Config) -> dict:
    accelerator = make_accelerator(config)
    source = config.encoder or str(newest_run())
    train, test = labelled_parts(config.data or trained_on(source), config.test, config.seed)
    if config.labels_per_class:
        train = train.subset(few_of_each(train.labels or [], config.labels_per_class, config.seed))
    torch.manual_seed(config.seed)
    encoder = load_encoder(
        source, num_classes=max(train.labels or []) + 1, global_pool=config.global_pool
    )
    if config.from_scratch:
        encoder = type(encoder)(**encoder.config)
    folder = Run.open("finetune", config, accelerator)
    transform = pretrain_transform(encoder, crop_scale=config.crop_scale, hflip=config.hflip)
    samples = SeededSamples(train, ClassificationTransform(transform), config.seed)
    fit(Classification(encoder).train(), samples, config, folder, accelerator)

    metrics: dict[str, Any] = {"task": "finetune", "data": train.name, "encoder": source,
                               "train": len(train)}  # fmt: skip
    if accelerator.is_main_process:
        encoder.eval()
        found = extract_features(
            encoder, test, create_transform(encoder), device=accelerator.device
        )
        top1 = round(accuracy(found.x.argmax(1), found.y), 2)
        metrics |= {"test": len(found.y), "top1": top1, "skipped": found.skipped,
                    "top1_ci": wilson_interval(top1, len(found.y)),
                    "protocol": to_dict(config), **environment()}  # fmt: skip
        path = Path(folder.folder) / "metrics.json"
        with folder.writing("the encoder"):
            save_encoder(encoder, folder.folder, record={"recipe": "finetune", "data": train.name})
            path.write_text(json.dumps(metrics, indent=2) + "\n")
        low, high = metrics["top1_ci"]
        print(f"top-1 {top1:.1f} % [{low:.1f}, {high:.1f}] on {len(found.y):,} test pictures, "
              f"trained on {len(train):,} · {path}")  # fmt: skip
    folder.close()
    accelerator.end_training()
    return metrics


def main(argv: Sequence[str] | None = None) -> int:
    run(parse(Config, argv=argv, default_preset=stored_or(None), description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
