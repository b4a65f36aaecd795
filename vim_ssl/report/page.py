"""The report of one run, section by section; templates/page.html defines the layout.

"", [] or {} skips a section.
"""

import json
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from vim_ssl.metrics.titles import (
    CHECK_GROUPS,
    CHECK_SIZE,
    CHECK_TRAIN,
    LOGGED,
    Title,
    logged_title,
)
from vim_ssl.report import curve
from vim_ssl.report.images import strips
from vim_ssl.report.record import Record, is_check, is_number
from vim_ssl.report.results import (
    Score,
    baselines,
    main_results,
    mark,
    measured,
    probe_metric,
    probe_rows,
    probes,
    score,
    sentences,
    task_result,
    zero_shot,
)
from vim_ssl.report.settings import duration, settings, state_text
from vim_ssl.report.titles import RECIPES, WIDE_RANGE
from vim_ssl.utils.names import number

COUNTERS = (
    "step", "epoch", "seconds", "samples", "bad_steps", "skipped", CHECK_SIZE, CHECK_GROUPS,
    CHECK_TRAIN,
)  # fmt: skip
PALETTE = 6  # colours of curves in style.css; further curves repeat them with dashes

# Recipe -> what its model predicts, for `vim_ssl.load_model`.
PREDICTED = {
    "finetune": '"image.png").name',
    "supervised_pretrain": '"image.png").name',
    "video": '"video.mp4").name',
    "segmentation": '"image.png")  # (h, w) class numbers',
    "detection": '"image.png")  # boxes, labels, scores',
    "clip_pretrain": '"image.png", classes=["cat", "dog"]).name',
}

templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
templates.globals |= {"plot": curve, "palette": PALETTE}
templates.filters["px"] = "{:.1f}".format


def render(run: Record) -> str:
    """Render the HTML of a run's report. What a damaged file makes impossible to draw is left out
    and named."""
    page, parts = templates.get_template("page.html"), _always(run)
    drawn: dict[str, Any] = {}
    for name, (draw, empty) in SECTIONS.items():
        drawn[name] = empty
        try:
            drawn[name] = draw(run)
        except Exception as error:  # whatever the values in a user's files lead to
            parts["missing"] += [_undrawn(name, error)]
    try:
        return page.render(**parts, **drawn)
    except Exception:
        return page.render(**parts, **_renderable(page, parts, drawn))


def _renderable(page: Template, parts: dict[str, Any], drawn: dict[str, Any]) -> dict[str, Any]:
    """Replace the sections that the template cannot render by empty ones, and name them."""
    kept = {name: empty for name, (_, empty) in SECTIONS.items()}
    for name, section in drawn.items():
        try:
            page.render(**parts, **(kept | {name: section}))
            kept[name] = section
        except Exception as error:  # as above
            parts["missing"] += [_undrawn(name, error)]
    return kept


