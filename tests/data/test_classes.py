"""Classes are matched by name, never by position, wherever two data sets meet."""

import numpy as np
import pytest
from PIL import Image

from vim_ssl.data import ImageData, boxed_splits, labelled_splits, registry
from vim_ssl.data.classes import match_classes, with_classes
from vim_ssl.data.loading.streamed import ImageStream, Shard
from vim_ssl.data.values import Names, name_of, sort_classes


@pytest.mark.parametrize(
    ("names", "known", "numbers"),
    [
        ("ba", "abc", [1, 0]),
        ("ad", "abc", [0, -1]),
        (["1.0", "2"], ["2", "1"], [1, 0]),
        (["True", "0"], ["0", "1"], [1, 0]),
        (["cafe\u0301"], ["caf\u00e9"], [0]),  # as macOS names folders
        (["Golden Retriever"], ["golden_retriever"], [0]),
        (["a", "A"], ["b", "A"], [-1, 1]),  # a is no spelling of A here
        (["Cat"], ["cat", "CAT"], [-1]),  # which of them?
        (["7"], ["07"], [0]),
        (["1.10", "1.2"], ["1.1", "1.10", "1.2"], [1, 2]),
        (["1.0", "True"], ["1", "1.0"], [1, 0]),
        (["1", "1.0"], ["1"], [0, -1]),  # two classes on one side
        (["250"], ["250.0", "250.1"], [-1]),  # codes
        (["1.10"], ["1.1"], [-1]),
        (["100", "1,000"], ["1E2", "1"], [-1, -1]),
        (["3", "-2.0"], ["3.0", "-2"], [0, 1]),
    ],
)
def test_names_are_matched(names, known, numbers):
    assert match_classes(names, known) == numbers


@pytest.mark.parametrize(
    "names",
    [
        ["9", "10"], ["-1.5", "0.0", "2.0", "10.0"], ["0,5", "2,0", "10,0"], ["1e-3", "1e2"],
        ["-2", "-1", "0", "1"], ["007", "08", "10"], ["10", "9", "a"], ["B", "a"],
    ],
    ids=lambda names: " ".join(names),
)  # fmt: skip
def test_numbers_are_in_the_order_of_their_size_and_texts_in_that_of_their_letters(names):
    assert sort_classes(set(names)) == names


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (1, "1"), (1.0, "1"), (np.float32(2), "2"), (np.int64(3), "3"), (True, "True"),
        (0.5, "0.5"), (" cat\u00a0", "cat"), ("\ufeffcat", "cat"), ("007", "007"), ("none", "none"),
        ("Na", "Na"), *((missing, None) for missing in
                        (None, float("nan"), np.nan, "", " ", "nan", "NaN", "NA", "None", "null",
                         "<NA>", "N/A")),
    ],
)  # fmt: skip
def test_one_rule_says_what_a_value_is_called_and_what_is_missing(value, name):
    assert name_of(value) == name


def test_spellings_of_one_name_are_one_class_and_doubtful_ones_are_told():
    names = Names(["1", "1.0", "2", "None", "Cat", "cat", "1"])
    assert names.classes == ["1", "2", "Cat", "cat"]
    assert [names.number(value) for value in ("1.0", "2", "None", "cat")] == [0, 1, -1, 3]
    assert [remark.split(",")[0] for remark in names.remarks] == [
        "1 labels are 'None'",
        "'1' and '1.0' are read as one label; write it in one way",
        "'Cat' and 'cat' are different labels",
    ]
    assert Names(["cat", "dog", "", None]).remarks == []


@pytest.mark.parametrize(
    "codes",
    [["1.1", "1.10", "1.2"], ["250.0", "250.00", "250.1"], ["100", "1E2"], ["1", "1,000"],
     ["1", "1.0", "1.5"], ["07", "7"], ["1.0", "1.00"]],
    ids=" ".join,
)  # fmt: skip
def test_codes_and_versions_that_are_equal_as_numbers_are_different_classes(codes):
    names = Names(codes)
    assert sorted(names.classes) == sorted(codes)
    assert not any("read as one" in remark for remark in names.remarks)


def test_class_folders_with_names_of_versions_keep_their_names(tmp_path, caplog):
    for folder in ("train/1.1", "train/1.10", "test/1.10", "test/1.2"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / folder / "a.png")
    train, test = labelled_splits(str(tmp_path), 0.3, 0)
    assert [train.classes[label] for label in train.labels] == ["1.1", "1.10"]
    assert [test.classes[label] for label in test.labels] == ["1.10", "1.2"]
    assert "differ only" not in caplog.text


# ------------------------------------------------------------------ data


class Table:
    """Masks and objects of one image, as the sources have them."""

    outlines = False
    images = ({"id": 1, "file_name": "0", "width": 2, "height": 1},)
    categories = ({"id": 3, "name": "a"}, {"id": 8, "name": "b"})

    def read(self, row, size):
        return {"boxes": np.zeros((2, 4), np.float32), "box_labels": np.array([0, 1])}


