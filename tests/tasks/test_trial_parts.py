"""The parts of a trial: costs, plans that fit into the time, differences, and the verdict."""

import itertools
import time

import numpy as np
import pytest
import torch

from vim_ssl.metrics.classification import proportion
from vim_ssl.tasks.trial.arms import make_arms, stage_of
from vim_ssl.tasks.trial.costs import Cost, measure
from vim_ssl.tasks.trial.plan import make_plan
from vim_ssl.tasks.trial.verdict import Difference, Spread, decide, difference

OBJECTIVES = ("mae", "simmim", "ar")
ARMS = make_arms(OBJECTIVES, ["other"])
COSTS = {stage: Cost(0.5, 1.0) for arm in ARMS if (stage := stage_of(arm, ARMS))}


# ------------------------------------------------------------------------- time


def test_a_step_costs_the_time_between_two_updates():
    """Opening, saving and slow first steps do not count as steps."""
    now = 0.0

    def training(step: float):
        def train(steps: int) -> float:
            nonlocal now
            began, now = now, now + 2.0
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
            for i in range(steps):
                now += step + 5 * (i == 0)
                optimizer.step()
            return now - began

        return train

    costs = measure({"a": training(0.25), "b": training(0.5)}, lambda: now)
    assert costs["a"].step == pytest.approx(0.25)
    assert costs["b"].step == pytest.approx(0.5)
    assert costs["a"].fixed == pytest.approx(7.0)


def test_a_training_without_an_optimizer_of_torch_has_no_cost():
    with pytest.raises(RuntimeError, match="no step"):
        measure({"a": float}, time.process_time)


def plan(budget: float, seeds: int = 3):
    return make_plan(ARMS, COSTS, 1.0, budget=budget, seeds=seeds, rates=[1.0, 3.0])


@pytest.mark.parametrize(
    ("budget", "seeds", "rates", "left_out"),
    [
        (4000, 3, 2, []),
        (2000, 3, 1, ["rates"]),
        (1450, 3, 1, ["rates", "ar"]),
        (1050, 2, 1, ["rates", "ar", "1 seed of 3"]),
        (700, 2, 1, ["rates", "ar", "simmim", "1 seed of 3"]),
        (450, 2, 1, ["rates", "ar", "simmim", "other", "1 seed of 3"]),
        (240, 1, 1, ["rates", "ar", "simmim", "other", "2 seeds of 3"]),
        (100, 1, 1, ["rates", "ar", "simmim", "other", "2 seeds of 3"]),
    ],
)
def test_a_plan_shrinks_until_it_fits(budget, seeds, rates, left_out):
    made = plan(budget)
    assert (made.seeds, len(made.rates)) == (seeds, rates)
    assert len(made.left_out) == len(left_out)
    for text, word in zip(made.left_out, left_out, strict=True):
        assert word in text
    assert made.estimate <= budget + 1e-6
    jobs = list(itertools.chain(*made.jobs(ARMS)))
    assert len(set(jobs)) == len(jobs)
    assert {job.arm for job in jobs} == set(made.arms)
    assert all(job.rate == 1 for job in jobs if job.seed), "later seeds do not try learning rates"
    assert [job.arm for job in jobs].count("raw pixels") == 1


def test_the_parts_of_a_training_have_the_time_of_a_whole_one():
    by_name = {arm.name: arm for arm in ARMS}
    for arm in ARMS:
        if arm.kind == "finetune":
            before = by_name[arm.source].share if arm.source in by_name else 0.0
            assert before + arm.share == 1


def test_a_time_that_is_too_short_is_refused_with_one_that_does():
    with pytest.raises(ValueError, match=r"smallest plan needs --minutes \d") as error:
        plan(20.0)
    minutes = float(str(error.value).partition("--minutes ")[2].partition(". ")[0])
    assert plan(60 * minutes).seeds == 1


# ------------------------------------------------------------------------- verdict


def gap(points: float, of_images: float = 0.5, of_seeds: float = 0.2, freedom: int | None = 8):
    return Difference(points, of_images, of_seeds, freedom)


