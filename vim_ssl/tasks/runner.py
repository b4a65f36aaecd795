"""Train in a run directory and write the results: code shared by recipes and tasks.

open the run → fit, saving the model with every checkpoint → conclude → close
"""

import contextlib
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from vim_ssl.checkpoints.identity import encoder_hash, model_hash
from vim_ssl.data.dataset import ImageData
from vim_ssl.data.identity import TrainingRecord, describe_training
from vim_ssl.data.loading.streamed import ImageStream
from vim_ssl.evaluation.seen import Exposure, earlier_trainings, exposure, is_resumed, record_of
from vim_ssl.metrics.titles import split_name
from vim_ssl.models.freezing import Freezable
from vim_ssl.report import write_report
from vim_ssl.training.accelerator import make_average
from vim_ssl.training.config import TrainConfig
from vim_ssl.training.loop import fit
from vim_ssl.training.resume import outside
from vim_ssl.training.run import Run
from vim_ssl.utils.environment import environment
from vim_ssl.utils.files import atomic_write, optional_output
from vim_ssl.utils.names import number, plural


@dataclass
class Training:
    """A training in progress, passed to the callbacks of `train_run`.

    Attributes:
        run: the open run directory.
        scope: entries of metrics.json: ``trained_parameters``, their number, and ``frozen``, True
            for a frozen encoder.
        model: the model to evaluate: the moving average if there is one.
        save: writes the model into the run; keyword arguments are added to its record.
        evaluator: the result of ``evaluate`` of `train_run`.
        exposure: what earlier trainings used of the test images.
    """

    run: Run
    scope: dict[str, Any]
    model: Any
    save: Callable[..., None]
    evaluator: Any = None
    exposure: Exposure | None = None