def _undrawn(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return f"the section {name.replace('_', ' ')} cannot be drawn ({reason})"


def _always(run: Record) -> dict[str, Any]:
    """The parts of a page that any run has."""
    path = run.folder.resolve()
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return {
        "title": run.name,
        "run": run,
        "drawn_at": time.strftime("%Y-%m-%d %H:%M"),
        "missing": run.missing(),
        "run_literal": json.dumps(path.as_posix(), ensure_ascii=False),
        "run_quoted": shlex.quote(path.as_posix()),
        "embed_dim": str(run.encoder.get("embed_dim", "embed_dim")),
        "prediction": PREDICTED.get(str(run.config.get("recipe")), ""),
    }


def _curves(run: Record, checks: bool) -> list[tuple[curve.Plot, str]]:
    """The curves of the in-training checks, or those of the training."""
    return list(plots([run], [name for name in curve_names([run]) if is_check(name) == checks]))


def _config_json(run: Record) -> str:
    return json.dumps(run.config, indent=2, ensure_ascii=False) if run.config else ""


# ---------------------------------------------------------------- header


def _lede(run: Record) -> str:
    config = run.config
    recipe = str(config.get("recipe", ""))
    how = RECIPES.get(recipe, recipe) or "an unknown recipe"
    objective = f" ({config['objective']})" if config.get("objective") else ""
    size = f" with {_parameters(run.parameters)} parameters" if run.parameters else ""
    data = f" on {config['data']}" if config.get("data") else ""
    return f"{config.get('encoder') or 'An encoder'}{size}, trained by {how}{objective}{data}."


def _parameters(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


def _tiles(run: Record) -> Iterator[tuple[str, str, str] | None]:
    """Yield title, value and note of each key metric: final results, else the in-training check."""
    final = [*_result_tiles(run), *_probe_tiles(run)]
    yield from final
    if not final:
        yield _curve_tile(run, "knn_top1")
    yield _curve_tile(run, "loss")
    seconds, samples = run.last("seconds"), run.last("samples")
    if seconds > 0:
        rate = f"{number(samples / seconds, 2)} images/s on average" if samples > 0 else ""
        yield "Training time", duration(seconds), rate


def _result_tiles(run: Record) -> Iterator[tuple[str, str, str]]:
    for title, metrics, key, unit in main_results(run.result.metrics):
        note = mark(run.result, measured(run.result.metrics))
        yield title, *_with_interval(score(metrics, key, unit), note)
        break
    for name, value in baselines(run.result.metrics):
        title = name if name.startswith("kNN") else name[:1].upper() + name[1:]
        yield title, *_with_interval(value, "for comparison")


def _probe_tiles(run: Record) -> Iterator[tuple[str, str, str]]:
    """The linear probe of the encoder and, as a tile of its own, its baselines."""
    for probe in run.probes[:1]:
        rows = [row for row in probe_rows(probe) if is_number(row.get("logistic"))]
        if not rows:
            return
        metric = probe_metric(probe.metrics).lower()
        note = mark(probe, measured(probe.metrics))
        yield f"Linear probe, {metric}", *_with_interval(score(rows[0], "logistic"), note)
        for row in rows[1:]:
            yield (
                f"Linear probe of {row.get('features', '?')}",
                *_with_interval(score(row, "logistic"), "for comparison"),
            )


def _with_interval(value: Score, note: str) -> tuple[str, str]:
    interval = f"95 % interval {value.interval} · " if value.interval else ""
    return value.text, interval + note


def _curve_tile(run: Record, name: str) -> tuple[str, str, str] | None:
    """The newest value of a logged metric, and its first value if there are several."""
    steps, _, values = run.series(name)
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if not len(values):
        return None
    title = _title([run], name)
    start = f"from {number(values[0], 3)}{title.unit} " if len(values) > 1 else ""
    note = f"{start}at step {steps[0]:,.0f}"
    return title.text, f"{number(values[-1], 3)}{title.unit}", note


# ---------------------------------------------------------------- curves


def curve_names(runs: list[Record]) -> list[str]:
    """The logged metrics to draw, those with a title first."""
    logged = dict.fromkeys(name for run in runs for name in run.log if name not in COUNTERS)
    if len(runs) == 1 and _is_pixel_error(runs[0]):
        logged.pop("pixel_mse")
    return [*(name for name in LOGGED if name in logged),
            *(name for name in logged if name not in LOGGED)]  # fmt: skip


def plots(runs: list[Record], names: list[str]) -> Iterator[tuple[curve.Plot, str]]:
    """Yield a plot of each metric, with a curve for each run that logged it, and how it is
    measured."""
    for name in names:
        series = []
        for i, run in enumerate(runs):
            one = run.series(name)
            if len(one[0]):
                label = run.name if len(runs) > 1 else ""
                series.append(curve.Series(*one, label, i, _check_images(run, name)))
        if series:
            title = _title(runs, name)
            yield (
                curve.draw_curves(
                    title.text, series, unit=title.unit, allow_log=name in WIDE_RANGE
                ),
                title.how,
            )


def _check_images(run: Record, name: str) -> int:
    """The number of images, or of their groups, of an accuracy that an in-training check measured;
    0 if unknown."""
    groups = run.last(CHECK_GROUPS)
    count = groups if groups > 0 else run.last(CHECK_SIZE)
    return round(count) if is_check(name) and name.endswith("_top1") and count > 0 else 0


def _title(runs: list[Record], name: str) -> Title:
    run = next(run for run in runs if name in run.log)
    newest = {key: run.last(key) for key in run.log}
    known = {key: value for key, value in newest.items() if is_number(value)}
    return logged_title(name, known, run.config)


def _is_pixel_error(run: Record) -> bool:
    """True if the loss is the pixel error, as of mae without norm_pix_loss: one curve is enough."""
    return {"loss", "pixel_mse"} <= run.log.keys() and np.allclose(
        run.log["pixel_mse"], run.log["loss"], rtol=1e-6, atol=0, equal_nan=True
    )


# Part of the template → the function that draws it, and its value if nothing can be drawn.
SECTIONS: dict[str, tuple[Callable[[Record], Any], Any]] = {
    "lede": (_lede, ""),
    "state": (state_text, ""),
    "tiles": (lambda run: list(filter(None, _tiles(run))), []),
    "sentences": (sentences, []),
    "result": (task_result, {}),
    "strips": (strips, []),
    "probes": (probes, []),
    "zero_shot": (lambda run: list(filter(None, map(zero_shot, run.zero_shot))), []),
    "checks": (lambda run: _curves(run, True), []),
    "curves": (lambda run: _curves(run, False), []),
    "settings": (settings, {}),
    "config_json": (_config_json, ""),
}
