"""Hugging Face tables, from disk: columns found, broken images named, errors clear."""

import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vim_ssl import create_transform, load_encoder
from vim_ssl.data import BadImage, band_arguments, open_data

datasets = pytest.importorskip("datasets")


def png(red: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def table(rows: int = 4, **columns):
    """A table with images of red 0, 1, 2 …, and the given (values, feature) columns."""
    values = {"image": [{"bytes": png(i), "path": None} for i in range(rows)]}
    features = {"image": datasets.Image()}
    for name, (column, feature) in columns.items():
        values[name], features[name] = column, feature
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


TEXT, INTEGER = datasets.Value("string"), datasets.Value("int64")
FLOAT = datasets.Value("float64")
ANIMALS = datasets.ClassLabel(names=["cat", "dog"])


def saved(tmp_path, data) -> str:
    data.save_to_disk(tmp_path / "saved")
    return f"hf:{tmp_path / 'saved'}"


def test_one_table(tmp_path):
    spec = saved(tmp_path, table(label=([0, 1, 1, 0], ANIMALS), text=(list("abcd"), TEXT)))
    data = open_data(spec)
    assert data.splits == ["train"]
    assert data.ids == ["train/0", "train/1", "train/2", "train/3"]
    assert (data.labels, data.classes) == ([0, 1, 1, 0], ["cat", "dog"])
    item = data[2]
    assert item["image"].getpixel((0, 0)) == (2, 0, 0)
    assert (item["label"], item["caption"]) == (1, "c")
    assert isinstance(data.raw(2), bytes)


def test_subset_and_pickle(tmp_path):
    spec = saved(tmp_path, table(label=([0, 1, 1, 0], ANIMALS), text=(list("abcd"), TEXT)))
    part = pickle.loads(pickle.dumps(open_data(spec).subset([3, 1])))
    assert [(i["id"], i["label"], i["caption"], i["image"].getpixel((0, 0))[0]) for i in part] == [
        ("train/3", 0, "d", 3),
        ("train/1", 1, "b", 1),
    ]


def test_a_table_saved_to_give_tensors(tmp_path):
    data = table(label=([0, 1, 1, 0], ANIMALS)).with_format("torch")
    opened = open_data(saved(tmp_path, data))
    assert opened.labels == [0, 1, 1, 0]
    assert type(opened.labels[0]) is int
    assert opened[3]["image"].getpixel((0, 0)) == (3, 0, 0)


def test_splits(tmp_path):
    parts = {name: table(2, label=(labels, ANIMALS)) for name, labels in
             (("train", [0, 1]), ("validation", [1, 1]), ("test", [-1, -1]))}  # fmt: skip
    spec = saved(tmp_path, datasets.DatasetDict(parts))
    assert open_data(spec).splits == ["train", "validation", "test"]
    assert open_data(spec).split == "train"
    assert open_data(f"{spec}?split=val").labels == [1, 1]
    assert open_data(spec, split="test").labels is None  # withheld
    everything = open_data(spec, split="all")
    assert everything.labels == [0, 1, 1, 1, -1, -1]
    assert everything.ids[2:4] == ["validation/0", "validation/1"]
    assert everything[3]["image"].getpixel((0, 0)) == (1, 0, 0)
    assert open_data(spec, split="dev").split == "validation"
    with pytest.raises(ValueError, match="no split 'fold1'"):
        open_data(spec, split="fold1")


def test_columns_by_name(tmp_path):
    data = table(
        species=(["wolf", "cat", "wolf", "fox"], TEXT), grade=([5, 1, 5, None], INTEGER),
        who=(["p1", "p2", "p1", "p3"], TEXT), said=([["a", "b"]] * 4, datasets.List(TEXT)),
    )  # fmt: skip
    spec = saved(tmp_path, data)
    assert open_data(spec).labels is None
    opened = open_data(f"{spec}?label=species&group=who&caption=said")
    assert opened.classes == ["cat", "fox", "wolf"]
    assert opened.labels == [2, 0, 2, 1]
    assert opened.groups == ["p1", "p2", "p1", "p3"]
    assert opened[1]["caption"] == ["a", "b"]
    numbers = table(rank=(["10", "9", "10", "1"], TEXT))
    assert open_data(f"{saved(tmp_path / 'ranks', numbers)}?label=rank").classes == ["1", "9", "10"]
    graded = open_data(f"{spec}?label=grade")
    assert (graded.labels, graded.classes) == ([1, 0, 1, -1], ["1", "5"])


def test_label_column_is_chosen_among_several(tmp_path):
    two = {"coarse": ([0, 0, 1, 1], ANIMALS), "label": ([0, 1, 0, 1], ANIMALS)}
    spec = saved(tmp_path, table(**two))
    assert open_data(spec).labels == [0, 1, 0, 1]
    assert open_data(f"{spec}?label=coarse").labels == [0, 0, 1, 1]
    assert open_data(f"{spec}?label=none").labels is None


def test_images_as_paths_and_as_plain_bytes(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    data = table(4, file=(paths, TEXT), blob=([png(9)] * 4, datasets.Value("binary")))
    spec = saved(tmp_path, data)
    assert open_data(f"{spec}?image=file")[3]["image"].getpixel((0, 0)) == (3, 0, 0)
    assert open_data(f"{spec}?image=blob")[3]["image"].getpixel((0, 0)) == (9, 0, 0)


def test_broken_rows_are_bad_images(tmp_path):
    feature = datasets.Image()
    stored = (b"no image", b"", png(1)[:40], None, png(5))
    values = [None if c is None else {"bytes": c, "path": None} for c in stored]
    data = datasets.Dataset.from_dict({"scan": values}, features=datasets.Features(scan=feature))
    opened = open_data(saved(tmp_path, data))
    for i in range(4):
        with pytest.raises(BadImage, match=f"^train/{i}: ."):
            opened[i]
    assert opened[4]["image"].getpixel((0, 0)) == (5, 0, 0)


def test_fingerprint_follows_the_table(tmp_path):
    spec = saved(tmp_path, table())
    assert open_data(spec).fingerprint == open_data(spec).fingerprint
    other = saved(tmp_path / "other", table(3))
    assert open_data(spec).fingerprint != open_data(other).fingerprint


def test_a_folder_of_tables(tmp_path):
    table(label=([0, 1, 1, 0], ANIMALS)).to_parquet(tmp_path / "images" / "train.parquet")
    opened = open_data(f"hf:{tmp_path / 'images'}")
    assert opened.labels == [0, 1, 1, 0]
    assert opened[3]["image"].getpixel((0, 0)) == (3, 0, 0)


def arrays(tmp_path, shape, kind, rows=3, name="image") -> tuple[str, np.ndarray]:
    """A saved table of arrays, its spec, and the arrays."""
    draw = np.random.default_rng(0)
    values = draw.integers(0, 200, (rows, *shape)).astype(kind)
    feature = (datasets.Array2D if len(shape) == 2 else datasets.Array3D)(shape, kind)
    features = datasets.Features({name: feature, "label": ANIMALS})
    columns = {name: list(values), "label": [i % 2 for i in range(rows)]}
    return saved(tmp_path, datasets.Dataset.from_dict(columns, features=features)), values


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((8, 9, 13), "uint8"), ((8, 8, 2), "int16"), ((8, 8, 3), "float32"), ((8, 9), "float32")],
)
def test_arrays_are_bands(tmp_path, shape, kind):
    spec, values = arrays(tmp_path, shape, kind, name="scene")
    data = pickle.loads(pickle.dumps(open_data(spec)))
    count = (*shape, 1)[2]
    assert data.bands == tuple(f"band{i}" for i in range(1, count + 1))
    image = data.subset([2])[0]["image"]
    assert (image.shape, image.dtype) == ((*shape[:2], count), kind)
    assert np.array_equal(image, values[2].reshape(image.shape))
    assert data.labels == [0, 1, 0]
    encoder = load_encoder("vim_nano_patch8_64", img_size=8, **band_arguments(data))
    assert create_transform(encoder)(image).shape == (count, 8, 8)


