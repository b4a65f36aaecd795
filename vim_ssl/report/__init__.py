"""The page of a run: `report.html`, one file that asks nothing of the network.

    folder -> record.Record -> sections of HTML, curve.draw_curve -> page.PAGE

Whatever a run has not written yet is left out, so the page can be drawn at any time.
"""

import argparse
import base64
import io
import json
import math
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from PIL import Image

from vim_ssl.report.curve import draw_curve
from vim_ssl.report.page import PAGE, SCRIPT, STYLE, USE
from vim_ssl.report.record import EVALUATED, Record
from vim_ssl.training.run import newest_run
from vim_ssl.utils.names import number

# What is trained, in words; another recipe goes by its own name.
RECIPES = {
    "mim_pretrain": "masked image modelling",
    "clip_pretrain": "contrast of images and captions",
    "supervised_pretrain": "classification",
    "finetune": "fine-tuning",
    "video": "classification of videos",
}
# Figures of metrics.jsonl with a title of their own, in the page's order: (title, unit).
CURVES = {
    "loss": ("Loss", ""),
    "knn_top1": ("Nearest neighbours, accuracy", " %"),
    "linear_top1": ("Linear probe, accuracy", " %"),
    "pixel_mse": ("Mean squared error of the hidden pixels", ""),
    "image_to_text_r1": ("Captions of an image, R@1", " %"),
    "text_to_image_r1": ("Images of a caption, R@1", " %"),
    "batch_top1": ("Own caption the nearest of the step's", " %"),
    "logit_scale": ("Logit scale", ""),
    "lr": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", ""),
    "images_per_second": ("Images per second", ""),
    "data_wait": ("Share of the time waiting for data", ""),
    "feature_std": ("Spread of the features", ""),
    "effective_rank": ("Effective rank of the features", ""),
}
# Figures of zero_shot's metrics.json: part -> row's title -> (what, key).
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
# Figures of a task's metrics.json: key -> (title, unit), the first that is there above all.
RESULTS = {
    "top1": ("Top-1 accuracy", " %"),
    "top5": ("Top-5 accuracy", " %"),
    "balanced_accuracy": ("Balanced accuracy", " %"),
    "mean_error": ("Mean error", " classes"),
    "map_macro": ("Mean average precision", " %"),
    "map_micro": ("Average precision of all labels as one", " %"),
    "exact": ("Images with every label right", " %"),
    "miou": ("Mean IoU", " %"),
    "aacc": ("Pixels right", " %"),
    "macc": ("Mean recall", " %"),
    "mdice": ("Mean Dice", " %"),
    "volume_dice": ("Mean Dice of the volumes", " %"),
    "volume_hd95": ("95 % Hausdorff distance of the volumes", " mm"),
    **{
        f"{kind}_{name}": (f"{title} of the {kind}{'es' if kind == 'box' else 's'}", " %")
        for kind in ("box", "mask")
        for name, title in (("ap", "AP"), ("ap50", "AP50"), ("ap75", "AP75"), ("ar", "Recall"))
    },
    "auc": ("AUC as MedMNIST has it, 0 to 1", ""),
    "acc": ("Accuracy as MedMNIST has it, 0 to 1", ""),
}
SHOWN_CLASSES = 40
COUNTERS = ("step", "epoch", "seconds", "samples", "bad_steps", "skipped")
WIDE_RANGE = ("loss", "pixel_mse", "grad_norm")  # on a logarithmic axis where values demand it
SMALL, ENLARGED = 96, 88  # images up to SMALL px wide are drawn ENLARGED px wide
MIM_COLUMNS = ("original", "masked", "reconstructed", "pasted into the gaps")


