"""Linear probe: how well do frozen features tell the classes apart?

    python downstream/linear_probe.py                                    # newest run, its data
    python downstream/linear_probe.py --encoder RUN_OR_FILE --data hf:timm/eurosat-rgb

Logistic regression on standardised features (scikit-learn), weighted nearest neighbours beside it,
against the same encoder untrained and against raw pixels. The readout (class token; mean of the
patches; both; both and the means at a quarter, half and three quarters of the depth) and C are
chosen on a part of the training set; the test set is used once. Of data without a test split a
part is held out here; a run pretrained on the same data has seen its pictures, not its labels.
"""

import json
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vim_ssl import VimEncoder, create_transform, load_encoder
from vim_ssl.cli import guarded
from vim_ssl.config import opt, parse, to_dict
from vim_ssl.data import labelled_parts, stratified_split
from vim_ssl.probes import (
    READOUTS,
    Features,
    accuracy,
    choose_readout,
    extract_features,
    fit_logistic,
    knn_predict,
    read_all,
    readout_columns,
    wilson_interval,
)
from vim_ssl.report import write_report
from vim_ssl.runs import environment, newest_run, trained_on

MAX_PIXELS = 64 * 64 * 3  # values a picture above which regression on raw pixels is hopeless


@dataclass
class Config:
    """Linear probe and nearest neighbours on frozen features."""

    encoder: str = opt("", "run, checkpoint, preset or Hub id; default: the newest run")
    data: str = opt("", "labelled data; default: what the run was trained on")
    readouts: tuple[str, ...] = opt(READOUTS, "candidates; validation chooses", choices=READOUTS)
    baselines: bool = opt(True, "probe the untrained encoder and raw pixels too")
    validation: float = opt(0.2, "share of the training set on which C and readout are chosen")
    test: float = opt(0.2, "share held out for testing if the data has no test split")
    knn_k: int = opt(20, "neighbours that vote")
    batch_size: int = opt(128, "pictures at once")
    workers: int = opt(0, "data loading processes")
    device: str = opt("", "cpu, cuda …; default: cuda if there is one")
    seed: int = opt(0, "of the splits and of the untrained encoder")
    output: str = opt("", "where metrics.json goes; default: linear_probe/ in the run")


def probe(name: str, train: Features, test: Features, readouts: dict, config: Config) -> dict:
    """Choose on a part of ``train``, fit on all of it, test once: readout and C of the regression,
    readout and standardisation of the nearest neighbours.

    Args:
        readouts: name -> columns of the features.
    """
    fit_part, val_part = stratified_split(
        train.y.tolist(), config.validation, config.seed, train.groups
    )
    x, x_val, y, y_val = train.x[fit_part], train.x[val_part], train.y[fit_part], train.y[val_part]
    readout, C, validation = choose_readout(x, y, x_val, y_val, readouts)
    tried = []
    for name_knn, columns in readouts.items():
        for standardise in (True, False):
            voted = knn_predict(
                x[:, columns], y, x_val[:, columns], k=config.knn_k, standardise=standardise
            )
            tried.append((accuracy(voted, y_val), name_knn, standardise))
    # max takes the first of equals
    _, knn_readout, standardise = max(tried, key=lambda result: result[0])
    x, x_test = (part.x[:, readouts[readout]] for part in (train, test))
    logistic = fit_logistic(x, train.y, C).predict(x_test)
    knn = knn_predict(
        train.x[:, readouts[knn_readout]], train.y, test.x[:, readouts[knn_readout]],
        k=config.knn_k, standardise=standardise,
    )  # fmt: skip
    row: dict[str, Any] = {"features": name, "readout": readout, "dim": x.shape[1], "C": C}
    row |= {"knn_readout": knn_readout, "knn_standardised": standardise}
    row["validation"] = round(100 * validation, 2)
    for key, predicted in (("logistic", logistic), ("knn", knn)):
        row[key] = round(accuracy(predicted, test.y), 2)
        row[f"{key}_ci"] = wilson_interval(row[key], len(test.y))
    return row


