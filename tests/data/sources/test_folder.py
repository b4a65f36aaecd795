"""Folders as people have them: flat, by class, by split, by date, and with rubbish in between."""

import os
import pickle

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from vim_ssl.data import BadImage, open_data
from vim_ssl.data.check import check
from vim_ssl.data.open import warn_once
from vim_ssl.data.train_test import labelled_splits


def fill(root, *names, size=(8, 6)):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number * 10 % 256, 0, 0)).save(root / name)
    return root


def test_flat(tmp_path):
    fill(tmp_path, "b.png", "a.JPG", "c.webp")
    for junk in (".hidden.png", "notes.txt", "Thumbs.db"):
        (tmp_path / junk).write_text("no image")
    fill(tmp_path, ".cache/x.png")
    data = open_data(tmp_path)
    assert data.ids == ["a.JPG", "b.png", "c.webp"]
    assert (data.labels, data.classes, data.groups, data.splits) == (None, None, None, [])
    item = data[1]
    assert item.keys() == {"id", "image", "meta"}
    assert item["image"].size == (8, 6)
    assert item["meta"]["path"] == str(tmp_path / "b.png")


def test_class_folders(tmp_path):
    data = open_data(str(fill(tmp_path, "dog/1.png", "cat/2.png", "cat/1.png")))
    assert data.classes == ["cat", "dog"]
    assert data.ids == ["cat/1.png", "cat/2.png", "dog/1.png"]
    assert data.labels == [0, 0, 1]
    assert data[2]["label"] == 1


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10", "2", "0", "1"], ["0", "1", "2", "10"]),
        (["01", "1", "3", "02"], ["01", "1", "02", "3"]),
        (["10", "2", "many"], ["10", "2", "many"]),
        (["1_10", "1_2"], ["1_10", "1_2"]),
    ],
)
@pytest.mark.parametrize("split", ["", "train/"])
def test_classes_that_are_numbers_are_in_the_order_of_their_size(tmp_path, names, order, split):
    data = open_data(fill(tmp_path, *(f"{split}{name}/1.png" for name in names)))
    assert data.classes == order
    assert [data.classes[label] for label in data.labels] == sorted(names)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["2024/05/a.png", "2024/06/b.png", "2025/c.png"], id="dates-mixed-depth"),
        pytest.param(["2024/05/a.png", "2025/06/b.png"], id="dates-two-deep"),
        pytest.param(["a.png", "holiday/b.png", "work/c.png"], id="some-outside"),
        pytest.param(["only/a.png", "only/b.png"], id="one-folder"),
    ],
)
def test_nested_folders_that_are_no_classes(tmp_path, names):
    data = open_data(fill(tmp_path, *names))
    assert data.labels is None
    assert data.ids == sorted(names)


def test_label_option(tmp_path):
    fill(tmp_path, "x/deep/1.png", "y/2.png")
    assert open_data(f"{tmp_path}?label=folder").classes == ["x", "y"]
    assert open_data(f"{tmp_path}?label=folder").labels == [0, 1]
    fill(tmp_path / "plain", "x/1.png", "y/2.png")
    assert open_data(f"{tmp_path / 'plain'}?label=none").labels is None
    with pytest.raises(ValueError, match="label=species"):
        open_data(f"{tmp_path}?label=species")
    fill(tmp_path, "outside.png")
    with pytest.raises(ValueError, match=r"1 images in .* are not in a class folder"):
        open_data(f"{tmp_path}?label=folder")


def test_group_option(tmp_path):
    data = open_data(f"{fill(tmp_path, 'p1/a.png', 'p1/s/b.png', 'p2/c.png')}?group=folder")
    assert data.groups == ["p1", "p1/s", "p2"]
    assert data[0]["group"] == "p1"


def test_a_folder_takes_no_columns(tmp_path):
    with pytest.raises(ValueError, match=r"no option 'caption'; it takes split, limit, label, gro"):
        open_data(f"{fill(tmp_path, 'a.png')}?caption=text")


