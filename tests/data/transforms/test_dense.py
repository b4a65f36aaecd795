"""An image and its mask stay together through every augmentation, and a seed fixes them."""

import numpy as np
import pytest
import torch
from PIL import Image

from vim_ssl.data.labels import IGNORE
from vim_ssl.data.loading.indexed import SeededSamples
from vim_ssl.data.transforms.dense import DenseCrop, DensePixels

RGB = {"input_size": (3, 32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
GREY = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.25,)}
STILL = {"scale": (1.0, 1.0), "hflip": 0.0, "photometric": False}


def shape(width: int, height: int, values=(0, 255)) -> dict:
    """A disc of class 1, as bright as ``values[1]``, left of the middle on class 0."""
    y, x = np.mgrid[:height, :width]
    mask = (np.hypot(x - width / 3, y - height / 2) < min(width, height) / 4).astype(np.uint8)
    image = Image.fromarray(np.take(np.array(values, np.uint8), mask)).convert("RGB")
    return {"image": image, "mask": mask}


@pytest.mark.parametrize("config", [RGB, GREY], ids=["rgb", "grey"])
@pytest.mark.parametrize("size", [(64, 48), (7, 90), (1, 1), (2, 500)], ids=str)
@pytest.mark.parametrize("short_side", [0, 24])
def test_any_image_gives_a_crop_of_both(size, config, short_side):
    out = DenseCrop(config, 32, short_side=short_side)(shape(*size))
    assert out["image"].shape == (config["input_size"][0], 32, 32)
    assert out["image"].dtype == torch.float32
    assert type(out["image"]) is type(out["mask"]) is torch.Tensor
    assert (out["mask"].shape, out["mask"].dtype) == ((32, 32), torch.int64)
    assert set(out["mask"].unique().tolist()) <= {0, 1, IGNORE}
    assert out["image"].isfinite().all()


def test_the_mask_follows_the_image():
    """Bright is class 1 whatever the crop, the size and the side; the border alone is blurred."""
    transform = DenseCrop(RGB, 40, photometric=False)
    for seed in range(20):
        torch.manual_seed(seed)
        out = transform(shape(64, 48))
        labelled = out["mask"] != IGNORE
        bright = out["image"].mean(0) > 0
        assert (bright == (out["mask"] == 1))[labelled].float().mean() > 0.93, seed


def test_nothing_random_nothing_changed():
    item = shape(32, 32)
    out = DenseCrop(RGB, 32, **STILL)(item)
    torch.testing.assert_close(out["image"], DensePixels(RGB)(item["image"]))
    assert np.array_equal(out["mask"], item["mask"])
    assert out["image"].unique().tolist() == [-2.0, 2.0]


def test_padding_is_the_mean_and_nobodys_class():
    out = DenseCrop(RGB, 40, **STILL)(shape(20, 20))
    outside = out["mask"] == IGNORE
    assert outside.sum() == 40 * 40 - 20 * 20
    assert out["image"][:, outside].abs().max() < 0.02


def test_a_crop_of_one_class_is_drawn_again():
    item = {"image": Image.new("RGB", (400, 40)), "mask": np.zeros((40, 400), np.uint8)}
    item["mask"][:, 200:230] = 1
    one_class = {}
    for share in (0.75, 1.0):
        transform = DenseCrop(RGB, 40, **STILL, max_share=share)
        torch.manual_seed(0)
        one_class[share] = sum(len(transform(item)["mask"].unique()) == 1 for _ in range(60))
    assert one_class[0.75] < one_class[1.0] / 2
    item["mask"][:] = IGNORE  # nothing to wait for
    assert (transform(item)["mask"] == IGNORE).all()


def test_a_seed_fixes_the_sample():
    data = [shape(64, 48, (40, 200)) for _ in range(3)]
    samples = SeededSamples(data, DenseCrop(RGB, 24), seed=5)
    first, again, next_epoch = samples[(0, 1)], samples[(0, 1)], samples[(1, 1)]
    for key in ("image", "mask"):
        assert torch.equal(first[key], again[key])
        assert not torch.equal(first[key], next_epoch[key])


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((30, 60), 0, [30, 60]),
        ((30, 60), 15, [15, 30]),
        ((60, 30), 45, [90, 45]),
        ((2, 500), 32, [1, 128]),
    ],
)
def test_the_short_side_is_met_unless_the_long_one_explodes(size, short_side, expected):
    assert DensePixels(RGB, short_side).resized(size) == expected


def test_a_scale_that_is_no_range_is_refused():
    with pytest.raises(ValueError, match=r"expected \(low, high\)"):
        DenseCrop(RGB, 32, scale=(2.0, 0.5))