class Mask:
    def read(self, row, size):
        return np.array([[0, 1, 255]], np.uint8)


def data(**columns) -> ImageData:
    images = [np.zeros((1, 3), np.uint8)] * len(columns.get("labels") or [0])
    return ImageData(images, [str(i) for i in range(len(images))], name="new", **columns)


def test_labels_rows_masks_and_boxes_are_numbered_by_other_classes():
    labelled = with_classes(data(labels=[0, 1, -1], classes=["a", "b"]), ["b", "x", "a"], "run")
    assert (labelled.labels, labelled.classes) == ([2, 0, -1], ["b", "x", "a"])
    assert labelled.subset([1])[0]["label"] == 0
    rows = with_classes(data(labels=[[1, 0], [-1, -1]], classes=["a", "b"]), ["b", "a"], "run")
    assert rows.labels == [[0, 1], [-1, -1]]
    masked = with_classes(data(masks=Mask(), classes=["a", "b"]), ["b", "x", "a"], "run")
    assert masked[0]["mask"].tolist() == [[2, 0, 255]]
    boxed = with_classes(data(objects=Table(), classes=["a", "b"]), ["b", "x", "a"], "run")
    assert boxed[0]["box_labels"].tolist() == [2, 0]
    assert [category["id"] for category in boxed.categories] == [8, 10, 3]  # those of the file
    assert [category["name"] for category in boxed.categories] == ["b", "x", "a"]
    unnamed = with_classes(data(labels=[3, 5]), ["5", "3"], "run")
    assert unnamed.labels == [1, 0]


@pytest.mark.parametrize(
    ("columns", "classes", "says"),
    [
        ({"labels": [0, 1], "classes": ["a", "c"]}, ["a", "b"], "not among the 2 of run .*: c"),
        ({"masks": Mask(), "classes": ["a", "c"]}, ["a", "b"], "not among the 2 of run .*: c"),
        ({"labels": [[0, 1]], "classes": ["a", "b"]}, [*"abc"], "no labels for c, of the 3"),
        (
            {"labels": [0, 1], "classes": ["a", "1.0", "True"]},
            ["a", "1"],
            "several .* match 1 of run",
        ),
        ({"labels": [4]}, ["5", "3"], "not among the 2 of run .*: 4"),
    ],
    ids=["labels", "masks", "rows", "twice", "numbers"],
)
def test_a_class_that_is_not_known_is_refused_by_name(columns, classes, says):
    with pytest.raises(ValueError, match=says):
        with_classes(data(**columns), classes, "run")


def test_a_class_without_images_does_no_harm_and_what_is_guessed_or_lacking_is_told(caplog):
    known = with_classes(data(labels=[1], classes=["c", "A b"]), ["x", "a_b", "y"], "run 7")
    assert known.labels == [1]
    assert caplog.messages == [
        "new: its class 'A b' is read as 'a_b' of run 7.",
        "new has 1 of the 3 classes of run 7; it lacks x, y.",
    ]


@pytest.mark.parametrize(
    ("own", "known", "expected"),
    [(["a", "b"], ["b", "a"], [1, 0]), (None, ["5", "1", "0"], [2, 1])],
    ids=["names", "numbers"],
)
def test_the_labels_of_a_stream_are_numbered_by_other_classes(own, known, expected):
    records = [{"id": str(i), "image": b"", "label": i} for i in range(2)]
    stream = ImageStream([Shard("s", 2)], lambda name: iter(records), name="new", classes=own)
    numbered = with_classes(stream, known, "run")
    assert [record["label"] for record in numbered.records(0)] == expected
    assert numbered.classes == known


def test_splits_and_other_data_are_matched_by_name(tmp_path, monkeypatch):
    for where, folders in (("one", "ab"), ("two", "BA")):
        for folder in folders:
            for i in range(3):
                path = tmp_path / where / folder / f"{folder}{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (4, 4)).save(path)
    _, test = labelled_splits(str(tmp_path / "one"), 0.3, 0, str(tmp_path / "two"))
    assert {(id[0], label) for id, label in zip(test.ids, test.labels, strict=True)} == {
        ("A", 0),
        ("B", 1),
    }

    def opener(spec):
        of_test = spec.split == "test"
        return ImageData(
            ["0"], [f"{spec.split}/0"], name="m", objects=OtherTable() if of_test else Table(),
            classes=["b", "a"] if of_test else ["a", "b"], splits=["train", "test"],
            split=spec.split if spec.split != "all" else "train",
        )  # fmt: skip

    monkeypatch.setitem(registry._openers, ("coco", False), registry.Opener(opener))
    train, test = boxed_splits("coco:m", 0.2, 0)
    assert train.classes == test.classes == ["a", "b"]
    assert [category["id"] for category in test.categories] == [2, 1]


class OtherTable(Table):
    categories = ({"id": 1, "name": "b"}, {"id": 2, "name": "a"})

    def count(self, row):
        return 2