@pytest.mark.parametrize(("shape", "mode"), [((8, 9, 3), "RGB"), ((8, 9, 1), "L"), ((8, 9), "L")])
def test_arrays_of_8_bit_colour_and_grey_are_images(tmp_path, shape, mode):
    spec, values = arrays(tmp_path, shape, "uint8")
    data = open_data(spec)
    assert data.bands is None
    assert (data[1]["image"].mode, data[1]["image"].size) == (mode, (9, 8))
    assert np.array_equal(np.asarray(data[1]["image"]), values[1].squeeze())


def test_arrays_of_any_height_and_none(tmp_path):
    given = [np.full((h, 8, 4), h, np.uint8) for h in (5, 7)]
    features = datasets.Features(image=datasets.Array3D((None, 8, 4), "uint8"))
    table = datasets.Dataset.from_dict({"image": given}, features=features)
    data = open_data(saved(tmp_path / "heights", table))
    assert [item["image"].shape for item in data] == [(5, 8, 4), (7, 8, 4)]
    features = datasets.Features(image=datasets.Array3D((8, 8, 4), "uint8"))
    columns = {"image": [np.ones((8, 8, 4), np.uint8), None]}
    data = open_data(saved(tmp_path, datasets.Dataset.from_dict(columns, features=features)))
    assert data[0]["image"].dtype == np.uint8
    with pytest.raises(BadImage, match=r"^train/1: the table has no image in this row"):
        data[1]