def write_report(folder: str | Path) -> Path:
    """Draw ``report.html`` of the run in ``folder`` from what the run has written so far.

    Returns: the page's path. A reader sees the old page or the new one, never a part.
    Raises: FileNotFoundError if ``folder`` holds neither config.json nor metrics.jsonl.
    """
    run = Record(Path(folder))
    sections = [_header(run), _result(run), _images(run), _probe(run), _zero_shot(run),
                _curves(run), _settings(run), _use(run)]  # fmt: skip
    page = PAGE.substitute(title=escape(run.name), style=STYLE, script=SCRIPT,
                           body="\n".join(filter(None, sections)))  # fmt: skip
    path = run.folder / "report.html"
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # A file name that is no text may have come through the log; it must not cost the page.
        partial.write_text(page, encoding="utf-8", errors="replace")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """``vim-ssl report [RUN]``: draw the page of a run again."""
    parser = argparse.ArgumentParser(description="Draw the page of a run, finished or going.")
    parser.add_argument("run", nargs="?", help="run directory; default: the newest with an encoder")
    run = parser.parse_args(argv).run
    print(f"Report: {write_report(run or newest_run())}")
    return 0


# -------------------------------------------------------------------- sections


def _header(run: Record) -> str:
    config = run.config
    recipe = str(config.get("recipe", ""))
    how = RECIPES.get(recipe, recipe) or "an unnamed recipe"
    objective = f" ({config['objective']})" if config.get("objective") else ""
    size = f" with {run.parameters / 1e6:.1f} M parameters" if run.parameters else ""
    data = f" on {config['data']}" if config.get("data") else ""
    lede = f"{config.get('encoder') or 'An encoder'}{size}, trained by {how}{objective}{data}."
    state = "Finished" if _is_finished(run) else "Still going, or stopped before its end"
    state += f" · page drawn {time.strftime('%Y-%m-%d %H:%M')}"
    tiles = [_tile(run, "loss"), _tile(run, "knn_top1"), _result_tile(run), _probe_tile(run)]
    seconds, samples = run.last("seconds"), run.last("samples")
    if seconds > 0:
        rate = f"{number(samples / seconds, 2)} images/s on average" if samples > 0 else ""
        tiles.append(("Training time", _duration(seconds), rate))
    cells = "".join(
        f"<div><dt>{escape(title)}</dt><dd><b>{escape(value)}</b><small>{escape(note)}</small>"
        "</dd></div>"
        for title, value, note in filter(None, tiles)
    )
    return (
        f"<header><h1>{escape(run.name)}</h1><p class=lede>{escape(lede)}</p>"
        f"<p class=note>{escape(state)}</p></header>"
        + (f"<dl class=tiles>{cells}</dl>" if cells else "")
    )


def _tile(run: Record, name: str) -> tuple[str, str, str] | None:
    """Title, newest value and first value of a figure; of a single one its step."""
    steps, _, values = run.series(name)
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if not len(values):
        return None
    title, unit = CURVES[name]
    start = f"from {number(values[0], 3)}{unit} " if len(values) > 1 else ""
    return title, f"{number(values[-1], 3)}{unit}", f"{start}at step {steps[0]:,.0f}"


def _probe_tile(run: Record) -> tuple[str, str, str] | None:
    rows = [row for row in _probe_rows(run) if _is_number(row.get("logistic"))]
    if not rows:
        return None
    note = ", ".join(f"{row.get('features', '?')} {row['logistic']:.1f}" for row in rows[1:])
    return "Linear probe", f"{rows[0]['logistic']:.1f} %", note


def _result_tile(run: Record) -> tuple[str, str, str] | None:
    """The main figure of the test part."""
    for title, figures, key, unit in _results(run):
        return title, f"{figures[key]:.1f}{unit}", "on the test part"
    return None


def _results(run: Record) -> Iterator[tuple[str, dict, str, str]]:
    """Title, where the figure stands, its key and its unit; figures of several classifiers, as a
    dict of each, one classifier after another."""
    several = {name: part for name, part in run.result.items() if isinstance(part, dict)}
    for name, figures in {"": run.result, **several}.items():
        for key, (title, unit) in RESULTS.items():
            if _is_number(figures.get(key)):
                yield title + (f", {name}" if name else ""), figures, key, unit


