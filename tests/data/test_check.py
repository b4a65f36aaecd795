"""The data doctor finds what is wrong, names it, and is content with what is right."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from vim_ssl.cli import main
from vim_ssl.data import ImageData
from vim_ssl.data import check as doctor
from vim_ssl.data.check import check
from vim_ssl.data.open import Source


def write(root, *names, seed=0):
    """Images of noise, each another."""
    draw = np.random.default_rng(seed)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        values = draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(values).save(root / name)
    return root


def classes(root, split="", count=2):
    return write(
        root, *(f"{split}{c}/{i}.png" for c in ("cat", "dog") for i in range(count)),
        seed=len(split),
    )  # fmt: skip


def test_sound_data(tmp_path, capsys):
    classes(tmp_path, "train/", 3)
    classes(tmp_path, "test/")
    assert main(["data", "check", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "read by index; train, test; 2 classes" in text
    assert [line.split() for line in text.splitlines() if line.startswith(("train", "cat"))] == [
        ["train", "6", "6", "-"],
        ["cat", "3", "2"],
    ]
    assert "Read: 10 images, all." in text
    assert "Modes: RGB 10" in text
    assert "all 8×6" in text
    assert "No problems." in text


def test_a_stray_image_that_undoes_the_splits_is_told(tmp_path):
    classes(tmp_path, "train/", 3)
    classes(tmp_path, "Test/")
    assert check(str(tmp_path)).problems == []
    write(tmp_path, "stray.png", seed=9)
    (problem,) = check(str(tmp_path)).problems
    assert problem.startswith(
        "Test, train are not read as splits, because their parent folder also contains "
    )


def test_masks_are_counted_by_the_classes_they_show(tmp_path, capsys):
    draw = np.random.default_rng(0)
    for name, values in (("train/a", [0, 1, 255]), ("train/b", [1, 1, 2]), ("val/c", [0, 0, 3])):
        write(tmp_path, f"images/{name}.png", seed=draw)
        mask = np.full((6, 8), values[0], np.uint8)
        mask[0, :3] = values
        (tmp_path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(tmp_path / f"masks/{name}.png")
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\ntree\n")
    assert main(["data", "check", f"masks:{tmp_path}"]) == 1
    text = capsys.readouterr().out
    assert "labelled" not in text
    assert [line.split() for line in text.splitlines() if line.startswith(("split", "train"))] == [
        ["split", "images", "masks", "groups"],
        ["train", "2", "2", "-"],
    ]
    assert [line.split() for line in text.splitlines() if line[:4] in ("clas", "sky ", "road")] == [
        ["class", "(images)", "train", "val"],
        ["sky", "1", "1"],
        ["road", "2", "0"],
    ]
    assert "val has 1 classes that the training split lacks: tree." in text
    assert "val has no mask of 2 classes: road, car." in text
    # Of a sample nobody knows what the rest shows.
    assert check(f"masks:{tmp_path}", sample=1).problems == []


def test_boxes_are_counted(tmp_path):
    write(tmp_path, "train/1.png", "train/2.png", "val/3.png")
    (tmp_path / "annotations").mkdir()
    for split, ids, of in (("train", (1, 2), (1, 1, 1)), ("val", (3,), ())):
        table = {
            "images": [{"id": i, "file_name": f"{i}.png", "width": 8, "height": 6} for i in ids],
            "annotations": [
                {"id": n, "image_id": i, "category_id": 4, "bbox": [1, 1, 2, 2]}
                for n, i in enumerate(of)
            ],
            "categories": [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}],
        }
        (tmp_path / f"annotations/{split}.json").write_text(json.dumps(table))
    found = check(f"coco:{tmp_path}")
    rows = [line.split() for line in found.facts]
    assert ["split", "images", "with", "boxes", "boxes", "groups"] in rows
    assert ["train", "2", "1", "3", "-"] in rows
    assert ["val", "1", "0", "0", "-"] in rows
    assert ["cat", "3", "0"] in rows
    assert found.problems == []
    assert found.remarks == ["val has no box of 1 classes: cat."]


def test_captions_are_counted(tmp_path):
    write(tmp_path, "1.png", "2.png", "3.png")
    for name, text in (("1.txt", "a hat"), ("2.txt", "\n"), ("3.txt", "a cat\na pet")):
        (tmp_path / name).write_text(text)
    found = check(f"pairs:{tmp_path}")
    assert "With a caption: 2 of these images." in found.facts
    assert found.problems == ["all: 1 images have no caption: 2.png."]


def test_broken_twice_and_on_both_sides(tmp_path):
    classes(tmp_path, "train/", 3)
    classes(tmp_path, "val/")
    (tmp_path / "train/cat/0.png").write_bytes(b"no image")
    # The same pixels in another file format; and again in one split, as another class.
    Image.open(tmp_path / "train/cat/1.png").save(tmp_path / "val/cat/same.bmp")
    Image.open(tmp_path / "train/dog/1.png").save(tmp_path / "train/cat/twin.png")
    Image.new("L", (9, 9)).save(tmp_path / "val/dog/black.png")
    found = check(tmp_path)
    broken, sides = found.problems
    assert broken.startswith("train: 1 images cannot be decoded: train/cat/0.png (not an image")
    assert sides == (
        "1 images are in more than one split: train:train/cat/1.png = val:val/cat/same.bmp."
    )
    remarks = "\n".join(found.remarks)
    assert "1 images are duplicates: train/cat/twin.png = train/dog/1.png." in remarks
    assert "have copies with another label: train/cat/twin.png" in remarks
    assert "val: 1 images have a single value: val/dog/black.png." in remarks
    assert "Problems:" in str(found)


def test_class_folders_that_differ_between_splits(tmp_path):
    classes(tmp_path, "train/")
    write(tmp_path, "test/dog/1.png", "test/cow/1.png", seed=9)
    found = check(tmp_path)
    assert found.problems == ["test has 1 classes that the training split lacks: cow."]
    assert found.remarks == ["test has no image of 1 classes: cat."]


def data(**columns):
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 5), dtype=np.uint8)
    return ImageData(list(images), list("abcd"), name="made", **columns)


def use(monkeypatch, given):
    """Open this data whatever the spec."""
    source = Source(given.splits, lambda split: given)
    monkeypatch.setattr(doctor, "open_source", lambda *args, **kwargs: source)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"labels": [0, 1, 2, 1], "classes": ["x", "y"]}, "out of range, 0 to 1: 2 (c)."),
        ({"labels": [0, 1, -2, 1]}, "out of range, 0 and up: -2 (c)."),
        ({"labels": [1, 1, -1, 1], "classes": ["x", "y"]}, "all has images of only one class, y"),
        ({"labels": [[0, 1], [1, 0], [2, 0], [1, 1]], "classes": ["x", "y"]}, "[2, 0] (c)."),
        ({"faults": ["half of it is gone"]}, "half of it is gone"),
    ],
    ids=["above", "below", "one-class", "multi-label", "faults"],
)  # fmt: skip
def test_labels(monkeypatch, columns, message):
    use(monkeypatch, data(**columns))
    assert any(message in problem for problem in check("made").problems)


def test_sound_multi_labels(monkeypatch):
    given = data(labels=[[0, 1], [1, 0], [-1, -1], [1, 1]], classes=["x", "y"])
    use(monkeypatch, given)
    found = check("made")
    assert found.problems == []
    assert "all: 1 images have no label." in found.remarks
    assert "x                      2" in str(found)


def test_groups_and_ids_on_two_sides(tmp_path):
    write(tmp_path, *(f"{i}.png" for i in range(4)))
    lines = ["path,label,split,patient", "0.png,a,train,p1", "1.png,b,train,p2",
             "2.png,a,test,p2", "3.png,b,test,p3"]  # fmt: skip
    (tmp_path / "t.csv").write_text("\n".join(lines))
    found = check(f"csv:{tmp_path / 't.csv'}?group=patient")
    assert found.problems == ["1 groups are in train and in test: p2."]
    assert check(f"csv:{tmp_path / 't.csv'}?group=patient&split=train").problems == []


def test_a_sample_of_the_images(tmp_path):
    write(tmp_path, *(f"{i}.png" for i in range(20)))
    found = check(tmp_path, sample=5)
    assert "Read: 5 images, of 20." in found.facts
    assert found.problems == []


def test_workers_find_the_same(tmp_path):
    classes(tmp_path, count=3)
    (tmp_path / "cat/1.png").write_bytes(b"")
    assert str(check(tmp_path, workers=1)) == str(check(tmp_path))


def test_shards(tmp_path):
    write(tmp_path, "a.png", "b.png")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, content in (("a.png", None), ("a.cls", b"0"), ("b.png", None), ("b.cls", b"1"),
                              ("c.png", b"broken"), ("c.cls", b"x")):  # fmt: skip
            content = content or (tmp_path / name).read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    found = check(f"wds:{tmp_path / 's.tar'}")
    assert len(found.problems) == 1
    assert "all: 1 images cannot be decoded: s.tar/c (" in found.problems[0]


def test_what_cannot_be_opened_is_one_line(tmp_path, capsys):
    assert main(["data", "check", str(tmp_path)]) == 1
    assert "cannot be opened:\n  x The folder" in capsys.readouterr().out


def test_images_of_many_bands(monkeypatch):
    arrays = [np.random.default_rng(i).random((5, 6, 4), np.float32) for i in range(3)]
    arrays[1][2, 3] = np.nan
    given = ImageData(arrays, list("abc"), name="made")
    use(monkeypatch, given)
    found = check("made")
    assert "Modes: 4×float32 3" in found.facts
    assert found.remarks == ["all: 1 images have NaN or infinite values: b."]