@pytest.mark.parametrize(
    ("feature", "value", "message"),
    [
        (datasets.Array3D((4, 8, 8), "uint8"), np.ones((4, 8, 8), np.uint8), "bands come first"),
        (
            datasets.List(datasets.List(INTEGER)),
            [[1, 2]],
            "image has type List; expected Image, byte",
        ),
    ],
)
def test_what_is_no_image_is_refused(tmp_path, feature, value, message):
    features = datasets.Features(image=feature)
    spec = saved(tmp_path, datasets.Dataset.from_dict({"image": [value]}, features=features))
    with pytest.raises(ValueError, match=message):
        open_data(spec)


def test_a_stream_has_no_arrays(tmp_path):
    arrays(tmp_path, (8, 8, 4), "uint8")
    table = datasets.load_from_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "tables/train.parquet")
    assert open_data(f"hf:{tmp_path}/tables")[0]["image"].shape == (8, 8, 4)
    with pytest.raises(
        ValueError, match="contains arrays, which cannot be streamed; remove streaming=true"
    ):
        open_data(f"hf:{tmp_path}/tables?streaming=true", streams=True)


@pytest.mark.parametrize("query", ["", "?label=animals"])
def test_lists_of_classes_are_rows(tmp_path, query):
    tags = datasets.List(datasets.ClassLabel(names=["cat", "dog", "cow"]))
    values = [[0, 2], [], None, [1]]
    data = open_data(saved(tmp_path, table(animals=(values, tags))) + query)
    assert data.classes == ["cat", "dog", "cow"]
    assert data.labels == [[1, 0, 1], [0, 0, 0], [-1, -1, -1], [0, 1, 0]]
    assert data.multi_label
    table(animals=(values, tags)).to_parquet(tmp_path / "tables/train.parquet")
    stream = open_data(f"hf:{tmp_path}/tables?streaming=true", streams=True)
    assert "label" not in next(iter(stream.records(0)))  # as pretraining needs none


def test_one_class_an_image_goes_before_lists(tmp_path):
    columns = {"tags": ([[0, 1]] * 4, datasets.List(ANIMALS)), "kind": ([0, 1, 1, 0], ANIMALS)}
    assert open_data(saved(tmp_path, table(**columns))).labels == [0, 1, 1, 0]
    withheld = saved(tmp_path / "none", table(tags=([None] * 4, datasets.List(ANIMALS))))
    assert open_data(withheld).labels is None


@pytest.mark.parametrize(
    ("columns", "query", "message"),
    [
        ({}, "image=imgae", r"no column 'imgae' for image=\. Did you mean 'image'\? It has image"),
        ({}, "label=y", "no column 'y' for label="),
        ({"mask": ([{"bytes": b"", "path": None}] * 4, datasets.Image())}, "image=none", "'none'"),
        (
            {"x": ([[1.0]] * 4, datasets.List(datasets.Value("float32")))},
            "label=x",
            "must contain integers",
        ),
    ],
)
def test_wrong_columns(tmp_path, columns, query, message):
    with pytest.raises(ValueError, match=message):
        open_data(f"{saved(tmp_path, table(**columns))}?{query}")


def test_image_column_must_be_clear(tmp_path):
    plain = datasets.Dataset.from_dict({"a": ["x"]})
    with pytest.raises(ValueError, match=r"no image column; select one with image=\. Columns: a"):
        open_data(saved(tmp_path, plain))
    more = ([{"bytes": png(1), "path": None}] * 4, datasets.Image())
    two = table(right=more).rename_column("image", "left")
    with pytest.raises(ValueError, match=r"several image columns \(left, right\)"):
        open_data(saved(tmp_path / "two", two))


@pytest.mark.parametrize("location", ["/no/such/path", "./none", "a/b/c", "~/no-such-folder-here"])
def test_missing_local_path(location):
    with pytest.raises(FileNotFoundError, match="the local path does not exist"):
        open_data(f"hf:{location}")


@pytest.mark.slow
def test_an_unreachable_hub_says_so():
    code = "from vim_ssl.data import open_data; open_data('hf:nobody/nothing-here')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "ConnectionError: hf:nobody/nothing-here is neither a local folder" in done.stderr


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("gated."), ValueError, "hf auth login"),
        (ConnectionError("no route"), ConnectionError, "the Hub cannot be reached: no route"),
        (
            ValueError("Config name is missing."),
            ValueError,
            "missing. Select a config with hf:a/b:",
        ),
    ],
    ids=["unknown-or-gated", "no-network", "no-config"],
)
def test_what_the_hub_answers_is_explained(monkeypatch, raised, error, message):
    def refuse(name, config):
        assert (name, config) == ("a/b", None)
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(error, match=message):
        open_data("hf:a/b")


def test_a_config_is_passed_on(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: asked.append(args) or table())
    assert len(open_data("hf:a/b:large")) == 4
    assert asked == [("a/b", "large")]