def probe_encoder(name: str, encoder: VimEncoder, train, test, config: Config, device: str):
    """Extract every readout once, then `probe`."""
    encoder = encoder.to(device).eval()
    transform = create_transform(encoder)

    parts = [
        extract_features(lambda x: read_all(encoder, x), part, transform,
                         batch_size=config.batch_size, workers=config.workers, device=device)
        for part in (train, test)
    ]  # fmt: skip
    names = config.readouts
    if names == READOUTS and not encoder.cls_names:  # nobody asked for a class token
        names = tuple(r for r in names if not r.startswith("token"))
    readouts = {r: readout_columns(encoder, r) for r in names}
    return probe(name, parts[0], parts[1], readouts, config), parts[0].skipped + parts[1].skipped


def run(config: Config) -> dict:
    started = time.perf_counter()
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = config.encoder or newest_run()
    encoder = load_encoder(source, device=device)
    train, test = labelled_parts(config.data or trained_on(source), config.test, config.seed)
    print(f"Encoder {source} · {train.name}: {len(train):,} train, {len(test):,} test", flush=True)

    row, skipped = probe_encoder("pretrained encoder", encoder, train, test, config, device)
    rows = [row]
    if config.baselines:
        torch.manual_seed(config.seed)
        fresh = VimEncoder(**encoder.config)
        row, _ = probe_encoder("same encoder, untrained", fresh, train, test, config, device)
        rows.append(row)
        if math.prod(encoder.data_config["input_size"]) <= MAX_PIXELS:
            transform = create_transform(encoder)
            pixels = [
                extract_features(torch.nn.Identity(), part, transform, workers=config.workers)
                for part in (train, test)
            ]
            rows.append(probe("raw pixels", pixels[0], pixels[1], {"pixels": slice(None)}, config))
        else:
            print(f"Raw pixels are left out: more than {MAX_PIXELS:,} values a picture.")

    metrics = {
        "task": "linear_probe", "data": train.name, "encoder": str(source),
        "protocol": to_dict(config), "train": len(train), "test": len(test), "rows": rows,
        "skipped": skipped, "seconds": round(time.perf_counter() - started, 1), **environment(),
    }  # fmt: skip
    folder = Path(config.output) if config.output else _default_output(source, config.data)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    _print_table(metrics)
    print(f"Written: {folder / 'metrics.json'}")
    if (folder.parent / "metrics.jsonl").exists():
        print(f"Report: {write_report(folder.parent)}")
    return metrics


def _default_output(source: Path | str, data: str) -> Path:
    """In the run; a probe on other data than the run's own stands beside it by name."""
    slug = "-" + re.sub(r"\W+", "-", data).strip("-") if data else ""
    folder = Path(source)
    if folder.is_file():
        folder = folder.parent
    if folder.is_dir():
        return folder / f"linear_probe{slug}"
    return Path("runs") / f"linear_probe-{folder.name}{slug}"  # a preset, a Hub id


def _print_table(metrics: dict) -> None:
    print(f"\n{'features':26} {'readout':10} {'logistic regression':24} {'kNN':22}")
    for row in metrics["rows"]:
        cells = [f"{row[k]:5.1f} % [{row[f'{k}_ci'][0]:.1f}, {row[f'{k}_ci'][1]:.1f}]"
                 for k in ("logistic", "knn")]  # fmt: skip
        print(f"{row['features']:26} {row['readout']:10} {cells[0]:24} {cells[1]:22}")
    print("Accuracy on the test part, 95 % interval in brackets.")
    if metrics["skipped"]:
        print(f"{len(metrics['skipped'])} pictures could not be read: {metrics['skipped'][:3]} …")


def main(argv: Sequence[str] | None = None) -> int:
    run(parse(Config, argv=argv, description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
