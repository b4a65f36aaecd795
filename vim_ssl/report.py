"""The page of a run: `report.html`, one file that asks nothing of the network.

    folder -> _Record (what the run wrote) -> sections of HTML -> the page, whole or not at all

Whatever a run has not written yet is left out, so the page can be drawn at any time.
"""

import argparse
import base64
import io
import itertools
import json
import math
import os
import shlex
import time
import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from vim_ssl.encoder import PRESETS
from vim_ssl.runs import newest_run

# What is trained, in words; another recipe goes by its own name.
RECIPES = {
    "mim_pretrain": "masked image modelling",
    "clip_pretrain": "contrasting pictures with captions",
    "supervised_pretrain": "labels",
}
# Figures of metrics.jsonl with a title of their own, in the page's order: (title, unit).
CURVES = {
    "loss": ("Loss", ""),
    "knn_top1": ("Nearest neighbours, accuracy", " %"),
    "pixel_mse": ("Mean squared error of the hidden pixels", ""),
    "lr": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", ""),
    "images_per_second": ("Images per second", ""),
    "feature_std": ("Spread of the features", ""),
}
EVALUATED = ("knn_top1", "feature_std")  # logged again on every line until the next evaluation
COUNTERS = ("step", "epoch", "seconds", "samples", "bad_steps", "skipped")
WIDE_RANGE = ("loss", "pixel_mse", "grad_norm")  # on a logarithmic axis where values demand it
MIM_COLUMNS = ("original", "masked", "reconstructed", "pasted into the gaps")
MAX_LINES = 50_000  # of the log that are parsed, evenly spread
MAX_POINTS = 240  # of a curve; each stands for a stretch of steps
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 200, 52, 10, 8, 24  # of a curve, in SVG units


def write_report(folder: str | Path) -> Path:
    """Draw ``report.html`` of the run in ``folder`` from what the run has written so far.

    Returns: the page's path. A reader sees the old page or the new one, never a part.
    Raises: FileNotFoundError if ``folder`` holds neither config.json nor metrics.jsonl.
    """
    run = _Record(Path(folder))
    sections = [_header(run), _pictures(run), _probe(run), _curves(run), _settings(run), _use(run)]
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


# -------------------------------------------------------------------- what the run wrote


class _Record:
    """Everything the page tells, read once; absent files give empty values."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.name = folder.resolve().name
        if not any((folder / name).is_file() for name in ("config.json", "metrics.jsonl")):
            raise FileNotFoundError(
                f"{folder} holds no run (neither config.json nor metrics.jsonl); name the "
                "directory that a recipe printed as 'Run directory'."
            )
        self.config = _read_json(folder / "config.json")
        description = _read_json(folder / "encoder.json")
        self.finished = bool(description)
        self.made_by = description.get("made_by") or {}
        self.version = description.get("vim_ssl")
        name = self.config.get("encoder")
        model_args = self.config.get("model_args")
        self.encoder = description.get("config") or {
            **(PRESETS.get(name, {}) if isinstance(name, str) else {}),
            **(model_args if isinstance(model_args, dict) else {}),
        }
        self.parameters = _count_parameters(folder / "encoder.safetensors")
        self.probe = _read_json(folder / "linear_probe" / "metrics.json")
        self.log = _read_log(folder / "metrics.jsonl")
        self.pictures = _find_pictures(folder / "images")

    def last(self, name: str) -> float:
        """The newest finite value of a figure; NaN if there is none."""
        finite = self.log.get(name, np.empty(0))
        finite = finite[np.isfinite(finite)]
        return float(finite[-1]) if len(finite) else math.nan

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps, epochs and values of a figure; what is evaluated now and then, only there."""
        steps, values = self.log["step"], self.log[name]
        rows = ~np.isnan(values) if name in EVALUATED else np.ones(len(values), bool)
        if name in EVALUATED:
            marks = np.stack([self.log[k] for k in EVALUATED if k in self.log])
            rows[1:] &= (marks[:, 1:] != marks[:, :-1]).any(0)
        epochs = self.log.get("epoch", np.full(len(steps), math.nan))
        return steps[rows], epochs[rows], values[rows]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not written, or not whole
        return {}
    return content if isinstance(content, dict) else {}


