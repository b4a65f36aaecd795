"""The results on a page: tasks, probes, zero-shot, and what explains them.

Every function returns plain text and numbers, which the templates escape.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vim_ssl.metrics.titles import RESULTS, measured_on
from vim_ssl.report.images import SMALL, WHOLE, data_url, read_image
from vim_ssl.report.record import Evaluation, Record, is_number
from vim_ssl.report.titles import FRACTIONS, ZERO_SHOT

MAX_CLASSES = 40  # of the table of classes
MATRIX = 20  # largest confusion matrix; with more classes, the most frequent confusions are listed
PAIRS = 12
THUMB = 104  # width of an example on the page in pixels


@dataclass
class Score:
    """A metric as text, and its 95 % interval, "" without one."""

    text: str = "–"
    interval: str = ""


@dataclass
class Confusion:
    """Predicted classes of the images of each true class.

    Attributes:
        classes: all names; only for a matrix that is small enough.
        rows: per true class, (count, share of the row in per cent, hit) of each predicted class.
        pairs: the most frequent confusions: (true, predicted, count, share of the true class).
    """

    classes: list[str] = field(default_factory=list)
    rows: list[list[tuple[int, int, bool]]] = field(default_factory=list)
    pairs: list[tuple[str, str, int, str]] = field(default_factory=list)
    mistakes: int = 0
    images: int = 0


@dataclass
class Explained:
    """Sections that explain an evaluation; empty ones are skipped.

    Attributes:
        classes: the rows of classes.csv, with text for numbers; ``hidden`` more are in the file.
        mistakes, neighbours, maps: see `vim_ssl.evaluation.examples`, with data URLs for images.
        share: share of the variance in the colours of ``maps``, as text.
    """

    confusion: Confusion | None = None
    classes: list[dict[str, str]] = field(default_factory=list)
    hidden: int = 0
    mistakes: list[dict[str, Any]] = field(default_factory=list)
    neighbours: list[dict[str, Any]] = field(default_factory=list)
    maps: list[dict[str, Any]] = field(default_factory=list)
    share: str = ""


EARLIER = "Of earlier weights, which the run no longer has"


def mark(evaluation: Evaluation, text: str) -> str:
    """Say before ``text`` if the evaluation is of earlier weights of the run."""
    return f"{EARLIER}: {text}" if evaluation.stale else text


def score(metrics: dict, key: str, unit: str = " %") -> Score:
    """Format a metric and its 95 % interval, or why there is none."""
    value: Any = metrics.get(key)
    ci: Any = metrics.get(f"{key}_ci")
    result = Score()
    if is_number(value):
        digits = ".1f" if not 0 < value < 1 else ".1g"  # e.g. chance
        if not unit:  # a value in 0 to 1, as published
            digits = ".3f"
        result.text = f"{value:{digits}}{unit}"
    if isinstance(ci, list) and len(ci) == 2 and all(map(is_number, ci)):
        bounds = ".1f" if unit else ".3f"
        result.interval = f"{ci[0]:{bounds}} – {ci[1]:{bounds}}"
        if ci[0] == ci[1]:  # of an earlier version
            result.interval = "none (the resamples have the same value)"
    elif ci is None and f"{key}_ci" in metrics and is_number(value):
        why = metrics.get(f"{key}_ci_none")
        result.interval = f"none ({why})" if isinstance(why, str) else "none"
    return result


# ---------------------------------------------------------------- tasks and probes


def main_results(metrics: dict) -> Iterator[tuple[str, dict, str, str]]:
    """Yield (title, dict with the metric, its key, unit) for every test metric.

    If there are several classifiers, each has a dict of metrics; they are yielded one classifier at
    a time.
    """
    several = {
        name: value
        for name, value in metrics.items()
        if isinstance(value, dict) and name != "baselines"
    }
    for name, values in {"": metrics, **several}.items():
        for key, title in RESULTS.items():
            if is_number(values.get(key)):
                yield title.text + (f", {name}" if name else ""), values, key, title.unit


def task_result(run: Record) -> dict[str, Any]:
    """Metrics on the test split of a supervised run, its baselines, and what explains them."""
    metrics = run.result.metrics
    rows = [(title, score(part, key, unit)) for title, part, key, unit in main_results(metrics)]
    if not rows:
        return {}
    data = metrics.get("data") or metrics.get("features") or "Data not recorded"
    image = read_image(run.predictions)
    if image is not None:
        image.thumbnail(WHOLE)
    return {
        "rows": rows,
        "baselines": baselines(metrics),
        "note": mark(
            run.result,
            f"{data}{run.result.counts('to train on', 'to test on')}; {measured(metrics)}",
        ),
        "sentences": [mark(run.result, text) for text in summary(metrics)],
        "image": "" if image is None else data_url(image),
        "explained": explain(run.result),
    }


def baselines(metrics: dict) -> list[tuple[str, Score]]:
    """The main metric of each baseline, as (title, value)."""
    named = metrics.get("baselines")
    rows = []
    for name, values in named.items() if isinstance(named, dict) else ():
        for _, part, key, unit in main_results(values if isinstance(values, dict) else {}):
            rows.append((str(name), score(part, key, unit)))
            break
    return rows


def measured(metrics: dict) -> str:
    """Which images a result was measured on, as text."""
    split, n = metrics.get("split"), metrics.get("n", metrics.get("test"))
    if isinstance(split, str) and isinstance(n, int):
        return measured_on(split, n)
    return "test split" + (f", {n:,} images" if is_number(n) else "")


def probe_rows(evaluation: Evaluation) -> list[dict]:
    rows = evaluation.metrics.get("rows")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def probes(run: Record) -> list[dict[str, Any]]:
    """The linear probes of a run: on its own data first."""
    made = []
    for evaluation in run.probes:
        metrics = evaluation.metrics
        rows = [
            (row.get("features", "–"), score(row, "logistic"), _head_settings(row),
             score(row, "knn"), _knn_settings(row))
            for row in probe_rows(evaluation)
        ]  # fmt: skip
        if rows:
            data = f"{metrics.get('data', 'not recorded')}"
            made.append({
                "rows": rows,
                "metric": probe_metric(metrics),
                "data": mark(evaluation, data + evaluation.counts("for training", "for testing")),
                "sentences": [mark(evaluation, text) for text in summary(metrics)],
                "explained": explain(evaluation),
            })  # fmt: skip
    return made


def _head_settings(row: dict) -> str:
    readout = f"readout {row['readout']}" if row.get("readout") else ""
    return ", ".join(filter(None, [readout, f"C {row['C']:g}" if is_number(row.get("C")) else ""]))


def _knn_settings(row: dict) -> str:
    names = {"readout": row.get("knn_readout"), "k": row.get("knn_k"), "": row.get("knn_metric")}
    return ", ".join(f"{name} {value}".strip() for name, value in names.items() if value)


def probe_metric(metrics: dict) -> str:
    return "Mean average precision" if metrics.get("figure") == "mAP" else "Accuracy"


def sentences(run: Record) -> list[str]:
    """What the results are worth, in one sentence each."""
    evaluations = (run.result, *run.probes[:1], *run.zero_shot[:1])
    return [mark(one, text) for one in evaluations for text in summary(one.metrics)]


def summary(metrics: dict) -> list[str]:
    """The sentences of metrics.json that compare a result with its baselines."""
    value = metrics.get("summary")
    values = value if isinstance(value, list) else [value]
    return [text for text in values if text and isinstance(text, str)]


# ---------------------------------------------------------------- explanations


def explain(evaluation: Evaluation) -> Explained:
    """Collect what explains an evaluation, from whatever it has written."""
    examples = evaluation.examples
    maps = examples.get("maps")
    share = maps.get("share") if isinstance(maps, dict) else None
    return Explained(
        confusion=confusion(evaluation),
        classes=[_per_cent(row) for row in evaluation.classes[:MAX_CLASSES]],
        hidden=max(len(evaluation.classes) - MAX_CLASSES, 0),
        mistakes=[
            row | {"sure": per_cent(row.get("predicted_probability"))}
            for row in _with_urls(evaluation, examples.get("mistakes"))
        ],
        neighbours=[
            row | {"neighbours": _with_urls(evaluation, row.get("neighbours"))}
            for row in _with_urls(evaluation, examples.get("neighbours"))
        ],
        maps=_with_urls(evaluation, maps.get("rows") if isinstance(maps, dict) else None),
        share=per_cent(share),
    )


def confusion(evaluation: Evaluation) -> Confusion | None:
    """Count predicted against true classes in predictions.csv; None without single labels."""
    pairs = Counter(
        (row["label"], row["predicted"])
        for row in evaluation.predictions
        if row.get("label") and row.get("predicted")
    )
    # "a|b" are several labels of one image.
    if not pairs or any("|" in name for pair in pairs for name in pair):
        return None
    names = [row.get("class", "") for row in evaluation.classes]
    names += sorted({name for pair in pairs for name in pair}.difference(names))
    totals = Counter[str]()
    for (true, _), count in pairs.items():
        totals[true] += count
    wrong = Counter({pair: count for pair, count in pairs.items() if pair[0] != pair[1]})
    result = Confusion(mistakes=wrong.total(), images=pairs.total())
    if len(names) <= MATRIX:
        result.classes = names
        result.rows = [
            [
                (pairs[true, guess], round(100 * pairs[true, guess] / max(totals[true], 1)),
                 true == guess)
                for guess in names
            ]
            for true in names
        ]  # fmt: skip
    else:
        result.pairs = [
            (true, guess, count, f"{100 * count / totals[true]:.0f} %")
            for (true, guess), count in wrong.most_common(PAIRS)
        ]
    return result


def _with_urls(evaluation: Evaluation, rows: Any) -> list[dict[str, Any]]:
    """Replace the file names in rows of examples by data URLs; unreadable images are skipped."""
    if not isinstance(rows, list):
        return []
    made = []
    for row in rows:
        if not isinstance(row, dict):
            continue
        files = [evaluation.images / str(row[key]) for key in ("image", "map") if key in row]
        images = [image for image in map(read_image, files) if image is not None]
        if "image" in row and len(images) == len(files):
            urls = dict(zip(("image", "map"), (data_url(i, THUMB) for i in images), strict=False))
            similarity = row.get("similarity")
            text = {
                "similarity": f"{similarity:.2f}" if is_number(similarity) else "",
                "pixelated": images[0].width <= SMALL,
            }
            made.append({"label": "", "id": "", "predicted": ""} | row | text | urls)
    return made


def per_cent(share: Any) -> str:
    return f"{100 * share:.0f} %" if is_number(share) else ""


def _url(path: Path) -> str:
    image = read_image(path)
    return "" if image is None else data_url(image, THUMB)


def _per_cent(row: dict[str, str]) -> dict[str, str]:
    """Show the fractions of a row of classes.csv in per cent, like all other results."""
    return {key: _fraction(value) if key in FRACTIONS else value for key, value in row.items()}


def _fraction(text: str) -> str:
    try:
        value = float(text)
    except ValueError:
        return text
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%" if np.isfinite(value) else "–"


# ---------------------------------------------------------------- zero-shot


def zero_shot(evaluation: Evaluation) -> dict[str, Any]:
    """Zero-shot metrics of one data set, with a few images and their nearest captions."""
    metrics = evaluation.metrics
    rows = [
        (title, [(text, score(metrics[part], key)) for text, key in keys if key in metrics[part]])
        for part, titles in ZERO_SHOT.items()
        if isinstance(metrics.get(part), dict)
        for title, keys in titles.items()
    ]
    if not rows:
        return {}
    return {
        "data": mark(evaluation, f"{metrics.get('data', 'data not recorded')}"),
        "trained_on": metrics.get("trained_on") is True,
        "sentences": [mark(evaluation, text) for text in summary(metrics)],
        "rows": rows,
        "examples": _similarities(evaluation),
    }


def _similarities(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Image, caption, cosines with shades in per cent, and nearest captions of each example."""
    examples: Any = evaluation.metrics.get("examples")
    try:
        cosines = np.array(examples["cosines"], dtype=np.float64)
        rows: list[dict[str, Any]] = [
            {
                "image": _url(evaluation.folder / pair["picture"]),
                "caption": str(pair["own"]),
                "nearest": list(zip(map(str, pair["nearest"]), pair["right"], strict=True)),
            }
            for pair in examples["pairs"]
        ]
        if cosines.shape != (len(rows), len(rows)) or not all(row["image"] for row in rows):
            return []
        shades = np.round(80 * (cosines - cosines.min()) / max(np.ptp(cosines), 1e-6)).astype(int)
    except (TypeError, KeyError, ValueError):  # another layout, or not written yet
        return []
    for row, values, shade in zip(rows, cosines, shades, strict=True):
        row["cosines"] = list(zip((f"{value:.2f}" for value in values), shade, strict=True))
    return rows
