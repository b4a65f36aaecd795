"""The arms of a trial: where the weights come from, and what is done with them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

PIXELS, FRESH = "raw pixels", "fresh weights"
FROZEN, TUNED = "frozen features", "fine-tuned"
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
        share: of the time of a training, in [0, 1]. What an arm continues has the rest.
        settings: of the recipe.
    """

    name: str
    source: str
    kind: str
    family: str
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
    objectives: Iterable[str], weights: Iterable[str], teacher: str = "", finetune: bool = True
) -> list[Arm]:
    """Return the arms, baselines first; an arm follows the one that it continues.

    Args:
        objectives: names of pretraining objectives.
        weights: pretrained encoders that `load_encoder` accepts.
        teacher: see mim_pretrain; adds the objective ``distill`` with it.
        finetune: also fine-tune; False: only compare frozen features, after the whole time.
    """
    arms = [
        Arm(PIXELS, PIXELS, "frozen", PIXELS),
        Arm(f"{FRESH}, {FROZEN}", FRESH, "frozen", OTHER),
    ]
    if finetune:  # layer decay is for pretrained weights
        arms.append(Arm(f"{FRESH}, trained with labels", FRESH, "finetune", OTHER, 1.0,
                        {"layer_decay": None}))  # fmt: skip
    for name in weights:
        arms.append(Arm(f"{name}, {FROZEN}", name, "frozen", OTHER))
        if finetune:
            arms.append(Arm(f"{name}, {TUNED}", name, "finetune", OTHER, 1.0))
    known = {name: {"objective": name} | OBJECTIVE_SETTINGS.get(name, {}) for name in objectives}
    if teacher:
        known[f"distill from {teacher}"] = {"objective": "distill", "teacher": teacher}
    for name, settings in known.items():
        first = Arm(f"{name}, {FROZEN}", FRESH, "pretrain", PRETRAINED, 0.5 if finetune else 1.0,
                    settings)  # fmt: skip
        arms.append(first)
        if finetune:
            arms.append(Arm(f"{name}, {TUNED}", first.name, "finetune", PRETRAINED, 0.5))
    return arms


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
    same_size = arm.source == FRESH or parent_of(arm, arms)
    return f"fine-tuning of {FRESH if same_size else arm.source}"
