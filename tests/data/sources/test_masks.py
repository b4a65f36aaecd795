"""Images with masks: what is read, what is refused, and how it is told."""

import pickle
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vim_ssl.data import BadImage, masked_splits, open_data
from vim_ssl.data.check import check
from vim_ssl.data.sources import masks

VALUES = np.array([[0, 1, 2], [2, 1, 255]], np.uint8)


def save(path, values, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values))
    if mode == "P":
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette([7 * i % 256 for i in range(768)])
    image.save(path)


def plain(root, *names, values=VALUES, mode="L", folder="masks"):
    """images/NAME.jpg and masks/NAME.png of 3 x 2 pixels each."""
    for name in names:
        save(root / "images" / f"{name}.jpg", np.full((2, 3, 3), 90, np.uint8))
        save(root / folder / f"{name}.png", values, mode)
    return f"masks:{root}"


@pytest.mark.parametrize("mode", ["L", "P"])
def test_a_mask_is_its_files_numbers(tmp_path, mode):
    data = open_data(plain(tmp_path, "b", "a", mode=mode))
    assert data.ids == ["a.jpg", "b.jpg"]
    assert (data.classes, data.labels, data.has_masks) == (["0", "1", "2"], None, True)
    item = pickle.loads(pickle.dumps(data))[1]
    assert item["image"].size == (3, 2)
    assert item["mask"].dtype == np.uint8
    assert np.array_equal(item["mask"], VALUES)


def test_sixteen_bits_and_black_and_white(tmp_path):
    spec = plain(tmp_path, "a", values=VALUES.astype(np.uint16))
    assert np.array_equal(open_data(spec)[0]["mask"], VALUES)
    Image.fromarray(VALUES == 1).save(tmp_path / "masks/a.png")
    assert np.array_equal(open_data(spec)[0]["mask"], VALUES == 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_grey_of_few_bits_is_not_stretched(tmp_path, bits):
    """Programs that make PNG files small write it; Pillow shows 0 to 3 as 0 to 255."""
    spec = plain(tmp_path, "a", values=np.zeros((2, 3), np.uint8))
    (tmp_path / "masks/a.png").write_bytes(grey_png([[0, 1, 2], [3, 1, 0]], bits))
    data = open_data(spec)
    assert data.classes == ["0", "1", "2", "3"]
    assert data[0]["mask"].tolist() == [[0, 1, 2], [3, 1, 0]]


def grey_png(rows: list[list[int]], bits: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        ends = len(content).to_bytes(4, "big"), zlib.crc32(kind + content).to_bytes(4, "big")
        return ends[0] + kind + content + ends[1]

    packed = b""
    for row in rows:
        text = "".join(format(value, f"0{bits}b") for value in row)
        text += "0" * (-len(text) % 8)
        packed += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    head = struct.pack(">IIBBBBB", len(rows[0]), len(rows), bits, 0, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(packed)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_classes_txt_names_them(tmp_path):
    spec = plain(tmp_path, "a")
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfground\r\ntree \r\nhouse\r\nwater\r\n\r\n")
    assert open_data(spec).classes == ["ground", "tree", "house", "water"]


def test_each_mask_is_read_once_to_see_how_many_classes_there_are(tmp_path, monkeypatch):
    read = []
    decode = masks.label_numbers
    monkeypatch.setattr(masks, "label_numbers", lambda path: read.append(path.name) or decode(path))
    spec = plain(tmp_path, "train/a", "train/b", "val/c")
    assert masked_splits(spec, 0.5, 0)[0].classes == ["0", "1", "2"]
    assert sorted(read) == ["a.png", "b.png", "c.png"]
    plain(tmp_path, "val/c", values=np.full((2, 3), 10, np.uint8))  # a file of another size
    assert len(open_data(spec).classes) == 11
    assert read[3:] == ["c.png"]


def test_split_folders_are_the_parts(tmp_path):
    spec = plain(tmp_path, "train/a", "train/b", "val/a")
    train, test = masked_splits(spec, 0.5, 0)
    assert (train.ids, test.ids) == (["train/a.jpg", "train/b.jpg"], ["val/a.jpg"])
    assert train[0]["meta"]["path"].endswith("images/train/a.jpg")


def test_without_splits_a_share_is_held_out_with_its_mask(tmp_path):
    for i in range(8):
        spec = plain(tmp_path, f"scene{i // 2}/{i}", values=VALUES * 0 + i)
    for part in masked_splits(f"{spec}?group=folder", 0.25, 0):
        for item in (part[i] for i in range(len(part))):
            assert item["mask"][0, 0] == int(item["id"].split("/")[1][0])
    assert len({name.split("/")[0] for name in part.ids}) == 1 < len(part)


def test_ade20k_has_no_class_zero(tmp_path):
    values = np.array([[0, 1, 150], [2, 2, 0]], np.uint8)
    plain(tmp_path, "training/ADE_1", "validation/ADE_2", values=values, folder="annotations")
    train, test = masked_splits(f"ade20k:{tmp_path}", 0.2, 0)
    assert (train.split, test.split, len(train.classes)) == ("training", "validation", 150)
    assert train[0]["mask"].tolist() == [[255, 0, 149], [1, 1, 255]]
    rows = [f"{i}\t0.1\t5\t6\tname{i}, other" for i in range(1, 151)]
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + "\n".join(rows))
    assert open_data(f"ade20k:{tmp_path}").classes[0] == "name1"


def test_the_fingerprint_knows_the_masks(tmp_path):
    spec = plain(tmp_path, "a")
    before = open_data(spec).fingerprint
    save(tmp_path / "masks/a.png", np.random.default_rng(0).integers(0, 3, (90, 90), np.uint8))
    assert open_data(spec).fingerprint != before


# ------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.zeros((3, 2), np.uint8), "the mask has 2×3 pixels, its image 3×2"),
        ([[0, 1, 9], [0, 0, 0]], "contains the value 9; expected 3 classes, 0 to 2, or 255"),
        (np.zeros((2, 3, 3), np.uint8), "mode RGB; expected one class number per pixel"),
    ],
    ids=["size", "class", "colour"],
)
def test_a_mask_that_does_not_fit_is_named(tmp_path, values, reason):
    spec = plain(tmp_path, "a", "b")
    (tmp_path / "classes.txt").write_text("x\ny\nz\n")
    save(tmp_path / "masks/b.png", np.asarray(values, np.uint8))
    data = open_data(spec)
    assert data[0]["mask"].shape == (2, 3)
    with pytest.raises(BadImage, match=reason) as found:
        data[1]
    assert found.value.id == "b.jpg"


