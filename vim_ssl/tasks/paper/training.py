"""Claims about accuracy, scaled down: supervised trainings of a small encoder at equal time.

Every arm trains for the same seconds of one thread's processor time, which other work on the
machine does not affect. The time of a step is measured first, for all arms in turns; the epochs
that fit follow from it, so that every training has a whole schedule of its learning rate.
"""

import contextlib
import csv
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from vim_ssl.metrics.bootstrap import Metric
from vim_ssl.tasks.paper.findings import Finding
from vim_ssl.tasks.paper.measure import Job, Settings
from vim_ssl.tasks.paper.rows import TABLE, Key, Row, Rows
from vim_ssl.tasks.trial.costs import clock, measure
from vim_ssl.tasks.trial.verdict import Spread, difference
from vim_ssl.training.state import recorded

LEVEL = 0.95
# Arguments of supervised-pretrain. The sets have test splits, so that every seed has the same test
# images.
SHARED = shlex.split("--threads 1 --workers 0 --trackers none --eval-every never --save-every 60")


@dataclass(frozen=True)
class ImageSet:
    """A set of images, and the small encoder for it.

    Attributes:
        settings: arguments of supervised-pretrain.
        vim, vit: ``--model-args`` of the Vim, and of a ViT with as many parameters and tokens.
    """

    settings: str
    vim: str
    vit: str


DATA = {
    "digits": ImageSet(
        "--preset demo --data sample:mnist5k",
        "embed_dim=64 depth=4",
        "img_size=28 patch_size=4 embed_dim=64 depth=3 num_heads=2",
    ),
    "emoji": ImageSet(
        "--preset cpu_supervised_32 --data sample:noto-emoji",
        "img_size=32 patch_size=4 embed_dim=64 depth=4",
        "img_size=32 patch_size=4 embed_dim=64 depth=3 num_heads=2",
    ),
}
VIT = "vit"
MEAN = "cls_position=none global_pool=avg"
# Arm -> `--model-args`. The first four differ in the directions of the scans, the last five in the
# readout; "mean" and "both" are one arm.
ARMS = {
    "none": f"directions=forward {MEAN}",
    "layer": f"directions=layer {MEAN}",
    "ssm": f"shared_conv=true divide_out=false {MEAN}",
    "mean": MEAN,
    "max": "cls_position=none global_pool=max-logits",
    "head": "cls_position=first global_pool=token",
    "double": "cls_position=double global_pool=token",
    "middle": "cls_position=middle global_pool=token",
}


def arguments(data: str, arm: str) -> list[str]:
    """Arguments of ``vim-ssl`` that train an arm, without those of the campaign."""
    images = DATA[data]
    words = ["supervised-pretrain", *images.settings.split()]
    if arm == VIT:
        return [*words, "--encoder", "timm:deit_tiny_patch16_224", "--model-args",
                *images.vit.split()]  # fmt: skip
    return [*words, "--model-args", *images.vim.split(), *ARMS[arm].split()]