def test_split_folders(tmp_path):
    fill(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/dog/3.png", "val/cat/4.png")
    (tmp_path / "README.md").write_text("about")
    train, val = open_data(tmp_path), open_data(tmp_path, split="validation")
    assert (train.split, train.splits) == ("train", ["train", "val"])
    assert train.ids == ["train/cat/1.png", "train/dog/2.png"]
    assert (val.split, val.labels, val.classes) == ("val", [0, 1], ["cat", "dog"])
    everything = open_data(f"{tmp_path}?split=all")
    assert everything.labels == [0, 1, 0, 1]
    assert open_data(f"{tmp_path}?split=all", split="val").ids == val.ids
    with pytest.raises(ValueError, match="has no split 'test'"):
        open_data(tmp_path, split="test")


def test_split_folders_may_have_capitals(tmp_path):
    fill(tmp_path, "Train/cat/1.png", "Train/dog/2.png", "Test/dog/3.png", "Test/cat/4.png")
    train, test = open_data(tmp_path), open_data(tmp_path, split="test")
    assert (train.splits, train.ids) == (["Train", "Test"], ["Train/cat/1.png", "Train/dog/2.png"])
    assert (test.classes, test.labels) == (["cat", "dog"], [0, 1])


def test_classes_are_those_of_all_splits(tmp_path):
    fill(tmp_path, "train/b/1.png", "train/c/2.png", "test/a/3.png", "test/c/4.png")
    assert open_data(tmp_path, split="test").classes == ["a", "b", "c"]
    assert open_data(tmp_path, split="test").labels == [0, 2]


def test_an_unlabelled_test_split(tmp_path):
    fill(tmp_path, "train/a/1.png", "train/b/2.png", "test/3.png")
    assert open_data(tmp_path).labels == [0, 1]
    assert open_data(tmp_path, split="test").labels is None
    assert open_data(tmp_path, split="all").labels is None


def test_a_class_may_be_called_train(tmp_path):
    data = open_data(fill(tmp_path, "bus/1.png", "train/2.png"))
    assert (data.classes, data.splits) == (["bus", "train"], [])


def test_limit_spreads_over_the_classes(tmp_path):
    fill(tmp_path, *(f"{c}/{i}.png" for c in "abcd" for i in range(5)))
    assert open_data(f"{tmp_path}?limit=4").labels == [0, 1, 2, 3]
    assert len(open_data(f"{tmp_path}?limit=99")) == 20


def test_links_are_followed_but_not_in_circles(tmp_path):
    fill(tmp_path / "far", "a.png", "b.png")
    (tmp_path / "set").mkdir()
    try:
        os.symlink(tmp_path / "far", tmp_path / "set" / "linked")
        os.symlink(tmp_path / "set", tmp_path / "set" / "again")
    except OSError:
        pytest.skip("this system makes no links")
    assert open_data(tmp_path / "set").ids == ["linked/a.png", "linked/b.png"]


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda p: p / "none", FileNotFoundError, "none' does not exist"),
        (lambda p: fill(p, "a.png") / "a.png", NotADirectoryError, "is a file; give the folder"),
        (lambda p: p, ValueError, r"contains no image at any depth; it contains no files"),
        (
            lambda p: [(p / n).write_text("x") for n in ("a.txt", "b.TXT", "c.heic")] and p,
            ValueError, r"it contains 2 × \.txt, 1 × \.heic\. Images are files that end in .*\.jpg",
        ),
    ],
    ids=["missing", "file", "empty", "no-image"],
)  # fmt: skip
def test_unusable_folders_say_so_at_once(tmp_path, prepare, error, message):
    with pytest.raises(error, match=message):
        open_data(prepare(tmp_path))


@pytest.mark.parametrize(
    ("spec", "hint"), [("mnist-5k", "'sample:mnist5k'"), ("cifar/ten", "'hf:cifar/ten'")]
)
def test_a_missing_folder_hints_at_the_likely_scheme(spec, hint):
    with pytest.raises(FileNotFoundError, match=hint):
        open_data(spec)