def _result(run: Record) -> str:
    """What a run on labels is worth on its test part: figures, classes, drawn predictions."""
    body = "".join(
        f"<tr><th scope=row>{escape(title)}</th><td>{_score(figures, key, unit)}</td></tr>"
        for title, figures, key, unit in _results(run)
    )
    if not body:
        return ""
    counts = [
        f"{run.result[key]:,} {what}"
        for key, what in (("train", "to train on"), ("test", "to test on"))
        if _is_number(run.result.get(key))
    ]
    if isinstance(skipped := run.result.get("skipped"), list) and skipped:
        counts.append(f"{len(skipped):,} unreadable")
    data = run.result.get("data") or run.result.get("features") or "Data not recorded"
    note = f"{', '.join([str(data), *counts])}. "
    note += "In small figures the 95 % interval."
    parts = f"<div class=scroll><table>{body}</table></div>"
    try:
        with Image.open(run.drawn) as sheet:
            image = _png(sheet.convert("RGB"))
        parts += f'<img class=sheet alt="Truth and prediction side by side" src="{image}">'
    except (OSError, SyntaxError):  # none is drawn of classes
        pass
    if run.classes:
        heads = "".join(f"<th scope=col>{escape(k.replace('_', ' '))}</th>" for k in run.classes[0])
        lines = "".join(
            f"<tr>{''.join(f'<td>{escape(value)}</td>' for value in row.values())}</tr>"
            for row in run.classes[:SHOWN_CLASSES]
        )
        more = len(run.classes) - SHOWN_CLASSES
        rest = f"<p class=note>… and {more:,} more in classes.csv.</p>" if more > 0 else ""
        parts += (
            "<details><summary>Class by class</summary><div class=scroll><table><thead>"
            f"<tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>{rest}</details>"
        )
    return _section("Result on the test part", f"<p class=note>{escape(note)}</p>{parts}")


def _images(run: Record) -> str:
    if not run.images:
        return ""
    parts = []
    for found in run.images.values():
        ends = [found[0], found[-1]] if len(found) > 1 else found
        names = ("First evaluation", "Newest evaluation") if len(ends) == 2 else ("Evaluation",)
        figures = [_strip(run, f"{n}, step {step:,}", path)
                   for n, (step, path) in zip(names, ends, strict=True)]  # fmt: skip
        parts.append(f"<div class=pair>{''.join(figures)}</div>")
    note = "Every evaluation shows the same training images."
    if run.config.get("recipe") == "mim_pretrain":
        note += " Hidden patches, whose pixels the encoder never sees, are drawn in grey."
        if run.config.get("norm_pix_loss"):
            note += (
                " Predictions are normalised patch by patch; they are drawn with the brightness and"
                " contrast of the true patch."
            )
    return _section("Images", f"<p class=note>{note}</p>" + "".join(parts))