def _read_log(path: Path) -> dict[str, np.ndarray]:
    """metrics.jsonl as columns (n,) float64, NaN where a line lacks a figure. Broken lines are left
    out, and of a long log only every so-many-th line is parsed, and the last two."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        count = sum(1 for _ in file)
    stride, rows = math.ceil(count / MAX_LINES), []
    with path.open("rb") as file:
        for i, line in enumerate(file):
            if i % stride and i < count - 2:
                continue
            try:
                row = json.loads(line)
            except ValueError:  # being written at this moment, or cut off by a kill
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append({k: v for k, v in row.items() if isinstance(v, int | float)})
    names = dict.fromkeys(itertools.chain.from_iterable(rows))
    return {k: np.array([row.get(k, math.nan) for row in rows], float) for k in names}


def _count_parameters(path: Path) -> int:
    if not path.is_file():
        return 0
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return 0


def _find_pictures(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    """NAME-STEP.png as name -> (step, path), in the order of steps."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in folder.glob("*-*.png"):
        name, _, step = path.stem.rpartition("-")
        if step.isdecimal():
            found.setdefault(name, []).append((int(step), path))
    return {name: sorted(found[name]) for name in sorted(found)}


# -------------------------------------------------------------------- sections


def _header(run: _Record) -> str:
    config, log = run.config, run.log
    recipe = str(config.get("recipe", ""))
    how = RECIPES.get(recipe, recipe) or "a recipe that it does not name"
    objective = f" ({config['objective']})" if config.get("objective") else ""
    size = f" with {run.parameters / 1e6:.1f} M parameters" if run.parameters else ""
    lede = f"{config.get('encoder', 'An encoder')}{size}, trained by {how}{objective}"
    lede += f" on {config['data']}." if config.get("data") else "."
    state = "Finished" if run.finished else "Still going, or stopped before its end"
    state += f" · page drawn {time.strftime('%Y-%m-%d %H:%M')}"

    tiles = []
    for name in ("loss", "knn_top1"):
        _, epochs, values = run.series(name) if name in log else ([], np.empty(0), np.empty(0))
        finite = np.flatnonzero(np.isfinite(values))
        if len(finite):
            title, unit = CURVES[name]
            since = f"from {_number(values[finite[0]])} at epoch {_number(epochs[finite[0]])}"
            tiles.append((title, f"{_number(values[finite[-1]])}{unit}", since))
    rows = _probe_rows(run)
    if rows and _is_number(rows[0].get("logistic")):
        others = [r for r in rows[1:] if _is_number(r.get("logistic"))]
        note = ", ".join(f"{r.get('features', '?')} {r['logistic']:.1f}" for r in others)
        tiles.append(("Linear probe", f"{rows[0]['logistic']:.1f} %", note))
    seconds, samples = run.last("seconds"), run.last("samples")
    if seconds > 0:
        rate = f"{samples / seconds:,.0f} images/s on average" if samples > 0 else ""
        tiles.append(("Training time", _duration(seconds), rate))
    cells = "".join(
        f"<div><dt>{escape(title)}</dt><dd><b>{escape(value)}</b> <small>{escape(note)}</small>"
        "</dd></div>"
        for title, value, note in tiles
    )
    return (
        f"<header><h1>{escape(run.name)}</h1><p class=lede>{escape(lede)}</p>"
        f"<p class=note>{escape(state)}</p></header>"
        + (f"<dl class=tiles>{cells}</dl>" * bool(cells))
    )


def _pictures(run: _Record) -> str:
    if not run.pictures:
        return ""
    parts = []
    for found in run.pictures.values():
        ends = [found[0], found[-1]] if len(found) > 1 else found
        names = ("First evaluation", "Newest evaluation") if len(ends) == 2 else ("Evaluation",)
        figures = [_strip(run, f"{n}, step {step:,}", path)
                   for n, (step, path) in zip(names, ends, strict=True)]  # fmt: skip
        parts.append(f"<div class=pair>{''.join(figures)}</div>")
    note = "Each evaluation shows pictures of its own training batch."
    if run.config.get("recipe") == "mim_pretrain":
        note += " The encoder sees what is not grey in the second column, and nothing else."
        if run.config.get("norm_pix_loss"):
            note += (
                " Predictions are normalised patch by patch; they are drawn with the brightness and"
                " contrast of the true patch."
            )
    return _section("Pictures", f"<p class=note>{note}</p>" + "".join(parts))


