"""Folders and files whose names say that they are splits or masks, and that are read otherwise."""

from itertools import count

import numpy as np
import pytest
from PIL import Image

from vim_ssl.data import open_data
from vim_ssl.data.check import check


def fill(root, *folders, file="{}.png"):
    for number, folder in zip(count(), folders, strict=False):
        for i in range(2):
            path = root / folder / file.format(i)
            path.parent.mkdir(parents=True, exist_ok=True)
            values = np.random.default_rng(2 * number + i).integers(0, 255, (8, 8), np.uint8)
            Image.fromarray(values).save(path)
    return root


def warnings(root, scheme="folder"):
    return open_data(f"{scheme}:{root}").passed_over.warnings


SPLITS = [
    ("train2017", "val2017"), ("train_images", "test_images"), ("training_set", "test_set"),
    ("Train_Data", "Test_Data"), ("imgs_train", "imgs_test"), ("train", "test1"),
    ("trainA", "testA", "testB"), ("seg_train/sea", "seg_test/sea"),
    ("TrainingSet", "ValidationSet"),
    ("train_cat", "test_cat", "train_dog", "test_dog"), ("train2017", "val2017", "unlabeled2017"),
    ("VOC2007_trainval", "VOC2007_test"), ("archive/train/cat", "archive/test/cat"),
    ("cat/train", "cat/test", "dog/train", "dog/test"),
]  # fmt: skip


@pytest.mark.parametrize("folders", SPLITS, ids=lambda folders: folders[0])
def test_folders_that_look_like_splits_are_reported(tmp_path, folders):
    data = open_data(fill(tmp_path, *folders))
    assert (len(data), data.splits) == (2 * len(folders), [])  # read as ever
    [line] = data.passed_over.warnings
    assert "look like splits, but are not read as splits" in line


MASKS = [
    ("images", "masks"), ("img", "lbl"), ("JPEGImages", "SegmentationClass"), ("images", "labels"),
    ("images", "annotations"), ("train/images", "train/mask", "test/images"),
    ("train", "trainannot"), ("images/train", "masks/train"), ("Input", "GroundTruth"),
    ("c1/images", "c1/masks", "c2/images"),
    ("archive/images", "archive/masks"), ("images", "ground_truth"),
]  # fmt: skip


@pytest.mark.parametrize("folders", MASKS, ids=lambda folders: folders[0])
def test_folders_that_look_like_masks_are_reported(tmp_path, folders):
    [line] = warnings(fill(tmp_path, *folders))
    assert "look like the masks of" in line
    assert "write masks:FOLDER" in line


def test_masks_beside_their_images_are_reported(tmp_path):
    fill(tmp_path, "benign", "normal", file="a ({}).png")
    fill(tmp_path, "benign", file="a ({})_mask.png")
    fill(tmp_path, "benign", file="a ({})_mask_1.png")
    [line] = warnings(tmp_path)
    assert line.startswith("4 of 8 files look like masks of others")


@pytest.mark.parametrize(
    "folders",
    [
        ("train station", "test tube"), ("train", "car", "bus"), ("test", "control"),
        ("valid", "invalid"), ("with_mask", "without_mask"), ("mask", "no_mask"),
        ("train/cat", "test/cat", "train/dog"), ("labels", "posters"), ("2024/05", "2025/06"),
        ("test1", "test2"), ("device", "valley", "settee"),
    ],
    ids=lambda folders: folders[0],
)  # fmt: skip
def test_other_folders_are_not_reported(tmp_path, folders):
    fill(tmp_path, *folders)
    fill(tmp_path, folders[0], file="old_label {}.png")
    assert warnings(tmp_path) == []


@pytest.mark.parametrize("scheme", ["folder", "pairs", "masks", "video", "geotiff", "nifti"])
def test_every_source_with_split_folders_reports_them(tmp_path, scheme):
    folders = "train2017", "val2017"
    fill(tmp_path / "images" if scheme == "masks" else tmp_path, *folders, file={
        "video": "{}/0.png", "geotiff": "{}.tif"}.get(scheme, "{}.png"))  # fmt: skip
    if scheme == "masks":
        fill(tmp_path / "masks", *folders)
        (tmp_path / "classes.txt").write_text("\n".join(f"class {i}" for i in range(255)))
    for path in sorted(tmp_path.rglob("*.png")):
        if scheme == "pairs":
            path.with_suffix(".txt").write_text("a caption")
        elif scheme == "nifti":
            nibabel = pytest.importorskip("nibabel")
            volume = nibabel.Nifti1Image(np.ones((4, 4, 2), np.uint8), np.eye(4))
            nibabel.save(volume, path.with_suffix(".nii"))
    [line] = warnings(tmp_path, scheme)
    assert line.startswith("train2017/, val2017/ look like splits")


def test_the_check_reports_them_as_a_problem(tmp_path):
    assert "look like splits" in check(fill(tmp_path, "train2017", "val2017")).problems[0]
    assert "look like the masks" in check(fill(tmp_path / "m", "images", "masks")).problems[0]
