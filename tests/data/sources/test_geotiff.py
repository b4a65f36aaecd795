"""Rasters: bands by name and in order, no data as NaN, the official sets as they are handed out."""

import json
import pickle
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

rasterio = pytest.importorskip("rasterio", reason="needs pip install 'vim-ssl[remote-sensing]'")

from vim_ssl import VimEncoder, create_transform, load_encoder, save_encoder  # noqa: E402
from vim_ssl.data import BadImage, band_statistics, labelled_splits, open_data  # noqa: E402
from vim_ssl.data.check import check  # noqa: E402
from vim_ssl.data.sources import geotiff as rasters  # noqa: E402
from vim_ssl.data.sources.bigearthnet import BIGEARTHNET_BANDS, BIGEARTHNET_CLASSES  # noqa: E402
from vim_ssl.data.sources.eurosat import EUROSAT_BANDS, EUROSAT_CLASSES  # noqa: E402
from vim_ssl.data.sources.geotiff import write_labels  # noqa: E402
from vim_ssl.downstream import embed  # noqa: E402
from vim_ssl.evaluation.embeddings import read_embeddings  # noqa: E402
from vim_ssl.evaluation.features import encode_data  # noqa: E402


def write(path, values, names=(), nodata=None, **more):
    """A GeoTIFF of values (bands, h, w)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(
            path, "w", driver="GTiff", width=width, height=height, count=count,
            dtype=values.dtype, nodata=nodata, **more,
        ) as file:  # fmt: skip
            file.write(values)
            for number, name in enumerate(names, 1):
                file.set_band_description(number, name)
    return path


def scene(bands=4, height=20, width=30, dtype=np.uint16, seed=0):
    return np.random.default_rng(seed).integers(1, 250, (bands, height, width)).astype(dtype)


NAMES = ("B02", "B03", "B04", "B08")


def test_bands(tmp_path):
    values = scene()
    write(tmp_path / "a.tif", values, NAMES)
    data = open_data(f"geotiff:{tmp_path}")
    assert (data.bands, data.ids, data.groups) == (NAMES, ["a.tif"], ["a.tif"])
    image = data[0]["image"]
    assert (image.shape, image.dtype) == ((20, 30, 4), np.uint16)
    np.testing.assert_array_equal(image, values.transpose(1, 2, 0))
    some = pickle.loads(pickle.dumps(open_data(f"geotiff:{tmp_path}/*.tif?bands=B08,b02,3")))
    assert some.bands == ("B08", "B02", "B04")
    np.testing.assert_array_equal(some[0]["image"], values[[3, 0, 2]].transpose(1, 2, 0))


def test_further_pages_are_counted(tmp_path):
    write(tmp_path / "a.tif", scene(), NAMES)
    for number in range(3):
        more = {"APPEND_SUBDATASET": "YES"} if number else {}
        write(tmp_path / "b.tif", scene(seed=number), NAMES, **more)
    with rasters.opened(tmp_path / "a.tif"), rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.build_overviews([2])  # smaller versions are no pages
    data = open_data(f"geotiff:{tmp_path}")
    assert data.passed_over == {"further pages of rasters": 2}
    np.testing.assert_array_equal(data[1]["image"], scene(seed=0).transpose(1, 2, 0))
    remarks = " ".join(check(f"geotiff:{tmp_path}").remarks)
    assert "passed over: 2 further pages of rasters: b.tif" in remarks


def test_images_of_8_bits_are_images(tmp_path):
    write(tmp_path / "rgb.tif", scene(3, dtype=np.uint8))
    data = open_data(f"geotiff:{tmp_path}")
    assert data.bands == ("band1", "band2", "band3")
    assert data[0]["image"].mode == "RGB"
    assert open_data(f"geotiff:{tmp_path}?bands=2")[0]["image"].mode == "L"


def test_tiles(tmp_path):
    values = scene()
    for name in ("a.tif", "b.tif"):
        write(tmp_path / name, values, NAMES)
    data = open_data(f"geotiff:{tmp_path}?tile=10")
    assert len(data) == 12
    assert data.ids[5] == "a.tif/001-002"
    assert set(data.groups) == {"a.tif", "b.tif"}
    np.testing.assert_array_equal(data[5]["image"], values[:, 10:20, 20:30].transpose(1, 2, 0))
    with pytest.raises(ValueError, match=r"a\.tif \(30x20\) is smaller than a tile"):
        open_data(f"geotiff:{tmp_path}?tile=64")
    write(tmp_path / "c.tif", scene(height=8), NAMES)
    less = open_data(f"geotiff:{tmp_path}?tile=10")
    assert (len(less), less.faults) == (12, ["c.tif (30x8) is smaller than a tile"])
    assert open_data(f"geotiff:{tmp_path}?tile=10 + geotiff:{tmp_path}?tile=8").bands == NAMES


def test_a_scene_too_large_to_be_read_whole_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a.tif", scene(), NAMES)
    write(tmp_path / "b.tif", scene(height=40), NAMES)
    monkeypatch.setenv("VIM_SSL_MAX_PIXELS", "600")
    data = open_data(f"geotiff:{tmp_path}")
    assert data.ids == ["a.tif"]
    assert data.faults == [
        "b.tif has 30x40 pixels, the limit is 600; cut it with tile=, or set VIM_SSL_MAX_PIXELS"
    ]
    assert len(open_data(f"geotiff:{tmp_path}?tile=10")) == 6 + 12


def test_complex_values_and_mixed_depths_are_named(tmp_path):
    write(tmp_path / "a.tif", scene(), NAMES)
    write(tmp_path / "b.tif", scene(dtype=np.complex64), NAMES)
    assert open_data(f"geotiff:{tmp_path}").faults == [
        "b.tif has complex values, expected real ones"
    ]
    write(tmp_path / "c.tif", scene(dtype=np.uint8), NAMES)
    with pytest.raises(ValueError, match=r"c\.tif is uint8, others are uint16"):
        open_data(f"geotiff:{tmp_path}")


def test_a_large_scene_is_embedded_by_windows_and_gone_on_with(tmp_path):
    values = scene(4, 60, 70)
    values[:, :10, :10] = values[:, 12, 12] = 0
    write(tmp_path / "a.tif", values, NAMES, nodata=0)
    data = open_data(f"geotiff:{tmp_path}/a.tif?tile=10")
    encoder = VimEncoder(
        img_size=8, patch_size=4, in_chans=4, embed_dim=8, depth=1, num_classes=0,
        scan_backend="torch", data_config=band_statistics(data),
    )  # fmt: skip
    save_encoder(encoder, tmp_path / "encoder")
    argv = ["--encoder", str(tmp_path / "encoder"), "--data", data.name, "--shard-rows", "8",
            "--batch-size", "8", "--output"]  # fmt: skip
    for name in ("whole", "killed"):
        embed.main([*argv, str(tmp_path / name)])
    whole = read_embeddings(tmp_path / "whole")
    assert (len(whole.ids), len(whole.skipped)) == (41, 1)  # one window without data
    assert whole.x.isfinite().all()
    (tmp_path / "killed" / "shards" / "00002.parquet").unlink()
    embed.main([*argv, str(tmp_path / "killed")])
    again = read_embeddings(tmp_path / "killed")
    assert again.ids == whole.ids
    assert torch.equal(again.x, whole.x)


def test_values_in_another_unit_than_the_encoders_are_told(tmp_path):
    write(tmp_path / "a.tif", 40 * scene(3), NAMES[:3])
    write(tmp_path / "8bit" / "a.tif", scene(3, dtype=np.uint8), nodata=1)
    encoder = VimEncoder(
        img_size=8, patch_size=4, embed_dim=8, depth=1, num_classes=0, scan_backend="torch"
    )
    with pytest.raises(ValueError, match=r"the bands B02, B03, B04, the encoder has R, G, B"):
        encode_data(encoder, open_data(f"geotiff:{tmp_path}/a.tif"), cache=False)
    rgb = open_data(f"geotiff:{tmp_path}/a.tif?bands=B04,B03,B02")
    with pytest.raises(ValueError, match=r"on values of about .*: another unit"):
        encode_data(encoder, rgb, cache=False)
    assert len(encode_data(encoder, open_data(f"geotiff:{tmp_path}/8bit"), cache=False).x) == 1


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_no_data_is_nan_and_the_mean_to_an_encoder(tmp_path, dtype):
    values = scene(4, 20, 20, dtype)
    values[:, :10, :10] = 0
    write(tmp_path / "a.tif", values, NAMES, nodata=0)
    data = open_data(f"geotiff:{tmp_path}?tile=10")
    with pytest.raises(BadImage, match="all its values are missing"):
        data[0]
    image = data[1]["image"]
    np.testing.assert_array_equal(image, values[:, :10, 10:].transpose(1, 2, 0))
    whole = open_data(f"geotiff:{tmp_path}")
    holes = whole[0]["image"]
    assert holes.dtype == np.float32
    assert np.isnan(holes).sum() == 400
    stats = band_statistics(whole)
    unit = 255 if dtype == np.uint8 else 1
    expected = [band[values[0] != 0].astype(float).mean() / unit for band in values]
    np.testing.assert_allclose(stats["mean"], expected, rtol=1e-5)
    config = {"input_size": (4, 20, 20), "crop_pct": 1.0, **stats}
    x = create_transform(config)(holes)
    assert (x[:, :8, :8] == 0).all()
    assert x.mean().abs() < 0.1


def test_an_encoder_takes_what_the_data_has(tmp_path):
    write(tmp_path / "a.tif", scene(), NAMES)
    data = open_data(f"geotiff:{tmp_path}")
    encoder = load_encoder("vim_nano_patch8_64", in_chans=4, data_config=band_statistics(data))
    assert encoder.data_config["bands"] == NAMES
    x = create_transform(encoder)(data[0]["image"])
    with torch.inference_mode():
        assert encoder(x[None]).isfinite().all()


def test_folders_broken_and_unlike_files(tmp_path):
    for name in ("train/wood/a.tif", "train/town/b.tif", "test/wood/c.tif", "test/town/d.tif"):
        write(tmp_path / name, scene(seed=len(name) + ord(name[-5])), NAMES)
    (tmp_path / "train/wood/x.tif").write_bytes(b"no raster")
    spec = f"geotiff:{tmp_path}?label=folder"
    train, test = labelled_splits(spec, 0.5, 0)
    assert (train.classes, train.labels, test.labels) == (["town", "wood"], [0, 1], [0, 1])
    assert train.faults[0].startswith("train/wood/x.tif cannot be read")
    write(tmp_path / "train/wood/z.tif", scene(3), NAMES[:3])
    with pytest.raises(ValueError, match=r"z\.tif has the bands B02, B03, B04, others have B02"):
        open_data(spec)


def test_a_cut_off_file_is_named(tmp_path):
    content = write(tmp_path / "a.tif", scene()).read_bytes()
    (tmp_path / "a.tif").write_bytes(content[: len(content) // 2])
    with pytest.raises(BadImage, match=r"a\.tif"):
        open_data(f"geotiff:{tmp_path}")[0]


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        ("?bands=B99", ValueError, r"no band 'B99'.* It has B02, B03"),
        ("?bands=5", ValueError, "no band '5'"),
        ("?tile=0", ValueError, "tile=0 is not a whole number above 0"),
        ("?label=city", ValueError, "label=folder"),
        ("/*.jp2", FileNotFoundError, "does not match any file"),
    ],
)
def test_errors(tmp_path, query, error, message):
    write(tmp_path / "a.tif", scene(), NAMES)
    with pytest.raises(error, match=message):
        open_data(f"geotiff:{tmp_path}{query}")


# -------------------------------------------------------------------- official sets


def eurosat(root, kind):
    for number, name in enumerate(EUROSAT_CLASSES):
        for i in (1, 2, 3):
            if kind == "tif":
                write(root / name / f"{name}_{i}.tif", scene(13, 8, 8, seed=10 * number + i))
            else:
                (root / name).mkdir(parents=True, exist_ok=True)
                pixels = scene(3, 8, 8, np.uint8, seed=10 * number + i).transpose(1, 2, 0)
                Image.fromarray(pixels).save(root / name / f"{name}_{i}.jpg")
    return root


@pytest.mark.parametrize("top", ["", "2750", "EuroSAT_RGB"])
def test_eurosat_rgb(tmp_path, top):
    eurosat(tmp_path / top, "jpg")
    data = open_data(f"eurosat:{tmp_path}")
    assert (len(data), data.classes, data.bands) == (30, list(EUROSAT_CLASSES), ("R", "G", "B"))
    assert data.ids[3] == "Forest/Forest_1.jpg"
    assert data[3]["label"] == 1
    assert data[3]["image"].mode == "RGB"


def test_eurosat_of_13_bands(tmp_path):
    eurosat(tmp_path / "EuroSAT_MS", "tif")
    data = open_data(f"eurosat:{tmp_path}")
    assert data.bands == EUROSAT_BANDS
    assert data[0]["image"].shape == (8, 8, 13)
    rgb = open_data(f"eurosat:{tmp_path}?bands=B04,B03,B02")
    np.testing.assert_array_equal(rgb[0]["image"], data[0]["image"][..., [3, 2, 1]])
    eurosat(tmp_path / "EuroSAT_RGB", "jpg")  # both: bands decide
    assert open_data(f"eurosat:{tmp_path}")[0]["image"].mode == "RGB"
    assert open_data(f"eurosat:{tmp_path}?bands=all").bands == EUROSAT_BANDS


@pytest.mark.parametrize("lists", ["txt", "csv"])
def test_eurosat_splits(tmp_path, lists):
    eurosat(tmp_path, "jpg")
    for i, part in enumerate(("train", "val" if lists == "txt" else "validation", "test"), 1):
        names = [f"{name}_{i}.jpg" for name in EUROSAT_CLASSES]
        if lists == "txt":
            (tmp_path / f"eurosat-{part}.txt").write_text("\n".join(names) + "\n")
        else:
            rows = [f"{n},{name.split('_')[0]}/{name},{n}" for n, name in enumerate(names)]
            (tmp_path / f"{part}.csv").write_text("\n".join([",Filename,Label", *rows]))
    train, test = labelled_splits(f"eurosat:{tmp_path}", 0.5, 0)
    assert (len(train), len(test)) == (10, 10)
    assert test.ids[0] == "AnnualCrop/AnnualCrop_3.jpg"
    assert check(f"eurosat:{tmp_path}").problems == []


def test_eurosat_incomplete(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no class folder"):
        open_data(f"eurosat:{tmp_path}")
    eurosat(tmp_path, "jpg")
    for file in (tmp_path / "River").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="has no images of River"):
        open_data(f"eurosat:{tmp_path}")
    with pytest.raises(FileNotFoundError, match=r"with \.tif files"):
        open_data(f"eurosat:{tmp_path}?bands=B04")


SIDES = dict.fromkeys(BIGEARTHNET_BANDS, 60) | dict.fromkeys(("B01", "B09"), 20)
SIDES |= dict.fromkeys(("B02", "B03", "B04", "B08"), 120)


def patch(folder, name, value=0):
    for i, band in enumerate(BIGEARTHNET_BANDS):
        values = np.full((1, SIDES[band], SIDES[band]), 100 * i + value, np.uint16)
        write(folder / name / f"{name}_{band}.tif", values)


def test_bigearthnet_version_2(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    tile = "S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP"
    names = [f"{tile}_26_{i}" for i in range(3)]
    for i, name in enumerate(names):
        patch(tmp_path / "BigEarthNet-S2" / tile, name, i)
    classes = list(BIGEARTHNET_CLASSES)
    rows = {
        "patch_id": [*names, f"{tile}_1_1"],
        "labels": [[classes[0], classes[18]], [classes[2]], [], [classes[1]]],
        "split": ["train", "test", "train", "validation"],
    }
    parquet.write_table(pa.table(rows), tmp_path / "metadata.parquet")
    data = open_data(f"bigearthnet:{tmp_path}")
    assert (data.splits, data.ids) == (["train", "validation", "test"], [names[0], names[2]])
    assert data.labels[0] == [1, *[0] * 17, 1]
    assert (sum(data.labels[1]), len(data.classes)) == (0, 19)
    assert data.faults == ["1 of 4 labelled patches have no folder"]
    image = data[1]["image"]
    assert (image.shape, image.dtype) == ((120, 120, 12), np.uint16)
    np.testing.assert_array_equal(image[60, 60], np.arange(12) * 100 + 2)
    rgb = open_data(f"bigearthnet:{tmp_path}?bands=B04,B03,B02&split=test")
    np.testing.assert_array_equal(rgb[0]["image"][5, 5], [301, 201, 101])
    assert rgb.bands == ("B04", "B03", "B02")


def test_bigearthnet_version_1(tmp_path):
    old = {"S2A_1_0": ["Salines", "Airports", "Salt marshes"], "S2A_1_1": ["Olive groves"]}
    for name, labels in old.items():
        patch(tmp_path, name)
        file = tmp_path / name / f"{name}_labels_metadata.json"
        file.write_text(json.dumps({"labels": labels}))
    data = open_data(f"bigearthnet:{tmp_path}")
    assert [[data.classes[i] for i, has in enumerate(row) if has] for row in data.labels] == [
        ["Coastal wetlands"],
        ["Permanent crops"],
    ]
    assert data.groups == ["S2A", "S2A"]
    (tmp_path / "S2A_1_1/S2A_1_1_labels_metadata.json").write_text('{"labels": ["Moon"]}')
    with pytest.raises(ValueError, match="'Moon' is not a class of BigEarthNet"):
        open_data(f"bigearthnet:{tmp_path}")


def test_bigearthnet_without_labels(tmp_path):
    patch(tmp_path, "S2A_1_0")
    with pytest.raises(FileNotFoundError, match="1 patch folders and 0 labelled patches"):
        open_data(f"bigearthnet:{tmp_path}")


def test_the_43_classes_are_all_known():
    from vim_ssl.data.sources.bigearthnet import _LEFT_OUT

    assert len(BIGEARTHNET_CLASSES) == 19
    kept = [old for names in BIGEARTHNET_CLASSES.values() for old in names]
    assert len({*kept, *_LEFT_OUT}) == 43


# ------------------------------------------------------------------------- masks

HERE = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)}
THERE = HERE | {"transform": rasterio.Affine(10, 0, 500_010, 0, -10, 5_000_000)}


def pair(root, name="a", mask=None, folder="masks", place=HERE, **more):
    """A raster of which the first band is 100 times the class, and its mask."""
    mask = np.random.default_rng(0).integers(0, 3, (20, 30)) if mask is None else mask
    values = np.stack([100 * mask + 50] * 4).astype(np.uint16)
    write(root / "images" / f"{name}.tif", values, NAMES, **HERE)
    write(root / folder / f"{name}.tif", mask[None].astype(more.pop("dtype", np.uint8)), **more,
          **place)  # fmt: skip
    return f"geotiff:{root}"


@pytest.mark.parametrize("folder", ["masks", "labels"])
@pytest.mark.parametrize("query", ["", "?tile=10"])
def test_a_mask_lies_on_its_raster(tmp_path, query, folder):
    data = pickle.loads(pickle.dumps(open_data(pair(tmp_path, folder=folder) + query)))
    assert (data.classes, data.has_masks, data.bands) == (["0", "1", "2"], True, NAMES)
    for item in data:
        assert np.array_equal(item["image"][..., 0], 100 * item["mask"].astype(int) + 50)
    assert len(data) == (6 if query else 1)
    box = (10, 10, 10, 10) if query else None
    meta = {"raster": str(tmp_path / "images/a.tif"), "name": "a.tif", "box": box, "core": box}
    assert data[4 if query else 0]["meta"] == meta
    bare = open_data(f"geotiff:{tmp_path}{query or '?'}&label=none".replace("?&", "?"))
    assert "mask" not in bare[0]
    assert bare[4 if query else 0]["meta"] == meta  # known without masks, for predictions


@pytest.mark.parametrize("size", [(20, 30), (20, 21), (7, 9), (10, 10)], ids=str)
@pytest.mark.parametrize("overlap", [1, 3, 9])
def test_overlapping_tiles_cover_the_raster_and_their_cores_divide_it(tmp_path, size, overlap):
    values = scene(2, *size)
    write(tmp_path / "a.tif", values, **HERE)
    data = open_data(f"geotiff:{tmp_path}?tile=10&overlap={overlap}")
    joined, times = np.zeros(size, int), np.zeros(size, int)
    for item in data:
        left, top, width, height = item["meta"]["box"]
        x, y, wide, high = item["meta"]["core"]
        core = slice(y, y + high), slice(x, x + wide)
        joined[core] = item["image"][y - top : y - top + high, x - left : x - left + wide, 0]
        times[core] += 1
        assert (width, height) == (min(10, size[1]), min(10, size[0]))
    assert (times == 1).all()
    assert np.array_equal(joined, values[0])


@pytest.mark.parametrize("query", ["overlap=4", "tile=4&overlap=4"])
def test_an_overlap_needs_larger_tiles(tmp_path, query):
    pair(tmp_path)
    with pytest.raises(ValueError, match="overlap=4 needs tile= with a larger number"):
        open_data(f"geotiff:{tmp_path}?{query}")


def test_what_has_no_label_and_what_cannot_be_one(tmp_path):
    mask = np.arange(600).reshape(20, 30) % 3
    spec = pair(tmp_path, mask=np.where(mask == 0, -9999, mask), dtype=np.int16, nodata=-9999)
    assert np.array_equal(open_data(spec)[0]["mask"], np.where(mask == 0, 255, mask))
    (tmp_path / "classes.txt").write_text("x\ny\nz\n")
    pair(tmp_path, "b", mask=mask + 0.5, dtype=np.float32)
    pair(tmp_path, "c", mask=mask + 1)
    pair(tmp_path, "d", place=THERE)
    pair(tmp_path, "e")
    write(tmp_path / "masks/e.tif", np.zeros((1, 20, 20), np.uint8), **HERE)
    data = open_data(spec)
    assert data.groups == ["a.tif", "b.tif", "c.tif"]
    told = " ".join(data.faults)
    assert "d.tif: the mask lies elsewhere: it and its raster have different positions" in told
    assert "e.tif: the mask has 20×20 pixels, its raster 30×20" in told
    for i, reason in (
        (1, r"contains 0\.5, which is not a class"),
        (2, "value 3; expected 3 classes"),
    ):
        with pytest.raises(BadImage, match=reason):
            data[i]


def test_the_classes_of_a_large_mask_are_found_without_holding_it(tmp_path):
    mask = np.zeros((2048, 1024), np.uint8)
    mask[-1, -1] = 6
    tiled = {"tiled": True, "blockxsize": 128, "blockysize": 128}
    path = write(tmp_path / "a.tif", mask[None], **tiled)
    tracemalloc.start()
    try:
        assert rasters._numbers(path).tolist() == [0, 6]
        assert tracemalloc.get_traced_memory()[1] < mask.nbytes
    finally:
        tracemalloc.stop()


def test_labels_are_written_where_their_raster_lies(tmp_path):
    pair(tmp_path)
    path, like = tmp_path / "out/a.tif", str(tmp_path / "images/a.tif")
    one, other = np.full((10, 10), 1, np.uint8), np.full((10, 10), 2, np.uint8)
    for _ in range(2):  # again, as each evaluation does
        write_labels(path, like, (0, 0, 10, 10), one)
        write_labels(path, like, (20, 10, 10, 10), other)
    with rasterio.open(path) as file:
        values = file.read(1)
        assert (file.crs, file.transform, file.nodata) == (*HERE.values(), 255)
    expected = np.full((20, 30), 255)
    expected[:10, :10], expected[10:, 20:] = 1, 2
    assert np.array_equal(values, expected)
    write_labels(path, like, None, np.zeros((20, 30), np.uint8))
    with rasterio.open(path) as file:
        assert not file.read(1).any()


def test_labels_of_many_boxes_take_no_more_room_than_those_of_one(tmp_path):
    """And what no box has written, to the last pixel, is no data."""
    side, tile = 530, 128
    like = str(write(tmp_path / "a.tif", np.zeros((1, side, side), np.uint8), **HERE))
    expected = np.full((side, side), 255, np.uint8)
    by_boxes, at_once = tmp_path / "boxes.tif", tmp_path / "once.tif"
    for top in range(0, side - tile, tile):
        for left in range(0, side - tile, tile):
            labels = np.full((tile, tile), (top + left) % 3, np.uint8)
            labels[: top // 9, : left // 9] = 4
            expected[top : top + tile, left : left + tile] = labels
            write_labels(by_boxes, like, (left, top, tile, tile), labels)
    write_labels(at_once, like, None, expected)
    for path in (by_boxes, at_once):
        with rasterio.open(path) as file:
            assert np.array_equal(file.read(1), expected)
    assert by_boxes.stat().st_size < 2 * at_once.stat().st_size


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (20, 130)], ids=str)
def test_labels_of_small_rasters_are_written_too(tmp_path, size):
    like = str(write(tmp_path / "a.tif", np.zeros((1, *size), np.uint8), **HERE))
    labels = np.random.default_rng(0).integers(0, 3, size, np.uint8)
    write_labels(tmp_path / "out.tif", like, None, labels)
    with rasterio.open(tmp_path / "out.tif") as file:
        assert np.array_equal(file.read(1), labels)