@pytest.mark.parametrize(
    ("orientation", "mask", "reason"),
    [
        (
            3,
            VALUES,
            "its EXIF orientation is 3, and it is not known whether its labels are rotated too",
        ),
        (2, VALUES, "its EXIF orientation is 2"),
        (6, VALUES, "the mask has 3×2 pixels, its image 2×3"),
        (6, VALUES.T, ""),
    ],
    ids=["upside-down", "mirrored", "sideways-as-stored", "sideways-as-shown"],
)
def test_no_mask_lies_askew_on_an_image_that_exif_turns(tmp_path, orientation, mask, reason):
    spec, path = plain(tmp_path, "a", values=mask), tmp_path / "images/a.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(path).save(path, exif=exif)
    data = open_data(spec)
    if reason:
        with pytest.raises(BadImage, match=rf"a\.jpg: {reason}"):
            data[0]
        assert any(f"a.jpg ({reason}" in problem for problem in check(spec).problems)
    else:
        assert data[0]["image"].size == mask.shape[::-1]
        assert np.array_equal(data[0]["mask"], mask)


def test_a_broken_mask_is_named(tmp_path):
    spec = plain(tmp_path, "a", "b")
    (tmp_path / "masks/b.png").write_bytes(b"no image")
    with pytest.raises(BadImage, match=r"b\.jpg: the mask cannot be read"):
        open_data(spec)[1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda root: shutil.rmtree(root / "masks"), FileNotFoundError,
         r"has no masks/; it contains images"),
        (lambda root: [shutil.rmtree(root / name) for name in ("masks", "images")],
         FileNotFoundError, r"has no images/ and no masks/; it contains nothing"),
        (lambda root: [(root / "masks" / name).unlink() for name in ("a.png", "b.png")],
         FileNotFoundError, r"2 of 3 images .*: a.jpg, b.jpg"),
        (lambda root: shutil.copy(root / "images/a.jpg", root / "masks/a.jpg"), ValueError,
         r"a .jpg file does not preserve class numbers"),
        (lambda root: shutil.copy(root / "masks/a.png", root / "masks/a.gif"), ValueError,
         r"a .gif file does not preserve class numbers"),
        (lambda root: shutil.copy(root / "masks/a.png", root / "masks/a.bmp"), ValueError,
         r"two masks a.bmp and a.png"),
        (lambda root: (root / "classes.txt").write_text("one\n"), ValueError,
         r"has 1 classes; expected 2 to 255"),
    ],
    ids=["no-masks", "nothing", "two-lost", "jpeg", "gif", "twice", "one-class"],
)  # fmt: skip
def test_what_is_missing_is_told_at_the_start(tmp_path, change, error, message):
    spec = plain(tmp_path, "a", "b", "c")
    change(tmp_path)
    with pytest.raises(error, match=message):
        open_data(spec)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[0, 0, 0]], r"fewer than two classes \(values: 0\)"),
        ([[0, 255, 0]], r"values: 0, 255.* Save objects as 1 on 0"),
        ([[255, 255, 255]], r"fewer than two classes \(values: 255\)"),
    ],
    ids=["one-class", "white-on-black", "all-ignored"],
)
def test_masks_without_two_classes_are_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        open_data(plain(tmp_path, "a", values=np.array(values, np.uint8)))


def test_a_number_beyond_all_classes_is_refused_at_once(tmp_path):
    """Read as unsigned, -1 would be four thousand million classes; 65,535 would be as many."""
    spec = plain(tmp_path, "a")
    (tmp_path / "masks/a.png").unlink()
    Image.fromarray(np.array([[0, 1, -1]], np.int32)).save(tmp_path / "masks/a.tif")
    with pytest.raises(ValueError, match=r"a\.tif: it contains -1; class numbers start at 0"):
        open_data(spec)
    Image.fromarray(np.array([[0, 1, 65_535]], np.uint16)).save(tmp_path / "masks/a.tif")
    with pytest.raises(ValueError, match="contain the value 65535; classes are 0 to 254"):
        open_data(spec)


def test_no_masks_no_segmentation(tmp_path):
    plain(tmp_path, "a")
    with pytest.raises(ValueError, match=r"has no masks; .* masks:FOLDER"):
        masked_splits(tmp_path, 0.2, 0)
