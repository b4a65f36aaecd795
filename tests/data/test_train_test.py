"""A training and a test part of labelled images, whatever splits the source has."""

import numpy as np
import pytest
from PIL import Image

from vim_ssl.data import ImageData, labelled_splits, masked_splits, open_data, registry
from vim_ssl.data.check import check


def fill(root, *names) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(root / name)
    return str(root)


def classes(split: str) -> list[str]:
    return [f"{split}{name}/{i}.png" for name in "ab" for i in range(5)]


def test_a_share_is_held_out_of_a_source_without_splits(tmp_path):
    train, test = labelled_splits(fill(tmp_path, *classes("")), test=0.2, seed=0)
    assert (len(train), sorted(test.labels)) == (8, [0, 1])
    assert not set(train.ids) & set(test.ids)


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_the_sources_own_split_is_used(tmp_path, name):
    spec = fill(tmp_path, *classes("train/"), *classes(f"{name}/"))
    train, test = labelled_splits(spec, test=0.2, seed=0)
    assert {i.split("/")[0] for i in train.ids} == {"train"}
    assert {i.split("/")[0] for i in test.ids} == {name}


def test_a_test_split_without_labels_is_passed_over(tmp_path):
    spec = fill(tmp_path, *classes("train/"), *classes("val/"), "test/1.png", "test/2.png")
    assert labelled_splits(spec, test=0.2, seed=0)[1].split == "val"


def test_a_class_without_a_test_image_is_reported(tmp_path, caplog):
    names = [f"train/{name}/{i}.png" for name in "abc" for i in range(2)]
    labelled_splits(fill(tmp_path, *names, "test/a/4.png", "test/b/5.png"), test=0.2, seed=0)
    assert "1 of 3 classes, for example c, have no image in test" in caplog.text


@pytest.mark.parametrize("scheme", ["folder", "csv"])
@pytest.mark.parametrize("query", ["", "?split=train"])
def test_without_labels_to_test_on_a_share_of_train_is_held_out(tmp_path, caplog, scheme, query):
    names = [*classes("train/"), *(f"test/{i}.png" for i in range(3))]
    spec = fill(tmp_path, *names)
    if scheme == "csv":
        parts = [name.split("/") for name in names]
        rows = [f"{'/'.join(p)},{p[0]},{p[1] if p[2:] else ''}" for p in parts]
        (tmp_path / "t.csv").write_text("\n".join(["path,split,label", *rows]))
        spec = f"csv:{tmp_path / 't.csv'}"
    train, test = labelled_splits(spec + query, 0.2, 0)
    assert (len(train), sorted(test.labels), test.split) == (8, [0, 1], "all")
    assert all(name.startswith("train/") for name in train.ids + test.ids)
    assert not set(train.ids) & set(test.ids)
    assert "test cannot be tested on without labels; images of train are held out" in caplog.text
    lines = [line.split() for line in check(spec).facts]
    assert ["a", "5"] in [line[:2] for line in lines]
    assert ["b", "5"] in [line[:2] for line in lines]
    drawn = labelled_splits(fill(tmp_path / "alone", *classes("")), 0.2, 0)[1]
    assert [f"train/{name}" for name in drawn.ids] == test.ids  # as without a test split


def test_groups_stay_whole(tmp_path):
    names = [f"{name}/p{i}/{k}.png" for name in "ab" for i in range(5) for k in range(3)]
    spec = fill(tmp_path, *names) + "?label=folder&group=folder"
    train, test = labelled_splits(spec, test=0.2, seed=0)
    assert len(test) == 6
    assert not set(train.groups) & set(test.groups)


@pytest.mark.parametrize("group", ["patient", "room"])
def test_a_group_on_both_sides_of_the_sources_own_split_is_told(tmp_path, caplog, group):
    rows = [
        ("train", "a", "p1", ""), ("train", "b", "p2", "r1"), ("test", "a", "p2", "r2"),
        ("test", "b", "p3", ""),
    ]  # fmt: skip
    fill(tmp_path, *(f"{i}.png" for i in range(4)))
    lines = [f"{i}.png,{','.join(row)}" for i, row in enumerate(rows)]
    (tmp_path / "t.csv").write_text("\n".join(["path,split,label,patient,room", *lines]))
    labelled_splits(f"csv:{tmp_path / 't.csv'}", test=0.2, seed=0)
    assert not caplog.text
    labelled_splits(f"csv:{tmp_path / 't.csv'}?group={group}", test=0.2, seed=0)
    told = "1 groups are in both train and test, for example p2; test results"
    assert (told in caplog.text) == (group == "patient")


