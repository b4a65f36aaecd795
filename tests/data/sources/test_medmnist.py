"""MedMNIST files: every task and shape, labels in the official order, nothing unpickled."""

import pickle

import numpy as np
import pytest

from vim_ssl.data import open_data
from vim_ssl.data.sources.medmnist import known_sets


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "VIM_SSL_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))


def write(path, shape, labels, dtype=np.uint8, **changes):
    """Splits of 4, 2 and 3 entries; entry i of a split is filled with i, its planes counted up."""
    arrays = {}
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        arrays[f"{part}_images"] = (
            np.arange(count).reshape(-1, *[1] * len(shape)) * 50 + np.zeros(shape)
        ).astype(dtype)
        arrays[f"{part}_labels"] = np.array([labels[i % len(labels)] for i in range(count)])
    np.savez_compressed(path, **(arrays | changes))
    return f"medmnist:{path}"


@pytest.mark.parametrize(
    ("name", "shape", "size", "mode"),
    [("pathmnist", (28, 28, 3), 28, "RGB"), ("octmnist_64", (64, 64), 64, "L"),
     ("bloodmnist_224", (224, 224, 3), 224, "RGB"), ("retinamnist_128", (128, 128, 3), 128, "RGB")],
)  # fmt: skip
def test_images(tmp_path, name, shape, size, mode):
    spec = write(tmp_path / f"{name}.npz", shape, [[2], [0], [1]])
    data = open_data(spec)
    assert (data.splits, data.split) == (["train", "val", "test"], "train")
    assert data.labels == [2, 0, 1, 2]
    assert (data.task, tuple(data.classes)) == known_sets()[name.split("_")[0]]
    test = pickle.loads(pickle.dumps(open_data(spec, split="test")))
    assert test.ids == ["test/000000", "test/000001", "test/000002"]
    item = test[2]
    assert (item["image"].size, item["image"].mode, item["label"]) == ((size, size), mode, 1)
    assert np.asarray(item["image"]).max() == np.asarray(item["image"]).min() == 100
    everything = open_data(spec, split="all")
    assert len(everything) == 9
    assert np.asarray(everything[5]["image"]).max() == 50  # the second of val
    assert open_data(f"{spec}?label=none").labels is None


def test_several_labels(tmp_path):
    rows = np.eye(14, dtype=np.uint8)[:4]
    data = open_data(write(tmp_path / "chestmnist.npz", (28, 28), rows))
    assert data.labels[1] == [0, 1] + 12 * [0]
    assert (data.task, data.classes[13]) == ("multi-label, binary-class", "hernia")
    assert data[1]["label"] == data.labels[1]


def test_volumes(tmp_path):
    shape = (4, 5, 6)
    volume = np.arange(4 * 5 * 6, dtype=np.uint8).reshape(shape)
    images = np.stack([volume, volume + 100])
    spec = write(tmp_path / "nodulemnist3d.npz", shape, [[0], [1]], val_images=images)
    with pytest.raises(ValueError, match=r"use axis=0, 1 or 2"):
        open_data(spec)

    cube = write(tmp_path / "organmnist3d.npz", (6, 6, 6), [[10]])
    planes = np.asarray(open_data(cube)[1]["image"])
    assert planes.shape == (6, 6, 3)
    assert (planes == 50).all()

    across = open_data(f"{spec}?axis=1&split=val")
    assert (across.task, across.classes) == ("binary-class", ["benign", "malignant"])
    assert len(across) == 10
    assert across.ids[:2] == ["val/000000/000", "val/000000/001"]
    assert across.labels == [0] * 5 + [1] * 5
    assert across.groups == ["val/000000"] * 5 + ["val/000001"] * 5
    np.testing.assert_array_equal(np.asarray(across[3]["image"]), volume[:, 3])
    np.testing.assert_array_equal(np.asarray(across[7]["image"]), volume[:, 2] + 100)


@pytest.mark.parametrize(
    ("labels", "task", "classes"),
    [([[0], [1]], "binary-class", 2), ([[0], [3]], "multi-class", 4),
     ([[0, 1], [1, 1]], "multi-label, binary-class", 2)],
)  # fmt: skip
def test_an_unknown_set_is_known_by_its_labels(tmp_path, labels, task, classes):
    data = open_data(write(tmp_path / "mine.npz", (8, 8), labels))
    assert (data.task, len(data.classes)) == (task, classes)


def test_nothing_is_unpickled(tmp_path):
    evil = np.array([[{"a": 1}], [2]], dtype=object)
    spec = write(tmp_path / "mine.npz", (8, 8), [[0]], val_labels=evil)
    with pytest.raises(ValueError, match=r"is not a MedMNIST file: .*Python objects"):
        open_data(spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_images": np.zeros((2, 8, 8), np.float32)}, "val_images is float32"),
        ({"val_labels": np.zeros((3, 1), int)}, r"val_labels is int64 \(3, 1\); expected .*\(2,"),
        ({"val_labels": np.zeros((2, 1))}, "val_labels is float64"),
    ],
)
def test_another_form(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        open_data(write(tmp_path / "mine.npz", (8, 8), [[0]], **changes))


def test_other_files(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"it has no train_images\.npy.*it has x\.npy"):
        open_data(f"medmnist:{tmp_path / 'a.npz'}")
    (tmp_path / "b.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"is not a MedMNIST file: .*zip"):
        open_data(f"medmnist:{tmp_path / 'b.npz'}")
    with pytest.raises(FileNotFoundError, match=r"medmnist\.com"):
        open_data(f"medmnist:{tmp_path / 'c.npz'}")
    with pytest.raises(ValueError, match="contains images, not volumes"):
        open_data(write(tmp_path / "mine.npz", (8, 8), [[0]]) + "?axis=1")
