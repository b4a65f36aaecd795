"""Run a trial in its directory: measure, plan, train every job, choose, and test once.

    OUTPUT/config.json    settings                 OUTPUT/trial.csv     a row per finished job
    OUTPUT/trial.json     data and weights         OUTPUT/jobs/         the runs
    OUTPUT/plan.json      costs and plan           OUTPUT/metrics.json, report.html

A killed trial continues: finished jobs have a row, a training resumes from its checkpoint, and what
was measured is read again.
"""

import contextlib
import json
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from vim_ssl.checkpoints.loading import load_encoder, load_for_bands, save_encoder
from vim_ssl.checkpoints.timm_models import same_images
from vim_ssl.data import ImageData, band_arguments
from vim_ssl.data.transforms.image import create_transform
from vim_ssl.evaluation.baselines import pixel_features
from vim_ssl.evaluation.extract import Features, extract_features
from vim_ssl.evaluation.features import encode_splits
from vim_ssl.evaluation.readout import READOUTS, available_readouts
from vim_ssl.metrics.bootstrap import Metric
from vim_ssl.metrics.classification import MAIN_METRIC, target_metrics
from vim_ssl.tasks.trial.arms import (
    FRESH,
    FROZEN,
    PIXELS,
    Arm,
    parent_of,
    stage_of,
    stage_source,
    without,
)
from vim_ssl.tasks.trial.costs import Cost, clock, measure
from vim_ssl.tasks.trial.plan import Job, Plan, make_plan
from vim_ssl.tasks.trial.readings import Reading, Readouts, choose_reading, read
from vim_ssl.tasks.trial.rows import describe, folder_of, read_jobs, slug, write_job
from vim_ssl.tasks.trial.splits import Splits
from vim_ssl.utils.files import atomic_write, read_object
from vim_ssl.utils.names import number, rough_time

ROWS = "trial.csv"
QUIET: dict[str, Any] = {"eval_every": "never", "save_every": 5.0, "trackers": ("none",)}


