"""Numbers in files that spoil images: undeclared values for no data, and a narrow range."""

import logging

import numpy as np
import pytest
from PIL import Image

from vim_ssl.data import ImageData, band_statistics, check, open_data
from vim_ssl.data.ranges import fills, undeclared

DRAW = np.random.default_rng(0)


def scene(low: float, high: float, dtype=np.float32, fill: float | None = None, rows=8):
    values = DRAW.uniform(low, high, (40, 40, 3))
    values[:rows] = values[:rows] if fill is None else fill
    return values.astype(dtype)


@pytest.mark.parametrize(
    ("low", "high", "dtype", "fill"),
    [
        (0, 0.4, np.float32, -9999),
        (0, 0.4, np.float32, -3.4028234663852886e38),
        (0, 0.4, np.float32, 1e20),
        (0, 0.4, np.float32, 77),
        (0, 3000, np.int16, -32768),
        (0, 20000, np.int16, -9999),
        (0, 4000, np.uint16, 65535),
    ],
)
def test_a_frequent_value_far_from_all_others_stands_for_no_data(low, high, dtype, fill):
    values = scene(low, high, dtype, fill)
    assert fills(values) == (pytest.approx(fill, rel=1e-6),)
    assert fills(values[..., 0]) == fills(values)


@pytest.mark.parametrize(
    "values",
    [
        scene(0, 0.4),
        scene(0, 4000, np.uint16, 0),
        scene(0, 255, np.uint8, 255),
        scene(30000, 65535, np.uint16, 65535),  # saturated
        scene(0, 1, np.uint16, 1),  # a mask
        np.full((40, 40, 3), np.nan, np.float32),
        scene(-5000, 1000, np.int16),
    ],
    ids=["plain", "dark", "8-bit", "saturated", "mask", "empty", "signed"],
)
def test_other_values_are_measured(values):
    assert fills(values) == ()


def test_a_raster_without_a_tag_for_no_data_is_a_problem_and_a_warning(tmp_path, caplog):
    rasterio = pytest.importorskip("rasterio")
    for i in range(3):
        values = np.moveaxis(scene(0, 0.4, fill=None if i else -9999), -1, 0)
        with rasterio.open(
            tmp_path / f"{i}.tif", "w", driver="GTiff", width=40, height=40, count=3,
            dtype="float32",
        ) as file:  # fmt: skip
            file.write(values)
    (problem,) = [p for p in check.check(f"geotiff:{tmp_path}").problems if "no-data" in p]
    assert problem.startswith("1 of 3 images have many pixels of -9999")
    assert "gdal_edit.py -a_nodata -9999 FILE" in problem
    assert "0.tif" in problem
    band_statistics(open_data(f"geotiff:{tmp_path}"))
    assert "1 of 3 images have many pixels of -9999" in caplog.text


def test_statistics_of_arrays_warn_too(caplog):
    data = ImageData([scene(0, 1, fill=1e20)], ["a"], name="arrays", bands=tuple("xyz"))
    with caplog.at_level(logging.WARNING):
        band_statistics(data)
    assert "arrays: 1 of 1 images have many pixels of 1e+20" in caplog.text


@pytest.mark.parametrize(
    ("value", "text"),
    [(-9999, "-9999"), (np.float32(1e20), "1e+20"), (2**31 - 1, "2147483647"),
     (np.finfo(np.float32).min, "-3.4028235e+38"), (-np.finfo(float).max, "-1.79769313486231")],
)  # fmt: skip
def test_the_value_is_written_so_that_a_tag_can_have_it(value, text):
    assert f"many pixels of {text}" in undeclared({"a": (float(value),)})


def test_a_grey_float_image_with_a_value_for_no_data_is_a_problem(tmp_path):
    for i in range(2):
        Image.fromarray(scene(0, 50, fill=-9999)[..., 0]).save(tmp_path / f"{i}.tif")
    (problem,) = check.check(str(tmp_path)).problems
    assert problem.startswith("2 of 2 images have many pixels of -9999")


@pytest.mark.parametrize(
    ("dtype", "most", "words"),
    [
        (np.uint16, 4095, "use only about 6.6% of the range"),
        (np.int32, 60000, "become 1 levels of grey"),
        (np.uint16, 65535, ""),
        (np.uint8, 9, ""),
    ],
)
def test_a_narrow_part_of_a_types_range_is_a_problem_and_a_warning(
    tmp_path, caplog, dtype, most, words
):
    for i in range(3):
        values = DRAW.integers(0, most + 1, (16, 16)).astype(dtype)
        values[0, 0] = most
        Image.fromarray(values).save(tmp_path / f"{i}.tif")
    open_data(tmp_path)
    problems = check.check(str(tmp_path)).problems
    assert [words in problem for problem in problems] == [True] * bool(words)
    assert ("of the range of their type" in caplog.text) == bool(words)
