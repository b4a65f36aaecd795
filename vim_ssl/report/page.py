"""The content of the report, section by section; templates/page.html defines the layout.

Every function returns plain text and numbers, which the templates escape; "", [] or {} skips the
section.
"""

import base64
import io
import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from vim_ssl.metrics.titles import CHECK_SIZE, CHECK_TRAIN
from vim_ssl.report import curve
from vim_ssl.report.record import EVALUATED, Record, is_number
from vim_ssl.report.settings import duration, is_finished, settings
from vim_ssl.utils.names import number

# Recipe → description; other recipes are shown by their names.
RECIPES = {
    "mim_pretrain": "masked image modelling",
    "clip_pretrain": "contrastive learning of images and captions",
    "supervised_pretrain": "classification",
    "finetune": "fine-tuning",
    "video": "video classification",
}
# Columns of metrics.jsonl that have a title, in the order of the report: (title, unit).
CURVES = {
    "loss": ("Loss", ""),
    "knn_top1": ("Nearest neighbours, accuracy", " %"),
    "linear_top1": ("Linear probe, accuracy", " %"),
    "pixel_mse": ("Mean squared error of the masked pixels", ""),
    "image_to_text_r1": ("Captions of an image, R@1", " %"),
    "text_to_image_r1": ("Images of a caption, R@1", " %"),
    "batch_top1": ("Caption retrieval within the batch, R@1", " %"),
    "logit_scale": ("Logit scale", ""),
    "lr": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", ""),
    "images_per_second": ("Images per second", ""),
    "data_wait": ("Fraction of the time waiting for data", ""),
    "feature_std": ("Standard deviation of the features", ""),
    "effective_rank": ("Effective rank of the features", ""),
}
# Metrics in zero_shot's metrics.json: section -> title of a row -> (name, key) of its cells.
ZERO_SHOT = {
    "classification": {
        "Classes by name": [("top-1", "top1"), ("top-5", "top5"), ("chance", "chance")]
    },
    "retrieval": {
        title: [*((f"R@{k}", f"{way}_r{k}") for k in (1, 5, 10)), ("chance at R@1", "chance_r1")]
        for title, way in (
            ("Captions of an image", "image_to_text"),
            ("Image of a caption", "text_to_image"),
        )
    },
}
# Metrics in a task's metrics.json: key -> (title, unit); the first existing one is the main one.
RESULTS = {
    "top1": ("Top-1 accuracy", " %"),
    "top5": ("Top-5 accuracy", " %"),
    "balanced_accuracy": ("Balanced accuracy", " %"),
    "mean_error": ("Mean error", " classes"),
    "map_macro": ("Mean average precision", " %"),
    "map_micro": ("Average precision of all labels as one", " %"),
    "exact": ("Images with all labels correct", " %"),
    "miou": ("Mean IoU", " %"),
    "aacc": ("Pixel accuracy", " %"),
    "macc": ("Mean recall", " %"),
    "mdice": ("Mean Dice", " %"),
    "volume_dice": ("Mean Dice of the volumes", " %"),
    "volume_hd95": ("95 % Hausdorff distance of the volumes", " mm"),
    **{
        f"{kind}_{name}": (f"{title} of the {kind}{'es' if kind == 'box' else 's'}", " %")
        for kind in ("box", "mask")
        for name, title in (("ap", "AP"), ("ap50", "AP50"), ("ap75", "AP75"), ("ar", "Recall"))
    },
    "auc": ("AUC as MedMNIST defines it, 0 to 1", ""),
    "acc": ("Accuracy as MedMNIST defines it, 0 to 1", ""),
}
MAX_CLASSES = 40
COUNTERS = ("step", "epoch", "seconds", "samples", "bad_steps", "skipped", CHECK_SIZE, CHECK_TRAIN)
WIDE_RANGE = ("loss", "pixel_mse", "grad_norm")  # may use a logarithmic axis
SMALL, ENLARGED = 96, 88  # images up to SMALL px wide are drawn ENLARGED px wide
MIM_COLUMNS = ("original", "masked", "reconstructed", "visible + reconstructed")

_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_templates.globals |= {"plot": curve, "max_classes": MAX_CLASSES}
_templates.filters["px"] = "{:.1f}".format


def render(run: Record) -> str:
    """Render the HTML of a run's report."""
    path = run.folder.resolve()
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return _templates.get_template("page.html").render(
        run=run,
        summary=_summary(run),
        state="Finished" if is_finished(run) else "Still running, or stopped early",
        drawn_at=time.strftime("%Y-%m-%d %H:%M"),
        tiles=list(filter(None, _tiles(run))),
        result=_result(run),
        previews=_previews(run),
        probe=_probe(run),
        zero_shot=list(filter(None, (_zero_shot(*one) for one in run.zero_shot))),
        curves=list(_curves(run)),
        settings=settings(run),
        config_json=json.dumps(run.config, indent=2, ensure_ascii=False) if run.config else "",
        run_literal=json.dumps(path.as_posix(), ensure_ascii=False),
        run_quoted=shlex.quote(path.as_posix()),
        embed_dim=run.encoder.get("embed_dim", "embed_dim"),
    )