def _strip(run: _Record, caption: str, path: Path) -> str:
    """The pictures of one evaluation, a row a sample, cut apart so that the page can space them."""
    try:
        with Image.open(path) as file:
            image = file.convert("L" if file.mode == "L" else "RGB")
    except OSError:
        return ""
    columns = MIM_COLUMNS if run.config.get("recipe") == "mim_pretrain" else ()
    cells, width, height = [image], image.width, image.height
    # `Run.save_pictures` leaves one pixel around every row.
    if columns and not (image.width - 2) % len(columns):
        width = (image.width - 2) // len(columns)
        side = run.encoder.get("img_size", width)
        height = int(side[0] if isinstance(side, list | tuple) else side)
        if (image.height - 1) % (height + 1):
            height = image.height - 2
        cells = [
            image.crop((x, y, x + width, y + height))
            for y in range(1, image.height - height, height + 1)
            for x in range(1, image.width - width, width)
        ]
    else:
        columns = ()
    heads = "".join(f"<span>{escape(name)}</span>" for name in columns)
    small = width <= 96
    style = f"--n:{len(columns) or 1};--side:{88 if small else min(width, 720)}px"
    images = "".join(f'<img alt="" src="{_png(cell)}">' for cell in cells)
    label = f"{caption}: {', '.join(columns)}" if columns else caption
    return (
        f"<figure><figcaption>{escape(caption)}</figcaption>"
        f'<div role=img aria-label="{escape(label)}" class="strip{" small" * small}"'
        f' style="{style}">{heads}{images}</div></figure>'
    )


def _probe_rows(run: _Record) -> list[dict]:
    rows = run.probe.get("rows")
    return [r for r in rows if isinstance(r, dict)] if isinstance(rows, list) else []


