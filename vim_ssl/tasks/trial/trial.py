"""`run_trial`: from settings to a verdict."""

import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vim_ssl.metrics.bootstrap import Metric
from vim_ssl.metrics.sentences import metric_text
from vim_ssl.metrics.titles import measured_on, split_name
from vim_ssl.report import write_report
from vim_ssl.tasks.runner import finish_run
from vim_ssl.tasks.trial.arms import OTHER, PIXELS, PRETRAINED, Arm, make_arms, parent_of
from vim_ssl.tasks.trial.plan import Job, Plan
from vim_ssl.tasks.trial.readings import Reading
from vim_ssl.tasks.trial.session import Recipes, Session, stopping
from vim_ssl.tasks.trial.splits import Splits
from vim_ssl.tasks.trial.verdict import UNDECIDED, Spread, Verdict, decide, difference, mean_of
from vim_ssl.training.folders import new_folder
from vim_ssl.utils.config import to_dict
from vim_ssl.utils.distributed import pick_device
from vim_ssl.utils.environment import environment
from vim_ssl.utils.files import atomic_write
from vim_ssl.utils.names import plural, rough_time
from vim_ssl.utils.resumable import IMAGE_FILES, claim_output

RECORD, LOCK = "trial.json", ".lock"
FAMILIES = (PRETRAINED, OTHER, PIXELS)


def run_trial(
    config: Any, recipes: Recipes, now: Callable[[], float] | None = None
) -> dict[str, Any]:
    """Run a trial, or go on with it; return the content of metrics.json.

    Args:
        config: see `vim_ssl.downstream.trial.Config`; its ``output`` is set.
        recipes: the functions that train.
        now: the clock in seconds; by default that of `vim_ssl.tasks.trial.costs.clock`.
    Raises: FileExistsError for a directory with a trial, without ``resume``; ValueError for other
        settings or images than those of the trial there, and if the time is too short;
        BlockingIOError while another process runs it; SystemExit(0) after SIGTERM or SIGINT.
    """
    folder = Path(config.output or new_folder("trial"))
    config.output = str(folder)
    if (folder / RECORD).exists() and config.resume != "auto":
        raise FileExistsError(
            f"{folder} already holds a trial; go on with --resume auto, or choose another --output."
        )
    splits = Splits.open(config.data, config.test, config.validation, config.seed)
    settings = {k: v for k, v in to_dict(config).items() if k not in ("output", "resume")}
    strangers = [] if not folder.exists() else [p for p in folder.iterdir() if p.name != LOCK]
    images = {"images": splits.fingerprints, IMAGE_FILES: splits.times}
    lock = claim_output(
        folder, folder / RECORD, settings | images, environment(),
        what="a trial", lock=folder / LOCK, strangers=strangers,
    )  # fmt: skip
    try:
        stored = {"recipe": "trial", **to_dict(config)}
        atomic_write(folder / "config.json", json.dumps(stored, indent=2) + "\n")
        with stopping():
            return _run(folder, config, splits, recipes, now)
    except KeyboardInterrupt:
        print(f"\nStopped; finished jobs are in {folder}. Continue with:\n"
              f"  vim-ssl trial --output {shlex.quote(str(folder))} --resume auto")  # fmt: skip
        sys.exit(0)
    finally:
        lock.release()


def _run(
    folder: Path, config: Any, splits: Splits, recipes: Recipes, now: Callable[[], float] | None
) -> dict[str, Any]:
    device = pick_device()
    if device == "cpu":
        torch.set_num_threads(max(config.threads, 1))
    arms = make_arms(config.objectives, config.weights, config.encoders, config.teacher)
    session = Session(folder, config, splits, arms, recipes, device, now)
    report(f"Trial: {folder} · {splits.train.name}: {len(splits.train):,} train, "
        f"{len(splits.validation):,} validation, {len(splits.test):,} test")  # fmt: skip
    try:
        plan = session.prepare(report)
    except ValueError:  # a refusal; other settings may follow in the same directory
        session.discard()
        (folder / RECORD).unlink(missing_ok=True)
        raise
    for line in describe_plan(plan, session):
        report(line)
    session.run_plan(plan, report)
    metrics = conclude(session, plan) | {"protocol": to_dict(config), **environment()}
    metrics = finish_run(folder, metrics, table)
    report(f"Report: {write_report(folder)}")
    return metrics


def report(text: str) -> None:
    print(text, flush=True)


def describe_plan(plan: Plan, session: Session) -> list[str]:
    """Return what will be run, its estimated time, and what is left out."""
    per = "processor time" if session.device == "cpu" else "GPU time"
    measured = rough_time(session.stored["measured"])
    lines = [
        f"Plan: {plural(len(plan.arms), 'arm')}, {plural(plan.seeds, 'seed')}, "
        f"{rough_time(plan.seconds)} of {per} each; about {rough_time(plan.estimate)} in all, "
        f"after {measured} of measuring."
    ]
    for name, reason in session.left_out.items():
        lines.append(f"{name}: {reason}")
    if plan.left_out:
        lines.append(f"Left out, to fit into the time: {'; '.join(plan.left_out)}.")
    return lines


# ---------------------------------------------------------------- results