def train(settings: Settings, words: Sequence[str], folder: Path) -> float:
    """Run a training into ``folder``; return its seconds, with the evaluation of the test images.

    What it prints goes to the log. Raises: RuntimeError if the command fails.
    """
    words = [*words, *SHARED, "--output", str(folder)]
    began = clock("cpu")
    with (
        open(settings.log, "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        code = settings.command(words)
    if code:
        raise RuntimeError(
            f"vim-ssl {shlex.join(words)} ended with code {code}; see {settings.log}."
        )
    return clock("cpu") - began


# ---------------------------------------------------------------- costs


def costs(rows: Rows, data: str, arms: Sequence[str], settings: Settings) -> dict[str, Row]:
    """Return the row of every arm's time of a step; measure, in turns, those that have none."""
    known = {row["arm"]: row for row in rows.of_campaign(measure="cost", data=data)}
    missing = [arm for arm in arms if arm not in known]
    if not missing:
        return known
    settings.report(f"Measuring the time of a step on {data}, in turns: {', '.join(missing)} …")
    epochs: dict[str, int] = {}

    def timed(arm: str, steps: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            words = [*arguments(data, arm), "--max-steps", str(steps)]
            seconds = train(settings, words, Path(folder))
            epochs[arm] = recorded(Path(folder), "plan")["epoch_steps"]
        return seconds

    measured = measure({arm: partial(timed, arm) for arm in missing}, partial(clock, "cpu"))
    for arm, cost in measured.items():
        rows.append(
            Key("cost", arm, data), metric="seconds a step", value=round(cost.step, 5),
            seconds=round(cost.fixed, 2), steps=epochs[arm],
            settings=shlex.join(arguments(data, arm)),
        )  # fmt: skip
    return costs(rows, data, arms, settings)


# ---------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Training:
    """Train an arm with a seed for a budget, and test it."""

    arm: str
    data: str
    seed: int
    budget: str
    peers: tuple[str, ...] = field(compare=False)  # the arms whose costs are measured together

    @property
    def key(self) -> Key:
        return Key("training", self.arm, self.data, str(self.seed), self.budget)

    @property
    def order(self) -> tuple:
        """Seed by seed and set by set: each is a comparison of all arms."""
        return (1, self.seed, self.data, [*ARMS, VIT].index(self.arm))

    def estimate(self, rows: Rows, settings: Settings) -> float:
        cost = rows.of_campaign(measure="cost", data=self.data, arm=self.arm)
        if cost:
            return settings.seconds + float(cost[-1]["seconds"])
        # Two runs of a few steps each, and what a run costs beside its steps, from experience.
        return settings.seconds + 5 + 5 * 6 / settings.seeds

    def run(self, rows: Rows, settings: Settings) -> None:
        cost = costs(rows, self.data, self.peers, settings)[self.arm]
        steps = max(round(settings.seconds / float(cost["value"])), 2)
        epochs = steps / int(cost["steps"])
        words = [*arguments(self.data, self.arm), "--epochs", f"{epochs:.6g}",
                 "--seed", str(self.seed)]  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            seconds = train(settings, words, Path(folder))
            bits = correct(Path(folder))
        rows.append(
            self.key, metric="top-1 %", value=round(100 * float(np.mean(bits)), 2),
            seconds=round(seconds - float(cost["seconds"]), 2), steps=steps,
            settings=shlex.join(words), correct=to_hex(bits),
        )  # fmt: skip


def correct(run: Path) -> np.ndarray:
    """Whether each test image of a run was classified correctly, (n,) bool."""
    with open(run / "predictions.csv", newline="", encoding="utf-8") as file:
        return np.array([row["label"] == row["predicted"] for row in csv.DictReader(file)])


def to_hex(bits: np.ndarray) -> str:
    """``n:digits``: n bits as hexadecimal digits, the first image first."""
    return f"{len(bits)}:{np.packbits(bits).tobytes().hex()}"


def from_hex(text: str) -> np.ndarray:
    """The inverse of `to_hex`."""
    count, _, digits = text.partition(":")
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8))[: int(count)].astype(bool)


# ---------------------------------------------------------------- claims


@dataclass(frozen=True)
class Above:
    """The accuracy of an arm above that of others, at equal time.

    Attributes:
        arm: the paper's choice, or Vim.
        others: what it is compared with.
    """

    arm: str
    others: tuple[str, ...]
    peers: tuple[str, ...] = tuple(ARMS)

    @property
    def command(self) -> str:
        one = self.others[0] if len(self.others) == 1 else self.arm
        return "vim-ssl " + shlex.join(arguments("digits", one))

    def jobs(self, settings: Settings) -> list[Job]:
        return [
            Training(arm, data, seed, settings.budget, self.peers)
            for seed in range(settings.seeds) for data in settings.data
            for arm in (self.arm, *self.others)
        ]  # fmt: skip

    def sources(self, rows: Rows, settings: Settings) -> list[Row]:
        return [row for row in self._trainings(rows, settings)
                if row["arm"] in (self.arm, *self.others)]  # fmt: skip

    def _trainings(self, rows: Rows, settings: Settings) -> list[Row]:
        """The trainings of all arms for one budget: that of the settings if it has a comparison of
        this claim, else the longest that has. Those of the campaign if there are any."""
        committed = [row for row in rows.committed(TABLE) if row["measure"] == "training"]
        for known in (rows.of_campaign(measure="training"), committed):
            ours = {row["budget"] for row in known if row["arm"] == self.arm}
            budgets = {row["budget"] for row in known if row["arm"] in self.others} & ours
            if budgets:
                longest = max(budgets, key=lambda budget: float(budget.split()[0]))
                budget = settings.budget if settings.budget in budgets else longest
                return [row for row in known if row["budget"] == budget]
        return []

    def findings(self, rows: Rows, settings: Settings) -> list[Finding]:
        made = []
        trainings = self._trainings(rows, settings)
        for data in DATA:
            metrics: dict[str, dict[str, Metric]] = {}  # arm -> seed -> accuracy
            for row in trainings:
                if row["data"] == data:
                    metrics.setdefault(row["arm"], {})[row["seed"]] = accuracy(row)
            spread = Spread.pooled(
                [metric.value for metric in of_arm.values()] for of_arm in metrics.values()
            )
            ours = metrics.get(self.arm, {})
            for other in self.others:
                theirs = metrics.get(other, {})
                seeds = sorted(ours.keys() & theirs.keys(), key=int)
                if seeds:
                    name = f"{data}, over {other}" if len(self.others) > 1 else data
                    pair = [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
                    made.append(_above(f"{name}, {trainings[0]['budget']}", *pair, spread))
        return made


def accuracy(row: Row) -> Metric:
    bits = from_hex(row["correct"]).astype(float)
    return Metric(
        lambda weights: 100 * float(np.average(bits, weights=weights)), len(bits), share=True
    )


def _above(name: str, ours: Sequence[Metric], theirs: Sequence[Metric], spread: Spread) -> Finding:
    gap = difference(ours, theirs, spread)
    bounds = gap.interval(LEVEL)
    means = [np.mean([metric.value for metric in metrics]) for metrics in (ours, theirs)]
    interval = f"[{bounds[0]:+.1f}, {bounds[1]:+.1f}]" if bounds else "one seed, no interval"
    text = f"{gap.points:+.1f} points {interval} ({means[0]:.1f} against {means[1]:.1f} %)"
    return Finding(name, text, bounds[0] if bounds else float("nan"))
