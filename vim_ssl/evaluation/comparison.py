"""Compare frozen encoders on the same labelled images.

The tasks `downstream/linear_probe.py` and `downstream/knn.py` share the encoders, the splits, the
features and the record.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vim_ssl.checkpoints.loading import load_encoder
from vim_ssl.data import labelled_splits
from vim_ssl.evaluation.extract import Features
from vim_ssl.evaluation.features import encode_splits
from vim_ssl.evaluation.readout import READOUTS, available_readouts
from vim_ssl.training.run import newest_run, task_folder, trained_on
from vim_ssl.utils.config import opt, to_dict
from vim_ssl.utils.distributed import join_processes, pick_device
from vim_ssl.utils.environment import environment


@dataclass
class ComparisonConfig:
    """The options of every task."""

    encoder: str = opt("", "run, checkpoint, preset or Hub id; default: the newest run")
    data: str = opt("", "labelled data; default: what the run was trained on")
    test_data: str = opt("", "other data of the same classes to test on: another style, site …")
    test: float = opt(0.2, "share held out for testing if the data has no test split")
    against: tuple[str, ...] = opt((), "further encoders, on the same images")
    baselines: bool = opt(True, "untrained weights too, and in the probe raw pixels")
    readouts: tuple[str, ...] = opt(
        READOUTS, "parts of the encoder's output to use as features", choices=READOUTS
    )
    batch_size: int = opt(128, "images at once")
    workers: int = opt(0, "data loading processes")
    cache: bool = opt(True, "keep features on disk, and read them from there")
    device: str = opt("", "cpu, cuda …; default: cuda if there is one")
    seed: int = opt(0, "of the splits and of the untrained encoder")
    output: str = opt(
        "", "folder of metrics.json; default: a folder in the run, named after the task"
    )


class Comparison:
    """One run of a task. Several processes share out the images; the main one has the features.

    Attributes:
        encoder: the first of the encoders, inflated where the data are videos.
        train, test: labelled splits of the data.
        main: True on the process that goes on with the features.
    Raises: what `load_encoder` and `labelled_splits` raise.
    """

    def __init__(self, task: str, config: ComparisonConfig):
        self.began = time.perf_counter()
        self.task, self.config = task, config
        self.processes, self.device = join_processes(), pick_device(config.device)
        self.main = self.processes.main
        self.source = config.encoder or str(newest_run())
        torch.manual_seed(config.seed)  # of a preset's weights
        self.encoder = load_encoder(self.source, device=self.device)
        self.train, self.test = labelled_splits(
            config.data or trained_on(self.source), config.test, config.seed, config.test_data
        )
        self.encoder = self.encoder.for_data(self.train)
        if self.main:
            tested = f" of {self.test.name}" if config.test_data else ""
            print(f"Encoder {self.source} · {self.train.name}: {len(self.train):,} train, "
                  f"{len(self.test):,} test{tested}", flush=True)  # fmt: skip

    def features(self) -> Iterator[tuple[str, Features, Features, dict[str, slice]]]:
        """On the main process: name, features of both splits, the columns of every readout."""
        config = self.config
        encoders = {"pretrained encoder": self.encoder}
        for other in config.against:
            encoders[other] = load_encoder(other, device=self.device).for_data(self.train)
        if config.baselines:
            torch.manual_seed(config.seed)
            encoders["same encoder, untrained"] = type(self.encoder)(**self.encoder.config)
        for name, encoder in encoders.items():
            splits = encode_splits(
                encoder.to(self.device).eval(), (self.train, self.test), cache=config.cache,
                batch_size=config.batch_size, workers=config.workers, device=self.device,
                processes=self.processes,
            )  # fmt: skip
            if splits is not None:
                yield name, splits[0], splits[1], available_readouts(encoder, config.readouts)

    def record(self, **results: Any) -> tuple[dict[str, Any], Path]:
        """The content of metrics.json, with these results, and the folder it goes to."""
        config = self.config
        metrics: dict[str, Any] = {
            "task": self.task, "data": self.train.name, "test_data": self.test.name,
            "encoder": self.source, "figure": "mAP" if self.train.multi_label else "accuracy",
            "protocol": to_dict(config), "train": len(self.train), "test": len(self.test),
            **results, "seconds": round(time.perf_counter() - self.began, 1), **environment(),
        }  # fmt: skip
        named = "-".join(spec for spec in (config.data, config.test_data) if spec)
        return metrics, Path(config.output or task_folder(self.task, self.source, named))


# The "figure" of metrics.json in words.
METRIC_TITLES = {"accuracy": "Accuracy", "mAP": "Mean average precision over the classes"}


def pivot(rows: list[dict[str, Any]], cells: list[str], width: int) -> list[str]:
    """Lines of a table: the cells of rows with the same features and readout beside each other."""
    lines: dict[str, str] = {}
    for row, cell in zip(rows, cells, strict=True):
        title = f"{row['features']:26} {row['readout']:10}"
        lines[title] = lines.get(title, title) + f"{cell:>{width}}"
    return list(lines.values())