# ---------------------------------------------------------------- header


def _summary(run: Record) -> str:
    config = run.config
    recipe = str(config.get("recipe", ""))
    how = RECIPES.get(recipe, recipe) or "an unknown recipe"
    objective = f" ({config['objective']})" if config.get("objective") else ""
    size = f" with {run.parameters / 1e6:.1f} M parameters" if run.parameters else ""
    data = f" on {config['data']}" if config.get("data") else ""
    return f"{config.get('encoder') or 'An encoder'}{size}, trained by {how}{objective}{data}."


def _tiles(run: Record) -> Iterator[tuple[str, str, str] | None]:
    """Yield title, value and note of each key metric."""
    yield _curve_tile(run, "loss")
    yield _curve_tile(run, "knn_top1")
    for title, metrics, key, unit in _results(run):
        yield title, f"{metrics[key]:.1f}{unit}", "on the test split"
        break
    if rows := [row for row in _probe_rows(run) if is_number(row.get("logistic"))]:
        note = ", ".join(f"{row.get('features', '?')} {row['logistic']:.1f}" for row in rows[1:])
        yield "Linear probe", f"{rows[0]['logistic']:.1f} %", note
    seconds, samples = run.last("seconds"), run.last("samples")
    if seconds > 0:
        rate = f"{number(samples / seconds, 2)} images/s on average" if samples > 0 else ""
        yield "Training time", duration(seconds), rate


def _curve_tile(run: Record, name: str) -> tuple[str, str, str] | None:
    """The newest value of a logged metric, and its first value if there are several."""
    steps, _, values = run.series(name)
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if not len(values):
        return None
    title, unit = CURVES[name]
    start = f"from {number(values[0], 3)}{unit} " if len(values) > 1 else ""
    return title, f"{number(values[-1], 3)}{unit}", f"{start}at step {steps[0]:,.0f}"


# ---------------------------------------------------------------- results


def _results(run: Record) -> Iterator[tuple[str, dict, str, str]]:
    """Yield (title, dict with the metric, its key, unit) for every test metric.

    If there are several classifiers, each has a dict of metrics; they are yielded one classifier at
    a time.
    """
    several = {name: value for name, value in run.result.items() if isinstance(value, dict)}
    for name, metrics in {"": run.result, **several}.items():
        for key, (title, unit) in RESULTS.items():
            if is_number(metrics.get(key)):
                yield title + (f", {name}" if name else ""), metrics, key, unit


def _result(run: Record) -> dict[str, Any]:
    """Metrics on the test split of a supervised run, its classes, and the image of predictions."""
    rows = [(title, _score(metrics, key, unit)) for title, metrics, key, unit in _results(run)]
    if not rows:
        return {}
    data = run.result.get("data") or run.result.get("features") or "Data not recorded"
    try:
        with Image.open(run.predictions) as grid:
            image = _png(grid.convert("RGB"))
    except (OSError, SyntaxError):  # classification writes no image
        image = ""
    note = str(data) + _counts(run.result, "to train on", "to test on")
    return {"rows": rows, "note": note, "image": image, "classes": run.classes}


def _counts(metrics: dict, train: str, test: str) -> str:
    """Text with the numbers of images, each after a comma."""
    text = ""
    for key, what in (("train", train), ("test", test)):
        if is_number(metrics.get(key)):
            text += f", {metrics[key]:,} {what}"
    if isinstance(skipped := metrics.get("skipped"), list) and skipped:
        text += f", {len(skipped):,} unreadable"
    return text


def _probe_rows(run: Record) -> list[dict]:
    rows = run.probe.get("rows")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _probe(run: Record) -> dict[str, Any]:
    rows = [
        (row.get("features", "–"), row.get("readout", "–"), _score(row, "logistic"),
         _score(row, "knn"))
        for row in _probe_rows(run)
    ]  # fmt: skip
    if not rows:
        return {}
    metric = "Mean average precision" if run.probe.get("figure") == "mAP" else "Accuracy"
    data = f"{run.probe.get('data', 'not recorded')}"
    data += _counts(run.probe, "for training", "for testing")
    return {"rows": rows, "metric": metric, "data": data}


def _zero_shot(folder: Path, metrics: dict) -> dict[str, Any]:
    """Zero-shot metrics of one data set, with a few images and their nearest captions."""
    rows = [
        (title, [(text, _score(metrics[part], key)) for text, key in keys if key in metrics[part]])
        for part, titles in ZERO_SHOT.items()
        if isinstance(metrics.get(part), dict)
        for title, keys in titles.items()
    ]
    if not rows:
        return {}
    return {
        "data": metrics.get("data", "data not recorded"),
        "trained_on": metrics.get("trained_on") is True,
        "rows": rows,
        "examples": _similarities(folder, metrics.get("examples")),
    }