def _strip(run: Record, caption: str, path: Path) -> str:
    """The images of one evaluation, a row a sample, cut apart so that the page can space them."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError):  # being written at this moment
        return ""
    columns: tuple[str, ...] = MIM_COLUMNS if run.config.get("recipe") == "mim_pretrain" else ()
    cells = _cut(image, len(columns), run.encoder.get("img_size")) if columns else None
    if not cells:
        columns, cells = ("",), [image]
    width = cells[0].width
    small = width <= SMALL
    heads = "".join(f"<span>{name}</span>" for name in columns if name)
    images = "".join(f'<img alt="" src="{_png(cell)}">' for cell in cells)
    return (
        f"<figure><figcaption>{escape(caption)}</figcaption>"
        f'<div role="img" aria-label="{escape(caption)}" class="strip{" small" if small else ""}"'
        f' style="--n:{len(columns)};--side:{ENLARGED if small else width}px">'
        f"{heads}{images}</div></figure>"
    )


def _cut(image: Image.Image, columns: int, side: int | list | None) -> list[Image.Image] | None:
    """The inverse of `Run.save_images`, which leaves a pixel around every row; row by row.

    Args:
        side: of a sample, pixels, or (height, width); None: square.
    """
    width, rest = divmod(image.width - 2, columns)
    height = side[0] if isinstance(side, list | tuple) else side or width
    if rest or not isinstance(height, int) or (image.height - 1) % (height + 1):
        return None
    lefts = range(1, 1 + columns * width, width)
    tops = range(1, image.height, height + 1)
    return [image.crop((x, y, x + width, y + height)) for y in tops for x in lefts]


def _probe_rows(run: Record) -> list[dict]:
    rows = run.probe.get("rows")
    return [r for r in rows if isinstance(r, dict)] if isinstance(rows, list) else []


def _probe(run: Record) -> str:
    if not (rows := _probe_rows(run)):
        return ""
    body = ""
    for row in rows:
        features, readout = (escape(str(row.get(k, "–"))) for k in ("features", "readout"))
        cells = "".join(f"<td>{_score(row, key)}</td>" for key in ("logistic", "knn"))
        body += f"<tr><th scope=row>{features}</th><td>{readout}</td>{cells}</tr>"
    figure = "Mean average precision" if run.probe.get("figure") == "mAP" else "Accuracy"
    note = f"{figure} on the test part from frozen features; in small figures the 95 % interval. "
    note += f"Data: {run.probe.get('data', 'not recorded')}"
    for key, what in (("train", "for training"), ("test", "for testing")):
        if _is_number(run.probe.get(key)):
            note += f", {run.probe[key]:,} {what}"
    if isinstance(skipped := run.probe.get("skipped"), list) and skipped:
        note += f", {len(skipped):,} unreadable"
    table = (
        "<div class=scroll><table><thead><tr><th scope=col>Features</th><th scope=col>Readout</th>"
        "<th scope=col>Logistic regression</th><th scope=col>Nearest neighbours</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )
    return _section("Linear probe", f"<p class=note>{escape(note)}.</p>{table}")


def _zero_shot(run: Record) -> str:
    """What names and captions alone find, and a few images with the captions nearest to them."""
    parts = ""
    for folder, found in run.zero_shot:
        body = ""
        for part, rows in ZERO_SHOT.items():
            figures = found.get(part)
            if not isinstance(figures, dict):
                continue
            for title, keys in rows.items():
                cells = "".join(
                    f"<td>{text}: {_score(figures, key)}</td>" for text, key in keys
                    if key in figures
                )  # fmt: skip
                body += f"<tr><th scope=row>{title}</th>{cells}</tr>"
        if body:
            table = f"<div class=scroll><table class=even><tbody>{body}</tbody></table></div>"
            title = escape(str(found.get("data", "data not recorded")))
            title += " · trained on these images: no test" * (found.get("trained_on") is True)
            parts += f"<h3>{title}</h3>{table}{_similarities(folder, found.get('examples'))}"
    if not parts:
        return ""
    note = "No label was learnt from; in small figures the 95 % interval."
    return _section("By names and captions alone", f"<p class=note>{note}</p>{parts}")


def _similarities(folder: Path, examples: Any) -> str:
    """A few images against their captions: cosines, shaded, and the nearest captions of all."""
    try:
        pairs, cosines = examples["pairs"], np.array(examples["cosines"], dtype=np.float64)
        thumbs = [_png(Image.open(folder / p["picture"])) for p in pairs]
        owns = [escape(str(p["own"])) for p in pairs]
        found = [
            " · ".join(
                _marked(escape(str(text)), right)
                for text, right in zip(p["nearest"], p["right"], strict=True)
            )
            for p in pairs
        ]
        low, span = cosines.min(), max(np.ptp(cosines), 1e-6)
        shades = np.round(80 * (cosines - low) / span).astype(int)
        if cosines.shape != (len(pairs), len(pairs)):
            return ""
    except (TypeError, KeyError, ValueError, OSError):  # of another form, or not there yet
        return ""
    heads = "".join(f"<th scope=col>{own}</th>" for own in owns)
    body = ""
    for i, (thumb, row, shade) in enumerate(zip(thumbs, cosines, shades, strict=True)):
        cells = "".join(
            f'<td style="background:color-mix(in srgb,var(--line) {s}%,transparent)">'
            f"{_marked(f'{x:.2f}', i == j)}</td>"
            for j, (x, s) in enumerate(zip(row, shade, strict=True))
        )
        image = f'<img alt="{owns[i]}" width=64 src="{thumb}">'
        body += f"<tr><th scope=row>{image}</th>{cells}<td>{found[i]}</td></tr>"
    note = (
        "Cosines of images (rows) and captions (columns), and the captions nearest of all; a "
        "image's own caption in bold."
    )
    return (
        f'<p class=note>{note}</p><div class=scroll><table class="even cosines"><thead><tr>'
        f"<th></th>{heads}<th scope=col>nearest</th></tr></thead><tbody>{body}</tbody></table>"
        "</div>"
    )


def _marked(text: str, bold: bool) -> str:
    return f"<b>{text}</b>" if bold else text


def _score(row: dict, key: str, unit: str = " %") -> str:
    value: Any = row.get(key)
    ci: Any = row.get(f"{key}_ci")
    text = "–"
    if _is_number(value):
        text = f"{value:.1f}{unit}" if not 0 < value < 1 else f"{value:.1g}{unit}"  # as chance is
        if not unit:  # a share as it is published
            text = f"{value:.3f}"
    if isinstance(ci, list) and len(ci) == 2 and all(map(_is_number, ci)):
        text += f" <small>{ci[0]:.1f} – {ci[1]:.1f}</small>"
    return text


def _curves(run: Record) -> str:
    # Without norm_pix_loss mae's loss is the pixels' error: one curve is enough.
    twice = {"loss", "pixel_mse"} <= run.log.keys() and np.allclose(
        run.log["pixel_mse"], run.log["loss"], rtol=1e-6, atol=0, equal_nan=True
    )
    names = [n for n in CURVES if n in run.log and not (twice and n == "pixel_mse")]
    names += [n for n in run.log if n not in CURVES and n not in COUNTERS]
    figures = ""
    for name in names:
        title, unit = CURVES.get(name, (name, ""))
        figures += draw_curve(title, *run.series(name), unit=unit,
                              allow_log=name in WIDE_RANGE, marked=name in EVALUATED)  # fmt: skip
    if not figures:
        return _section("Curves", "<p class=note>metrics.jsonl holds no line yet.</p>")
    note = (
        "Over optimiser steps. Where a point stands for many lines of metrics.jsonl, the line is "
        "their mean and the shade their range."
    )
    return _section("Curves", f"<p class=note>{note}</p><div class=curves>{figures}</div>")


def _settings(run: Record) -> str:
    config, encoder = run.config, run.encoder
    model: dict[str, Any] = {"Encoder": config.get("encoder")}
    if run.parameters:
        model["Parameters"] = f"{run.parameters:,}"
    if "embed_dim" in encoder and "depth" in encoder:
        model["Blocks"] = f"{encoder['depth']} of width {encoder['embed_dim']}"
    if run.shape_known:
        model |= _grid(encoder)
    model["Objective"] = config.get("objective")
    if _is_number(config.get("mask_ratio")):
        model["Masked"] = f"{100 * config['mask_ratio']:g} % of the patches"
    training: dict[str, Any] = {
        "Recipe": config.get("recipe"),
        "Data": config.get("data"),
    } | _schedule(run)
    for key, title in (("optimizer", "Optimiser"), ("weight_decay", "Weight decay"),
                       ("precision", "Autocast"), ("seed", "Seed")):  # fmt: skip
        training[title] = config.get(key)
    health: dict[str, Any] = {
        "Non-finite steps": _most(run, "bad_steps"),
        "Images skipped": _most(run, "skipped"),
    }
    for key, value in run.made_by.items():
        if key not in ("recipe", "data", "classes", "figures", "config"):
            title = key[:1].upper() + key[1:].replace("_", " ")
            health[title] = _flat(value)
    health["vim_ssl"] = run.version
    parts = (("Model", model), ("Training", training), ("Run", health))
    lists = "".join(_facts(title, facts) for title, facts in parts)
    whole = escape(json.dumps(config, indent=2, ensure_ascii=False))
    whole = f"<details><summary>The whole configuration</summary><pre>{whole}</pre></details>"
    return _section("Settings", f"<div class=facts>{lists}</div>{whole if config else ''}")


def _most(run: Record, counter: str) -> str:
    """A counter's largest value: a resumed run may have begun to count anew."""
    counts = run.log.get(counter, np.empty(0))
    counts = counts[np.isfinite(counts)]
    return f"{counts.max():,.0f}" if len(counts) else ""


