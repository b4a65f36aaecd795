"""One page that compares several runs: results with paired differences, curves, settings.

    vim-ssl compare RUN RUN …                  # writes comparison.html
    vim-ssl compare RUN RUN … --output FILE

The first run is the reference. The difference to it is paired: it is computed on the same test
images, from the predictions.csv of both runs.
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vim_ssl.metrics.bootstrap import Metric
from vim_ssl.metrics.classification import accuracy
from vim_ssl.report.page import curve_names, plots, templates
from vim_ssl.report.record import Evaluation, Record, is_check, is_number
from vim_ssl.report.results import EARLIER, Score, main_results, probe_metric, probe_rows, score
from vim_ssl.report.settings import duration, is_finished
from vim_ssl.utils.files import atomic_write

NOT_COMPARED = ("output", "resume")  # settings that always differ
PLANNED = ("effective_batch", "peak_lr", "epoch_steps", "processes")  # of a run's plan
ABSENT = "–"
OTHERS = "evaluated on other test images"
ROUNDING = 0.02  # of the difference of two metrics of metrics.json, in points


@dataclass
class Result:
    """One metric of all runs.

    Attributes:
        rows: per run: name, value, difference to the first run, and a remark.
    """

    title: str
    data: str
    rows: list[tuple[str, Score, Score, str]] = field(default_factory=list)


@dataclass
class _Measured:
    """A metric of one run: its dict and key, and the evaluation that it is from."""

    metrics: dict[str, Any]
    key: str
    unit: str
    evaluation: Evaluation


def compare_runs(folders: Sequence[str | Path]) -> str:
    """Render the HTML page that compares runs, finished or not.

    Raises: ValueError for fewer than two runs, or one given twice; FileNotFoundError for a folder
        that is not a run directory.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if len(paths) < 2 or len(set(paths)) < len(paths):
        raise ValueError(
            f"got the runs {', '.join(map(str, folders)) or '(none)'}; give two or more different "
            "run directories."
        )
    runs = [Record(Path(folder)) for folder in folders]
    _name(runs)
    names = curve_names(runs)
    return templates.get_template("compare.html").render(
        title=" · ".join(run.name for run in runs),
        runs=[_row(run) for run in runs],
        drawn_at=time.strftime("%Y-%m-%d %H:%M"),
        results=list(_results(runs)),
        settings=_settings(runs),
        checks=list(plots(runs, [name for name in names if is_check(name)])),
        curves=list(plots(runs, [name for name in names if not is_check(name)])),
    )


def _name(runs: list[Record]) -> None:
    """Name the runs by the parts of their paths that differ."""
    parts = [run.folder.resolve().parts for run in runs]
    if len({path[-1] for path in parts}) < len(runs):
        common = len(os.path.commonpath([run.folder.resolve() for run in runs]).split(os.sep))
        common -= os.path.commonpath([run.folder.resolve() for run in runs]) == os.sep
        for run, path in zip(runs, parts, strict=True):
            run.name = "/".join(path[common:]) or path[-1]


def _row(run: Record) -> dict[str, Any]:
    """State and effort of a run, as text."""
    seconds, step, samples = map(run.last, ("seconds", "step", "samples"))
    return {
        "name": run.name,
        "encoder": str(run.config.get("encoder") or ABSENT),
        "parameters": f"{run.parameters / 1e6:.1f} M" if run.parameters else ABSENT,
        "steps": f"{step:,.0f}" if step >= 0 else ABSENT,
        "images": f"{samples:,.0f}" if samples >= 0 else ABSENT,
        "time": duration(seconds) if seconds > 0 else ABSENT,
        "state": str(run.state) if run.state else "finished" if is_finished(run) else "unfinished",
        "missing": run.missing(),
    }


# ---------------------------------------------------------------- results


def _results(runs: list[Record]) -> Iterator[Result]:
    """Yield every metric that at least one run has, on the same test images."""
    measured = [_measured(run) for run in runs]
    for title, data in dict.fromkeys(key for one in measured for key in one):
        several = _by_images([one.get((title, data), []) for one in measured])
        for number, metrics in enumerate(several, 1):
            part = f" · test images {number} of {len(several)}" if len(several) > 1 else ""
            result = Result(title, data + part)
            for i, run in enumerate(runs):
                if metric := metrics.get(i):
                    result.rows.append((run.name, *_row_of(metric, metrics.get(0), several)))
                else:
                    absent = "not evaluated" if not any(i in one for one in several) else OTHERS
                    result.rows.append((run.name, Score(), Score(""), absent))
            yield result


def _row_of(
    metric: _Measured, first: _Measured | None, several: list[dict[int, _Measured]]
) -> tuple[Score, Score, str]:
    """Return the value of a metric, its difference to the ``first`` run, and a remark."""
    difference, remark = Score(""), "reference"
    if first is None:
        evaluated = any(0 in one for one in several)
        remark = f"the first run was {OTHERS if evaluated else 'not evaluated'}"
    elif metric is not first:
        difference, remark = _difference(first, metric)
    if metric.evaluation.stale:
        remark += f"; {EARLIER[0].lower()}{EARLIER[1:]}"
    return score(metric.metrics, metric.key, metric.unit), difference, remark


def _by_images(measured: Sequence[Sequence[_Measured]]) -> list[dict[int, _Measured]]:
    """Group the metrics of all runs by their test images: number of the run → metric. Of several
    metrics of one run on the same images, the last counts."""
    several: list[dict[int, _Measured]] = []
    for number, metrics in enumerate(measured):
        for metric in metrics:
            for known in several:
                if _same_images(next(iter(known.values())).evaluation, metric.evaluation):
                    known[number] = metric
                    break
            else:
                several.append({number: metric})
    return several


