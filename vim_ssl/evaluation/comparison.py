"""Compare frozen encoders on the same labelled images.

`downstream/linear_probe.py` and `downstream/knn.py` use this for encoders, splits, features,
differences and metrics.json.
"""

import math
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vim_ssl.checkpoints.identity import encoder_hash
from vim_ssl.checkpoints.loading import load_encoder
from vim_ssl.data import labelled_splits
from vim_ssl.data.identity import TrainingRecord
from vim_ssl.evaluation.baselines import pixel_features
from vim_ssl.evaluation.extract import Features
from vim_ssl.evaluation.features import cache_folder, encode_splits
from vim_ssl.evaluation.readout import CHOICES, READOUTS, available_readouts, readouts_of
from vim_ssl.evaluation.seen import exposure, labels_seen, trainings_of
from vim_ssl.metrics.bootstrap import Metric
from vim_ssl.metrics.sentences import Gain, result_sentence
from vim_ssl.metrics.titles import measured_on, split_name
from vim_ssl.training.folders import claim
from vim_ssl.training.run import newest_run, task_folder, trained_on
from vim_ssl.utils.config import opt, to_dict
from vim_ssl.utils.distributed import join_processes, pick_device
from vim_ssl.utils.environment import environment
from vim_ssl.utils.names import plural

UNTRAINED = "same encoder, untrained"


@dataclass
class ComparisonConfig:
    """Options shared by the linear probe and kNN scripts."""

    encoder: str = opt("", "run, checkpoint, preset, Hub id or timm:NAME; default: the newest run")
    model_args: dict[str, Any] = opt(
        {}, "additional arguments of the encoder; its global_pool selects the readout"
    )
    data: str = opt("", "labelled data; default: the run's training data")
    test_data: str = opt("", "test on other data with the same classes: another style, site …")
    test: float = opt(0.2, "fraction held out for testing if the data has no test split")
    against: tuple[str, ...] = opt((), "additional encoders to compare on the same images")
    baselines: bool = opt(True, "also evaluate an untrained encoder and raw pixels")
    validation: float = opt(
        0.2, "fraction of the training set used to select readout, C, metric and k"
    )
    readouts: tuple[str, ...] = opt(
        READOUTS, "parts of the encoder's output to use as features", choices=CHOICES
    )
    batch_size: int = opt(128, "images per batch")
    workers: int = opt(0, "number of data loading processes")
    cache: bool = opt(True, "cache features on disk and reuse them")
    device: str = opt("", "cpu, cuda …; default: cuda if available")
    seed: int = opt(0, "seed of the splits and of the untrained encoder")
    output: str = opt(
        "", "folder for metrics.json; default: a folder in the run, named after the task"
    )


class Comparison:
    """Encoders, splits and features of one comparison. Several processes divide the images; only
    the main process has the features.

    Attributes:
        encoder: the first encoder, inflated to 3D if the data are videos.
        train, test: labelled splits of the data.
        main: True on the main process.
        n: number of readable test images, once `features` has yielded.
    Raises: the errors of `load_encoder` and `labelled_splits`.
    """

    def __init__(self, task: str, config: ComparisonConfig):
        self.began = time.perf_counter()
        self.task, self.config = task, config
        self.processes, self.device = join_processes(), pick_device(config.device)
        self.main, self.n = self.processes.main, 0
        self.source = config.encoder or str(newest_run())
        torch.manual_seed(config.seed)  # for the weights of a preset
        # Before the encoder is loaded: a training may replace it in the meantime.
        self.weights = encoder_hash(self.source) if self.main else ""
        config.readouts = readouts_of(config.model_args.get("global_pool"), config.readouts)
        args: dict[str, Any] = config.model_args | {"num_classes": 0, "device": self.device}
        try:
            self.encoder = load_encoder(self.source, **args)
        except TypeError as error:  # an unknown name
            raise ValueError(f"model_args: {error}") from error
        trainings = trainings_of(self.source)
        self.train, self.test = labelled_splits(
            config.data or trained_on(self.source), config.test, config.seed, config.test_data,
            trainings,
        )  # fmt: skip
        self.encoder = self.encoder.for_data(self.train)
        self.folder = self._claim_folder() if self.main else Path()
        if self.main:
            tested = f" of {self.test.name}" if config.test_data else ""
            print(f"Encoder {self.source} · {self.train.name}: {len(self.train):,} train, "
                  f"{len(self.test):,} test{tested}", flush=True)  # fmt: skip
            self._look_at_trainings(trainings)

    def _claim_folder(self) -> Path:
        """Create the output folder; see `claim`."""
        config = self.config
        named = "-".join(spec for spec in (config.data, config.test_data) if spec)
        folder = Path(config.output or task_folder(self.task, self.source, named))
        settings = to_dict(config) | {"encoder": self.source}
        return claim(
            folder, self.task, settings, named=bool(config.output), weights=self.weights,
            images=self._fingerprints(),
        )  # fmt: skip

    def _fingerprints(self) -> dict[str, str]:
        return {"train": self.train.fingerprint, "test": self.test.fingerprint}

    def features(self) -> Iterator[tuple[str, Features, Features, dict[str, slice]]]:
        """Yield name, features of both splits, and the columns of every readout, for each encoder;
        only on the main process."""
        config = self.config
        encoders = {"pretrained encoder": self.encoder}
        for other in config.against:
            encoder = load_encoder(other, num_classes=0, device=self.device)
            encoders[other] = encoder.for_data(self.train)
        if config.baselines:
            torch.manual_seed(config.seed)
            encoders[UNTRAINED] = type(self.encoder)(**self.encoder.config)
        if self.main and config.cache:
            print(f"Feature cache: {cache_folder()} (--no-cache turns it off)", flush=True)
        for name, encoder in encoders.items():
            splits = encode_splits(
                encoder.to(self.device).eval(), (self.train, self.test), cache=config.cache,
                batch_size=config.batch_size, workers=config.workers, device=self.device,
                processes=self.processes,
            )  # fmt: skip
            if splits is not None:
                self.n = len(splits[1].y)
                yield name, splits[0], splits[1], available_readouts(encoder, config.readouts)
        if self.main and config.baselines:
            name, (train, test) = pixel_features(
                self.encoder, (self.train, self.test), workers=config.workers
            )
            yield name, train, test, {"pixels": slice(None)}

    def remarks(self) -> list[str]:
        """Return what a reader of the results must know, as sentences; often nothing."""
        return self.notes

    def _look_at_trainings(self, trainings: Sequence[TrainingRecord]) -> None:
        """Compare the test images with those of the encoders' trainings, and print remarks."""
        config = self.config
        self.seen = exposure(
            trainings, self.test, self.train, source=self.source,
            spec=config.test_data or config.data,
            split=split_name(self.test, held_out=not config.test_data),
        )  # fmt: skip
        self.notes = self.seen.remarks()
        for other in config.against:
            self.notes += labels_seen(other, self.test)
        for note in self.notes:
            print(note, flush=True)

    def record(self, **results: Any) -> tuple[dict[str, Any], Path]:
        """Return the contents of metrics.json, including ``results``, and its output folder."""
        config = self.config
        metrics: dict[str, Any] = {
            "task": self.task, "data": self.train.name, "test_data": self.test.name,
            "encoder": self.source, "figure": "mAP" if self.train.multi_label else "accuracy",
            "split": split_name(self.test, held_out=not config.test_data), "n": self.n,
            **({"weights": self.weights} if self.weights else {}),
            "fingerprints": self._fingerprints(),
            "protocol": to_dict(config), "train": len(self.train), "test": len(self.test),
            "seen": self.seen.record(), **results,
            "seconds": round(time.perf_counter() - self.began, 1), **environment(),
        }  # fmt: skip
        return metrics, self.folder