def test_broken_images_name_themselves(tmp_path):
    fill(tmp_path, "good.png")
    (tmp_path / "text.jpg").write_text("no image")
    data = open_data(tmp_path)
    with pytest.raises(BadImage, match=r"^text\.jpg: ") as error:
        data[1]
    assert error.value.id == "text.jpg"
    (tmp_path / "good.png").unlink()  # vanished after it was listed
    with pytest.raises(BadImage, match=r"^good\.png"):
        data[0]


def test_subset(tmp_path):
    data = open_data(fill(tmp_path, "a/1.png", "a/2.png", "b/3.png"))
    part = data.subset([2, 0])
    assert (part.ids, part.labels, part.classes) == (["b/3.png", "a/1.png"], [1, 0], ["a", "b"])
    assert part.subset([1])[0]["id"] == "a/1.png"
    assert part.subset([1]).raw(0).endswith("1.png")
    assert part.raw(0).endswith("3.png")
    assert [item["id"] for item in part] == part.ids
    assert part.fingerprint != data.fingerprint
    with pytest.raises(IndexError):
        part[2]


def test_fingerprint_follows_what_matters(tmp_path):
    fill(tmp_path / "one", "a/1.png", "b/2.png")
    fill(tmp_path / "two", "a/1.png", "b/2.png")
    first = open_data(tmp_path / "one").fingerprint
    assert first == open_data(tmp_path / "two").fingerprint  # another place, the same data
    assert first != open_data(f"{tmp_path / 'two'}?label=none").fingerprint
    fill(tmp_path / "two", "b/3.png")
    grown = open_data(tmp_path / "two").fingerprint
    (tmp_path / "two/b/3.png").unlink()
    assert open_data(tmp_path / "two").fingerprint == first
    (tmp_path / "two/b/2.png").write_bytes(b"other")
    assert len({first, grown, open_data(tmp_path / "two").fingerprint}) == 3


def test_pickling_keeps_everything(tmp_path):
    data = open_data(fill(tmp_path, "a/1.png", "b/2.png")).subset([1])
    copy = pickle.loads(pickle.dumps(data))
    assert (copy.ids, copy.labels, copy.fingerprint) == (data.ids, data.labels, data.fingerprint)
    assert copy[0]["image"].getpixel((0, 0)) == (10, 0, 0)


def test_min_side_reaches_the_decoder(tmp_path):
    Image.new("RGB", (800, 600)).save(tmp_path / "a.jpg")
    data = open_data(tmp_path)
    data.min_side = 140
    assert data.subset([0])[0]["image"].size == (200, 150)


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers(tmp_path, context):
    if context == "fork" and not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    data = open_data(fill(tmp_path, *(f"{i}.png" for i in range(6))))
    loader = DataLoader(
        data, batch_size=3, num_workers=1, collate_fn=list, multiprocessing_context=context
    )
    assert [item["id"] for batch in loader for item in batch] == data.ids