# ------------------------------------------------------------------ classes by name


def animals(names: str, labels: list[int]):
    """A table whose classes have one letter each."""
    return table(len(labels), label=(labels, datasets.ClassLabel(names=list(names))))


def named(data) -> str:
    """The class of each image, by name; "-" if it is unknown."""
    return "".join(data.classes[label] if label >= 0 else "-" for label in data.labels)


def saved_to_disk(folder, parts):
    datasets.DatasetDict(parts).save_to_disk(folder / "saved")
    return f"hf:{folder}/saved"


def parquet(folder, parts):
    for name, part in parts.items():
        part.to_parquet(folder / f"{name}.parquet")
    return f"parquet:{folder}"


def folder_of_parquet(folder, parts):
    return parquet(folder, parts).replace("parquet:", "hf:")


@pytest.mark.parametrize("write", [saved_to_disk, parquet, folder_of_parquet])
def test_splits_that_order_their_classes_differently_agree_by_name(tmp_path, write):
    spec = write(tmp_path, {"train": animals("abc", [0, 1, 2]), "test": animals("cba", [0, 1, -1])})
    train, test = open_data(spec), open_data(spec, split="test")
    assert train.classes == test.classes == ["a", "b", "c"]
    assert (named(train), named(test)) == ("abc", "cb-")
    assert named(open_data(spec, split="all")) == "abccb-"


@pytest.mark.parametrize("write", [saved_to_disk, parquet])
def test_splits_with_more_or_fewer_classes_agree_by_name(tmp_path, write):
    spec = write(tmp_path, {"train": animals("ab", [0, 1]), "test": animals("cxb", [0, 1, 2])})
    assert open_data(spec, split="test").classes == ["a", "b", "c", "x"]
    assert named(open_data(spec, split="test")) == "cxb"


def test_files_of_one_split_that_order_their_classes_differently_agree_by_name(tmp_path):
    parts = {"train-00000": animals("ab", [0, 1, 1]), "train-00001": animals("ba", [0, 1])}
    spec = parquet(tmp_path, parts)
    assert named(open_data(spec)) == "abbba"
    stream = open_data(f"hf:{tmp_path}?streaming=true", streams=True)
    records = [record for shard in range(2) for record in stream.records(shard)]
    assert "".join(stream.classes[record["label"]] for record in records) == "abbba"


def test_lists_of_classes_agree_by_name(tmp_path):
    parts = {name: table(2, tags=([[0], [0, 1]], datasets.List(datasets.ClassLabel(names=names))))
             for name, names in (("train", ["a", "b"]), ("test", ["b", "c"]))}  # fmt: skip
    test = open_data(saved_to_disk(tmp_path, parts), split="test")
    assert (test.classes, test.labels) == (["a", "b", "c"], [[0, 1, 0], [0, 1, 1]])


@pytest.mark.parametrize(
    ("values", "kind", "labels", "classes"),
    [
        (["a ", "a", "", "nan"], TEXT, [0, 0, -1, -1], ["a"]),
        ([2.0, None, float("nan"), 10.0], FLOAT, [0, -1, -1, 1], ["2", "10"]),
        (["1", "1.0", "2", None], TEXT, [0, 0, 1, -1], ["1", "2"]),
        ([True, False, None, True], datasets.Value("bool"), [1, 0, -1, 1], ["False", "True"]),
    ],
)
def test_missing_and_equal_labels_are_those_of_any_table(tmp_path, values, kind, labels, classes):
    data = open_data(saved(tmp_path, table(y=(values, kind))) + "?label=y")
    assert (data.labels, data.classes) == (labels, classes)


def test_rows_without_a_group_are_groups_of_their_own(tmp_path):
    data = table(who=(["p", None, "nan", " p"], TEXT), part=([0.5, 1.0, 1.0, 2.0], FLOAT))
    spec = saved(tmp_path, data)
    assert open_data(f"{spec}?group=who").groups == ["p", "train/1", "train/2", "p"]
    with pytest.raises(ValueError, match=r"label=part: 0\.5 is not a class"):
        open_data(f"{spec}?label=part")


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no table PAR1")
    (tmp_path / "test.parquet").write_bytes(b"PAR1 no table PAR1")
    for scheme in ("parquet", "hf"):
        with pytest.raises(ValueError, match=rf"{tmp_path}.* cannot be read as"):
            open_data(f"{scheme}:{tmp_path}")


def test_paths_with_backslashes_name_files(tmp_path):
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics/0.png").write_bytes(png(7))
    datasets.Dataset.from_dict({"image": ["pics\\0.png"]}).to_parquet(tmp_path / "a.parquet")
    assert open_data(f"parquet:{tmp_path}/a.parquet")[0]["image"].getpixel((0, 0))[0] == 7
