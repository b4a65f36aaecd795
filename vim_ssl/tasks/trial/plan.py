"""Which arms, seeds and learning rates fit into the time of a trial."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vim_ssl.tasks.trial.arms import FRESH, FROZEN, OTHER, Arm, stage_of, without
from vim_ssl.tasks.trial.costs import Cost
from vim_ssl.utils.names import plural, rough_time

# Optimiser steps of the slowest stage: a plan with fewer is shrunk, or refused once nothing is left
# to leave out.
FULL_STEPS, LEAST_STEPS = 100, 10


@dataclass(frozen=True)
class Job:
    """One row of a trial: an arm with a seed and a factor of the learning rate."""

    arm: str
    seed: int = 0
    rate: float = 1.0


@dataclass
class Plan:
    """What a trial runs.

    Attributes:
        arms: names, in the order in which they run.
        seeds: number of seeds.
        rates: factors of the learning rate; the first seed tries all, the others use the best.
        seconds: of a whole training; an arm has its share of it.
        estimate: seconds of everything.
        left_out: what did not fit, as text.
    """

    arms: list[str]
    seeds: int
    rates: list[float]
    seconds: float
    estimate: float
    left_out: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def jobs(self, arms: Sequence[Arm]) -> Iterator[list[Job]]:
        """Yield the jobs seed by seed and arm by arm; those of one list differ in their learning
        rates, of which later seeds use only the best."""
        for seed in range(self.seeds):
            for arm in arms:
                if arm.name in self.arms and (arm.has_seeds or not seed):
                    rates = self.rates if arm.is_trained and not seed else self.rates[:1]
                    yield [Job(arm.name, seed, rate) for rate in rates]


def make_plan(
    arms: Sequence[Arm], costs: Mapping[str, Cost], reading: float, *, budget: float, seeds: int,
    rates: Sequence[float], spent: float = 0.0,
) -> Plan:  # fmt: skip
    """Return the largest plan whose trainings have `FULL_STEPS`.

    Left out first are further learning rates, then objectives from the last one on while there are
    two, seeds while there are two, the second objective, and then other weights and the second
    seed. The shorter trainings of the last plan are accepted down to `LEAST_STEPS`.

    Args:
        costs: by the stages of `stage_of`.
        reading: seconds to classify the frozen features of one encoder.
        budget: seconds of the trial, of which ``spent`` are gone.
    Raises: ValueError that names the minutes that would do.
    """
    plan = None
    for chosen, count, factors, left_out in _smaller(arms, seeds, rates):
        plan = _fit(chosen, costs, reading, budget - spent, count, factors)
        plan.left_out = left_out
        if _steps(plan, chosen, costs) >= FULL_STEPS:
            return plan
    assert plan is not None
    if _steps(plan, chosen, costs) < LEAST_STEPS:
        fixed, weight = _demand(chosen, costs, reading, count, factors)
        least = LEAST_STEPS * max(
            costs[stage_of(arm, chosen)].step / arm.share for arm in chosen if arm.is_trained
        )
        minutes = 1.1 * (spent + fixed + weight * least) / 60
        raise ValueError(
            f"a trial of {rough_time(budget)} is too short: its smallest plan needs --minutes "
            f"{minutes:.1f}. Fewer images (?limit=N) or a smaller --encoder also help."
        )
    return plan


def _smaller(
    arms: Sequence[Arm], seeds: int, rates: Sequence[float]
) -> Iterator[tuple[list[Arm], int, list[float], list[str]]]:
    """Yield arms, seeds, learning rates and what is left out, from all to the smallest plan."""
    chosen, factors, left_out = list(arms), list(rates), list[str]()
    yield chosen, seeds, factors, list(left_out)
    if len(factors) > 1:
        left_out.append(f"learning rates times {', '.join(f'{f:g}' for f in factors[1:])}")
        factors = factors[:1]
        yield chosen, seeds, factors, list(left_out)
    requested = seeds
    for objectives, most_seeds in ((2, seeds), (2, 2), (1, 2), (1, 1)):
        while len(firsts := _objectives(chosen)) > objectives:
            chosen = without(chosen, firsts[-1:])
            left_out.append(firsts[-1].removesuffix(f", {FROZEN}"))
            yield chosen, seeds, factors, [*left_out, *_seeds_text(requested, seeds)]
        if most_seeds == 1 and (others := _other_weights(chosen)):
            chosen = [arm for arm in chosen if arm.source not in others]
            left_out += others
            yield chosen, seeds, factors, [*left_out, *_seeds_text(requested, seeds)]
        while seeds > most_seeds:
            seeds -= 1
            yield chosen, seeds, factors, [*left_out, *_seeds_text(requested, seeds)]


def _seeds_text(requested: int, seeds: int) -> list[str]:
    return [f"{plural(requested - seeds, 'seed')} of {requested}"] if seeds < requested else []


def _objectives(arms: Sequence[Arm]) -> list[str]:
    """The arms that pretrain."""
    return [arm.name for arm in arms if arm.kind == "pretrain"]


def _other_weights(arms: Sequence[Arm]) -> list[str]:
    """Pretrained weights that are fine-tuned."""
    return [
        arm.source for arm in arms
        if arm.kind == "finetune" and arm.family == OTHER and arm.source != FRESH
    ]  # fmt: skip


def _demand(
    arms: Sequence[Arm], costs: Mapping[str, Cost], reading: float, seeds: int,
    rates: Sequence[float],
) -> tuple[float, float]:  # fmt: skip
    """Seconds that do not depend on the length of a training, and the number of whole trainings."""
    fixed = weight = 0.0
    for arm in arms:
        runs = (seeds if arm.has_seeds else 1) + (len(rates) - 1 if arm.is_trained else 0)
        fixed += runs * costs[stage_of(arm, arms)].fixed if arm.is_trained else 0.0
        if arm.kind != "finetune":
            fixed += runs * reading
        fixed += 0.5 * (seeds if arm.has_seeds else 1) * reading  # on the test images, at the end
        weight += runs * arm.share
    return fixed, weight


def _fit(
    arms: Sequence[Arm], costs: Mapping[str, Cost], reading: float, budget: float, seeds: int,
    rates: Sequence[float],
) -> Plan:  # fmt: skip
    fixed, weight = _demand(arms, costs, reading, seeds, rates)
    seconds = max(budget - fixed, 0.0) / weight if weight else 0.0
    return Plan([arm.name for arm in arms], seeds, list(rates), seconds, fixed + weight * seconds)


def _steps(plan: Plan, arms: Sequence[Arm], costs: Mapping[str, Cost]) -> float:
    """Steps of the slowest stage."""
    return min(
        (plan.seconds * arm.share / costs[stage_of(arm, arms)].step
         for arm in arms if arm.is_trained), default=float(FULL_STEPS),
    )  # fmt: skip