NAMES = ("mae, fine-tuned", "fresh weights, trained with labels", "raw pixels")
# pretrained - other, pretrained - pixels, other - pixels
CASES = {
    "clear winner": (gap(6), gap(9), gap(3), "pretrain", "Pretrain with mae, fine-tuned: 6.0"),
    "pixels win": (gap(1), gap(-8), gap(-9), "raw pixels", "raw pixels are as good"),
    "pixels level": (
        gap(0, 0.1, 0.05), gap(0, 0.1, 0.05), gap(0, 0.1, 0.05), "raw pixels", "as good"
    ),
    "other weights win": (gap(-5), gap(4), gap(9), "other weights", "use fresh weights, trained"),
    "other weights do": (
        gap(0.1, 0.1, 0.05), gap(9), gap(9), "other weights", "Do not pretrain; use fresh"
    ),
    "few images": (gap(3, 3), gap(9, 3), gap(6, 3), "undecided", "more labelled test images"),
    "seeds that differ": (
        gap(3, 0.5, 2), gap(9, 0.5, 2), gap(6, 0.5, 2), "undecided", "--minutes 60"
    ),
    "better, but pixels may do": (gap(5), gap(1, 2), gap(-4), "undecided", "above raw pixels"),
    "one seed": (
        gap(9, freedom=0), gap(9, freedom=0), gap(9, freedom=None), "undecided", "one seed"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_rule_of_the_verdict(case):
    *differences, kind, words = CASES[case]
    verdict = decide(NAMES, tuple(differences), margin=1.0, minutes=30.0)
    assert verdict.kind == kind
    assert words in verdict.sentence
    assert verdict.sentence.endswith(".")


def answers(*right: float, n: int = 400, seed: int = 0):
    draw = np.random.default_rng(seed)
    return [proportion(draw.random(n) < share) for share in right]


def compare(ours, theirs, **more):
    spread = Spread.pooled([[one.value for one in many] for many in (ours, theirs)])
    return difference(ours, theirs, spread, **more)


def test_an_interval_covers_seeds_and_images():
    ours, theirs = answers(0.9, 0.9, 0.9), answers(0.7, 0.7, 0.7, seed=1)
    alike, apart = compare(ours, theirs), compare(answers(0.8, 0.9, 1.0), theirs)
    assert alike.points == pytest.approx(20, abs=4)
    low, high = alike.interval(0.95)
    assert 0 < low < alike.points < high
    wide_low, wide_high = apart.interval(0.95)
    assert wide_high - wide_low > 2 * (high - low), "the seeds differ more"
    assert alike.interval(0.99)[0] < low
    few = compare(answers(0.9, 0.9, 0.9, n=40), answers(0.7, 0.7, 0.7, n=40, seed=1))
    assert few.of_images > 2 * alike.of_images


def test_the_spread_over_seeds_is_that_of_all_arms():
    """Two seeds of one arm that agree by chance do not make its interval narrow."""
    spread = Spread.pooled([[70.0, 74.0], [80.0, 80.0, 83.0], [90.0]])
    assert spread == Spread((8 + 6) / 3, 3)
    same = answers(0.9)[0]
    one = difference([same, same], [same, same], spread)
    assert one.of_seeds == pytest.approx((2 * spread.variance / 2) ** 0.5)
    baseline = difference([same, same], [same], spread, (True, False))
    assert baseline.of_seeds == pytest.approx((spread.variance / 2) ** 0.5)
    far = difference(answers(0.5, 1.0), [same], spread, (True, False))
    assert far.of_seeds > 2 * baseline.of_seeds


def test_no_interval_from_one_seed_but_one_without_any():
    ours, theirs = answers(0.9), answers(0.7, seed=1)
    assert compare(ours, theirs).interval(0.95) is None
    assert compare(ours, theirs, have_seeds=(True, False)).interval(0.95) is None
    assert compare(ours, theirs, have_seeds=(False, False)).interval(0.95) is not None


def test_few_images_have_no_interval_and_no_verdict():
    small = compare(answers(0.9, 0.9, n=4), answers(0.5, 0.5, n=4))
    assert small.interval(0.95) is None
    verdict = decide(NAMES, (small, small, small), margin=1.0, minutes=30.0)
    assert verdict.kind == "undecided"
    assert "more labelled images" in verdict.sentence


def test_equal_answers_have_an_interval_that_is_no_point():
    low, high = compare(answers(1.0, 1.0), answers(1.0, 1.0)).interval(0.95)
    assert low < 0 < high


def test_images_of_a_group_count_as_one():
    ours, theirs = answers(0.9, 0.9), answers(0.7, 0.7, seed=1)
    groups = [str(i // 100) for i in range(400)]
    assert compare(ours, theirs, groups=groups).interval(0.95) is None  # four groups


def test_another_encoder_has_arms_and_stages_of_its_size():
    arms = make_arms(("mae",), ["weights"], ["larger"])
    names = [arm.name for arm in arms if arm.encoder]
    assert names == [
        "larger: fresh weights, frozen features", "larger: fresh weights, trained with labels",
        "larger: mae, frozen features", "larger: mae, fine-tuned",
    ]  # fmt: skip
    stages = {arm.name: stage_of(arm, arms) for arm in arms if arm.kind == "finetune"}
    assert stages["larger: mae, fine-tuned"] == "fine-tuning of larger"
    assert stages["mae, fine-tuned"] == "fine-tuning of fresh weights"
    assert stages["weights, fine-tuned"] == "fine-tuning of weights"