def _probe(run: _Record) -> str:
    if not (rows := _probe_rows(run)):
        return ""
    body = ""
    for row in rows:
        cells = [row.get("features", "?"), row.get("readout", "–")]
        body += f"<tr><th scope=row>{escape(str(cells[0]))}</th><td>{escape(str(cells[1]))}</td>"
        for key in ("logistic", "knn"):
            value, ci = row.get(key), row.get(f"{key}_ci")
            text = f"{value:.1f} %" if _is_number(value) else "–"
            if isinstance(ci, list) and len(ci) == 2 and all(map(_is_number, ci)):
                text += f" <small>{ci[0]:.1f} – {ci[1]:.1f}</small>"
            body += f"<td>{text}</td>"
        body += "</tr>"
    counts = [f"{run.probe[k]:,} {what}" for k, what in (("train", "for training"),
              ("test", "for testing")) if _is_number(run.probe.get(k))]  # fmt: skip
    note = f"Accuracy of a classifier on frozen features. Data: {run.probe.get('data', '?')}"
    note += "".join(f", {c}" for c in counts) + ". Small figures: 95 % interval."
    if skipped := run.probe.get("skipped"):
        note += (
            f" {len(skipped) if isinstance(skipped, list) else skipped} pictures were unreadable."
        )
    table = (
        "<div class=scroll><table><thead><tr><th scope=col>Features<th scope=col>Readout"
        "<th scope=col>Logistic regression<th scope=col>Nearest neighbours</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )
    return _section("Linear probe", f"<p class=note>{escape(note)}</p>{table}")


def _curves(run: _Record) -> str:
    names = [n for n in CURVES if n in run.log]
    names += [n for n in run.log if n not in (*CURVES, *COUNTERS)]
    figures = "".join(_curve(name, *run.series(name)) for name in names)
    if not figures:
        return _section("Curves", "<p class=note>No line of metrics.jsonl yet.</p>")
    note = (
        "Over optimiser steps. Where a point stands for many steps, the line is their mean and the "
        "shade their range."
    )
    return _section("Curves", f"<p class=note>{note}</p><div class=curves>{figures}</div>")


def _curve(name: str, steps: np.ndarray, epochs: np.ndarray, values: np.ndarray) -> str:
    """One figure: a line of at most MAX_POINTS points, gaps where nothing was finite."""
    title, unit = CURVES.get(name, (name, ""))
    caption = f"<figcaption>{escape(title)}</figcaption>"
    values = np.where(np.abs(values) < 1e30, values, np.nan)  # beyond it no axis makes sense
    if not np.isfinite(values).any():
        return f"<figure>{caption}<p class=note>No finite value yet.</p></figure>" * bool(
            len(steps)
        )
    parts = np.array_split(np.arange(len(values)), min(len(values), MAX_POINTS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a stretch without a finite value: NaN
        means = np.array([np.nanmean(values[p]) for p in parts])
        bounds = np.array([(np.nanmin(values[p]), np.nanmax(values[p])) for p in parts])
    ends = np.array([p[-1] for p in parts])
    finite = means[np.isfinite(means)]
    low, high = float(finite.min()), float(finite.max())
    log = name in WIDE_RANGE and 0 < low < high / 50 and not (bounds <= 0).any()
    x_of, x_ticks = _axis(steps[ends[0]], steps[-1], LEFT, WIDTH - RIGHT)
    y_of, y_ticks = _axis(low, high, HEIGHT - BOTTOM, TOP, log)

    xs, ys = x_of(steps[ends].astype(float)), y_of(means)
    tops, floors = (np.clip(y_of(b), TOP, HEIGHT - BOTTOM) for b in (bounds[:, 1], bounds[:, 0]))
    line = band = dots = ""
    seen = np.isfinite(means)
    runs = [list(g) for ok, g in itertools.groupby(range(len(means)), lambda i: seen[i]) if ok]
    for group in runs:
        points = [f"{xs[i]:.1f},{ys[i]:.1f}" for i in group]
        line += f"<polyline points='{' '.join(points)}'/>"
        if len(parts) < len(values):
            edge = [f"{xs[i]:.1f},{tops[i]:.1f}" for i in group]
            edge += [f"{xs[i]:.1f},{floors[i]:.1f}" for i in reversed(group)]
            band += f"<polygon points='{' '.join(edge)}'/>"
        if len(group) == 1 or name in EVALUATED:
            dots += "".join(f"<circle cx={xs[i]:.1f} cy={ys[i]:.1f} r=3 />" for i in group)
    axes = "".join(
        f"<line x1={LEFT} x2={WIDTH - RIGHT} y1={y:.1f} y2={y:.1f} />"
        f"<text x={LEFT - 6} y={y + 4:.1f} text-anchor=end>{text}</text>"
        for y, text in y_ticks
    ) + "".join(
        f"<text x={min(x, WIDTH - 22):.1f} y={HEIGHT - 6} text-anchor=middle>{text}</text>"
        for x, text in x_ticks
    )
    readout = [
        [round(float(xs[i]), 1), round(float(ys[i]), 1),
         f"step {steps[ends[i]]:,.0f}" + f" · epoch {_number(epochs[ends[i]])}"
         * bool(np.isfinite(epochs[ends[i]])) + f" · {_number(means[i])}{unit}"]
        for i in np.flatnonzero(seen)
    ]  # fmt: skip
    lost = int((~np.isfinite(values)).sum())
    last = f"{_number(finite[-1])}{unit}" + f" · {lost:,} not finite" * bool(lost)
    last += " · logarithmic" * log
    points = escape(json.dumps(readout))
    return (
        f"<figure>{caption}<output data-rest='{escape(last)}'>{escape(last)}</output>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{escape(title)} over steps"'
        f' data-points="{points}"><g class=axes>{axes}</g><g class=band>{band}</g>'
        f"<g class=line>{line}{dots}</g><circle class=cursor r=4 hidden /></svg></figure>"
    )


def _axis(low: float, high: float, start: int, end: int, log: bool = False):
    """Value -> SVG coordinate, and the ticks (coordinate, text)."""
    if log:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 5) if len(exponents) < 4 else (1,)
        ticks = [d * 10.0**e for e in exponents for d in digits if low <= d * 10.0**e <= high]
        ticks = ticks[:: math.ceil(len(ticks) / 6)]
    else:
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value: put it in the middle
            low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
        raw = (high - low) / 4
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
        ticks = list(
            np.arange(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1) * step
        )

    scale = np.log10 if log else np.asarray

    def place(value):
        share = (scale(value) - scale(low)) / (scale(high) - scale(low))
        return start + (end - start) * share

    return place, [(float(place(t)), _number(round(t, 12) if abs(t) > 1e-9 else t)) for t in ticks]


def _settings(run: _Record) -> str:
    config, encoder = run.config, run.encoder
    model: dict[str, Any] = {"Encoder": config.get("encoder")}
    if run.parameters:
        model["Parameters"] = f"{run.parameters:,}"
    if "embed_dim" in encoder and "depth" in encoder:
        model["Blocks"] = f"{encoder['depth']} of width {encoder['embed_dim']}"
    if config.get("encoder") in PRESETS or run.finished:
        model |= _grid(encoder)
    if "objective" in config:
        model["Objective"] = config["objective"]
    if _is_number(config.get("mask_ratio")):
        model["Masked"] = f"{100 * config['mask_ratio']:g} % of the patches"
    training = {"Recipe": config.get("recipe"), "Data": config.get("data")} | _schedule(run)
    for key, title in (("opt", "Optimiser"), ("weight_decay", "Weight decay"),
                       ("precision", "Autocast"), ("seed", "Seed")):  # fmt: skip
        training[title] = config.get(key)

    health: dict[str, Any] = {}
    for key, title in (("bad_steps", "Non-finite steps"), ("skipped", "Pictures skipped")):
        if key in run.log and np.isfinite(run.log[key]).any():
            health[title] = f"{np.nanmax(run.log[key]):,.0f}"
    known = ("recipe", "data", "figures", "config")
    extra = {k: v for k, v in run.made_by.items() if k not in known}
    health |= {k.replace("_", " ").capitalize(): _flat(v) for k, v in extra.items()}
    if run.version:
        health["vim_ssl"] = run.version
    lists = "".join(_facts(t, f) for t, f in
                    (("Model", model), ("Training", training), ("Run", health)))  # fmt: skip
    everything = escape(json.dumps(config, indent=2, ensure_ascii=False))
    details = (
        f"<details><summary>The whole configuration</summary><pre>{everything}</pre></details>"
    )
    return _section("Settings", f"<div class=facts>{lists}</div>" + details * bool(config))


def _grid(encoder: dict[str, Any]) -> dict[str, str]:
    """Picture, patches and tokens, defaults filled in as `VimEncoder` has them."""
    size, patch = encoder.get("img_size", 224), encoder.get("patch_size", 16)
    stride, chans = encoder.get("stride") or patch, encoder.get("in_chans", 3)
    try:
        height, width = size if isinstance(size, list | tuple) else (size, size)
        rows, columns = (height - patch) // stride + 1, (width - patch) // stride + 1
    except (TypeError, ValueError, ZeroDivisionError):
        return {}
    overlap = f" every {stride} px" if stride != patch else ""
    return {
        "Picture": f"{height} × {width} px, {chans} channel" + "s" * (chans != 1),
        "Patch": f"{patch} × {patch} px{overlap}",
        "Tokens": f"{rows} × {columns} = {rows * columns:,} an image",
    }


def _schedule(run: _Record) -> dict[str, str]:
    """Batch, learning rate, epochs and steps; processes and epoch length follow from the log."""
    config, facts = run.config, {}
    step, epoch, samples = (run.last(k) for k in ("step", "epoch", "samples"))
    batch, pile = config.get("batch_size"), config.get("accumulation", 1)
    if _is_number(batch) and step > 0 and samples > 0:
        world = max(round(samples / step / (batch * pile)), 1)
        facts["Effective batch"] = f"{batch * pile * world:,} = {batch} × {pile} (accumulation)"
        facts["Effective batch"] += f" × {world} (processes)"
        base, unit = config.get("base_lr"), config.get("lr_reference_batch")
        if _is_number(base) and _is_number(unit):
            facts["Peak learning rate"] = _number(base * batch * pile * world / unit)
    if epoch > 0 and _is_number(config.get("epochs")):
        steps = round(step / epoch) * config["epochs"]
        steps = min(steps, config.get("max_steps") or steps)
        facts["Epochs"] = f"{_number(epoch)} of {config['epochs']}"
        facts["Steps"] = f"{step:,.0f} of {steps:,}"
    seconds = run.last("seconds")
    if seconds > 0:
        facts["Time"] = _duration(seconds)
    return facts


def _facts(title: str, facts: dict[str, Any]) -> str:
    rows = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>"
                   for k, v in facts.items() if v not in (None, ""))  # fmt: skip
    return f"<div><h3>{title}</h3><dl>{rows}</dl></div>" if rows else ""


def _use(run: _Record) -> str:
    path = run.folder.resolve()
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    name, width = path.as_posix(), run.encoder.get("embed_dim", "embed_dim")
    code = USE.substitute(run=repr(name), d=width)
    probe = f"vim-ssl linear-probe --encoder {shlex.quote(name)} --data YOUR_LABELLED_DATA"
    note = "" if run.finished else "<p class=note>Works once the run has written its encoder.</p>"
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: float) -> str:
    if 1e4 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_flat(v)}" for k, v in value.items())
    return ", ".join(map(_flat, value)) if isinstance(value, list) else str(value)


