"""New images are opened by any path, as the training data of a model were."""

import numpy as np
import pytest
from PIL import Image

from vim_ssl.data import BadImage
from vim_ssl.data.inputs import open_new, read_input

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8)


@pytest.fixture
def folder(tmp_path):
    """Two splits with an image each, and one image beside them."""
    for name in ("photos/train/a.png", "photos/test/b.png", "one.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(GREY).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "ids"),
    [
        ("photos", ["train/a.png", "test/b.png"]),
        ("photos?split=test", ["test/b.png"]),
        ("one.png", ["one.png"]),
        ("photos + photos/test", ["0/train/a.png", "0/test/b.png", "1/b.png"]),
        ("list.csv", ["one.png", "photos/test/b.png"]),
    ],
)
def test_every_image_that_a_spec_names_is_opened(folder, monkeypatch, spec, ids):
    (folder / "list.csv").write_text("path\none.png\nphotos/test/b.png\n")
    monkeypatch.chdir(folder)
    data = open_new(spec)
    assert data.ids == ids
    assert data[0]["image"].size == (8, 6)


@pytest.mark.parametrize(
    ("spec", "frames", "fps"), [("{}", 4, 5), ("video:{}", 4, 5), ("video:{}?frames=2", 2, 5)]
)
def test_videos_are_sampled_as_in_training_unless_the_spec_says_otherwise(
    tmp_path, spec, frames, fps
):
    for clip in "ab":
        (tmp_path / clip).mkdir()
        Image.fromarray(GREY).save(tmp_path / clip / "0.png")
    data = open_new(spec.format(tmp_path), "video:elsewhere?frames=4&fps=5&split=train")
    assert (data.kind, data.ids, data.sampling.frames, data.sampling.fps) == (
        "video", ["a", "b"], frames, fps,
    )  # fmt: skip


def test_rasters_are_read_with_the_bands_and_tiles_of_the_training_data(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    values = np.arange(3 * 8 * 8, dtype=np.uint16).reshape(3, 8, 8)
    profile = {"width": 8, "height": 8, "count": 3, "dtype": "uint16"}
    with rasterio.open(tmp_path / "r.tif", "w", driver="GTiff", **profile) as file:
        file.write(values)
    trained = "geotiff:elsewhere?bands=3,1&tile=4&label=folder"
    for path in (tmp_path, tmp_path / "r.tif"):
        (item,) = open_new(path, trained)
        np.testing.assert_array_equal(item["image"], values[[2, 0]].transpose(1, 2, 0))
        assert len(open_new(path, trained, tiles=True)) == 4
    np.testing.assert_array_equal(read_input(tmp_path / "r.tif", trained), item["image"])
    Image.fromarray(GREY).save(tmp_path / "photo.png")  # a folder of photos stays one
    assert open_new(tmp_path, trained).name.startswith("folder:")


@pytest.mark.parametrize(
    "make",
    [lambda path: path, str, lambda path: Image.open(path), lambda path: GREY],
    ids=["path", "string", "image", "array"],
)
def test_an_image_is_the_same_from_a_path_and_from_memory(folder, make):
    np.testing.assert_array_equal(np.asarray(read_input(make(folder / "one.png"))), GREY)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ("photos", ValueError, "contains 2 images; give a list"),
        ("nothing.png", FileNotFoundError, "There is no file 'nothing.png'"),
        ("broken.png", BadImage, "not an image"),
        (3, TypeError, "got int"),
        (np.zeros(3), BadImage, "is not an image"),
    ],
)
def test_what_is_no_image_is_refused_by_name(folder, monkeypatch, x, error, message):
    monkeypatch.chdir(folder)
    (folder / "broken.png").write_text("no image")
    with pytest.raises(error, match=message):
        read_input(x)
