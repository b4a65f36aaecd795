"""Transforms give what the encoder expects, of any image."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

from vim_ssl import VimEncoder, create_transform
from vim_ssl.data import BadImage, ImageData, band_statistics, pretrain_transform
from vim_ssl.data.transforms.image import denormalize

RGB = {
    "input_size": (3, 32, 32), "mean": (0.5, 0.25, 0.0), "std": (0.5, 0.25, 1.0),
    "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
}  # fmt: skip
GREY = RGB | {"input_size": (1, 28, 28), "mean": (0.1307,), "std": (0.3081,)}

FIVE = RGB | {
    "input_size": (5, 32, 32),
    "mean": (1000.0, 0.5, 0.0, 3.0, 4.0), "std": (100.0, 0.5, 1.0, 1.0, 2.0),
    "bands": ("B02", "B03", "B04", "NIR", "SWIR"),
}  # fmt: skip


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), 0 * x], -1)
    return Image.fromarray(rgb.astype(np.uint8))


@pytest.mark.parametrize("config", [RGB, GREY], ids=["rgb", "grey"])
@pytest.mark.parametrize("size", [(32, 32), (7, 5), (400, 90), (1, 1), (3, 9000)])
@pytest.mark.parametrize(
    "make", [create_transform, pretrain_transform], ids=["evaluate", "pretrain"]
)
def test_any_size_becomes_the_encoders(make, size, config):
    x = make(config)(gradient(*size))
    assert x.shape == config["input_size"]
    assert x.dtype == torch.float32
    assert x.isfinite().all()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "I;16", "F", "LA"])
@pytest.mark.parametrize("config", [RGB, GREY], ids=["rgb", "grey"])
def test_any_mode_becomes_the_encoders(mode, config):
    image = gradient(40, 30)
    if mode == "I;16":
        image = Image.fromarray(np.full((30, 40), 30000, np.uint16))
    else:
        image = image.convert("L").convert(mode) if mode in ("F", "LA") else image.convert(mode)
    assert create_transform(config)(image).shape == config["input_size"]


@pytest.mark.parametrize("config", [RGB, GREY], ids=["rgb", "grey"])
def test_values_are_those_of_torchvision_bit_for_bit(config):
    from torchvision.transforms import functional

    levels = np.arange(3 * 32 * 32, dtype=np.uint16).reshape(32, 32, 3) % 256  # all 256 of each
    image = Image.fromarray(levels.astype(np.uint8))
    image = image.crop((0, 0, 28, 28)).convert("L") if config is GREY else image
    expected = functional.normalize(functional.to_tensor(image), config["mean"], config["std"])
    whole = pretrain_transform(config, crop_scale=(1, 1), hflip=0)
    training = create_transform(config, is_training=True, no_aug=True)
    for transform in (create_transform(config), whole, training):
        assert torch.equal(transform(image), expected)
        assert torch.equal(pickle.loads(pickle.dumps(transform))(image), expected)


def test_evaluation_values_are_normalised_pixels():
    image = Image.new("RGB", (32, 32), (255, 0, 51))
    x = create_transform(RGB)(image)
    torch.testing.assert_close(x[:, 3, 4], torch.tensor([1.0, -1.0, 0.2]))
    digit = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    x = create_transform(GREY)(Image.fromarray(digit))
    expected = (torch.from_numpy(digit) / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(x[0], expected)


def test_evaluation_is_timms(tmp_path):
    from timm.data import create_transform as timm_transform

    config = RGB | {"crop_pct": 0.875, "interpolation": "bilinear"}
    image = gradient(300, 200)
    ours, theirs = create_transform(config)(image), timm_transform(**config)(image)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("crop_mode", "reds"), [("center", (85, 170)), ("squash", (0, 255))], ids=str
)
def test_crop_mode(crop_mode, reds):
    config = RGB | {"crop_mode": crop_mode, "mean": (0, 0, 0), "std": (1, 1, 1)}
    x = create_transform(config)(gradient(96, 32)) * 255
    np.testing.assert_allclose([x[0].min(), x[0].max()], reds, atol=6)


def test_long_images_are_trimmed_without_changing_the_result():
    """A 1 × 60,000 image would otherwise be enlarged to 61 million pixels."""
    config = RGB | {"crop_pct": 0.9}
    from timm.data import create_transform as timm_transform

    image = gradient(1200, 40)  # aspect 30: trimmed
    torch.testing.assert_close(
        create_transform(config)(image), timm_transform(**config)(image), rtol=0, atol=0.03
    )
    longest = []
    config = RGB | {"input_size": (3, 224, 224)}
    transform = create_transform(config)
    transform.transforms.insert(2, lambda image: longest.append(max(image.size)) or image)
    transform(Image.new("RGB", (1, 60_000)))
    assert longest == [8]


def test_transparent_and_turned_images_are_put_right():
    clear = Image.new("RGBA", (32, 32), (9, 9, 9, 0))
    config = RGB | {"mean": (0, 0, 0), "std": (1, 1, 1)}
    assert create_transform(config)(clear).min() == 1  # white
    turned = gradient(32, 32)
    turned.getexif()[0x0112] = 3
    upside_down = create_transform(config)(turned)
    torch.testing.assert_close(upside_down, create_transform(config)(gradient(32, 32)).flip(1, 2))


def test_an_encoder_says_what_it_expects():
    encoder = VimEncoder(
        img_size=(32, 48), patch_size=8, in_chans=1, embed_dim=8, depth=1, num_classes=0
    )
    x = create_transform(encoder)(gradient(100, 100))
    assert x.shape == (1, 32, 48)
    assert encoder(x[None]).shape == (1, 8)


def test_training_augmentation_takes_timms_arguments():
    plain = create_transform(RGB, is_training=True, hflip=0, scale=(1, 1), ratio=(1, 1),
                             color_jitter=0)  # fmt: skip
    torch.testing.assert_close(plain(gradient(32, 32)), create_transform(RGB)(gradient(32, 32)))
    augmented = create_transform(RGB, is_training=True, auto_augment="rand-m9-mstd0.5-inc1")
    assert not torch.equal(augmented(gradient(64, 64)), augmented(gradient(64, 64)))
    with pytest.raises(TypeError, match="colour_jitter"):
        create_transform(RGB, is_training=True, colour_jitter=0)


@pytest.mark.parametrize("name", ["rand-m10-n1", "rand-m10-inc1-n1", "original", "augmix-m10"])
def test_timms_policies_take_their_highest_level(name):
    """Where timm posterizes to no bit at all, which Pillow 13 refuses."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    transform = create_transform(RGB, is_training=True, auto_augment=name, color_jitter=None)
    for _ in range(400):
        transform(gradient(32, 32))