@pytest.mark.parametrize("scheme", ["folder", "masks", "nifti"])
def test_a_group_folder_in_two_splits_is_reported(tmp_path, caplog, scheme):
    """The group is the folder without its split: a/p1 for train/a/p1."""
    names = [f"{s}/{c}/p{i}/{s}" for s, first in (("train", 1), ("test", 2)) for c in "ab"
             for i in (first, first + 1)]  # fmt: skip
    if scheme == "nifti":
        nibabel = pytest.importorskip("nibabel")
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True)
            volume = nibabel.Nifti1Image(np.ones((4, 4, 2), np.uint8), np.eye(4))
            nibabel.save(volume, tmp_path / f"{name}.nii")
    else:
        tops = ("images/", "masks/") if scheme == "masks" else ("",)
        fill(tmp_path, *(f"{top}{name}.png" for name in names for top in tops))
        (tmp_path / "classes.txt").write_text("one\ntwo")
    spec = f"{scheme}:{tmp_path}?group=folder" + "&label=folder" * (scheme != "masks")
    train, test = (masked_splits if scheme == "masks" else labelled_splits)(spec, 0.2, 0)
    assert (set(train.groups), set(test.groups)) == (
        {"a/p1", "a/p2", "b/p1", "b/p2"}, {"a/p2", "a/p3", "b/p2", "b/p3"})  # fmt: skip
    assert "2 groups are in both train and test, for example a/p2" in caplog.text
    assert any("2 groups are in train and in test" in line for line in check(spec).problems)


@pytest.mark.parametrize("names", [("train/a/1", "train/b/1", "test/a/2"), ("train/1", "test/2")])
def test_class_folders_and_split_folders_are_no_groups_of_two_splits(tmp_path, names):
    spec = fill(tmp_path, *(f"{name}.png" for name in names))
    label = "folder" if "a" in names[0].split("/") else "none"
    data = open_data(f"{spec}?split=all&group=folder&label={label}")
    assert data.groups == [name.rpartition("/")[0] for name in names]


def test_a_group_on_both_sides_is_told_of_images_with_masks(monkeypatch, caplog):
    ids, groups = ["1", "2", "3"], {"train": ["p1", "p2", "p2"], "test": ["p2", "p3", "p1"]}

    def opener(spec):
        split = spec.split if spec.split in groups else "train"
        names = [f"{split}/{name}" for name in ids]
        return ImageData(
            names, names, name="m", masks=object(), groups=groups[split], splits=["train", "test"],
            split=split,
        )  # fmt: skip

    monkeypatch.setitem(registry._openers, ("masks", False), registry.Opener(opener))
    train, test = masked_splits("masks:m", test=0.2, seed=0)
    assert (train.split, test.split) == ("train", "test")
    assert "masks:m: 2 groups are in both train and test, for example p1" in caplog.text


def test_a_class_that_is_never_tested_is_told(tmp_path, caplog):
    names = [f"{name}/{name}{i}/{k}.png" for name in "ab" for i in range(5) for k in range(3)]
    spec = fill(tmp_path, *names) + "?label=folder&group=folder"
    labelled_splits(spec, test=0.2, seed=0)
    assert not caplog.text
    fill(tmp_path, "c/only/1.png", "c/only/2.png")
    labelled_splits(spec, test=0.2, seed=0)
    assert "1 of 3 classes, for example c, are not among the held-out images" in caplog.text


def test_images_without_labels_are_an_error_and_nothing_else_is_reported(tmp_path, caplog):
    with pytest.raises(ValueError, match=r"fewer than two classes; put the images of each class"):
        labelled_splits(fill(tmp_path, "1.png", "2.png"), test=0.2, seed=0)
    assert not caplog.text  # all images are both splits here, which is no overlap


def test_the_training_split_counts_what_was_left_out_of_it(monkeypatch):
    names = [str(i) for i in range(11)]
    data = ImageData(names, names, name="rows", labels=[*[0, 1] * 5, -1])
    monkeypatch.setitem(registry._openers, ("folder", False), registry.Opener(lambda spec: data))
    train, test = labelled_splits("anything", test=0.2, seed=0)
    assert train.left_out == {"without a label": 1, "held out for testing": 2}
    assert "held out for testing" not in test.left_out
    assert train.subset([0, 1]).left_out == train.left_out
    assert train.subset([0, 1], "without a label").left_out["without a label"] == 1 + 6
    assert data.left_out == {}


