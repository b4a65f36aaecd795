"""What the header of a raster says of its values: bands, colours, units, missing pixels, place."""

import warnings

import numpy as np
import pytest

rasterio = pytest.importorskip("rasterio", reason="needs pip install 'vim-ssl[remote-sensing]'")

from rasterio.control import GroundControlPoint  # noqa: E402
from rasterio.enums import ColorInterp  # noqa: E402
from rasterio.rpc import RPC  # noqa: E402

from vim_ssl.data import BadImage, open_data  # noqa: E402
from vim_ssl.data.sources.geotiff import write_labels  # noqa: E402

UTM33 = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)}
SIDE = 12


def draw(bands=3, dtype=np.uint8, low=1, high=250, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (bands, SIDE, SIDE)).astype(dtype)


def write(path, values, names=(), after=lambda file: None, place=UTM33, **profile):
    """A GeoTIFF of values (bands, h, w); ``after`` sets further tags."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(
            path, "w", driver="GTiff", width=width, height=height, count=count, dtype=values.dtype,
            **place, **profile,
        ) as file:  # fmt: skip
            for number, name in enumerate(names, 1):
                file.set_band_description(number, name)
            after(file)
            file.write(values)
    return path


def setter(**attributes):
    def after(file):
        for name, value in attributes.items():
            setattr(file, name, value)

    return after


def first(spec: str) -> np.ndarray:
    return np.asarray(open_data(spec)[0]["image"])


# ------------------------------------------------------------------------- bands


@pytest.mark.parametrize(
    ("names", "interpretation"),
    [(("blue", "green", "red"), None), (("B02", "B03", "B04"), None), ((), "bgr")],
    ids=["words", "sentinel", "interpretation"],
)
def test_bands_of_8_bits_named_blue_green_red_are_fed_as_red_green_blue(
    tmp_path, names, interpretation
):
    kinds = [ColorInterp.blue, ColorInterp.green, ColorInterp.red]
    after = setter(colorinterp=kinds) if interpretation else setter()
    values = draw()
    write(tmp_path / "a.tif", values, names, after)
    assert np.array_equal(first(f"geotiff:{tmp_path}"), np.moveaxis(values[::-1], 0, -1))
    asked = open_data(f"geotiff:{tmp_path}?bands=3,2,1")
    assert (np.asarray(asked[0]["image"])[..., 0] == values[2]).all()
    assert asked.faults == []
    if names:
        told = open_data(f"geotiff:{tmp_path}?bands={','.join(names)}").faults
        assert "are taken for red, green and blue in this order" in told[0]


def test_files_with_the_bands_in_another_order_are_read_by_name(tmp_path):
    values = draw(4, np.uint16)
    write(tmp_path / "a.tif", values, ("B02", "B03", "B04", "B08"))
    write(tmp_path / "b.tif", values[[3, 2, 1, 0]], ("B08", "B04", "B03", "B02"))
    write(tmp_path / "c.tif", values[[2, 1, 0, 3]], ("red", "green", "blue", "b08"))
    data = open_data(f"geotiff:{tmp_path}")
    assert data.bands == ("B02", "B03", "B04", "B08")
    for item in data:
        assert np.array_equal(item["image"], np.moveaxis(values, 0, -1))
    one = open_data(f"geotiff:{tmp_path}?bands=B08,red")
    assert all(np.array_equal(item["image"][..., 1], values[2]) for item in one)


def test_a_palette_has_colours_where_it_is_an_image_and_numbers_where_it_is_a_mask(tmp_path):
    numbers = draw(1, low=0, high=3)
    colours = {0: (250, 0, 0, 255), 1: (0, 240, 0, 255), 2: (1, 2, 230, 255)}
    for folder in ("images", "masks"):
        write(tmp_path / folder / "a.tif", numbers, (), lambda f: f.write_colormap(1, colours))
    item = open_data(f"geotiff:{tmp_path}")[0]
    assert np.array_equal(item["mask"], numbers[0])
    assert np.array_equal(item["image"], np.array(list(colours.values()))[numbers[0], :3])
    write(tmp_path / "images/b.tif", draw())  # red, green and blue without a palette
    assert len(open_data(f"geotiff:{tmp_path}/images")) == 2
    stored = open_data(f"geotiff:{tmp_path}/images/a.tif?values=stored")
    assert np.array_equal(stored[0]["image"], numbers[0])


def test_an_alpha_band_marks_missing_pixels(tmp_path):
    values = draw(4)
    values[3] = 255
    values[3, :2] = 0
    write(tmp_path / "a.tif", values)
    image = first(f"geotiff:{tmp_path}")
    assert open_data(f"geotiff:{tmp_path}").bands == ("band1", "band2", "band3")
    assert np.isnan(image[:2]).all()
    np.testing.assert_allclose(image[2:], np.moveaxis(values[:3, 2:], 0, -1) / 255, rtol=1e-6)
    assert first(f"geotiff:{tmp_path}?values=stored").shape[2] == 4


@pytest.mark.parametrize("names", [(), ("R", "G", "B", "NIR")], ids=["values", "name"])
def test_near_infrared_that_gdal_declares_as_alpha_is_a_band(tmp_path, names):
    values = draw(4, low=0 if names else 1)
    if names:
        values[3] = np.where(values[3] > 99, 255, 0)  # a name decides before the values
    write(tmp_path / "a.tif", values, names)
    assert np.array_equal(first(f"geotiff:{tmp_path}"), np.moveaxis(values, 0, -1))


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ("B02,B02,B03", "bands=B02,B02,B03 has the band B02 twice"),
        ("B99", "no band 'B99'"),
        ("5", "no band '5'"),
        ("x", "several bands 'x'"),
    ],
)
def test_bands_in_doubt_are_refused(tmp_path, bands, message):
    write(tmp_path / "a.tif", draw(4, np.uint16), ("B02", "B03", "x", "x"))
    with pytest.raises(ValueError, match=message):
        open_data(f"geotiff:{tmp_path}?bands={bands}")
    assert open_data(f"geotiff:{tmp_path}?bands=1,1,1")[0]["image"].shape[2] == 3


# ------------------------------------------------------------------------- units


def test_scale_and_offset_are_applied_and_no_data_is_found_before(tmp_path):
    stored = draw(2, np.int16, 100, 5000)
    stored[0, 0, 0] = -9999
    tags = setter(scales=(1e-4, 2.0), offsets=(-0.1, 5.0))
    write(tmp_path / "a.tif", stored, ("r", "t"), tags, nodata=-9999)
    data = open_data(f"geotiff:{tmp_path}")
    image = data[0]["image"]
    assert (data.dtype, image.dtype, np.isnan(image).sum()) == (np.float32, np.float32, 1)
    expected = np.stack([stored[0] * 1e-4 - 0.1, stored[1] * 2.0 + 5], -1)
    np.testing.assert_allclose(image[1:], expected[1:], rtol=1e-5)
    raw = first(f"geotiff:{tmp_path}?values=stored")
    np.testing.assert_array_equal(raw[1:], np.moveaxis(stored, 0, -1)[1:])


def named(file):
    file.units = ("K", "K")


FEET = {"crs": "EPSG:32633", "transform": rasterio.Affine(30, 0, 500_000, 0, -30, 5_000_000)}
DEGREES = {"crs": "EPSG:4326", "transform": rasterio.Affine(9e-5, 0, 15, 0, -9e-5, 45)}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("b", {"dtype": np.float32}, "different types of values: float (test/b.tif), integer"),
        ("b", {"after": named}, "different units: K, K (test/b.tif), none"),
        ("b", {"place": FEET}, "different resolutions: 10 m a pixel (train/a.tif) to 30 m"),
        ("b", {"place": DEGREES}, "different coordinate systems: EPSG:4326 (test/b.tif), UTM"),
        ("b", {"nodata": 99_999, "dtype": np.int32}, ""),
        ("b", {"place": UTM33 | {"crs": "EPSG:32634"}}, ""),
        ("S2A_MSIL2A_20230101T000000_N0509_R1_T33UUP", {}, "1000 is added to reflectances"),
    ],
    ids=["types", "units", "resolutions", "systems", "integers", "zones", "baselines"],
)
def test_rasters_whose_values_mean_other_things_are_told_across_the_splits(
    tmp_path, name, options, words
):
    write(tmp_path / "train/a.tif", draw(2, np.uint16))
    if "T33" in name:
        (tmp_path / "train/a.tif").rename(
            tmp_path / "train/S2A_MSIL2A_20200101T000000_N0213_R1_T33UUP.tif"
        )
    write(tmp_path / f"test/{name}.tif", draw(2, options.pop("dtype", np.uint16)), **options)
    for split in ("train", "test"):
        told = "\n".join(open_data(f"geotiff:{tmp_path}", split=split).faults)
        assert words in told
        assert bool(words) == bool(told)


# ------------------------------------------------------------------------- missing values


@pytest.mark.parametrize("query", ["", "?bands=3", "?bands=1,2"])
def test_a_colour_pixel_is_missing_where_all_its_bands_are(tmp_path, query):
    values = draw()
    values[:, 0, 0] = 0, 0, 200
    values[:, 0, 1] = 0
    write(tmp_path / "a.tif", values, nodata=0)
    image = first(f"geotiff:{tmp_path}{query}").reshape(SIDE, SIDE, -1)
    assert np.isnan(image).all(-1).sum() == np.isnan(image).any(-1).sum() == 1
    assert np.isnan(image[0, 1]).all()
    assert image[0, 0].max() == pytest.approx(0 if query == "?bands=1,2" else 200 / 255)


@pytest.mark.parametrize(
    ("dtype", "nodata"), [(np.float32, np.nan), (np.int16, -9999), (np.float32, -3.4e38)]
)
def test_a_measured_band_is_missing_on_its_own(tmp_path, dtype, nodata):
    values = draw(3, dtype)
    values[1, 0, 0] = nodata
    write(tmp_path / "a.tif", values, nodata=nodata)
    image = first(f"geotiff:{tmp_path}")
    assert np.isnan(image[0, 0]).tolist() == [False, True, False]
    assert np.isnan(image).sum() == 1


def test_a_mask_in_the_file_or_beside_it_marks_missing_pixels(tmp_path):
    mask = np.full((SIDE, SIDE), 255, np.uint8)
    mask[:3] = 0
    for name, inside in (("a", True), ("b", False)):
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=inside):
            write(tmp_path / f"{name}.tif", draw(), (), lambda file: file.write_mask(mask))
    assert (tmp_path / "b.tif.msk").exists()
    for item in open_data(f"geotiff:{tmp_path}"):
        assert np.isnan(item["image"][:3]).all()
        assert np.isfinite(item["image"][3:]).all()


# ------------------------------------------------------------------------- masks and predictions

TURNED = {"crs": "EPSG:32633", "transform": rasterio.Affine(9, 2, 5e5, 2, -9, 5e6)}
FAR = rasterio.Affine(10, 0, 500_500, 0, -10, 5_000_000)
NEAR = rasterio.Affine(10, 0, 500_000.4, 0, -10, 5_000_000)


@pytest.mark.parametrize(
    ("image", "mask", "fits"),
    [
        (UTM33, {"transform": FAR}, False),
        ({"transform": UTM33["transform"]}, {"transform": FAR}, False),
        (UTM33, UTM33 | {"crs": "EPSG:32634"}, False),
        (UTM33, {"transform": rasterio.Affine(20, 0, 500_000, 0, -20, 5_000_000)}, False),
        (TURNED, UTM33 | {"transform": rasterio.Affine(9, -2, 5e5, 2, -9, 5e6)}, False),
        (UTM33, UTM33 | {"transform": NEAR}, True),
        (UTM33, {}, True),
        ({}, UTM33, True),
        (TURNED, TURNED, True),
    ],
)
def test_a_mask_lies_where_its_raster_lies_or_is_refused(tmp_path, image, mask, fits):
    write(tmp_path / "images/a.tif", draw(), place=image)
    write(tmp_path / "masks/a.tif", draw(1, low=0, high=3), place=mask)
    if fits:
        assert len(open_data(f"geotiff:{tmp_path}")) == 1
        return
    with pytest.raises(ValueError, match="different positions"):
        open_data(f"geotiff:{tmp_path}")


def test_masks_that_cannot_hold_class_numbers_are_refused(tmp_path):
    for name, mask, options in (
        ("a", draw(1, low=0, high=3), {}),
        ("b", draw(3, low=0, high=2), {}),
        ("c", draw(1, low=0, high=2), {"compress": "jpeg"}),
    ):
        write(tmp_path / f"images/{name}.tif", draw())
        write(tmp_path / f"masks/{name}.tif", mask, **options)
    data = open_data(f"geotiff:{tmp_path}")
    assert "2 masks cannot be read, for example b.tif: the mask is a colour" in data.faults[0]
    for i, reason in ((1, "colour image"), (2, "JPEG compression changes class numbers")):
        with pytest.raises(BadImage, match=reason):
            data[i]


POINTS = [GroundControlPoint(r, c, 15 + c / 320, 45 - r / 320, 0) for r, c in
          ((0, 0), (0, SIDE), (SIDE, SIDE))]  # fmt: skip
MODEL = RPC(
    height_off=1.0, height_scale=2.0, lat_off=3.0, lat_scale=4.0, line_off=5.0, line_scale=6.0,
    long_off=7.0, long_scale=8.0, samp_off=1.0, samp_scale=2.0, err_bias=None, err_rand=None,
    line_den_coeff=[1.0] * 20, line_num_coeff=[2.0] * 20, samp_den_coeff=[3.0] * 20,
    samp_num_coeff=[4.0] * 20,
)  # fmt: skip


@pytest.mark.parametrize(
    ("place", "after"),
    [
        (UTM33, lambda file: file.update_tags(AREA_OR_POINT="Point")),
        ({}, lambda file: setattr(file, "gcps", (POINTS, rasterio.CRS.from_epsg(4326)))),
        ({}, setter(rpcs=MODEL)),
        ({}, lambda file: file.update_tags(ns="GEOLOCATION", X_DATASET="x.tif", X_BAND="1")),
        (TURNED, setter()),
    ],
    ids=["point", "gcps", "rpcs", "geolocation", "turned"],
)
@pytest.mark.parametrize("box", [None, (2, 3, 4, 4)], ids=["whole", "tile"])
def test_predictions_lie_where_their_raster_lies(tmp_path, place, after, box):
    def position(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(path) as file:
                points = [(p.row, p.col, p.x, p.y) for p in file.gcps[0]]
                return (file.crs, file.transform, points, file.gcps[1], file.rpcs,
                        file.tags(ns="GEOLOCATION"), file.tags().get("AREA_OR_POINT"))  # fmt: skip

    like = write(tmp_path / "a#1.tif", draw(), after=after, place=place)
    labels = np.ones((4, 4) if box else (SIDE, SIDE), np.uint8)
    write_labels(tmp_path / "out.tif", str(like), box, labels, ["soil", "leaf"])
    assert position(tmp_path / "out.tif") == position(like)
    with rasterio.open(tmp_path / "out.tif") as file:
        assert (file.nodata, file.colormap(1)[1][3]) == (255, 255)
        assert file.tags(1) == {"CLASS_0": "soil", "CLASS_1": "leaf"}
        assert (file.read(1) == 1).sum() == labels.size