def _grid(encoder: dict[str, Any]) -> dict[str, str]:
    """Image, patches and tokens, defaults filled in as `VimEncoder` has them."""
    size, patch = encoder.get("img_size", 224), encoder.get("patch_size", 16)
    stride, chans = encoder.get("stride") or patch, encoder.get("in_chans", 3)
    try:
        height, width = size if isinstance(size, list | tuple) else (size, size)
        rows, columns = (height - patch) // stride + 1, (width - patch) // stride + 1
    except (TypeError, ValueError, ZeroDivisionError):
        return {}
    overlap = f" every {stride} px" if stride != patch else ""
    return {
        "Image": f"{height} × {width} px, {chans} channel" + "s" * (chans != 1),
        "Patch": f"{patch} × {patch} px{overlap}",
        "Tokens": f"{rows} × {columns} = {rows * columns:,} an image",
    }


def _planned_steps(run: Record) -> int:
    """What the settings ask for; 0 until the log tells how long an epoch is."""
    step, epoch, epochs = run.last("step"), run.last("epoch"), run.config.get("epochs")
    if not (step > 0 and epoch > 0 and _is_number(epochs)):
        return 0
    planned = round(step / epoch * epochs)
    return min(planned, run.config.get("max_steps") or planned)


def _is_finished(run: Record) -> bool:
    """Whether all steps were taken, or as many as patience allowed."""
    planned = _planned_steps(run)
    early = run.saved and run.config.get("patience")
    return bool(planned) and (run.last("step") >= planned or bool(early))