def _same_images(one: Evaluation, other: Evaluation) -> bool:
    """False if two evaluations recorded other test images: by their fingerprint, their ids or, in
    earlier versions, their number alone."""
    for recorded in (_fingerprint, _ids, _count):
        known, now = recorded(one), recorded(other)
        if known and now and known != now:
            return False
    return True


def _fingerprint(evaluation: Evaluation) -> str:
    known = evaluation.metrics.get("fingerprints")
    return str(known.get("test") or "") if isinstance(known, dict) else ""


def _ids(evaluation: Evaluation) -> list[str]:
    return sorted(row["id"] for row in evaluation.predictions if "id" in row)


def _count(evaluation: Evaluation) -> float:
    count = evaluation.metrics.get("n", evaluation.metrics.get("test"))
    return count if is_number(count) else 0


def _measured(run: Record) -> dict[tuple[str, str], list[_Measured]]:
    """(title, data) → metrics: the main one of a task, of each probe and of zero-shot."""
    measured: dict[tuple[str, str], list[_Measured]] = {}

    def add(title: str, values: dict, key: str, unit: str, evaluation: Evaluation) -> None:
        data = str(evaluation.metrics.get("data", ""))
        metric = _Measured(values, key, unit, evaluation)
        measured.setdefault((title, data), []).append(metric)

    for title, metrics, key, unit in main_results(run.result.metrics):
        add(title, metrics, key, unit, run.result)
    for probe in run.probes:
        for row in probe_rows(probe)[:1]:
            metric = probe_metric(probe.metrics).lower()
            for key, title in (("logistic", "Linear probe"), ("knn", "kNN")):
                if is_number(row.get(key)):
                    add(f"{title}, {metric}", row, key, " %", probe)
    for search in run.zero_shot:
        for part in ("classification", "retrieval"):
            values = search.metrics.get(part)
            for key, title in (("top1", "Zero-shot top-1 accuracy"),
                               ("image_to_text_r1", "Captions of an image, R@1")):  # fmt: skip
                if isinstance(values, dict) and is_number(values.get(key)):
                    add(title, values, key, " %", search)
    return measured


def _difference(first: _Measured, other: _Measured) -> tuple[Score, str]:
    """Return the difference to the first run in the metric of both, in points or its unit, with the
    interval if it can be paired, and a remark on the images."""
    points = other.metrics[other.key] - first.metrics[first.key]
    plain = Score(_signed(points, other.unit))
    # predictions.csv has labels, nothing else: it gives the accuracy of single labels only.
    if other.key not in ("top1", "logistic") or other.evaluation.metrics.get("figure") == "mAP":
        return plain, "no interval: not paired"
    pairs = _paired(first.evaluation.predictions, other.evaluation.predictions)
    if pairs is None:
        return plain, "no interval: the predictions are absent, or for other test images"
    ours, theirs, groups = pairs
    gain: Metric = ours - theirs
    if abs(gain.value - points) > ROUNDING:  # of another classifier, or of an earlier result
        return plain, "no interval: predictions.csv does not give these values"
    bounds, reason = gain.estimate(groups)
    if bounds is None:
        return plain, f"no interval: {reason}"
    low, high = bounds
    verdict = "no measurable difference" if low <= 0 <= high else "the interval excludes 0"
    return Score(plain.text, f"{_signed(low)} to {_signed(high)}"), (
        f"paired on {gain.n:,} images: {verdict}"
    )


def _signed(points: float, unit: str = " %") -> str:
    return f"{points:+{'.1f' if unit else '.3f'}}".replace("-", "−")  # no unit: from 0 to 1


def _paired(first: list[dict], other: list[dict]) -> tuple[Metric, Metric, list[str] | None] | None:
    """Return the accuracy of the other run and of the first on the same images, and their groups;
    None unless both have one predicted label for each of the same images."""
    tables = []
    for rows in (first, other):
        if not rows or not {"id", "label", "predicted"} <= rows[0].keys():
            return None
        tables.append({row["id"]: row for row in rows})
    reference, table = tables
    if reference.keys() != table.keys() or len(reference) != len(first):
        return None
    if any(reference[id]["label"] != row["label"] for id, row in table.items()):
        return None
    truth = [row["label"] for row in table.values()]
    ours, theirs = (
        accuracy(np.array([one[id]["predicted"] for id in table]), np.array(truth))
        for one in (table, reference)
    )
    groups = [row.get("group", "") for row in table.values()]
    return ours, theirs, groups if any(groups) else None


# ---------------------------------------------------------------- settings


def _settings(runs: list[Record]) -> list[tuple[str, list[str]]]:
    """The settings that differ, with the value of each run."""
    configs = [
        {k: v for k, v in run.config.items() if k not in NOT_COMPARED}
        | {name.replace("_", " "): run.plan[name] for name in PLANNED if name in run.plan}
        for run in runs
    ]
    rows = []
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [_text(config.get(key)) if key in config else ABSENT for config in configs]
        if len(set(values)) > 1:
            rows.append((key, values))
    return rows


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(part)}" for key, part in value.items()) or "none"
    return "none" if value in ("", None) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vim-ssl compare RUN RUN …``."""
    parser = argparse.ArgumentParser(
        description="Compare runs on one page: results with paired differences to the first run, "
        "curves, and the settings that differ."
    )
    parser.add_argument("run", nargs="+", help="run directories, two or more")
    parser.add_argument("--output", default="comparison.html", help="the page to write")
    args = parser.parse_args(argv)
    page = compare_runs(args.run)
    path = Path(args.output)
    replaced = " (replaces an earlier one)" if path.exists() else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, page.encode(errors="replace"))
    print(f"Comparison: {path}{replaced}")
    return 0
