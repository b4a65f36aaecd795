"""Class numbers in masks and the names in classes.txt: what cannot be meant is refused or told."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vim_ssl.data import masked_splits, open_data
from vim_ssl.data.check import check
from vim_ssl.data.labels import absent_classes, paired, read_classes
from vim_ssl.data.sources.memory import register_data

SIDE = 16


def blocks(*values: int) -> np.ndarray:
    """A mask with a block of 4 × 4 pixels of each value."""
    return np.resize(np.repeat(values, 4), (SIDE, SIDE)).astype(np.uint8)


def in_masks(root: Path, masks: list[np.ndarray], folder: str = "masks") -> str:
    for i, mask in enumerate(masks):
        for name, values in (("images", np.full((SIDE, SIDE, 3), 9 * i)), (folder, mask)):
            (root / name / "train").mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(root / f"{name}/train/{i}.png")
    return f"masks:{root}"


def in_ade20k(root: Path, masks: list[np.ndarray]) -> str:
    return in_masks(root, masks, "annotations").replace("masks:", "ade20k:")


def in_geotiff(root: Path, masks: list[np.ndarray]) -> str:
    rasterio = pytest.importorskip("rasterio", reason="needs pip install 'vim-ssl[remote-sensing]'")
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)}
    for i, mask in enumerate(masks):
        for name, count in (("images", 4), ("masks", 1)):
            (root / name / "train").mkdir(parents=True, exist_ok=True)
            with rasterio.open(
                root / f"{name}/train/{i}.tif", "w", driver="GTiff", width=SIDE, height=SIDE,
                count=count, dtype="uint8" if count == 1 else "uint16", **place,
            ) as file:  # fmt: skip
                file.write(np.stack([mask] * count).astype(file.dtypes[0]) + (count == 4))
    return f"geotiff:{root}"


def in_nifti(root: Path, masks: list[np.ndarray]) -> str:
    nibabel = pytest.importorskip("nibabel", reason="needs pip install 'vim-ssl[medical]'")
    for i, mask in enumerate(masks):
        for name in ("images", "masks"):
            (root / name / "train").mkdir(parents=True, exist_ok=True)
            volume = np.stack([mask] * 2, -1).astype(np.int16 if name == "images" else np.uint8)
            nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), root / f"{name}/train/{i}.nii.gz")
    return f"nifti:{root}"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIM_SSL_CACHE", str(tmp_path / "cache"))


def complaints(spec: str) -> str:
    try:
        return "\n".join(open_data(spec).faults)
    except ValueError as error:
        return str(error)


NAMED = pytest.mark.parametrize("write", [in_masks, in_geotiff, in_nifti])


@NAMED
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([(0, 255)], "no labelled pixel but of class 'ground'"),
        ([(255,)], "no labelled pixel (values: 255)"),
        ([(0,), (0,)], "no labelled pixel but of class 'ground'"),
        ([(0, 1), (0, 255)], "only the values 0 and 255, and 255 is unlabelled"),
        ([(0, 128, 255)], "contain the value 128; expected 3 classes, 0 to 2"),
        ([(0, 1), (1, 3)], "1 of 2 masks read contain the value 3"),
        ([(1, 2, 3)], "name every class, from 0 on"),
        ([(0, 1, 2), (0, 1, 255)], ""),
        ([(0, 1), (0, 2)], ""),
    ],
    ids=["white", "ignored", "one", "some-white", "grey", "beyond", "from-1", "right", "few"],
)  # fmt: skip
def test_values_that_no_class_of_classes_txt_can_mean(tmp_path, write, values, words):
    spec = write(tmp_path, [blocks(*mask) for mask in values])
    (tmp_path / "classes.txt").write_text("ground\ntree\nhouse\n")
    assert words in complaints(spec)
    assert bool(words) == bool(complaints(spec))


def soft_edge() -> np.ndarray:
    """A disc as a program with smoothing draws it: values from 0 to 255."""
    y, x = np.mgrid[:SIDE, :SIDE] - 7.5
    return (255 / (1 + np.exp(np.hypot(x, y) - 5))).round()


@pytest.mark.parametrize("write", [in_masks, in_geotiff])
@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (blocks(0, 128, 255), "only the values 0, 128, which look like grey levels"),
        (np.arange(256).reshape(16, 16) % 250, "have up to 250 values"),
        (blocks(7), "fewer than two classes (values: 7)"),
        (blocks(0, 1, 5), ""),
    ],
    ids=["three-greys", "gradient", "one-value", "classes"],
)
def test_values_that_are_no_class_numbers_without_classes_txt(tmp_path, write, mask, words):
    assert words in complaints(write(tmp_path, [mask]))


def test_a_smoothed_mask_is_refused(tmp_path):
    text = complaints(in_masks(tmp_path, [soft_edge()]))
    assert "look like grey levels" in text or "contain the value" in text


def test_masks_with_0_as_background_are_not_of_ade20k(tmp_path):
    text = complaints(in_ade20k(tmp_path, [blocks(0, 1)] * 2))
    assert "0 and 255 mark unlabelled pixels, classes begin at 1" in text
    assert complaints(in_ade20k(tmp_path / "ade", [blocks(0, 1, 150)])) == ""


@pytest.mark.parametrize(
    ("values", "words"),
    [((0, 255), "no labelled pixel but of class 'a'"), ((0, 1, 2), "contain the value 2")],
)
def test_masks_in_memory(values, words):
    mask = blocks(*values)
    item = {"image": [np.zeros((SIDE, SIDE, 3), np.uint8)], "mask": [mask], "classes": ["a", "b"]}
    with pytest.raises(ValueError, match=words):
        register_data(item)


def test_the_reason_why_masks_cannot_be_read_is_told(tmp_path):
    spec = in_masks(tmp_path, [blocks(0, 1), np.zeros((SIDE, SIDE, 3))])
    assert "1 masks cannot be read, for example train/1.png" in complaints(spec)
    (tmp_path / "masks/train/0.png").write_bytes(b"broken")
    assert "masks cannot be read: train/0.png: UnidentifiedImageError" in complaints(spec)


# ------------------------------------------------------------------------- classes.txt


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("\ufeffa\r\nb \r\n\r\n", ["a", "b"]),
        ("a\rb", ["a", "b"]),
        ("0 background\n1 road\n", ["background", "road"]),
        ("0: background\n1:road", ["background", "road"]),
        ("10 m\n20 m\n30 m", ["10 m", "20 m", "30 m"]),
        ("grade 1\ngrade 2\n", ["grade 1", "grade 2"]),
        ("name\nroad", ["name", "road"]),
        ("a\u2028b\nc", ["a\u2028b", "c"]),
    ],
)
def test_the_line_number_is_the_class_number(tmp_path, text, names):
    (tmp_path / "classes.txt").write_bytes(text.encode())
    assert read_classes(tmp_path / "classes.txt") == names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\n\nb\n", "line 2 is empty"),
        ("# my classes\na\nb\n", "line 1 is a comment"),
        ("a\nb\na\n", "line 3 repeats the name 'a'"),
        ("1 road\n2 house\n", "its number is 1"),
        ("1: road\n0: ground\n", "its number is 1"),
        ("road 1\nbackground 0\n", "a number behind each name"),
        ("road: 1\nbackground: 0\n", "a number behind each name"),
        ("road,1\nbackground,2\n", "a number behind each name"),
        ("name,number\nbackground,0\nroad,1\n", "is a header"),
        ("id name\n0 background\n1 road\n", "is a header"),
    ],
)
def test_lines_that_are_no_names_are_refused(tmp_path, text, words):
    spec = in_masks(tmp_path, [blocks(0, 1)])
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"classes\.txt: line .*{words}|{words}"):
        open_data(spec)


def test_a_classes_txt_that_is_not_read_is_told(tmp_path):
    spec = in_masks(tmp_path, [blocks(0, 1)])
    (tmp_path / "masks/train/classes.txt").write_text("a\nb\n")
    assert complaints(spec).startswith("masks/train/classes.txt is not read; ")
    (tmp_path / "Classes.txt").write_text("a\nb\n")
    assert (open_data(spec).classes, complaints(spec)) == (["a", "b"], "")
    (tmp_path / "Classes.txt").write_text("b\na\n")
    assert "is not read and names other classes" in complaints(spec)


# ------------------------------------------------------------------------- classes of the splits


@NAMED
def test_classes_that_cannot_be_learned_are_told(tmp_path, write):
    spec = write(tmp_path, [blocks(0, 1), blocks(0, 2)])
    for folder in ("images", "masks"):
        (file,) = (tmp_path / folder / "train").glob("1.*")
        (tmp_path / folder / "test").mkdir()
        file.rename(tmp_path / folder / "test" / file.name)
    (tmp_path / "classes.txt").write_text("ground\ntree\nhouse\nroad\n")
    train, test = pickle.loads(pickle.dumps(masked_splits(spec, 0.5, 0)))
    learned = absent_classes(train, test)
    assert "1 of the 4 classes, but test masks have them: house" in learned[0]
    assert "1 of the 4 classes: road" in learned[1]
    (text,) = absent_classes(open_data(spec, split="all"), test)
    assert "road" in text
    assert any("no mask has 1 of the classes: road" in line for line in check(spec).remarks)


# ------------------------------------------------------------------------- pairs


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("a.jpg", "a.png"),
        ("a.jpg", "a.jpg.png"),
        ("a.png", "a.png.png"),
        ("a.jpg", "a_mask.png"),
        ("a.JPG", "a.PNG"),
        ("A.jpg", "a.png"),
        ("sub/v1.2 x.jpg", "sub/v1.2 x_labels.tif"),
    ],
)
def test_the_mask_of_an_image(image, mask):
    others = [mask.replace("a", "b").replace("x", "y"), "c.png"]
    assert paired([image], [*others, mask], Path("images"), Path("masks")) == [mask]


@pytest.mark.parametrize(
    ("images", "masks", "words"),
    [
        (["a.jpg", "b.jpg"], ["a.png"], "1 of 2 images in images have no mask .*: b.jpg"),
        (["a.jpg", "a.png"], ["a.png"], "two images a.jpg and a.png with the same mask a.png"),
        (["a.jpg"], ["a.png", "a.tif"], "two masks a.png and a.tif"),
        (["a.jpg"], ["a_mask.png", "a_gt.png"], "two masks a_mask.png and a_gt.png"),
        (["a.jpg", "A.jpg"], ["a.png"], "the same mask a.png"),
    ],
)
def test_pairs_in_doubt_are_refused(images, masks, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        paired(images, masks, Path("images"), Path("masks"))


@NAMED
def test_masks_without_an_image_are_counted(tmp_path, write):
    spec = write(tmp_path, [blocks(0, 1), blocks(0, 2)])
    (file,) = (tmp_path / "images/train").glob("1.*")
    file.unlink()
    assert open_data(spec).passed_over == {"masks without an image": 1}