def test_images_with_several_labels_are_parted_too(monkeypatch):
    rows = [[i % 2, int(i % 3 == 0)] for i in range(30)] + [[-1, -1]]
    names = [str(i) for i in range(31)]
    data = ImageData(names, names, name="rows", labels=rows)
    monkeypatch.setitem(registry._openers, ("folder", False), registry.Opener(lambda spec: data))
    train, test = labelled_splits("anything", test=0.2, seed=0)
    assert (len(train), len(test)) == (24, 6)
    assert "30" not in train.ids + test.ids  # its labels are not known
    assert train.multi_label
    assert [rows[int(name)] for name in test.ids] == test.labels
    data.labels[0] = [0, 0]
    assert (
        data.subset(range(31)).fingerprint
        != ImageData(names, names, name="rows", labels=[[1, 1], *rows[1:]]).fingerprint
    )


# ------------------------------------------------------------------ several sources as one


def test_specs_joined_by_a_plus_are_one_set_after_another(tmp_path):
    for name, value in (("a", 10), ("b", 200)):
        for i in range(3):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            Image.new("RGB", (4, 4), (value + i,) * 3).save(folder / f"{i}.png")
    both = open_data(f"{tmp_path}/a?limit=2 + {tmp_path}/b")
    assert len(both) == 5
    assert [both[i]["image"].getpixel((0, 0))[0] for i in range(5)] == [10, 11, 200, 201, 202]
    assert len(set(both.ids)) == 5
    assert "label" not in both[0]
    assert open_data(f"{tmp_path}/a + {tmp_path}/a").fingerprint != both.fingerprint
    weighted = open_data(f"{tmp_path}/a?limit=1 + 2 * {tmp_path}/b")
    grey = [weighted[i]["image"].getpixel((0, 0))[0] for i in range(len(weighted))]
    assert grey == [10, *(200, 201, 202) * 2]
    assert len(set(weighted.ids)) == 7
    assert weighted.name == f"folder:{tmp_path}/a?limit=1 + 2 * folder:{tmp_path}/b"


def test_a_folder_with_a_plus_in_its_name_is_a_folder(tmp_path):
    fill(tmp_path / "a + b", "0.png")
    assert len(open_data(f"{tmp_path}/a + b")) == 1


def test_one_source_is_trained_on_and_another_tested_on(tmp_path):
    names = [f"{split}/{c}/{i}.png" for split in ("train", "test") for c in "ab" for i in range(3)]
    here, there = fill(tmp_path / "here", *names), fill(tmp_path / "there", *names)
    train, test = labelled_splits(here, 0.2, 0, there)
    assert (train.split, test.split) == ("train", "test")
    assert "here" in train.name
    assert "there" in test.name
    whole = fill(tmp_path / "whole", *(f"{c}/{i}.png" for c in "ab" for i in range(4)))
    assert len(labelled_splits(here, 0.2, 0, whole)[1]) == 8
    others = fill(tmp_path / "others", *(f"{c}/{i}.png" for c in "ac" for i in range(3)))
    with pytest.raises(ValueError, match=r"1 classes that are not among the 2 of .* \(a, b\): c"):
        labelled_splits(here, 0.2, 0, others)


@pytest.mark.parametrize("name", ["holdout", "extra"])
def test_a_split_of_another_name_is_neither_trained_on_nor_tested(tmp_path, caplog, name):
    rows = [f"{i}.png,{'ab'[i % 2]},{name if i > 15 else 'train'}" for i in range(20)]
    fill(tmp_path, *(f"{i}.png" for i in range(20)))
    (tmp_path / "t.csv").write_text("\n".join(["path,label,split", *rows]))
    spec = f"csv:{tmp_path / 't.csv'}"
    train, test = labelled_splits(spec, 0.25, 0)
    assert sorted(train.ids + test.ids) == sorted(f"{i}.png" for i in range(16))
    assert f"{name} is neither a test nor a validation split" in caplog.text
    train, test = labelled_splits(f"{spec}?split=all", 0.25, 0)
    assert len(train) + len(test) == 20


def test_classes_that_a_limit_loses_are_reported(tmp_path, caplog):
    rows = [f"{i}.png,{'abcd'[i % 4]}" for i in range(16)]
    fill(tmp_path, *(f"{i}.png" for i in range(16)))
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *rows]))
    open_data(f"csv:{tmp_path / 't.csv'}?limit=8")
    assert "limit=8 keeps no image of 2 classes" in caplog.text
