"""Boxes and masks stay with their image on the canvas, whatever is drawn."""

import numpy as np
import pytest
import torch
from PIL import Image

from vim_ssl.data.loading.indexed import SeededSamples, collate
from vim_ssl.data.transforms.dense import LargeScaleJitter, around, fitted, on_canvas

SIZE = 64
RGB = {"input_size": (3, 32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
GREY = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.25,)}


def two(width: int = 90, height: int = 50, masks: bool = True) -> dict:
    """White, a disc of class 4 and a bar of class 1, on black."""
    y, x = np.mgrid[:height, :width]
    disc = np.hypot(x - width * 0.3, y - height / 2) < min(width, height) * 0.3
    bar = (x >= width * 0.7) & (x < width * 0.8) & (y > height * 0.2) & (y < height * 0.9)
    outlines = np.stack([disc, bar]).astype(np.uint8)
    boxes = around(torch.from_numpy(outlines)).numpy()
    item = {
        "image": Image.fromarray(255 * outlines.max(0)).convert("RGB"), "boxes": boxes,
        "box_labels": np.array([4, 1]),
    }  # fmt: skip
    return item | ({"masks": outlines} if masks else {})


def nothing(width: int = 90, height: int = 50) -> dict:
    return {
        "image": Image.new("RGB", (width, height)), "boxes": np.zeros((0, 4), np.float32),
        "box_labels": np.zeros(0, np.int64), "masks": np.zeros((0, height, width), np.uint8),
    }  # fmt: skip


@pytest.mark.parametrize("scale", [(0.1, 2.0), (1.5, 2.0), (0.1, 0.2)], ids=str)
def test_boxes_and_masks_follow_the_image(scale):
    """A mask is where it is white, and the box is the bounding box of its mask."""
    transform = LargeScaleJitter(RGB, SIZE, scale=scale)
    counts = set()
    for seed in range(25):
        torch.manual_seed(seed)
        out = transform(two())
        image, objects = out["image"], out["objects"]
        assert image.shape == (3, SIZE, SIZE)
        masks, boxes = objects["masks"], objects["boxes"]
        counts.add(len(masks))
        assert len(masks) == len(boxes) == len(objects["labels"])
        assert set(objects["labels"].tolist()) <= {5, 2}
        for mask, box in zip(masks, boxes, strict=True):
            rows, columns = mask.nonzero(as_tuple=True)
            expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == [float(x) for x in expected]
        if len(masks) == 2:  # of a bar thinner than a pixel the image alone tells
            white, inside = image.mean(0) > 0.5, masks.any(0)
            border = torch.nn.functional.max_pool2d(
                torch.stack([inside, ~inside]).float()[None], 5, 1, 2
            )[0].all(0)  # blurred there
            assert (white == inside)[~border].all(), seed
    assert 2 in counts
    if scale[1] == 2.0:
        assert 1 in counts  # the other one was cut off


def test_without_masks_boxes_are_cut_at_the_canvas():
    transform = LargeScaleJitter(RGB, SIZE, scale=(1.0, 2.0))
    for seed in range(25):
        torch.manual_seed(seed)
        plain = transform(two(masks=False))["objects"]
        torch.manual_seed(seed)
        masked = transform(two())["objects"]
        assert set(plain) == {"boxes", "labels"}
        assert ((plain["boxes"][:, 2:] - plain["boxes"][:, :2]) >= 1).all()
        assert 0 <= plain["boxes"].min() <= plain["boxes"].max() <= SIZE
        # Of a bar that is cut off the mask's box is the same, but for what its pixels round.
        one, other = (o["boxes"][o["labels"] == 2] for o in (plain, masked))
        if len(one) and len(other):
            assert (one - other).abs().max() <= 2


def test_nothing_random_is_what_a_test_sees():
    item = two(40, 60)
    out = LargeScaleJitter(RGB, SIZE, scale=(1.0, 1.0), hflip=0.0)(item)
    pixels = LargeScaleJitter(RGB, SIZE).pixels
    canvas, size = on_canvas(pixels, pixels.read(item["image"]), SIZE)
    assert size == [64, 43]
    assert torch.equal(out["image"], canvas)
    assert (canvas[:, :, 43:] == 0).all()  # the mean
    expected = torch.from_numpy(item["boxes"]) * torch.tensor([43 / 40, 64 / 60] * 2)
    torch.testing.assert_close(out["objects"]["boxes"], expected, atol=1.0, rtol=0)


def test_mirroring():
    item = two()
    straight, mirrored = (
        LargeScaleJitter(RGB, SIZE, scale=(1.0, 1.0), hflip=p)(item) for p in (0.0, 1.0)
    )
    assert torch.equal(straight["image"].flip(-1)[..., :64], mirrored["image"])
    left, _, right, _ = straight["objects"]["boxes"].T
    flipped = mirrored["objects"]["boxes"]
    torch.testing.assert_close(flipped[:, 0], 64 - right, atol=1.0, rtol=0)
    torch.testing.assert_close(flipped[:, 2], 64 - left, atol=1.0, rtol=0)


@pytest.mark.parametrize("config", [RGB, GREY], ids=["rgb", "grey"])
@pytest.mark.parametrize("make", [nothing, two])
@pytest.mark.parametrize("size", [(1, 1), (3, 400), (400, 3), (64, 64)], ids=str)
def test_any_image_gives_a_canvas(size, make, config):
    for seed in range(3):
        torch.manual_seed(seed)
        item = nothing(*size) if make is nothing or min(size) < 9 else two(*size)
        out = LargeScaleJitter(config, SIZE)(item)
        assert out["image"].shape == (config["input_size"][0], SIZE, SIZE)
        assert out["image"].isfinite().all()
        assert type(out["image"]) is torch.Tensor
        n = len(out["objects"]["labels"])
        assert out["objects"]["boxes"].shape == (n, 4)
        assert out["objects"]["masks"].shape == (n, SIZE, SIZE)
        assert out["objects"]["labels"].dtype == torch.int64
        assert out["objects"]["masks"].dtype == torch.uint8


def test_a_batch_keeps_every_samples_objects_and_a_seed_fixes_them():
    samples = SeededSamples([two(), nothing(), two()], LargeScaleJitter(RGB, SIZE), seed=3)
    batch, again = (collate([samples[(0, i)] for i in range(3)]) for _ in range(2))
    assert batch["image"].shape == (3, 3, SIZE, SIZE)
    assert len(batch["objects"]) == 3
    assert len(batch["objects"][1]["boxes"]) == 0
    for one, other in zip(batch["objects"], again["objects"], strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [((30, 60), 1.0, [32, 64]), ((60, 30), 0.5, [32, 16]), ((2, 500), 1.0, [1, 64])],
)
def test_the_longer_side_fits(size, scale, expected):
    assert fitted(size, SIZE, scale) == expected


def test_a_scale_that_is_no_range_is_refused():
    with pytest.raises(ValueError, match=r"expected \(low, high\)"):
        LargeScaleJitter(RGB, SIZE, scale=(0.0, 0.5))