CLASSES = ["cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([*CLASSES, "cover.png"], ("cover.png", "1 of 5", "move them away")),
        ([*CLASSES, "cat/old/5.png"], ("cat/old/5.png", "label=folder")),
        ([*(f"train/{n}" for n in CLASSES), "train/x.png", *(f"test/{n}" for n in CLASSES)],
         ("of train/", "x.png", "1 of 5")),
        ([*(f"train/{n}" for n in CLASSES), "test/cat/5.png", "x.png"],
         ("test, train are not read as splits", "x.png")),
        ([*(f"train/{n}" for n in CLASSES), "test/cat/5.png", "unsorted/x.png"],
         ("test, train are not read as splits", "unsorted/")),
        (["train/cat/1.png", "train/dog/2.png", "test/Cat/3.png", "test/dog/4.png"],
         ("'cat', 'Cat'", "one class")),
        (["train/cat/1.png", "train/Cat/2.png", "test/cat/3.png"], ("'Cat', 'cat'", "different")),
        (["cat/1.png", "cat /2.png", "dog/3.png"], ("'cat', 'cat '", "different")),
        (["caf\u00e9/1.png", "cafe\u0301/2.png"], ("differ only",)),
        (["train/cat/1.png", "Train/dog/2.png", "test/cat/3.png"], ("Train/", "of one split")),
        (["val/cat/1.png", "validation/dog/2.png", "train/cat/3.png"], ("validation/, val/",)),
        ([*CLASSES, "bird\\1.png"], ("bird\\1.png", "Windows", "7z")),
    ],
    ids=["stray", "deep", "stray-in-split", "stray-beside-splits", "folder-beside-splits",
         "case", "case-in-split", "space", "unicode", "two-train", "two-val", "backslash"],
)  # fmt: skip
def test_a_layout_that_hides_labels_or_splits_is_reported(tmp_path, names, words, caplog):
    warn_once.cache_clear()
    fill(tmp_path, *names)
    open_data(tmp_path, split="all")
    told = [record.getMessage() for record in caplog.records]
    assert any(all(word in line for word in words) for line in told)
    problems = check(str(tmp_path)).problems
    assert any(all(word in line for word in words) for line in problems)


@pytest.mark.parametrize(
    "names",
    [CLASSES, ["1.png", "2.png"], ["2024/05/a.png", "2024/06/b.png", "2025/c.png"],
     [*(f"train/{n}" for n in CLASSES), "test/1.png"], ["bus/1.png", "train/2.png"],
     ["1/a.png", "1_1/c.png", "11/d.png"]],
)  # fmt: skip
def test_an_ordinary_layout_causes_no_warning(tmp_path, names):
    data = open_data(fill(tmp_path, *names), split="all")
    assert (data.passed_over, data.passed_over.warnings) == ({}, [])


@pytest.mark.parametrize("split", ["", "train/"])
def test_class_folders_without_an_image_are_counted(tmp_path, split):
    fill(tmp_path, *(f"{split}{name}" for name in CLASSES))
    (tmp_path / f"{split}bird").mkdir()
    (tmp_path / f"{split}fish").mkdir()
    (tmp_path / f"{split}fish/1.HEIC").write_bytes(b"content")
    data = open_data(tmp_path)
    assert data.classes == ["cat", "dog"]
    assert data.passed_over == {"folder without a file to read": 2, "HEIC": 1}
    assert any(f"{split}bird/" in line for line in check(str(tmp_path)).remarks)


def test_label_folder_names_the_images_outside_of_the_classes(tmp_path):
    fill(tmp_path, *CLASSES, "cover.png")
    with pytest.raises(ValueError, match=r"1 images in .* not in a class folder: cover\.png; move"):
        open_data(f"{tmp_path}?label=folder")


@pytest.mark.parametrize("option", ["", "?label=folder"])
def test_a_single_class_folder_is_refused_for_its_labels(tmp_path, option):
    fill(tmp_path, "all/1.png", "all/2.png", "all/3.png")
    with pytest.raises(ValueError, match="fewer than two classes; put the images of each class"):
        labelled_splits(f"{tmp_path}{option}", 0.3, 0)


@pytest.mark.parametrize("other", ["Cat", "cat ", "CAT", "tabby_cat"])
def test_class_folders_of_two_splits_are_matched_by_name(tmp_path, other):
    cat = "tabby cat" if "_" in other else "cat"
    fill(tmp_path, f"train/{cat}/1.png", "train/dog/2.png", f"test/{other}/3.png", "test/dog/4.png")
    data = open_data(tmp_path, split="all")
    assert sorted(data.classes) == sorted([cat, "dog"])
    true = {f"train/{cat}/1.png": cat, f"test/{other}/3.png": cat}
    assert [data.classes[label] for label in data.labels] == [
        true.get(id, "dog") for id in data.ids
    ]