def differences(
    metrics: Mapping[str, Mapping[str, Metric]], groups: Sequence[Hashable] | None, seed: int
) -> list[dict[str, Any]]:
    """Return the gains of the first features over each of the others, on the same images.

    Args:
        metrics: name of the features -> key of the metric -> metric.
        groups, seed: see `Metric.estimate`.
    Returns: a row for each of the others, with the `Metric.entries` of the gain in points.
    """
    (first, base), *others = metrics.items()
    rows = []
    for other, theirs in others:
        row: dict[str, Any] = {"features": first, "over": other}
        for key in base:
            row |= (base[key] - theirs[key]).entries(key, groups, seed=seed)
        rows.append(row)
    return rows


def sentence(name: str, key: str, value: float | None, rows: Sequence[Mapping[str, Any]]) -> str:
    """Say how the first features compare with the others, from rows of `differences`."""
    gains = [
        Gain("the untrained encoder" if row["over"] == UNTRAINED else row["over"],
             math.nan if row[key] is None else row[key], row[f"{key}_ci"],
             row.get(f"{key}_ci_none", ""))
        for row in rows
    ]  # fmt: skip
    return result_sentence(name, value, gains)


# The "figure" of metrics.json → its title.
METRIC_TITLES = {"accuracy": "Accuracy", "mAP": "Mean average precision over the classes"}


def caption(metrics: Mapping[str, Any]) -> list[str]:
    """Return the lines below a table: what was measured, on which images, and how the settings were
    selected."""
    where = measured_on(metrics["split"], metrics["n"])
    share = f"{100 * metrics['protocol']['validation']:g} %"
    lines = [
        f"{METRIC_TITLES[metrics['figure']]}, {where}; 95 % interval in brackets.",
        f"Settings selected on {share} of the {metrics['train']:,} training images.",
    ]
    if skipped := metrics["skipped"]:
        named = "; ".join(skipped[:3]) + (" …" if len(skipped) > 3 else "")
        lines += [f"{plural(len(skipped), 'image')} could not be read: {named}"]
    return lines


def settings_table(rows: Sequence[tuple[str, str, str, str]]) -> list[str]:
    """Format rows of features, classifier, metric and its settings; equal features are named
    once."""
    lines, last = [f"{'features':24} {'classifier':13} {'result':22} settings"], ""
    for features, classifier, result, settings in rows:
        name = "" if features == last else features
        lines += [f"{name:24} {classifier:13} {result:22} {settings}"]
        last = features
    return lines


def pivot(rows: list[dict[str, Any]], cells: list[str], width: int) -> list[str]:
    """Return the lines of a table; rows with the same features and readout share a line."""
    lines: dict[str, str] = {}
    for row, cell in zip(rows, cells, strict=True):
        title = f"{row['features']:26} {row['readout']:10}"
        lines[title] = lines.get(title, title) + f"{cell:>{width}}"
    return list(lines.values())