def conclude(session: Session, plan: Plan) -> dict[str, Any]:
    """Choose by the validation scores, then test every arm; return the entries of metrics.json."""
    arms = [arm for arm in session.arms if arm.name in plan.arms]
    rows = {arm.name: _rows(session, arm, plan.seeds) for arm in arms}
    chosen = {arm.family: _best(arms, rows, arm.family) for arm in arms}
    metrics: dict[str, list[Metric]] = {}
    groups: list[str] | None = None
    for arm in arms:
        tested = [session.test(row) for row in rows[arm.name]]
        metrics[arm.name], groups = [metric for metric, _ in tested], tested[0][1]
    verdict, differences = _verdict(session, chosen, metrics, groups)
    seed, test = session.config.seed, session.splits.test
    table_rows = []
    for arm in arms:
        of_arm, mean = rows[arm.name], mean_of(metrics[arm.name])
        table_rows.append({
            "arm": arm.name, "family": arm.family, "kind": arm.kind, "source": arm.source,
            "encoder": arm.encoder,
            "chosen": arm in chosen.values(), "seeds": len(of_arm),
            "seconds": round(_mean(of_arm, "seconds"), 2),
            "planned_seconds": round(_planned(arm, arms) * plan.seconds, 2),
            "validation": round(_mean(of_arm, "validation"), 2),
            "rate": float(of_arm[-1]["rate"]) if arm.is_trained else None,
            "settings": [str(Reading(**json.loads(row["settings"]))) if row["settings"] else ""
                         for row in of_arm],
            "values": [round(metric.value, 2) for metric in metrics[arm.name]],
            **mean.entries("accuracy", groups, seed=seed),
        })  # fmt: skip
    return {
        "task": "trial", "data": session.config.data, "split": split_name(test),
        "n": metrics[PIXELS][0].n, "figure": "mAP" if session.multi_label else "accuracy",
        "train": len(session.splits.train), "validation": len(session.splits.validation),
        "test": len(test), "fingerprints": session.splits.fingerprints,
        "plan": plan.record(), "left_out": session.left_out,
        "costs": session.stored["costs"], "rows": table_rows,
        "differences": differences, "verdict": verdict.kind, "summary": [verdict.sentence],
    }  # fmt: skip


def _rows(session: Session, arm: Arm, seeds: int) -> list[dict[str, Any]]:
    """The row of every seed; a single one of an arm without seeds."""
    return [session.best(Job(arm.name, seed)) for seed in range(seeds if arm.has_seeds else 1)]


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return math.fsum(row[key] for row in rows) / len(rows)


def _planned(arm: Arm, arms: Sequence[Arm]) -> float:
    """Share of the time of a training, with that of the arm that it continues."""
    parent = parent_of(arm, arms)
    return arm.share + (parent.share if parent else 0.0)


def _best(arms: Sequence[Arm], rows: dict[str, list[dict[str, Any]]], family: str) -> Arm:
    """The arm of a family with the best mean validation score; the first one on a tie."""
    return max((arm for arm in arms if arm.family == family),
               key=lambda arm: _mean(rows[arm.name], "validation"))  # fmt: skip


def _verdict(
    session: Session, chosen: dict[str, Arm], metrics: dict[str, list[Metric]],
    groups: list[str] | None,
) -> tuple[Verdict, list[dict[str, Any]]]:  # fmt: skip
    """Compare the chosen arms of the three families."""
    config, made, records = session.config, [], []
    spread = Spread.pooled([metric.value for metric in many] for many in metrics.values())
    for first, second in ((PRETRAINED, OTHER), (PRETRAINED, PIXELS), (OTHER, PIXELS)):
        if first not in chosen:
            continue
        one, other = chosen[first], chosen[second]
        made.append(difference(
            metrics[one.name], metrics[other.name], spread, (one.has_seeds, other.has_seeds),
            groups, seed=config.seed,
        ))  # fmt: skip
        records.append({"arm": one.name, "over": other.name, **made[-1].record()})
    if PRETRAINED not in chosen:
        return Verdict(UNDECIDED, (
            "No difference can be established: every pretraining diverged; try smaller --rates, "
            "such as 0.1."
        )), records  # fmt: skip
    names = tuple(chosen[family].name for family in FAMILIES)
    verdict = decide(names, tuple(made), config.margin, config.minutes)  # type: ignore[arg-type]
    return verdict, records


def table(metrics: dict[str, Any]) -> str:
    """Format the rows, the differences that decide, and the verdict."""
    lines = ["", f"{'arm':44} {'seconds':>8} {'validation':>10}  test"]
    for row in metrics["rows"]:
        name, test = row["arm"] + " *" * row["chosen"], metric_text(row, "accuracy", width=5)
        numbers = f"{row['planned_seconds']:8.1f} {row['validation']:8.1f} %"
        lines.append(f"{name:44} {numbers}  {test}")
    where = measured_on(metrics["split"], metrics["n"])
    lines += [f"{where}; mean over seeds, 95 % interval over images; * chosen on validation."]
    for row in metrics["differences"]:
        ci = "none" if row["ci"] is None else f"{row['ci'][0]:.1f}, {row['ci'][1]:.1f}"
        lines.append(f"{row['arm']} - {row['over']}: {row['points']:+.1f} points [{ci}]")
    return "\n".join([*lines, "", *metrics["summary"]])
