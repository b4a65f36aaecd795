"""The unit and the order of bands, between images of a set, and between data and an encoder."""

import logging

import numpy as np
import pytest

from vim_ssl import VimEncoder, save_encoder
from vim_ssl.checkpoints.loading import load_for_bands
from vim_ssl.data import ImageData, band_arguments, band_statistics
from vim_ssl.data.bands import check_bands, in_other_unit

BANDS = ("B02", "B03", "B04", "B08")


def scene(seed=0, scale=1.0, dtype=np.float32) -> np.ndarray:
    return (np.random.default_rng(seed).integers(500, 5000, (16, 16, 4)) * scale).astype(dtype)


def data_of(*images: np.ndarray, bands=BANDS, name="scenes") -> ImageData:
    ids = [f"{i}.tif" for i in range(len(images))]
    return ImageData(list(images), ids, name=name, bands=bands, dtype=images[0].dtype)


def encoder_for(data: ImageData) -> VimEncoder:
    return VimEncoder(
        img_size=16, patch_size=8, in_chans=4, embed_dim=8, depth=1, num_classes=0,
        scan_backend="torch", data_config=band_statistics(data),
    )  # fmt: skip


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_values_in_another_unit_than_those_of_training_are_refused(tmp_path, scale):
    encoder = encoder_for(data_of(scene()))
    other = data_of(scene(1, scale), scene(2, scale))
    with pytest.raises(ValueError, match=r"scenes has values of about .*: another unit"):
        check_bands(encoder, other)
    save_encoder(encoder, tmp_path)
    with pytest.raises(ValueError, match=r"the training data has values .*: another unit"):
        load_for_bands(str(tmp_path), band_arguments(other), img_size=16)


@pytest.mark.parametrize(
    "images",
    [
        [scene(1, 0.2)],
        [scene(1, 5)],
        [np.zeros((16, 16, 4), np.float32), scene(1)],  # a border without data
        [np.zeros((16, 16, 4), np.float32)],
        [np.where(scene(1) > 600, np.nan, scene(1))],
        [scene(1, 1e-4), scene(2)],
    ],
    ids=["dark", "bright", "border", "black", "holes", "one-of-two"],
)
def test_other_scenes_are_in_the_unit_of_training(tmp_path, images):
    encoder = encoder_for(data_of(scene()))
    check_bands(encoder, data_of(*images))
    save_encoder(encoder, tmp_path)
    if len(images) == 1 and np.nanmax(images[0]) > 0:
        load_for_bands(str(tmp_path), band_arguments(data_of(*images)), img_size=16)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("names", [BANDS, ("blue", "green", "red", "nir")])
def test_the_bands_of_an_encoder_in_another_order_are_refused(dtype, names):
    values = scene(0, 0.01, dtype)
    encoder = encoder_for(data_of(values, bands=names))
    check_bands(encoder, data_of(values, bands=names))
    turned = (names[2], names[1], names[0], names[3])
    with pytest.raises(ValueError, match=rf"\?bands={','.join(names)}"):
        check_bands(encoder, data_of(values, bands=turned))


def test_images_of_a_set_in_another_unit_are_told(caplog):
    images = [scene(i) for i in range(5)]
    with caplog.at_level(logging.WARNING):
        band_statistics(data_of(*images, name="same"))
        assert "another unit" not in caplog.text
        band_statistics(data_of(*images, scene(6, 1e-4), name="mixed"))
    assert "1 of 6 images, for example 5.tif" in caplog.text


def test_dark_and_empty_images_are_in_the_same_unit():
    assert in_other_unit({"a": 100.0, "b": 0.0, "c": float("nan"), "d": 2.0, "e": 90.0}) == []
    assert in_other_unit({"a": 100.0, "b": 110.0, "c": 0.01}) == ["c"]
