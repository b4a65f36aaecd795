"""Test whether self-supervised pretraining helps on your images, at equal time.

    python downstream/trial.py --data FOLDER_WITH_CLASSES                # half an hour
    python downstream/trial.py --data FOLDER --minutes 240 --seeds 5
    python downstream/trial.py --output RUN --resume auto                # after a kill

Raw pixels, untrained and pretrained weights, training from scratch with labels, and pretraining by
every objective, frozen and fine-tuned, are compared on the same images with several seeds. All
trainings have the same time: processor time on a CPU, which other work on the machine does not
affect, else GPU time. The cost of a step is measured first, in turns; a plan that does not fit is
shrunk, and what is left out is printed.

Readout, C, k, learning rate and the best arm of each kind are chosen on a validation split. The
test images are used once, at the end, for intervals over seeds and images, and for one verdict.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

from vim_ssl import finetune, pretrain
from vim_ssl.cli import guarded
from vim_ssl.objectives.base import OBJECTIVES, get_objective
from vim_ssl.tasks.trial.trial import Recipes, run_trial
from vim_ssl.tasks.trial.trial import table as table
from vim_ssl.training.run import stored_or
from vim_ssl.utils.config import opt, parse


@dataclass
class Config:
    """Compare pretraining with its alternatives on labelled images, at equal time."""

    data: str = opt("", "labelled images", "data")
    test: float = opt(0.2, "fraction held out if the data has no test split", "data")
    validation: float = opt(0.2, "fraction of the training set used for every choice", "data")
    minutes: float = opt(30.0, "time of everything, per thread on a CPU", "plan")
    seeds: int = opt(3, "number of seeds; the verdict needs two", "plan")
    objectives: tuple[str, ...] = opt(
        tuple(OBJECTIVES), "pretraining objectives, the last ones left out first", "plan"
    )
    weights: tuple[str, ...] = opt(
        ("vim_mini_patch8_96.offline_rgb",),
        "pretrained weights to evaluate and fine-tune; none: no weights", "plan",
    )  # fmt: skip
    encoders: tuple[str, ...] = opt(
        (), "further encoders to pretrain and to train: presets, timm:NAME", "plan"
    )
    teacher: str = opt("", "also distil from this teacher; see mim-pretrain", "plan")
    rates: tuple[float, ...] = opt(
        (1.0, 3.0), "factors of the learning rate, of which the first seed chooses one", "plan"
    )
    margin: float = opt(1.0, "points that would not be worth a training", "plan")
    encoder: str = opt("", "preset of the encoder; default: that of mim-pretrain", "model")
    model_args: dict[str, Any] = opt({}, "additional arguments of the encoder", "model")
    encoder_args: dict[str, Any] = opt(
        {}, "additional arguments of the further encoders; timm's have the trial's patches", "model"
    )
    pretrain_args: dict[str, Any] = opt({}, "further settings of mim-pretrain", "model")
    finetune_args: dict[str, Any] = opt({}, "further settings of finetune", "model")
    threads: int = opt(1, "CPU threads", "run")
    workers: int = opt(0, "data loading processes, whose time is not counted", "run")
    seed: int = opt(0, "seed of the splits and of the intervals", "run")
    output: str = opt("", "directory of the trial; default: a new one under runs/", "run")
    resume: str = opt(
        "never", "auto: continue the trial in output", "run", ("never", "auto")
    )  # fmt: skip

    def __post_init__(self):
        if self.weights == ("none",):
            self.weights = ()
        if self.minutes <= 0 or self.seeds < 1 or self.threads < 1 or self.margin < 0:
            raise ValueError(
                f"minutes {self.minutes:g}, seeds {self.seeds}, threads {self.threads} and margin "
                f"{self.margin:g}: minutes must be above 0, seeds and threads 1 or more, and the "
                "margin 0 or more."
            )
        for name in ("test", "validation"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name):g}; it must be in (0, 1).")
        if not self.rates or min(self.rates) <= 0:
            raise ValueError(f"rates are {self.rates}; expected factors above 0, such as 1 3.")
        if not self.objectives:
            raise ValueError("objectives is empty; name one at least, such as mae.")
        for name in self.objectives:
            get_objective(name)  # raises for an unknown name


def run(config: Config) -> dict[str, Any]:
    if not config.data:
        raise ValueError("a trial needs labelled images; give --data.")
    return run_trial(config, Recipes(pretrain, finetune))


def main(argv: Sequence[str] | None = None) -> int:
    run(parse(Config, argv=argv, default_preset=stored_or(None), description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