def _schedule(run: Record) -> dict[str, str]:
    """Batch, learning rate, epochs and steps; processes and epoch length follow from the log."""
    config, facts = run.config, {}
    step, epoch, samples, seconds = map(run.last, ("step", "epoch", "samples", "seconds"))
    batch, times = config.get("batch_size"), config.get("accumulation", 1)
    if isinstance(batch, int) and isinstance(times, int) and step > 0 and samples > 0:
        whole = round(samples / step)  # of few images less than what was asked for
        processes, rest = divmod(whole, max(batch * times, 1))
        product = f" = {batch} × {times} (accumulation) × {processes} (processes)"
        facts["Effective batch"] = f"{whole:,}{'' if rest else product}"
        base, unit = config.get("base_lr"), config.get("lr_reference_batch")
        if _is_number(base) and _is_number(unit):
            facts["Peak learning rate"] = number(base * whole / unit)
    if planned := _planned_steps(run):
        facts["Epochs"] = f"{number(epoch, 3)} of {config['epochs']}"
        facts["Steps"] = f"{step:,.0f} of {planned:,}"
    if seconds > 0:
        facts["Time"] = _duration(seconds)
    return facts


def _facts(title: str, facts: dict[str, Any]) -> str:
    rows = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>"
                   for k, v in facts.items() if v not in (None, ""))  # fmt: skip
    return f"<div><h3>{title}</h3><dl>{rows}</dl></div>" if rows else ""


def _use(run: Record) -> str:
    path = run.folder.resolve()
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    name, width = path.as_posix(), run.encoder.get("embed_dim", "embed_dim")
    code = USE.substitute(run=json.dumps(name, ensure_ascii=False), d=width)
    probe = f"vim-ssl linear-probe --encoder {shlex.quote(name)} --data YOUR_LABELLED_DATA"
    note = "" if run.saved else "<p class=note>Works once the run has written its encoder.</p>"
    blocks = "".join(f"<div class=code><pre><code>{escape(text)}</code></pre></div>"
                     for text in (code, probe))  # fmt: skip
    return _section("Use the encoder", note + blocks)


# -------------------------------------------------------------------- small things


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_flat(v)}" for k, v in value.items())
    return ", ".join(map(_flat, value)) if isinstance(value, list) else str(value)
