"""Images in memory: every form that users have them in gives the same data."""

import pickle

import datasets
import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset, TensorDataset

from vim_ssl.data import labelled_splits, masked_splits, open_data
from vim_ssl.data.sources.memory import register_data
from vim_ssl.data.transforms.image import pretrain_transform

GREY = np.arange(4 * 6 * 8, dtype=np.uint8).reshape(4, 6, 8)  # four images, 6 x 8
COLOUR = np.stack([GREY, GREY + 1, GREY + 2], -1)
CHANNELS_FIRST = torch.from_numpy(COLOUR).movedim(-1, 1)
NAMES = ["cat", "dog", "cat", "dog"]
NUMBERS = [0, 1, 0, 1]


class Pairs(torch.utils.data.Dataset):
    """A data set as torchvision writes them."""

    classes = ("cat", "dog")

    def __init__(self, images, labels=NUMBERS):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return self.images[row], self.labels[row]


def pil():
    return [Image.fromarray(image) for image in COLOUR]


LABELLED = {
    "pair of a list and names": lambda: (pil(), NAMES),
    "pair of an array and names": lambda: (COLOUR, np.array(NAMES)),
    "pair of a tensor and names": lambda: (CHANNELS_FIRST, NAMES),
    "floats from 0 to 1": lambda: (CHANNELS_FIRST / 255, NAMES),
    "whole numbers of another type": lambda: (COLOUR.astype(np.int64), NAMES),
    "pairs": lambda: list(zip(pil(), NAMES, strict=True)),
    "dicts": lambda: [
        {"image": i, "label": n, "id": str(k)}
        for k, (i, n) in enumerate(zip(pil(), NAMES, strict=True))
    ],
    "columns": lambda: {"image": pil(), "label": NUMBERS, "classes": ["cat", "dog"]},
    "torch data set": lambda: Pairs(pil()),
    "torch data set of tensors": lambda: Pairs(CHANNELS_FIRST / 255, torch.tensor(NUMBERS)),
    "part of a torch data set": lambda: Subset(Pairs(pil() * 2, NUMBERS * 2), range(4)),
    "table": lambda: datasets.Dataset.from_dict(
        {"picture": pil(), "animal": NUMBERS},
        datasets.Features(
            picture=datasets.Image(), animal=datasets.ClassLabel(names=["cat", "dog"])
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", LABELLED)
def test_every_form_gives_the_same_images_and_labels(form):
    spec = register_data(LABELLED[form]())
    data = open_data(spec)
    assert (data.classes, data.labels) == (["cat", "dog"], NUMBERS)
    assert data.bands is None
    for item, expected in zip(data, COLOUR, strict=True):
        np.testing.assert_array_equal(np.asarray(item["image"]), expected)
    assert open_data(f"{spec}?label=none").labels is None
    assert len(open_data(f"{spec}?limit=2")) == 2


@pytest.mark.parametrize("form", sorted(set(LABELLED) - {"table"}))
def test_the_spec_is_a_hash_of_the_content(form):
    spec = register_data(LABELLED[form]())
    assert register_data(LABELLED[form]()) == spec
    assert register_data(spec) == spec


def test_the_same_pixels_in_another_form_have_the_same_spec():
    """So that a resume need not give the same object."""
    forms = pil(), list(COLOUR), COLOUR, CHANNELS_FIRST, tuple(CHANNELS_FIRST)
    assert len({register_data(images) for images in forms}) == 1


def test_any_change_of_the_content_changes_the_spec():
    def spec(images=COLOUR, labels=NUMBERS, **columns):
        columns = {"image": list(images), "label": labels, "classes": ["a", "b"]} | columns
        return register_data(columns)

    other = COLOUR.copy()
    other[3, 5, 7, 2] ^= 1
    specs = {
        spec(), spec(other), spec(labels=[0, 1, 1, 0]), spec(classes=["a", "c"]),
        spec(caption=["one", "two", "three", "four"]), spec(group=["x", "x", "y", "y"]),
        spec(images=COLOUR[::-1]), spec(id=["a", "b", "c", "d"]),
        register_data({"train": {"image": list(COLOUR), "label": NUMBERS, "classes": ["a", "b"]}}),
        register_data(COLOUR), register_data({"image": COLOUR, "mask": GREY % 2}),
        register_data({"image": COLOUR, "mask": GREY % 3}),
    }  # fmt: skip
    assert len(specs) == 12


def test_the_spec_is_the_same_in_every_process():
    """A resume in another process compares it."""
    assert register_data((GREY, ["b", "a", "b", None])) == "memory:fb77838b86dbcacd"


def test_images_of_another_process_are_missed_with_a_way_out():
    with pytest.raises(ValueError, match=r"the memory of another process\. Give the same images"):
        open_data("memory:0123456789abcdef")


def test_paths_and_specs_are_no_objects_in_memory(tmp_path):
    for row, image in enumerate(pil()):
        image.save(tmp_path / f"{row}.png")
    assert register_data(tmp_path) == str(tmp_path)
    assert register_data("sample:photos") == "sample:photos"
    files = [tmp_path / f"{row}.png" for row in range(4)]
    data = open_data(register_data((files, NAMES)))
    assert data[3]["image"].getpixel((0, 0)) == tuple(COLOUR[3, 0, 0])
    assert data.paths(3) == [str(files[3])]
    part = open_data(tmp_path).subset([2, 0])
    again = open_data(register_data(part))
    assert again.ids == ["2.png", "0.png"]
    assert again.name == register_data(part) != register_data(part.subset([0]))


def test_splits_of_a_dict():
    spec = register_data(
        {"train": (COLOUR, ["b", "a", "b", "a"]), "test": (COLOUR[:2] + 9, ["c", "a"])}
    )
    assert open_data(spec).split == "train"
    everything = open_data(f"{spec}?split=all")
    assert everything.ids == ["train/0", "train/1", "train/2", "train/3", "test/0", "test/1"]
    assert everything.classes == ["a", "b", "c"]
    train, test = labelled_splits(spec, 0.2, 0)
    assert (train.labels, test.labels) == ([1, 0, 1, 0], [2, 0])
    assert test[0]["image"].getpixel((0, 0)) == tuple(COLOUR[0, 0, 0] + 9)
    tables = {name: datasets.Dataset.from_dict({"image": pil()}).cast_column(
        "image", datasets.Image()) for name in ("train", "test")}  # fmt: skip
    assert open_data(register_data(tables)).splits == ["train", "test"]
    assert open_data(register_data(datasets.DatasetDict(tables))).splits == ["train", "test"]


def test_labels_of_all_kinds():
    def opened(labels, **more):
        return open_data(register_data({"image": COLOUR, "label": labels} | more))

    assert (opened([7, 3, None, -1]).labels, opened([7, 3, 3, 3]).classes) == (
        [1, 0, -1, -1],
        ["3", "7"],
    )
    rows = opened([[0, 1], [1, 1], None, [0, 0]], classes=["wet", "cold"])
    assert rows.multi_label
    assert rows.labels == [[0, 1], [1, 1], [-1, -1], [0, 0]]
    assert opened(torch.eye(4, dtype=torch.long)).classes is None
    assert opened(np.array([[1], [0], [1], [0]])).labels == [1, 0, 1, 0]  # as MedMNIST has them
    assert opened(["b", "a", "b", "a"], classes=["b", "a"]).labels == [0, 1, 0, 1]
    assert opened([None] * 4).labels is None


@pytest.mark.parametrize(
    ("labels", "numbers", "classes"),
    [
        ([1, 1.0, True, "1"], [0, 0, 0, 0], ["1"]),
        (["2", 10, "10", 2.0], [0, 1, 1, 0], ["2", "10"]),
        ([1.0, np.nan, None, float("nan")], [0, -1, -1, -1], ["1"]),
        (np.array(["a", None, np.nan, "a "], dtype=object), [0, -1, -1, 0], ["a"]),
        (pandas.Series([3, None, 5, pandas.NA], dtype="Int64"), [0, -1, 1, -1], ["3", "5"]),
        (pandas.Series([3.0, np.nan, 5.0, 3.0]), [0, -1, 1, 0], ["3", "5"]),
        (["a", "", "nan", "None"], [0, -1, -1, -1], ["a"]),
    ],
    ids=["one", "texts", "nan", "objects", "Int64", "floats", "missing"],
)
def test_labels_of_one_kind_are_one_class_and_missing_ones_unknown(labels, numbers, classes):
    data = open_data(register_data({"image": COLOUR, "label": labels}))
    assert (data.labels, data.classes) == (numbers, classes)


def test_a_declared_class_may_have_the_name_of_a_missing_value():
    labels = {"image": COLOUR, "label": ["None", "a", None, "a "], "classes": ["None", "a"]}
    assert open_data(register_data(labels)).labels == [0, 1, -1, 1]


def test_splits_that_order_their_classes_differently_agree_by_name():
    def split(images, labels, classes):
        return {"image": images, "label": labels, "classes": classes}

    train, test = (COLOUR[:2], [0, 1], ["cat", "dog"]), (COLOUR[2:], [0, 1], ["dog", "cow"])
    spec = register_data({"train": split(*train), "test": split(*test)})
    assert open_data(spec, split="test").labels == [1, 2]
    assert open_data(spec, split="all").classes == ["cat", "dog", "cow"]
    masks = [GREY[:2] % 2, GREY[2:] % 2]
    both = {
        name: {"image": COLOUR[:2], "mask": mask, "classes": classes}
        for name, mask, classes in zip(
            ("train", "test"), masks, (["cat", "dog"], ["dog", "cat"]), strict=True
        )
    }
    item = open_data(register_data(both), split="test")[0]
    np.testing.assert_array_equal(item["mask"], 1 - masks[1][0])


def test_images_without_a_group_are_groups_of_their_own():
    groups = ["x", "", "nan", None]
    data = open_data(register_data({"image": COLOUR, "group": groups}))
    assert data.groups == ["x", "1", "2", "3"]


def test_captions_groups_and_masks():
    captions = ["a cat", ["a dog", "an animal"], None, "a fish"]
    data = open_data(
        register_data({"image": COLOUR, "caption": captions, "group": ["x", "x", "y", "y"]})
    )
    assert data.captions(1) == ["a dog", "an animal"]
    assert data.captions(2) == []
    assert data.groups == ["x", "x", "y", "y"]

    masks = GREY % 2
    for form, classes in (
        (Pairs(pil(), [Image.fromarray(mask) for mask in masks]), ["cat", "dog"]),
        (list(zip(COLOUR, torch.from_numpy(masks)[:, None], strict=True)), ["0", "1"]),
        ({"image": COLOUR, "mask": masks, "classes": ["soil", "leaf"]}, ["soil", "leaf"]),
    ):
        train, test = masked_splits(register_data(form), 0.25, 0)
        assert (len(train), len(test), train.classes) == (3, 1, classes)
        np.testing.assert_array_equal(train[0]["mask"], masks[int(train.ids[0])])


@pytest.mark.parametrize(
    ("images", "bands"),
    [
        (torch.linspace(0, 1, 4 * 5 * 6 * 8).reshape(4, 5, 6, 8), 5),
        (COLOUR.astype(np.float32) * 300, 3),
        (GREY.astype(np.int16) - 100, 1),
    ],
    ids=["five channels", "reflectances", "negative greys"],
)
def test_other_arrays_are_bands_in_their_units(images, bands):
    data = open_data(register_data(images))
    assert data.bands == tuple(f"band{i + 1}" for i in range(bands))
    image = images[3].movedim(0, -1).numpy() if torch.is_tensor(images) else images[3]
    np.testing.assert_array_equal(data[3]["image"], np.atleast_3d(image))
    assert data[3]["image"].dtype == data.dtype == image.dtype


def test_a_broken_item_is_named_and_the_others_are_read(tmp_path):
    (tmp_path / "short.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-999])
    cut = Image.open(tmp_path / "cut.jpg")
    data = open_data(register_data([pil()[0], tmp_path / "short.png", cut, {"image": None}]))
    assert data[0]["image"].size == (8, 6)
    for row in (1, 2, 3):
        with pytest.raises(ValueError, match=f"^{row}: "):
            data[row]
    with pytest.raises(ValueError, match="none of the 2 items can be read; item 0: KeyError"):
        register_data(
            type("Odd", (), {"__len__": lambda _: 2, "__getitem__": lambda _, i: {}[i]})()
        )


def test_workers_read_them():
    """Under spawn, the images travel to the workers; the registry stays in this process."""
    data = open_data(register_data(Pairs(CHANNELS_FIRST)))
    config = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    samples = data.samples(lambda item: {"image": pretrain_transform(config)(item["image"])})
    expected = [samples[0, i]["image"] for i in range(4)]
    loader = DataLoader(samples, batch_sampler=[[(0, i)] for i in range(4)], num_workers=1)
    for batch, image in zip(loader, expected, strict=True):
        torch.testing.assert_close(batch["image"][0], image)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(data))[2]["image"], COLOUR[2])


class Noise(Pairs):
    def __getitem__(self, row):
        return torch.rand(3, 6, 8), 0


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (3, TypeError, "type int cannot be read; expected a data spec"),
        ((image for image in COLOUR), TypeError, "type generator"),
        ([], ValueError, "no images"),
        (COLOUR[0], ValueError, "put a single image into a list"),
        (np.moveaxis(np.zeros((2, 8, 8, 3)), -1, 1), ValueError, "if the bands come first"),
        ([object()], TypeError, "an image has the type object"),
        ([{"img": pil()[0]}], ValueError, "unknown key 'img'. Did you mean 'image'"),
        ([{"label": 1}], ValueError, "the key 'image' is missing"),
        ({"image": COLOUR, "label": [1, 2]}, ValueError, "4 of image, 2 of label"),
        ((COLOUR, [1, "a", 1, 1]), ValueError, "labels have several kinds, such as 1 and 'a'"),
        ((COLOUR, [0.5] * 4), ValueError, "the label 0.5 is not a class"),
        ((COLOUR, [[0.3, 0.7]] * 4), ValueError, r"the label \[0.3, 0.7\] is not a row of 0 and 1"),
        ((COLOUR, [[0, 2]] * 4), ValueError, r"the label \[0, 2\] is not a row of 0 and 1"),
        ({"image": COLOUR, "id": [*"abca"]}, ValueError, "2 items have the id 'a'"),
        ({"image": COLOUR, "id": ["1", None, None, None]}, ValueError, "2 items have the id '1'"),
        (torch.zeros(2, 8, 8, 3), ValueError, "if the channels come last"),
        (Pairs(pil(), [0, 1, 2, 0]), ValueError, "the label 2 is not among the 2 classes"),
        (Pairs(pil(), ["cat", "dgo"] * 2), ValueError, "Did you mean 'dog'"),
        (Noise(COLOUR), ValueError, "item 0 is another image when it is read again"),
        ([(pil()[0], {"boxes": []})], TypeError, "for boxes, use coco:FOLDER"),
        (Pairs(pil(), list(GREY % 3)), ValueError, "masks contain the value 2; expected 2 classes"),
        ({"image": COLOUR, "mask": GREY * 0 + 255 * (GREY % 2)}, ValueError, "not as 255 on 0"),
        ({"image": COLOUR, "mask": GREY % 2, "label": NAMES}, ValueError, "labels and masks"),
        ([COLOUR[0] / 3.0, pil()[0]], ValueError, "use one kind"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_with_a_reason(data, error, words):
    with pytest.raises(error, match=words):
        open_data(register_data(data))


def test_streams_are_refused_with_a_way_out():
    stream = datasets.Dataset.from_dict({"image": [1, 2]}).to_iterable_dataset()
    with pytest.raises(TypeError, match=r"streaming=true, or a part of it, list\(stream.take"):
        register_data(stream)
    with pytest.raises(TypeError, match="a stream has no index"):
        register_data(type("Endless", (torch.utils.data.IterableDataset,), {"__iter__": iter})())
    with pytest.raises(ValueError, match="unsupported label=kind; use label=none"):
        open_data(f"{register_data(TensorDataset(CHANNELS_FIRST))}?label=kind")


@pytest.mark.parametrize("other", [(5, np.uint16), (4, np.uint8)], ids=["dtype", "bands"])
def test_arrays_of_several_kinds_are_refused(other):
    first = np.ones((4, 4, 5), np.uint8)
    with pytest.raises(ValueError, match=r"are arrays of .* and .*; use one dtype"):
        open_data(register_data([first, np.ones((4, 4, other[0]), other[1])]))
    assert len(open_data(register_data([first, np.ones((6, 4, 5), np.uint8)]))) == 2  # of any size