def test_pretraining_is_random_and_seeded_by_the_global_generators():
    transform = pretrain_transform(RGB)
    image = gradient(100, 80)

    def draw(seed: int) -> torch.Tensor:
        random.seed(seed)
        torch.manual_seed(seed)
        return transform(image)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_pretraining_crops_and_flips_as_asked():
    config = RGB | {"mean": (0, 0, 0), "std": (1, 1, 1)}
    image = gradient(320, 320)

    def rises(x: torch.Tensor) -> bool:  # red grows to the right: not mirrored
        return bool(x[0, 16, -1] > x[0, 16, 0])

    def draws(**arguments) -> list[torch.Tensor]:
        transform = pretrain_transform(config, **arguments)
        return [transform(image) for _ in range(40)]

    assert {rises(x) for x in draws()} == {True, False}
    assert {rises(x) for x in draws(hflip=0)} == {True}
    assert {rises(x) for x in draws(hflip=1)} == {False}
    # A crop of 4 % of the area in a square spans a fifth of the gradient.
    small = draws(crop_scale=(0.04, 0.04), ratio=(1, 1), hflip=0)
    spans = [float(x[0].max() - x[0].min()) for x in small]
    np.testing.assert_allclose(spans, 0.2, atol=0.02)


def test_no_crop_means_nothing_random():
    transform = pretrain_transform(RGB | {"crop_pct": 0.5}, crop_scale=(1, 1), hflip=0)
    image = gradient(90, 60)
    assert torch.equal(transform(image), transform(image))
    torch.testing.assert_close(transform(image), create_transform(RGB)(image))
    flipping = pretrain_transform(RGB, crop_scale=(1.0, 1.0), hflip=1)
    torch.testing.assert_close(flipping(image), transform(image).flip(2))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: create_transform(FIVE)(gradient(9, 9)), ValueError, r"5 channels .* grey"),
        (lambda: create_transform(FIVE)(np.zeros((9, 9, 4))), ValueError, r"4 bands; .*\?bands="),
        (lambda: create_transform({"input_size": (3, 32, 32)}), ValueError, "no mean, std"),
        (lambda: create_transform(224), TypeError, "got int"),
        (lambda: pretrain_transform(RGB, crop_scale=(0, 1)), ValueError, "crop_scale"),
        (lambda: pretrain_transform(RGB, crop_scale=(0.5, 0.2)), ValueError, "crop_scale"),
        (lambda: pretrain_transform(RGB, ratio=(2, 1)), ValueError, "ratio"),
        (lambda: create_transform(RGB)(np.zeros((4, 4))), TypeError, r"bands\), not ndarray"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message) as caught:
        make()
    assert not isinstance(caught.value, BadImage)