class Run(Protocol):
    """A finished run; see `vim_ssl.results.Run`."""

    folder: Path

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def metrics(self) -> dict[str, Any]: ...

    @property
    def plan(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Recipes:
    """The functions that train, in this process: `vim_ssl.pretrain` and `vim_ssl.finetune`."""

    pretrain: Callable[..., Run]
    finetune: Callable[..., Run]


class Session:
    """The jobs of a trial.

    Args:
        folder: its directory.
        config: settings; see `vim_ssl.downstream.trial.Config`.
        splits, arms, recipes: what is compared, on what, and how it is trained.
        device: "cpu" or a GPU.
        now: the clock; see `clock`.
    """

    def __init__(
        self, folder: Path, config: Any, splits: Splits, arms: Sequence[Arm], recipes: Recipes,
        device: str, now: Callable[[], float] | None = None,
    ):  # fmt: skip
        self.folder, self.config, self.splits = folder, config, splits
        self.arms, self.recipes, self.device = list(arms), recipes, device
        self.now = now or partial(clock, device)
        self.multi_label = splits.train.multi_label
        self.targets = "multi-label" if self.multi_label else "class"
        self.stored: dict[str, Any] = {}  # of plan.json
        if (folder / "plan.json").exists():
            self.stored = read_object(folder / "plan.json", "the plan of a trial")
            self.arms = without(arms, self.left_out)

    @property
    def left_out(self) -> dict[str, str]:
        """Reasons why arms are left out: they do not fit the encoder, or diverge."""
        return self.stored.get("left_out", {})

    @property
    def diverged(self) -> dict[str, str]:
        """Errors of the jobs that diverged, by `folder_of`."""
        return self.stored.get("diverged", {})

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    # ------------------------------------------------------------ encoders

    @property
    def size(self) -> dict[str, Any]:
        """``encoder`` and ``model_args`` of the trial: those that the recipe chose."""
        return self.stored["size"]

    def fresh(self, seed: int, encoder: str = "") -> str:
        """Folder of an untrained encoder, which is written on first use.

        Args:
            encoder: another one than that of the trial.
        """
        folder = self.folder / "jobs" / f"fresh{'-' + slug(encoder) if encoder else ''}-{seed}"
        if not (folder / "encoder.json").exists():
            torch.manual_seed(seed)
            args = {"num_classes": 0, "use_mask_token": False} | band_arguments(self.splits.train)
            size = self.settings_of(encoder) if encoder else self.size
            made = load_encoder(size["encoder"], **args | size["model_args"])
            save_encoder(made.for_data(self.splits.train), folder)
        return str(folder)

    def settings_of(self, encoder: str) -> dict[str, Any]:
        """``encoder`` and ``model_args`` of another encoder; those of timm get the images and
        patches of the trial's."""
        args = self.config.encoder_args
        if encoder.startswith("timm:"):
            args = same_images(load_encoder(self.fresh(0), num_classes=0)) | args
        return {"encoder": encoder, "model_args": args}

    def source(self, arm: Arm, seed: int) -> str:
        """The encoder that an arm starts from."""
        if arm.source == FRESH:
            return self.fresh(seed, arm.encoder)
        if parent := parent_of(arm, self.arms):
            return self.best(Job(parent.name, seed))["run"]
        return arm.source

    def features(
        self, source: str, seed: int, *splits: ImageData
    ) -> tuple[list[Features], Readouts]:
        """Features of every readout; with `PIXELS` as the source, raw pixels.

        Args:
            seed: of the weights of a ``source`` that is a preset.
        """
        loading = {"workers": self.config.workers}
        if source == PIXELS:
            size = load_encoder(self.fresh(0), num_classes=0)
            return pixel_features(size, splits, **loading)[1], {"pixels": slice(None)}
        torch.manual_seed(seed)
        bands = band_arguments(self.splits.train)
        encoder = load_for_bands(source, bands, num_classes=0, device=self.device)
        encoder = encoder.for_data(self.splits.train).to(self.device).eval()
        features = encode_splits(encoder, splits, cache=False, device=self.device, **loading)
        assert features is not None  # one process
        return features, available_readouts(encoder, READOUTS)

    # ------------------------------------------------------------ trainings

    def pretrain(self, arm: Arm, output: str, seed: int, rate: float, **more: Any) -> Run:
        config = self.config
        settings = QUIET | {"threads": config.threads, "workers": config.workers}
        settings |= arm.settings | config.pretrain_args | more
        if arm.encoder:
            settings |= self.settings_of(arm.encoder)
        elif config.encoder:
            settings |= {"encoder": config.encoder}
        if config.model_args and not arm.encoder:
            settings |= {"model_args": config.model_args}
        settings |= self._rate(arm, rate)
        return self.recipes.pretrain(
            self.splits.unlabelled, output=output, seed=seed, resume="auto", **settings
        )

    def finetune(
        self, arm: Arm, encoder: str, output: str, seed: int, rate: float, **more: Any
    ) -> Run:
        config = self.config
        settings = QUIET | {"threads": config.threads, "workers": config.workers}
        settings |= {"targets": self.targets} | arm.settings | config.finetune_args | more
        settings |= self._rate(arm, rate)
        return self.recipes.finetune(
            encoder, self.splits.labelled, output=output, seed=seed, resume="auto", **settings
        )

    def _rate(self, arm: Arm, factor: float) -> dict[str, float]:
        """The learning rate times a factor; that of a stage is known once it was measured."""
        if factor == 1:
            return {}
        return {"base_lr": factor * self.stored["base_lr"][stage_of(arm, self.arms)]}

    def _seconds(self, train: Callable[[], Any]) -> tuple[Any, float]:
        began = self.now()
        result = train()
        return result, self.now() - began

    # ------------------------------------------------------------ measuring and planning

    def prepare(self, report: Callable[[str], None]) -> Plan:
        """Measure the costs and make the plan, or read them.

        Raises: the errors of `make_plan`.
        """
        if "plan" not in self.stored:
            began = self.now()
            budget = self.budget
            report("Measuring the time of a step of every arm, in turns …")
            costs = self._measure()
            # The pixels first: what is imported and compiled on first use is not counted.
            rows = [(job, *self._seconds(partial(self.run, job, 0.0)))
                    for job in (Job(PIXELS), Job(f"{FRESH}, {FROZEN}"))]  # fmt: skip
            reading = rows[-1][2]
            plan = make_plan(
                self.arms, costs, reading, budget=budget, seeds=self.config.seeds,
                rates=self.config.rates, spent=self.now() - began,
            )  # fmt: skip
            for job, row, _ in rows:
                if job not in self.rows:
                    write_job(self.folder / ROWS, row)
            self._store(
                costs={name: vars(cost) for name, cost in costs.items()}, reading=reading,
                measured=self.now() - began, plan=plan.record(),
            )  # fmt: skip
        return Plan(**self.stored["plan"])

    def discard(self) -> None:
        """Remove what a trial without a plan has written."""
        for name in ("plan.json", "config.json", "trial.log", ROWS):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "jobs", ignore_errors=True)

    @property
    def budget(self) -> float:
        """Seconds of the `clock`: on a CPU those of all threads."""
        threads = max(self.config.threads, 1) if self.device == "cpu" else 1
        return 60 * self.config.minutes * threads

    def _measure(self) -> dict[str, Cost]:
        """Measure a step of every stage; store what the recipes chose for these data."""
        stages = {stage_of(arm, self.arms): arm for arm in reversed(self.arms) if arm.is_trained}
        stages = dict(reversed(stages.items()))
        rates: dict[str, float] = {}
        epochs: dict[str, list[int]] = {}

        def training(name: str, arm: Arm, steps: int) -> float:
            with tempfile.TemporaryDirectory() as folder, self.quiet():
                run, seconds = self._seconds(partial(self._try, arm, folder, steps))
                rates[name] = run.config["base_lr"]
                epochs[name] = [run.plan["epoch_steps"], run.plan["effective_batch"]]
                if arm.kind == "pretrain" and not arm.encoder and "size" not in self.stored:
                    size = {key: run.config[key] for key in ("encoder", "model_args")}
                    self._store(size=size)
            return seconds

        # Pretraining first: it chooses the encoder.
        ordered = sorted(stages.items(), key=lambda one: one[1].kind != "pretrain")
        trainings, unfit = {}, dict[str, str]()
        for name, arm in ordered:  # this also compiles
            train = partial(training, name, arm)
            try:
                train(2)
            except (ValueError, TypeError) as error:
                if arm.kind != "pretrain" or arm is ordered[0][1]:
                    raise
                unfit[arm.name] = f"does not fit: {error}"
            else:
                trainings[name] = train
        self.arms = without(self.arms, unfit)
        costs = measure(trainings, self.now)
        self._store(base_lr=rates, epochs=epochs, left_out=unfit)
        return costs

    def _try(self, arm: Arm, output: str, steps: int) -> Run:
        """A few steps of the stage of an arm."""
        if arm.kind == "pretrain":
            return self.pretrain(arm, output, 0, 1.0, max_steps=steps)
        source = stage_source(arm, self.arms)
        if source in (FRESH, arm.encoder):
            source = self.fresh(0, arm.encoder)
        return self.finetune(arm, source, output, 0, 1.0, max_steps=steps)

    def _store(self, **content: Any) -> None:
        self.stored |= content
        atomic_write(self.folder / "plan.json", json.dumps(self.stored, indent=2) + "\n")

    # ------------------------------------------------------------ jobs

    @property
    def rows(self) -> dict[Job, dict[str, Any]]:
        """The finished jobs."""
        return read_jobs(self.folder / ROWS)

    def best(self, job: Job) -> dict[str, Any]:
        """The row of this arm and seed with the best validation score, of its learning rates."""
        rows = [row for known, row in self.rows.items()
                if (known.arm, known.seed) == (job.arm, job.seed)]  # fmt: skip
        return max(rows, key=lambda row: row["validation"])  # ties: the first

    def run_plan(self, plan: Plan, report: Callable[[str], None]) -> None:
        """Run the jobs that have no row yet."""
        groups = list(plan.jobs(self.arms))
        total, done = sum(map(len, groups)), 0
        weights = [self._estimate(job, plan) for group in groups for job in group]
        for group in groups:
            if group[0].arm in self.left_out:
                done += len(group)
                continue
            jobs = self._with_best_rate(group)
            for job in jobs:
                done += 1
                if job in self.rows or folder_of(job) in self.diverged:
                    continue
                try:
                    row = self.run(job, plan.seconds)
                except FloatingPointError as error:
                    self._store(diverged=self.diverged | {folder_of(job): str(error)})
                    report(f"[{done}/{total}] {describe(job)} diverged: {error}")
                    continue
                write_job(self.folder / ROWS, row)
                left = rough_time(sum(weights[done:]))
                report(f"[{done}/{total}] {describe(job)}: validation {row['validation']:.1f} %, "
                    f"{number(row['seconds'], 3)} s · {left} left")  # fmt: skip
            if self.rows.keys().isdisjoint(jobs):
                self._leave_out(self.arm(group[0].arm), self.diverged[folder_of(jobs[-1])])

    def _leave_out(self, arm: Arm, reason: str) -> None:
        """Go on without an arm whose trainings diverge, and without those that continue it."""
        kept = without(self.arms, [arm.name])
        gone = {one.name: reason for one in self.arms if one not in kept}
        self._store(left_out=self.left_out | gone)
        self.arms = kept

    def _with_best_rate(self, group: Sequence[Job]) -> list[Job]:
        """Later seeds use the learning rate that the first seed chose."""
        if group[0].seed and self.arm(group[0].arm).is_trained:
            rate = float(self.best(Job(group[0].arm, 0))["rate"])
            return [Job(group[0].arm, group[0].seed, rate)]
        return list(group)

    def _estimate(self, job: Job, plan: Plan) -> float:
        """Seconds of a job."""
        arm = self.arm(job.arm)
        seconds = 0.0 if arm.kind == "finetune" else self.stored["reading"]
        if arm.is_trained:
            fixed = self.stored["costs"][stage_of(arm, self.arms)]["fixed"]
            seconds += fixed + arm.share * plan.seconds
        return seconds

    def run(self, job: Job, seconds: float) -> dict[str, Any]:
        """Run one job, or go on with it; return its row.

        Args:
            seconds: of a whole training.
        """
        arm = self.arm(job.arm)
        row: dict[str, Any] = {
            "arm": job.arm, "seed": job.seed, "rate": job.rate, "seconds": 0.0, "epochs": 0.0,
            "images": 0, "run": "",
        }  # fmt: skip
        output = str(self.folder / "jobs" / folder_of(job))
        if not arm.is_trained:
            return row | self._choose(self.source(arm, job.seed), job.seed)
        stage = stage_of(arm, self.arms)
        epoch_steps, batch = self.stored["epochs"][stage]
        steps = max(round(seconds * arm.share / self.stored["costs"][stage]["step"]), 1)
        epochs = steps / epoch_steps
        row |= {"epochs": round(epochs, 3), "images": steps * batch, "run": output}
        with self.quiet():
            if arm.kind == "pretrain":
                call = partial(self.pretrain, arm, output, job.seed, job.rate, epochs=epochs)
            else:
                source = self.source(arm, job.seed)
                call = partial(self.finetune, arm, source, output, job.seed, job.rate,
                               epochs=epochs)  # fmt: skip
            run, spent = self._continued(job, call)
        row["seconds"] = round(spent + self._spent_before(arm, job), 2)
        if arm.kind == "pretrain":
            return row | self._choose(output, job.seed)
        score = run.metrics[MAIN_METRIC[self.targets]]
        return row | {"validation": score, "settings": ""}

    def _continued(self, job: Job, train: Callable[[], Run]) -> tuple[Run, float]:
        """Train; return the run and its seconds, with those before it was stopped."""
        before, began = self.stored.get("stopped", {}).get(folder_of(job), 0.0), self.now()
        try:
            return train(), before + self.now() - began
        except KeyboardInterrupt:
            self._store(stopped={folder_of(job): before + self.now() - began})
            raise

    def _spent_before(self, arm: Arm, job: Job) -> float:
        """Seconds of the arm that this one continues."""
        parent = parent_of(arm, self.arms)
        return self.best(Job(parent.name, job.seed))["seconds"] if parent else 0.0

    def _choose(self, source: str, seed: int) -> dict[str, Any]:
        (train, validation), readouts = self.features(
            source, seed, self.splits.train, self.splits.validation
        )
        reading, score = choose_reading(train, validation, readouts, self.device)
        return {"validation": round(score, 2), "settings": json.dumps(reading.record())}

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Write what a run prints to OUTPUT/trial.log."""
        with (
            open(self.folder / "trial.log", "a", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
            warnings.catch_warnings(),
        ):
            yield

    # ------------------------------------------------------------ test

    def test(self, row: dict[str, Any]) -> tuple[Metric, list[str] | None]:
        """Evaluate a finished job on the test images, with the settings of its row; return the
        metric, and the groups of the images."""
        arm, test = self.arm(row["arm"]), self.splits.test
        if arm.kind != "finetune":
            seed = int(row["seed"])
            source = row["run"] or self.source(arm, seed)
            (bank, queries), readouts = self.features(source, seed, self.splits.train, test)
            reading = Reading(**json.loads(row["settings"]))
            return read(reading, bank, queries, readouts, self.device), queries.groups
        encoder = load_encoder(row["run"], num_classes=None).to(self.device).eval()
        answers = extract_features(
            encoder, test, create_transform(encoder), workers=self.config.workers,
            device=self.device,
        )  # fmt: skip
        metrics = target_metrics(answers.x, answers.y, self.targets)
        return metrics[MAIN_METRIC[self.targets]], answers.groups


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt, as in a run; what is finished has its row."""

    def stop(signum, frame):
        raise KeyboardInterrupt

    handler: Any = None
    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        handler = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
