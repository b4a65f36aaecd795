"""The page of a trial: the verdict, accuracy against time, and every arm with its interval."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from vim_ssl.report import curve
from vim_ssl.report.page import templates
from vim_ssl.report.record import Record, is_number, read_table
from vim_ssl.report.results import measured, probe_metric, probe_rows, score, summary

PIXELS = "raw pixels"  # a source of `vim_ssl.tasks.trial.arms`


def is_trial(run: Record) -> bool:
    return run.config.get("recipe") == "trial"


def render_trial(run: Record) -> str:
    """Render the HTML of a trial, finished or not."""
    metrics, rows = run.result.metrics, probe_rows(run.result)
    names, lines = _lines(rows)
    plan: Any = metrics.get("plan")
    plan = plan if isinstance(plan, dict) else {}
    left_out: Any = plan.get("left_out")
    reasons: Any = metrics.get("left_out")
    reasons = reasons if isinstance(reasons, dict) else {}
    plot = None
    if lines:
        plot = curve.draw_curves(probe_metric(metrics), lines, unit=" %", along="second")
    return templates.get_template("trial.html").render(
        title=run.name, run=run, drawn_at=time.strftime("%Y-%m-%d %H:%M"),
        sentences=summary(metrics), curves=[(plot, "test images, mean over seeds")] if plot else [],
        names=names, rows=[_row(row) for row in rows],
        done=len(read_table(run.folder / "trial.csv")),
        note=f"{probe_metric(metrics)}, {measured(metrics)}" if rows else "",
        differences=list(_differences(metrics)),
        reasons=[f"{name}: {why}" for name, why in reasons.items()],
        left_out=[str(text) for text in left_out] if isinstance(left_out, list) else [],
    )  # fmt: skip


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """One arm, as text."""
    settings: Any = row.get("settings")
    used = dict.fromkeys(filter(None, map(str, settings if isinstance(settings, list) else ())))
    rate = row.get("rate")
    if is_number(rate) and rate != 1:
        used[f"learning rate times {rate:g}"] = None
    values: Any = row.get("values")
    values = [f"{v:.1f}" for v in values if is_number(v)] if isinstance(values, list) else []
    seconds = row.get("planned_seconds")
    return {
        "name": str(row.get("arm", "–")), "chosen": row.get("chosen") is True,
        "time": f"{seconds:.0f} s" if is_number(seconds) else "–",
        "validation": score(row, "validation"), "test": score(row, "accuracy"),
        "values": ", ".join(values), "how": "; ".join(used),
    }  # fmt: skip


def _differences(metrics: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the two arms, the points and the interval of every difference that decides."""
    rows: Any = metrics.get("differences")
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and is_number(row.get("points")):
            ci: Any = row.get("ci")
            text = f"{ci[0]:+.1f} to {ci[1]:+.1f}" if ci else "none"
            yield f"{row.get('arm')} − {row.get('over')}", f"{row['points']:+.1f} points", text


def _start(row: dict[str, Any]) -> tuple[Any, Any]:
    """The weights that an arm starts from."""
    return row.get("source"), row.get("encoder")


def _lines(rows: list[dict[str, Any]]) -> tuple[list[str], list[curve.Series]]:
    """Return name and curve of every source of weights: from its frozen features at no time, over
    pretraining, to fine-tuning."""
    known = {row.get("arm"): row for row in rows if is_number(row.get("planned_seconds"))}
    end = max((row["planned_seconds"] for row in known.values()), default=0.0)
    frozen = {_start(row): row for row in known.values() if row.get("kind") == "frozen"}
    ways: dict[str, list[dict[str, Any]]] = {}
    for start, row in frozen.items():
        tuned = [one for one in known.values()
                 if _start(one) == start and one.get("kind") == "finetune"]  # fmt: skip
        ways[str(row["arm"]).rpartition(",")[0] or PIXELS] = [row, *tuned]
        if row.get("source") == PIXELS:
            ways[PIXELS].append(row | {"planned_seconds": end})
    for name, row in known.items():
        if row.get("kind") == "pretrain":
            tuned = [one for one in known.values() if one.get("source") == name]
            before = [frozen[start]] if (start := _start(row)) in frozen else []
            ways[str(name).rpartition(",")[0]] = [*before, row, *tuned]
    lines = []
    for colour, way in enumerate(ways.values()):
        way = [row for row in way if is_number(row.get("accuracy"))]
        seconds = np.array([row["planned_seconds"] for row in way], float)
        values = np.array([row["accuracy"] for row in way], float)
        lines.append(curve.Series(seconds, np.full(len(way), np.nan), values, "", colour))
    for line, name in zip(lines, ways, strict=True):
        line.label = name
    return list(ways), lines