def train_run(
    name: str,
    config: TrainConfig,
    objective: nn.Module,
    samples: Any,
    accelerator: Any,
    *,
    model: Any,
    data: str,
    splits: tuple[ImageData, ImageData] | None = None,
    source: str = "",
    save: Callable[..., object] | None,
    what: str = "encoder",
    record: dict[str, Any] | None = None,
    prepare: Callable[[Run], None] | None = None,
    evaluate: Callable[[Training], Callable[[], dict[str, float]]] | None = None,
    should_stop: Callable[[Training], bool] | None = None,
    conclude: Callable[[Training], dict[str, Any]] | None = None,
    depends_on: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Train ``objective`` in the run directory of ``config``; resume if ``config.resume`` is auto.

    Args:
        name: recipe or task name, for the records.
        objective, samples: see `fit`. With ``config.frozen`` the objective is `Freezable`, and its
            encoder is frozen.
        model: the model to average and save: an encoder, or an objective with its heads.
        data: name of the training data, for the record.
        splits: the images whose labels are learnt, and the test images; which these are is stored
            with the weights. Without it, the images of ``samples`` are stored, at the end.
        source: the run, preset or file that the encoder came from; default: ``config.encoder``.
        save: ``save(folder, ema=average or None, record=dict)`` writes the model. It is called on
            the main process with every checkpoint.
        what: the saved model in messages: "encoder" or "model".
        record: additional entries of the model's record.
        prepare: called on the main process once the run is open.
        evaluate: returns the evaluator, which is called every ``eval_every`` epochs on the main
            process and returns metrics to log.
        should_stop: called on the main process after each evaluation; True ends the training.
        conclude: called on the main process after the last step; returns the result. By default
            the model is saved again with the last metrics in its record, and the report is written.
        depends_on: hashes of further content outside the run that it depends on, such as test data;
            see `vim_ssl.training.resume`.
    Returns: the result of ``conclude``, empty on other ranks; by default the metrics logged last,
        and ``run``, the directory.
    Raises: the errors of `Run.open` and `fit`.
    """
    source = source or getattr(config, "encoder", "")
    given = {"encoder": encoder_hash(source) if source else "", **(depends_on or {})}
    needed = outside(objective, model, {what: known for what, known in given.items() if known})
    frozen = getattr(config, "frozen", False)
    if frozen:
        cast(Freezable, objective).freeze_encoder()
    average = make_average(model, config)
    averaged: Any = None if average is None else average.module
    run = Run.open(name, config, accelerator)
    origin: dict[str, Any] = {"recipe": name, "data": data, **(record or {}), **environment()}

    def save_model(**more: Any) -> None:
        if save is not None:
            with run.writing(f"the {what}"):
                save(run.folder, ema=averaged, record=origin | more)

    scope = {"trained_parameters": _count(objective, trained=True), "frozen": frozen}
    training = Training(run, scope, model if averaged is None else averaged, save_model)
    result: dict[str, Any] = {}
    earlier, resumed = earlier_trainings(config, source), is_resumed(config)
    with contextlib.closing(run), run.state.recording():
        if accelerator.is_main_process:
            present = TrainingRecord(name, data, labels=False)
            if splits is not None:
                present = describe_training(name, *splits)
                training.exposure = exposure(
                    earlier, splits[1], splits[0], source=source, spec=getattr(config, "data", ""),
                    split=split_name(splits[1]),
                )  # fmt: skip
                for remark in training.exposure.remarks():
                    print(remark, flush=True)
            origin["trainings"] = record_of(earlier, present, resumed)
            print(_describe(name, config, objective, model, source, accelerator), flush=True)
            if prepare is not None:
                prepare(run)
        if evaluate is not None:
            training.evaluator = evaluate(training)
        logged = fit(
            objective.train(), samples, config, run, accelerator, average=average,
            evaluate=training.evaluator, on_save=save_model,
            should_stop=should_stop and partial(should_stop, training), depends_on=needed,
        )  # fmt: skip
        if conclude is None:
            result = {"run": str(run.folder), **logged}
        if accelerator.is_main_process:
            if conclude is not None:
                result = conclude(training)
            else:
                if logged:  # empty if the run had ended before
                    if isinstance(samples.data, ImageData | ImageStream):
                        present = describe_training(name, samples.data)
                    origin["trainings"] = record_of(earlier, present, resumed)
                    save_model(**{"figures": logged})  # the key that encoder.json has
                _draw_report(run, f"{what.capitalize()}: {run.folder} · report: ")
            run.state.conclude()
    accelerator.end_training()
    return result


def _describe(
    name: str, config: Any, objective: nn.Module, model: Any, source: str, accelerator: Any
) -> str:
    """Describe recipe, preset, encoder and device in one line."""
    encoder = getattr(model, "encoder", model)
    facts = [" ".join(filter(None, (name, getattr(config, "objective", ""))))]
    if config.preset:
        facts.append(f"preset {config.preset}")
    size, trained = (
        f"{number(_count(module, only) / 1e6, 2)} M"
        for module, only in ((encoder, False), (objective, True))
    )
    line = f"encoder {source}: {size} parameters".replace(" :", ":")
    facts.append(line if size == trained else f"{line}, {trained} in training")
    data_config = getattr(encoder, "data_config", getattr(encoder, "pretrained_cfg", None)) or {}
    if shape := data_config.get("input_size"):
        channels, height, width = shape
        frames = f"{encoder.frames} frames of " if getattr(encoder, "reads_clips", False) else ""
        facts.append(f"input {frames}{height} x {width} px, {plural(channels, 'channel')}")
    precision = {"no": "float32"}.get(config.precision, config.precision)
    device = accelerator.device.type
    threads = f", {plural(torch.get_num_threads(), 'thread')}" if device == "cpu" else ""
    return " · ".join([*facts, f"{device}{threads}, {precision}"])


def _count(module: nn.Module, trained: bool = False) -> int:
    """The number of parameters, or of those that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def fingerprints(train: Any, test: Any) -> dict[str, dict[str, str]]:
    """Return the entry of metrics.json that identifies the images of a result."""
    known = {"train": train, "test": test}
    return {"fingerprints": {name: data.fingerprint for name, data in known.items() if data}}


def finish_run(
    where: Run | Path,
    metrics: dict[str, Any],
    summary: Callable[[dict[str, Any]], str],
    *,
    page: Path | None = None,
    exposure: Exposure | None = None,
) -> dict[str, Any]:
    """Write metrics.json, print the summary, and write the report of the run.

    Args:
        where: an open run, or the folder of an evaluation (created if missing).
        summary: metrics -> text to print.
        page: folder of the run that was evaluated; if it is a run, its report is written again.
        exposure: what the weights have seen of the test images; its remarks are added to the
            ``summary`` of the metrics.
    Returns: the metrics; those of a run with ``weights``, the hash of the model in its folder.
    """
    if exposure is not None:
        metrics = metrics | {"seen": exposure.record()}
        if remarks := exposure.remarks():
            metrics["summary"] = [*metrics.get("summary", []), *remarks]
    run = where if isinstance(where, Run) else None
    if run and (weights := model_hash(run.folder)):
        metrics |= {"weights": weights}
    folder = where.folder if isinstance(where, Run) else where
    text = json.dumps(metrics, indent=2, ensure_ascii=False) + "\n"
    with run.writing("metrics.json") if run else contextlib.nullcontext():
        folder.mkdir(parents=True, exist_ok=True)
        # Lone surrogates (from undecodable file names) become JSON escapes.
        atomic_write(folder / "metrics.json", text.encode("utf-8", "backslashreplace"))
    with optional_output("the summary"):
        print(summary(metrics))
    if run:
        with optional_output("report.html"):
            _draw_report(run)
        encoder = shlex.quote(str(run.folder))
        print(f"Predict new data: vim-ssl predict --encoder {encoder} --data NEW_DATA")
    elif page and (page / "metrics.jsonl").exists():
        with optional_output("report.html"):
            print(f"Report: {write_report(page)}")
    return metrics


def _draw_report(run: Run, lead: str = "Report: ") -> None:
    with run.writing("report.html"):
        run.state.conclude()
        print(f"{lead}{write_report(run.folder)}")
