"""A source is opened once for all its splits, and no image is read to learn its bands."""

import csv
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vim_ssl.data import ImageData, labelled_splits, open_data, registry
from vim_ssl.data.bands import SEEN, band_arguments, check_bands
from vim_ssl.data.check import check
from vim_ssl.data.open import open_source, open_split
from vim_ssl.models.encoder import VimEncoder

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1}


@pytest.fixture
def counts(monkeypatch) -> Counter:
    """How often openers, lists of files and images are read."""
    counter: Counter = Counter()
    opened, decoded = registry.Opener.__call__, ImageData.__getitem__

    def call(self, spec):
        counter["opened"] += 1
        return opened(self, spec)

    def decode(self, index):
        counter["decoded"] += 1
        return decoded(self, index)

    monkeypatch.setattr(registry.Opener, "__call__", call)
    monkeypatch.setattr(ImageData, "__getitem__", decode)
    return counter


def save(path, bands=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if bands is None:
        Image.new("RGB", (16, 16)).save(path)
        return
    rasterio = pytest.importorskip("rasterio")
    values = np.full((bands, 16, 16), 900, np.uint16)
    with rasterio.open(
        path, "w", driver="GTiff", width=16, height=16, count=bands, dtype="uint16"
    ) as file:
        file.write(values)


def folder(root, splits, bands=None, ending="png"):
    for split in splits:
        for name in "ab":
            for i in range(5):
                save(root / split / name / f"{i}.{ending}", bands)
    return str(root)


def table(root, splits):
    rows = [(f"{split or 'all'}-{name}{i}.png", name, split)
            for split in splits for name in "ab" for i in range(5)]  # fmt: skip
    for row in rows:
        save(root / row[0])
    with open(root / "table.csv", "w", newline="") as file:
        header = ["path", "label", "split"]
        used = 3 if any(splits) else 2
        csv.writer(file).writerows(row[:used] for row in [header, *rows])
    return f"csv:{root / 'table.csv'}"


def raster(root, splits):
    return f"geotiff:{folder(root, splits, 4, 'tif')}?label=folder"


@pytest.mark.parametrize("make", [folder, table, raster])
@pytest.mark.parametrize("splits", [("",), ("train", "test"), ("train", "val")], ids=str)
def test_a_linear_probe_opens_its_data_once(make, splits, tmp_path, counts):
    spec = make(tmp_path, splits)
    train, test = labelled_splits(spec, test=0.2, seed=0)
    assert (len(train), len(test)) == ((8, 2) if splits == ("",) else (10, 10))
    encoder = VimEncoder(**SMALL, in_chans=4 if train.bands else 3)
    encoder.data_config["bands"] = train.bands or ("R", "G", "B")
    if train.bands:
        encoder.data_config |= {"mean": (900,) * 4, "std": (1,) * 4}
    check_bands(encoder, train)
    assert counts["opened"] == 1
    assert counts["decoded"] == (min(len(train), SEEN) if train.bands else 0)  # to see their unit


@pytest.mark.parametrize("make", [folder, table, raster])
def test_a_split_is_the_same_however_it_is_opened(make, tmp_path, counts):
    spec = make(tmp_path, ("train", "test"))
    source = open_source(spec)
    assert list(source.splits) == ["train", "test"]
    for split in ("train", "test", "all"):
        one, other = source.open(split), open_data(spec, split=split)
        assert (one.name, one.split, one.ids) == (other.name, other.split, other.ids)
        assert (one.labels, one.classes, one.bands) == (other.labels, other.classes, other.bands)
        assert one.fingerprint == other.fingerprint
    assert source.open(None).name == open_data(spec).name
    assert counts == {"opened": 5}


def test_the_split_that_fits_is_chosen_without_opening_the_others(tmp_path, counts):
    assert open_split(folder(tmp_path, ("train", "val"))).split == "val"
    assert counts == {"opened": 1}


def test_the_bands_of_a_raster_are_read_without_an_image(tmp_path, counts):
    assert band_arguments(open_data(folder(tmp_path / "images", ("",)))) == {}
    data = open_data(raster(tmp_path / "rasters", ("",)))
    assert (data.dtype, counts["decoded"]) == (np.uint16, 0)
    assert band_arguments(data)["in_chans"] == 4
    assert counts["decoded"] == len(data)  # for their statistics
    counts.clear()
    with pytest.raises(ValueError, match=r"bands band1, .*, the encoder has R, G, B, .*up to 900"):
        check_bands(VimEncoder(**SMALL), data)
    assert counts["decoded"] == 1  # to say in which unit the values are


def test_eight_bits_fit_an_encoder_of_other_bands_unless_they_have_to_be_read(counts):
    images = [np.zeros((4, 4, 3), np.uint8)]
    known = ImageData(images, ["0"], name="x", bands=("R", "G", "B"), dtype=np.uint8)
    assert band_arguments(known) == {}
    check_bands(VimEncoder(**SMALL, data_config={"bands": ("A", "B", "C")}), known)
    assert not counts
    unknown = ImageData(images, ["0"], name="x", bands=("R", "G", "B"))
    assert band_arguments(unknown) == {}
    assert counts == {"decoded": 1}


def test_joined_sets_are_checked_without_opening_them_again(tmp_path, counts):
    first, second = (folder(tmp_path / name, ("",)) for name in "xy")
    assert check(f"{first} + {second}", sample=1).facts
    assert counts["opened"] == 2


def test_slides_and_captioned_images_are_opened_once(tmp_path, counts):
    for split in ("train", "test"):
        for name in "ab":
            save(tmp_path / split / name / "0.png")
            (tmp_path / split / name / "0.txt").write_text("a square")
    for spec, ids in ((f"slide:{tmp_path}?tile=8&tissue=none", 8), (f"pairs:{tmp_path}", 2)):
        counts.clear()
        source = open_source(spec)
        assert list(source.splits) == ["train", "test"]
        splits = [source.open(split) for split in source.splits]
        assert [len(data) for data in splits] == [ids, ids]
        assert counts == {"opened": 1}
        assert splits[1].fingerprint == open_data(spec, split="test").fingerprint
