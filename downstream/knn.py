"""Nearest neighbours on frozen features, by the protocol that papers report.

    python downstream/knn.py                                     # newest run, its data
    python downstream/knn.py --encoder RUN_OR_FILE --data FOLDER_WITH_CLASSES
    accelerate launch downstream/knn.py --data FOLDER            # pictures shared out

The labels of the k training pictures most similar by cosine vote, each with exp(similarity / 0.07)
votes (DINO, arXiv:2104.14294). Nothing is chosen: every k and every readout is shown. Features are
compared as they are; ``--standardise`` first takes the training set's mean and deviation out of
each, which is not the papers' protocol but helps encoders trained to predict pixels.

Accuracy, or where a picture has several labels the mean average precision of the votes.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vim_ssl import load_encoder
from vim_ssl.cli import guarded
from vim_ssl.config import opt, parse, to_dict
from vim_ssl.data import labelled_parts
from vim_ssl.features import encode_parts, readouts_of
from vim_ssl.probes import READOUTS, Features, knn_votes, nearest
from vim_ssl.processes import join_processes, pick_device
from vim_ssl.runs import environment, newest_run, task_folder, trained_on
from vim_ssl.scores import judge
from vim_ssl.video import reading


@dataclass
class Config:
    """Weighted nearest neighbours on frozen features."""

    encoder: str = opt("", "run, checkpoint, preset or Hub id; default: the newest run")
    data: str = opt("", "labelled data; default: what the run was trained on")
    against: tuple[str, ...] = opt((), "further encoders, on the same pictures")
    readouts: tuple[str, ...] = opt(READOUTS, "which features; all are shown", choices=READOUTS)
    k: tuple[int, ...] = opt((10, 20, 100, 200), "numbers of neighbours that vote")
    temperature: float = opt(0.07, "of the weights; lower: the nearest count for more")
    standardise: bool = opt(False, "give every feature mean 0 and deviation 1 first")
    baseline: bool = opt(True, "the untrained encoder too")
    test: float = opt(0.2, "share held out for testing if the data has no test split")
    batch_size: int = opt(128, "pictures at once")
    workers: int = opt(0, "data loading processes")
    cache: bool = opt(True, "keep features on disk, and take them from there")
    device: str = opt("", "cpu, cuda …; default: cuda if there is one")
    seed: int = opt(0, "of the split and of the untrained encoder")
    output: str = opt("", "where metrics.json goes; default: knn/ in the run")

    def __post_init__(self):
        if min(self.k, default=0) < 1:
            raise ValueError(f"k is {self.k}; expected one or more numbers, each 1 or more.")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature:g}; it must be above 0.")


def vote(
    name: str, bank: Features, queries: Features, readouts: dict[str, slice], config: Config,
    device: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for every readout and k: ``knn`` in per cent with its interval ``knn_ci``.

    Args:
        readouts: name -> columns of the features.
    """
    rows = []
    for readout, columns in readouts.items():
        similarity, places = nearest(
            bank.x[:, columns], queries.x[:, columns], k=max(config.k),
            standardise=config.standardise, device=device,
        )  # fmt: skip
        for k in config.k:
            votes = knn_votes(
                bank.y, similarity[:, :k], places[:, :k], temperature=config.temperature
            )
            row: dict[str, Any] = {"features": name, "readout": readout, "k": k}
            answer = votes.argmax(1) if bank.y.ndim == 1 else votes
            for kind, figure in judge(answer, queries.y).items():
                key = "knn" if kind == "main" else f"knn_{kind}"
                row[key] = round(figure.value, 2)
                row[f"{key}_ci"] = figure.interval(queries.groups, seed=config.seed)
            rows.append(row)
    return rows


def run(config: Config) -> dict:
    started = time.perf_counter()
    processes = join_processes()
    device = pick_device(config.device)
    source = config.encoder or str(newest_run())
    torch.manual_seed(config.seed)  # of a preset's weights
    encoder = load_encoder(source, device=device)
    train, test = labelled_parts(config.data or trained_on(source), config.test, config.seed)
    encoder = reading(encoder, train)
    if processes.main:
        print(f"Encoder {source} · {train.name}: {len(train):,} to be neighbours of {len(test):,}",
              flush=True)  # fmt: skip
    encoders = {"pretrained encoder": encoder}
    for other in config.against:
        encoders[other] = reading(load_encoder(other, device=device), train)
    if config.baseline:
        torch.manual_seed(config.seed)
        encoders["same encoder, untrained"] = type(encoder)(**encoder.config)
    rows, skipped = [], []
    for name, each in encoders.items():
        parts = encode_parts(
            each.to(device).eval(), (train, test), batch_size=config.batch_size,
            workers=config.workers, device=device, cache=config.cache, processes=processes,
        )  # fmt: skip
        if parts is not None:
            bank, queries = parts
            rows += vote(name, bank, queries, readouts_of(each, config.readouts), config, device)
            skipped = [name for part in parts for name in part.skipped]
    if not processes.main:
        return {}

    metrics = {
        "task": "knn", "data": train.name, "encoder": source,
        "figure": "mAP" if train.multi_label else "accuracy", "protocol": to_dict(config),
        "train": len(train), "test": len(test), "rows": rows, "skipped": skipped,
        "seconds": round(time.perf_counter() - started, 1), **environment(),
    }  # fmt: skip
    folder = Path(config.output or task_folder("knn", source, config.data))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    _print_table(metrics)
    print(f"Written: {folder / 'metrics.json'}")
    return metrics


def _print_table(metrics: dict) -> None:
    numbers = metrics["protocol"]["k"]
    print(f"\n{'features':26} {'readout':10}" + "".join(f"{f'k = {k}':>20}" for k in numbers))
    lines: dict[tuple[str, str], str] = {}
    for row in metrics["rows"]:
        place, (low, high) = (row["features"], row["readout"]), row["knn_ci"]
        cell = f"{row['knn']:.1f} [{low:.1f}, {high:.1f}]"
        lines[place] = lines.get(place, "") + f"{cell:>20}"
    for (features, readout), cells in lines.items():
        print(f"{features:26} {readout:10}{cells}")
    what = {"accuracy": "Accuracy", "mAP": "Mean average precision over the classes"}
    print(f"{what[metrics['figure']]} on the test part in per cent, 95 % interval in brackets.")
    if metrics["skipped"]:
        print(f"{len(metrics['skipped'])} pictures could not be read: {metrics['skipped'][:3]} …")


def main(argv: Sequence[str] | None = None) -> int:
    run(parse(Config, argv=argv, description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