@pytest.mark.parametrize("size", [(32, 32), (7, 5), (90, 40), (3, 900)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("make", [create_transform, pretrain_transform])
def test_bands_of_any_type_become_the_encoders(make, dtype, size):
    values = np.random.default_rng(0).integers(0, 200, (*size, 5)).astype(dtype)
    x = make(FIVE)(values)
    assert x.shape == FIVE["input_size"]
    assert x.dtype == torch.float32
    assert x.isfinite().all()


def test_bands_keep_their_unit_and_what_is_missing_is_the_mean():
    values = np.full((32, 32, 5), 1100, np.float32)
    values[:, :16] = np.nan
    x = create_transform(FIVE)(values)
    torch.testing.assert_close(x[:2, 3, 30], torch.tensor([1.0, 2199.0]))
    assert (x[:, :, :8] == 0).all()
    x = create_transform(FIVE)(np.full((32, 32, 5), 255, np.uint8))
    torch.testing.assert_close(x[1, 3, 4], torch.tensor(1.0))


def test_training_augmentation_takes_bands():
    values = np.random.default_rng(0).random((40, 50, 5), np.float32)
    assert create_transform(FIVE, is_training=True)(values).shape == (5, 32, 32)


def test_statistics_of_bands_leave_out_what_is_missing():
    draw = np.random.default_rng(0)
    arrays = [draw.normal((5, 100), (2, 30), (20, 20, 2)).astype(np.float32) for _ in range(8)]
    values = np.stack(arrays).reshape(-1, 2).astype(float)
    arrays[0][3:9] = np.nan
    kept = np.concatenate([a.reshape(-1, 2) for a in arrays])
    kept = kept[np.isfinite(kept[:, 0])].astype(float)
    arrays.append(np.full((2, 2, 2), np.nan, np.float32))  # nothing at all: passed over
    data = ImageData(arrays, map(str, range(9)), name="made", bands=("VV", "VH"))
    found = band_statistics(data)
    assert found["bands"] == ("VV", "VH")
    np.testing.assert_allclose(found["mean"], kept.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["std"], kept.std(0), rtol=1e-6)
    assert not np.allclose(found["mean"], values.mean(0), rtol=1e-6)
    images = ImageData([np.full((4, 4, 3), 51, np.uint8)], ["a"], name="made")
    assert band_statistics(images)["bands"] == ("R", "G", "B")
    np.testing.assert_allclose(band_statistics(images)["mean"], 0.2)


def test_bands_as_seen_are_red_green_and_blue_around_their_mean():
    x = torch.zeros(1, 5, 4, 4)
    x[:, 2], x[:, 3] = 2.0, -9.0  # red is two deviations up; infrared is not shown
    seen = denormalize(x, FIVE)
    torch.testing.assert_close(seen[0, :, 0, 0], torch.tensor([1.0, 0.5, 0.5]))
    assert denormalize(x, FIVE | {"bands": tuple("abcde")})[0, 2, 0, 0] == 1.0  # the first three
    image = create_transform(RGB)(Image.new("RGB", (32, 32), (255, 0, 51)))
    expected = torch.tensor([1.0, 0.0, 0.2])
    torch.testing.assert_close(denormalize(image[None], RGB)[0, :, 3, 3], expected)


def test_colours_of_four_channels_are_not_changed():
    four = {"input_size": (4, 8, 8), "mean": (0.5,) * 4, "std": (0.5,) * 4}
    assert create_transform(four, is_training=True)(np.zeros((9, 9, 4), np.uint8)).shape[0] == 4
    with pytest.raises(ValueError, match="not for 4 channels; set it to 0"):
        create_transform(four, is_training=True, color_jitter=0.4)
