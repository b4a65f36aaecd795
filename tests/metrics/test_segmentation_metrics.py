"""Figures of predicted masks equal a naive count; tables and drawings hold what they should."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from vim_ssl.data.labels import IGNORE
from vim_ssl.metrics.segmentation import SegmentationMetrics
from vim_ssl.utils.drawing import class_colours, mask_grid

NAMES = ["ground", "tree", "house", "never"]


def images(count: int = 6) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of several sizes, classes 0 to 2, some pixels without one; predictions half right."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        truth = rng.integers(0, 3, (8 + i, 11 - i), np.uint8)
        guess = np.where(rng.random(truth.shape) < 0.5, truth, rng.integers(0, 3, truth.shape))
        truth[rng.random(truth.shape) < 0.2] = IGNORE
        found.append((truth, guess))
    return found


def scores(pairs, names=NAMES) -> SegmentationMetrics:
    found = SegmentationMetrics(names)
    for i, (truth, guess) in enumerate(pairs):
        found.add(f"{i}.jpg", truth, guess)
    return found


def test_the_figures_are_a_naive_count_over_the_whole_set():
    pairs = images()
    pixels = [
        (int(t), int(g))
        for truth, guess in pairs
        for t, g in zip(truth.flat, guess.flat, strict=True)
        if t != IGNORE
    ]
    ious, recalls, dices = [], [], []
    for k in range(3):
        both = sum(t == k and g == k for t, g in pixels)
        either = sum(t == k or g == k for t, g in pixels)
        ious.append(both / either)
        recalls.append(both / sum(t == k for t, g in pixels))
        dices.append(2 * both / (sum(t == k for t, _ in pixels) + sum(g == k for _, g in pixels)))
    figures = scores(pairs).compute()
    assert figures["miou"] == pytest.approx(100 * np.mean(ious), abs=0.006)
    assert figures["macc"] == pytest.approx(100 * np.mean(recalls), abs=0.006)
    assert figures["mdice"] == pytest.approx(100 * np.mean(dices), abs=0.006)
    aacc = sum(t == g for t, g in pixels) / len(pixels)
    assert figures["aacc"] == pytest.approx(100 * aacc, abs=0.006)
    low, high = figures["miou_ci"]
    assert low < figures["miou"] < high


def test_a_constant_prediction_is_measured_from_the_counts():
    pairs = images()
    counted, whole = scores(pairs).constant(1), scores([(t, np.ones_like(t)) for t, _ in pairs])
    assert counted.compute() == whole.compute()
    assert (counted.confusion == whole.confusion).all()
    gain = scores(pairs).gain("one class", counted)
    low, high = gain.interval
    assert 0 < low < gain.points < high


def test_it_is_not_the_mean_of_the_images():
    one, two = np.zeros((2, 2), np.uint8), np.ones((20, 20), np.uint8)
    figures = scores([(one, one), (two, two * 0)]).compute()
    assert figures["miou"] == pytest.approx(100 * (4 / 404 + 0) / 2, abs=0.01)
    assert figures["miou_ci"] is None  # two images tell nothing about others


def test_images_of_a_group_are_one_sample():
    pairs = images(8)
    alone, grouped = scores(pairs), SegmentationMetrics(NAMES)
    for i, (truth, guess) in enumerate(pairs):
        grouped.add(f"{i}.jpg", truth, guess, group=f"scene{i // 4}")
    assert alone.compute()["miou_ci"] is not None
    assert grouped.compute()["miou_ci"] is None
    assert grouped.compute()["miou"] == alone.compute()["miou"]


def test_what_is_not_labelled_does_not_count():
    truth = np.full((4, 4), IGNORE, np.uint8)
    with pytest.raises(ValueError, match="needs at least one"):
        scores([(truth, truth * 0)]).compute()
    labelled = np.array([[0, 1]], np.uint8)
    assert scores([(truth, truth * 0), (labelled, labelled)]).compute()["miou"] == 100


@pytest.mark.parametrize("value", [4, 254])
def test_a_class_that_does_not_exist_is_named(value):
    wrong, right = np.full((2, 2), value, np.uint8), np.zeros((2, 2), np.uint8)
    for pair, what in (((wrong, right), "truth"), ((right, wrong), "prediction")):
        with pytest.raises(ValueError, match=f"0.jpg: the {what} has .* {value}; expected 0 to 3"):
            scores([pair])


def test_sizes_must_agree():
    with pytest.raises(
        ValueError, match=r"x: the truth has shape \(2, 3\), the prediction \(3, 2\)"
    ):
        SegmentationMetrics(NAMES).add("x", np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8))


def test_the_tables(tmp_path):
    found = scores(images())
    found.write(tmp_path)
    with open(tmp_path / "classes.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == NAMES
    assert rows[3]["pixels"] == "0"
    assert rows[3]["iou"] == "nan"
    ious = [float(row["iou"]) for row in rows[:3]]
    assert 100 * np.mean(ious) == pytest.approx(found.compute()["miou"], abs=0.01)
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 7
    lines = found.table().splitlines()
    assert len(lines) == 4  # a class that is nowhere has no line
    assert lines[0].split() == ["class", "share", "IoU", "recall", "Dice"]


def test_a_drawing_has_a_row_an_image_and_a_legend():
    colours = class_colours(4).numpy()
    truth = np.zeros((30, 40), np.uint8)
    truth[:, 20:], truth[:5] = 2, IGNORE
    guess = np.where(truth == IGNORE, 1, truth)
    rows = [(Image.new("RGB", (40, 30), "pink"), truth, guess)] * 2
    sheet = np.asarray(mask_grid(rows, NAMES, colours))
    one = np.asarray(mask_grid(rows[:1], NAMES, colours))
    assert sheet.shape[1] == one.shape[1]
    assert sheet.shape[0] > one.shape[0] + 100
    for wanted in (colours[0], colours[1], colours[2], colours[-1], [255, 192, 203]):
        assert (sheet == wanted).all(-1).sum() > 100


def test_nothing_to_draw_is_an_empty_sheet():
    assert mask_grid([], NAMES, class_colours(4).numpy()).width > 100


def test_colours_are_all_different():
    colours = class_colours(255)
    assert colours.shape == (256, 3)
    assert len({tuple(c) for c in colours.tolist()}) == 256
    # As PASCAL VOC paints its background and what has no label; the first classes are vivid.
    assert [colours[i].tolist() for i in (0, -1)] == [[0] * 3, [224, 224, 192]]
    first = colours[1:13].int()
    apart = (first[:, None] - first).abs().sum(-1) + 1000 * torch.eye(12)
    assert apart.min() > 100
    assert first.amax(1).min() >= 128