def _similarities(folder: Path, examples: Any) -> list[dict[str, Any]]:
    """Image, caption, cosines with shades in per cent, and nearest captions of each example."""
    try:
        cosines = np.array(examples["cosines"], dtype=np.float64)
        rows: list[dict[str, Any]] = [
            {
                "image": _png(Image.open(folder / pair["picture"])),
                "caption": str(pair["own"]),
                "nearest": list(zip(map(str, pair["nearest"]), pair["right"], strict=True)),
            }
            for pair in examples["pairs"]
        ]
        if cosines.shape != (len(rows), len(rows)):
            return []
        shades = np.round(80 * (cosines - cosines.min()) / max(np.ptp(cosines), 1e-6)).astype(int)
    except (TypeError, KeyError, ValueError, OSError):  # another layout, or not written yet
        return []
    for row, values, shade in zip(rows, cosines, shades, strict=True):
        row["cosines"] = list(zip((f"{value:.2f}" for value in values), shade, strict=True))
    return rows


def _score(metrics: dict, key: str, unit: str = " %") -> dict[str, str]:
    """Format a metric and its 95 % interval as text."""
    value: Any = metrics.get(key)
    ci: Any = metrics.get(f"{key}_ci")
    text, interval = "–", ""
    if is_number(value):
        text = f"{value:.1f}{unit}" if not 0 < value < 1 else f"{value:.1g}{unit}"  # e.g. chance
        if not unit:  # a value in 0 to 1, as published
            text = f"{value:.3f}"
    if isinstance(ci, list) and len(ci) == 2 and all(map(is_number, ci)):
        interval = f"{ci[0]:.1f} – {ci[1]:.1f}"
    return {"text": text, "interval": interval}


# ---------------------------------------------------------------- images and curves


def _previews(run: Record) -> list[list[dict[str, Any] | None]]:
    """First and newest evaluation for every type of preview."""
    pairs = []
    for evaluations in run.previews.values():
        ends = [evaluations[0], evaluations[-1]] if len(evaluations) > 1 else evaluations
        names = ("First evaluation", "Newest evaluation") if len(ends) == 2 else ("Evaluation",)
        pairs.append([_preview(run, f"{name}, step {step:,}", path)
                      for name, (step, path) in zip(names, ends, strict=True)])  # fmt: skip
    return pairs


def _preview(run: Record, caption: str, path: Path) -> dict[str, Any] | None:
    """The images of one evaluation, split into cells so that the page can space them."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError):  # the run is writing it now
        return None
    columns: tuple[str, ...] = MIM_COLUMNS if run.config.get("recipe") == "mim_pretrain" else ()
    cells = _cut(image, len(columns), run.encoder.get("img_size")) if columns else None
    if not cells:
        columns, cells = ("",), [image]
    width = cells[0].width
    return {
        "caption": caption, "columns": columns, "cells": [_png(cell) for cell in cells],
        "enlarged": width <= SMALL, "side": ENLARGED if width <= SMALL else width,
    }  # fmt: skip


def _cut(image: Image.Image, columns: int, side: int | list | None) -> list[Image.Image] | None:
    """Split an image written by `Run.save_images`, which has a one-pixel border around every row,
    into cells, row by row.

    Args:
        side: height of a sample in pixels, or (height, width); None: square.
    Returns: the cells, or None if the size does not fit.
    """
    width, rest = divmod(image.width - 2, columns)
    height = side[0] if isinstance(side, list | tuple) else side or width
    if rest or not isinstance(height, int) or (image.height - 1) % (height + 1):
        return None
    lefts = range(1, 1 + columns * width, width)
    tops = range(1, image.height, height + 1)
    return [image.crop((x, y, x + width, y + height)) for y in tops for x in lefts]


def _curves(run: Record) -> Iterator[curve.Curve]:
    # Without norm_pix_loss, mae's loss is the pixel error: one curve is enough.
    same = {"loss", "pixel_mse"} <= run.log.keys() and np.allclose(
        run.log["pixel_mse"], run.log["loss"], rtol=1e-6, atol=0, equal_nan=True
    )
    names = [name for name in CURVES if name in run.log and not (same and name == "pixel_mse")]
    names += [name for name in run.log if name not in CURVES and name not in COUNTERS]
    for name in names:
        title, unit = CURVES.get(name, (name, ""))
        series = run.series(name)
        if len(series[0]):
            yield curve.draw_curve(title, *series, unit=unit, allow_log=name in WIDE_RANGE,
                                   marked=name in EVALUATED)  # fmt: skip


def _png(image: Image.Image) -> str:
    """Encode an image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
