"""The arms of a trial: where the weights come from, and what is done with them."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

PIXELS, FRESH = "raw pixels", "fresh weights"
FROZEN, TUNED, SUPERVISED = "frozen features", "fine-tuned", "trained with labels"
PRETRAINED, OTHER = "pretrained", "other"  # families: with and without pretraining on the images
# Settings of mim_pretrain that an objective needs beside its preset; the others have the preset's.
# `cluster` 1 divides every grid. From the study of benchmarks/learning.
OBJECTIVE_SETTINGS: dict[str, dict[str, Any]] = {
    "simmim": {"mask_ratio": 0.6},
    "ar": {"cluster": 1},
    "distill": {"teacher_layers": 2},
}


@dataclass(frozen=True)
class Arm:
    """One of the ways that a trial compares.

    Attributes:
        name: unique in a trial; in rows and messages.
        source: `PIXELS`, `FRESH`, a preset or file of weights, or the name of the arm that this one
            fine-tunes.
        kind: "frozen": only classify features; "pretrain": pretrain, then classify features;
            "finetune".
        family: `PIXELS`, `PRETRAINED` (on the images of the trial) or `OTHER`.
        encoder: preset or name of another encoder than that of the trial, without weights.
        share: of the time of a training, in [0, 1]. What an arm continues has the rest.
        settings: of the recipe.
    """

    name: str
    source: str
    kind: str
    family: str
    encoder: str = ""
    share: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def is_trained(self) -> bool:
        return self.kind != "frozen"

    @property
    def has_seeds(self) -> bool:
        """Whether another seed gives another result."""
        return self.is_trained or self.source == FRESH


def make_arms(
    objectives: Iterable[str], weights: Iterable[str], encoders: Iterable[str] = (),
    teacher: str = "", finetune: bool = True,
) -> list[Arm]:  # fmt: skip
    """Return the arms, baselines first; an arm follows the one that it continues.

    Args:
        objectives: names of pretraining objectives.
        weights: pretrained encoders that `load_encoder` accepts.
        encoders: further encoders, to be trained like that of the trial.
        teacher: see mim_pretrain; adds the objective ``distill`` with it.
        finetune: also fine-tune; False: only compare frozen features, after the whole time.
    """
    known = {name: {"objective": name} | OBJECTIVE_SETTINGS.get(name, {}) for name in objectives}
    if teacher:
        known[f"distill from {teacher}"] = {"objective": "distill", "teacher": teacher}
    arms = [Arm(PIXELS, PIXELS, "frozen", PIXELS)]
    of_weights = []
    for name in weights:
        of_weights.append(Arm(f"{name}, {FROZEN}", name, "frozen", OTHER))
        if finetune:
            of_weights.append(Arm(f"{name}, {TUNED}", name, "finetune", OTHER, share=1.0))
    for encoder in ("", *encoders):
        arms += _baselines(encoder, finetune) + ([] if encoder else of_weights)
        for name, settings in known.items():
            arms += _pretrained(encoder, name, settings, finetune)
    return arms


def _prefix(encoder: str) -> str:
    return f"{encoder}: " if encoder else ""


def _baselines(encoder: str, finetune: bool) -> list[Arm]:
    """Fresh weights, frozen and trained with labels."""
    name = f"{_prefix(encoder)}{FRESH}"
    arms = [Arm(f"{name}, {FROZEN}", FRESH, "frozen", OTHER, encoder)]
    if finetune:  # layer decay is for pretrained weights
        arms.append(Arm(f"{name}, {SUPERVISED}", FRESH, "finetune", OTHER, encoder, 1.0,
                        {"layer_decay": None}))  # fmt: skip
    return arms


def _pretrained(encoder: str, name: str, settings: dict[str, Any], finetune: bool) -> list[Arm]:
    """An objective, frozen and fine-tuned."""
    name, share = f"{_prefix(encoder)}{name}", 0.5 if finetune else 1.0
    first = Arm(f"{name}, {FROZEN}", FRESH, "pretrain", PRETRAINED, encoder, share, settings)
    if not finetune:
        return [first]
    return [first, Arm(f"{name}, {TUNED}", first.name, "finetune", PRETRAINED, encoder, 0.5)]


def parent_of(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The arm whose pretrained encoder this one fine-tunes, or None."""
    return next((one for one in arms if one.kind == "pretrain" and one.name == arm.source), None)


def stage_of(arm: Arm, arms: Sequence[Arm]) -> str:
    """Return the name of the training whose step this arm repeats: arms that fine-tune encoders of
    one size share it; "" without training."""
    if not arm.is_trained:
        return ""
    if arm.kind == "pretrain":
        return arm.name
    return f"fine-tuning of {stage_source(arm, arms)}"


def stage_source(arm: Arm, arms: Sequence[Arm]) -> str:
    """The encoder of the stage of an arm that fine-tunes: weights, another encoder, or `FRESH`."""
    same_size = arm.source == FRESH or parent_of(arm, arms)
    return (arm.encoder or FRESH) if same_size else arm.source


def without(arms: Sequence[Arm], names: Collection[str]) -> list[Arm]:
    """Leave out arms by name, and those that continue them."""
    return [arm for arm in arms if arm.name not in names and arm.source not in names]