USE = Template("""\
import torch, vim_ssl
from PIL import Image

encoder = vim_ssl.load_encoder($run)
transform = vim_ssl.create_transform(encoder)
with torch.inference_mode():
    x = transform(Image.open("picture.png"))[None]
    features = encoder(x)                   # (1, $d)
    tokens = encoder.forward_features(x)    # (1, tokens, $d)
""")

# The policy lets the page ask for nothing: not even a slip of ours can.
PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$body
</main>
<script>$script</script>
</body>
</html>
""")

STYLE = """
:root { color-scheme: light dark; --back: #fcfcfb; --text: #202326; --soft: #5d6469;
  --rule: #dfe2e3; --line: #0b6b74; --code: #f1f3f3; }
@media (prefers-color-scheme: dark) { :root { --back: #15181a; --text: #e3e6e7; --soft: #9aa3a8;
  --rule: #30363a; --line: #63c5cd; --code: #1e2326; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1180px; margin: auto; padding: 40px 20px 80px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 0 0 .5rem; }
h3, figcaption { font-size: .95rem; font-weight: 600; margin: 0 0 .25rem; }
section { border-top: 1px solid var(--rule); margin-top: 2.5rem; padding-top: 1.25rem; }
.lede { font-size: 1.1rem; max-width: 48em; margin: 0; }
.note, small, output, .strip span, dt { color: var(--soft); }
.note { max-width: 48em; margin: .25rem 0 1rem; font-size: .9rem; }
figure, dl, dd { margin: 0; }
.tiles { display: grid; gap: 1.25rem 2rem; margin-top: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 200px), 1fr)); }
.tiles dt { font-size: .85rem; }
.tiles b { display: block; font-size: 1.6rem; font-weight: 600; line-height: 1.3; }
.pair { display: flex; flex-wrap: wrap; gap: 2rem 4rem; margin-bottom: 2rem; }
.pair figure { flex: 0 1 auto; min-width: 0; max-width: min(100%, 558px); }
.strip { display: grid; gap: 4px; align-items: end;
  grid-template-columns: repeat(var(--n), minmax(0, var(--side))); }
.strip span { font-size: .75rem; line-height: 1.2; }
.strip img { width: 100%; display: block; }
.small img { image-rendering: pixelated; }
.curves { display: grid; gap: 1.75rem 2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
svg { width: 100%; display: block; touch-action: pan-y; }
output { display: block; font-size: .85rem; }
.axes line { stroke: var(--rule); }
.axes text { fill: var(--soft); font-size: 12px; }
.line { stroke: var(--line); stroke-width: 1.8; stroke-linejoin: round; fill: none; }
.line circle, .cursor { fill: var(--line); stroke: var(--back); }
.cursor[hidden] { display: none; }
.band { fill: var(--line); opacity: .18; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; overflow-wrap: normal; }
th, td { text-align: left; padding: .4rem 1.5rem .4rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
tbody th { font-weight: 400; }
tbody tr:first-child > * { font-weight: 600; }
td small { font-weight: 400; white-space: nowrap; }
.facts { display: grid; gap: 1.5rem 3rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.facts dl { display: grid; grid-template-columns: 9.5em 1fr; gap: .2rem 1rem; font-size: .9rem; }
details { margin-top: 1.5rem; font-size: .9rem; }
pre { background: var(--code); padding: .9rem 1rem; border-radius: 6px; overflow-x: auto;
  font: .85rem/1.5 ui-monospace, monospace; overflow-wrap: normal; margin: .75rem 0; }
.code { position: relative; }
.code button { position: absolute; top: .5rem; right: .5rem; font: .8rem system-ui, sans-serif; }
"""

SCRIPT = """
for (const svg of document.querySelectorAll("svg[data-points]")) {
  const points = JSON.parse(svg.dataset.points), cursor = svg.querySelector(".cursor");
  const output = svg.parentNode.querySelector("output");
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const near = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    cursor.setAttribute("cx", near[0]);
    cursor.setAttribute("cy", near[1]);
    cursor.removeAttribute("hidden");
    output.textContent = near[2];
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("hidden", "");
    output.textContent = output.dataset.rest;
  });
}
if (navigator.clipboard) for (const block of document.querySelectorAll(".code")) {
  const button = block.appendChild(document.createElement("button"));
  button.textContent = "Copy";
  button.onclick = () => navigator.clipboard.writeText(block.querySelector("code").textContent)
    .then(() => { button.textContent = "Copied"; });
}
"""
