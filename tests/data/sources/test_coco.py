"""COCO's format: what is read, what is left out and counted, what is refused."""

import json
import pickle
import shutil
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

from vim_ssl.data import BadImage, boxed_splits, open_data
from vim_ssl.data.check import check
from vim_ssl.data.sources.coco import ground_truth, mask_tools, to_rle

WIDTH, HEIGHT = 12, 8
# Columns 2 to 5 and rows 1 to 4.
SQUARE = [2, 1, 6, 1, 6, 5, 2, 5]
BOX = [2, 1, 4, 4]


def truth() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[1:5, 2:6] = 1
    return mask


def counts(mask: np.ndarray) -> list[int]:
    """Run lengths down the columns, of 0 first."""
    flat = mask.T.reshape(-1)
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends, flat.size]).tolist()
    return [0, *runs] if flat[0] else runs


def image_entry(id, name: str | None = None, **more) -> dict:
    named = {"id": id, "file_name": name or f"{id}.png", "width": WIDTH, "height": HEIGHT}
    return named | more


def thing(id, image_id, category_id=7, **more) -> dict:
    usual = {"bbox": BOX, "segmentation": [SQUARE], "area": 16, "iscrowd": 0}
    return {"id": id, "image_id": image_id, "category_id": category_id} | usual | more


def content(images, annotations, categories=((7, "cat"), (90, "dog"))) -> dict:
    return {
        "images": images, "annotations": annotations,
        "categories": [{"id": key, "name": name} for key, name in categories],
    }  # fmt: skip


def put(root, table: dict | str, split: str = "train", file: str = "", folder: str = "") -> str:
    """A file of annotations, and its images."""
    path = root / "annotations" / (file or f"{split}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    for image in table["images"] if isinstance(table, dict) else ():
        if isinstance(image.get("file_name"), str):
            place = root / (folder or split) / image["file_name"]
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (WIDTH, HEIGHT), "teal").save(place)
    return f"coco:{root}"


@pytest.fixture
def spec(tmp_path) -> str:
    return put(tmp_path, content([image_entry(5)], [thing(1, 5)]))


# ------------------------------------------------------------------------- what is read


def test_an_item_has_boxes_classes_and_masks(tmp_path):
    """Ids are neither contiguous nor sorted; classes are, by id."""
    table = content(
        [image_entry(42), image_entry(7)],
        [thing(3, 42, 90), thing(9, 42, 3, bbox=[0.5, 0.25, 3, 2])],
        [(90, "dog"), (3, "ape"), (7, "cat")],
    )
    data = open_data(put(tmp_path, table))
    assert data.classes == ["ape", "cat", "dog"]
    assert [category["id"] for category in data.categories] == [3, 7, 90]
    assert data.ids == ["train/42.png", "train/7.png"]
    item = pickle.loads(pickle.dumps(data))[0]
    assert item["boxes"].tolist() == [[2, 1, 6, 5], [0.5, 0.25, 3.5, 2.25]]
    assert item["box_labels"].tolist() == [2, 0]
    assert (item["boxes"].dtype, item["box_labels"].dtype) == (np.float32, np.int64)
    assert np.array_equal(item["masks"], np.stack([truth()] * 2))
    empty = data[1]
    assert empty["boxes"].shape == (0, 4)
    assert empty["masks"].shape == (0, HEIGHT, WIDTH)
    assert [data.box_count(i) for i in range(2)] == [2, 0]


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_official_layout(tmp_path, split):
    for name, id in (("train", 1), ("val", 2)):
        put(tmp_path, content([image_entry(id, f"{id:012d}.jpg")], [thing(1, id)]),
            file=f"instances_{name}2017.json", folder=f"{name}2017")  # fmt: skip
    (tmp_path / "annotations/captions_train2017.json").write_text("[]")
    data = open_data(f"coco:{tmp_path}?split={split}")
    assert (data.splits, data.split) == (["train", "val"], split)
    assert data.ids == [f"{split}2017/{1 if split == 'train' else 2:012d}.jpg"]
    assert data[0]["masks"].sum() == 16
    assert [part.split for part in boxed_splits(f"coco:{tmp_path}", 0.5, 0)] == ["train", "val"]


def test_splits_without_one_for_training_are_mixed_on_request_only(tmp_path):
    for name, id in (("val", 1), ("test", 2)):
        put(tmp_path, content([image_entry(id)], [thing(1, id)]), split=name)
    with pytest.raises(ValueError, match="the splits val, test, but no training split"):
        boxed_splits(f"coco:{tmp_path}", 0.5, 0)
    assert [len(part) for part in boxed_splits(f"coco:{tmp_path}?split=all", 0.5, 0)] == [1, 1]


@pytest.mark.parametrize("folder", ["images/train", "images", "."])
def test_images_are_found_where_they_usually_lie(tmp_path, folder):
    spec = put(tmp_path, content([image_entry(1, "sub/a.png")], [thing(1, 1)]), folder=folder)
    assert open_data(spec)[0]["boxes"].tolist() == [[2, 1, 6, 5]]


def test_without_a_test_file_a_share_is_held_out(tmp_path):
    spec = put(tmp_path, content([image_entry(i) for i in range(10)], [thing(1, 3)]))
    train, test = boxed_splits(spec, 0.2, 0)
    assert (len(train), len(test)) == (8, 2)
    assert not set(train.ids) & set(test.ids)


def encoded(mask: np.ndarray) -> str:
    from pycocotools import mask as tools

    return tools.encode(np.asfortranarray(mask))["counts"].decode()


LINES = np.add.outer(3 * np.arange(HEIGHT), np.arange(WIDTH)) % 7 < 3


@pytest.mark.parametrize("mask", [truth(), LINES.astype(np.uint8)], ids=["square", "lines"])
def test_compressed_or_not_a_mask_is_the_same(mask):
    size = [HEIGHT, WIDTH]
    for outline in ({"size": size, "counts": counts(mask)},
                    {"size": size, "counts": encoded(mask)}):  # fmt: skip
        assert np.array_equal(mask_tools().decode(to_rle(outline, HEIGHT, WIDTH)), mask)


@pytest.mark.parametrize(
    "outline",
    [
        [SQUARE],
        SQUARE,
        [SQUARE, SQUARE, [1, 1], [0, 0, 4, 4], [1, 2, 3, 4, 5, 6, 7]],
        [[2, 1, 6, 1, 6, 5, 2, 5, 2, 1]],
    ],
    ids=["one", "not in a list", "with points, a box and a half", "closed"],
)
def test_polygons_of_all_kinds(tmp_path, outline):
    spec = put(tmp_path, content([image_entry(1)], [thing(1, 1, segmentation=outline)]))
    assert np.array_equal(open_data(spec)[0]["masks"][0], truth())


def test_a_point_a_million_pixels_away_costs_nothing(tmp_path):
    far = [[2, 1, 1e9, 1, 1e9, 5, 2, 5]]
    data = open_data(put(tmp_path, content([image_entry(1)], [thing(1, 1, segmentation=far)])))
    (judged_by,) = ground_truth(data, [0])["annotations"]
    for outline in (to_rle(far, HEIGHT, WIDTH), json.loads(json.dumps(judged_by["segmentation"]))):
        assert mask_tools().decode(outline).sum() == 4 * (WIDTH - 2)


def test_crowds_are_judged_by_and_not_learned(tmp_path):
    crowd = {"iscrowd": 1, "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts(truth())}}
    things = [thing(1, 1), thing(2, 1, **crowd), thing(3, 2, **crowd)]
    spec = put(tmp_path, content([image_entry(1), image_entry(2)], things))
    data = open_data(spec)
    assert [len(data[i]["boxes"]) for i in range(2)] == [1, 0]
    assert [data.box_count(i) for i in range(2)] == [1, 0]
    assert [a["iscrowd"] for a in ground_truth(data, [0, 1])["annotations"]] == [0, 1, 1]


def test_boxes_alone(tmp_path):
    table = content([image_entry(1)], [thing(1, 1), thing(2, 1, segmentation=[])])
    spec = put(tmp_path, table)
    with_masks, boxes = open_data(spec), open_data(f"{spec}?label=boxes")
    assert [len(with_masks[0]["boxes"]), len(boxes[0]["boxes"])] == [1, 2]
    assert "masks" not in boxes[0]
    assert not boxes.has_outlines
    assert "1 objects have a box but no outline" in with_masks.faults[0]
    nothing = open_data(f"{spec}?label=none")
    assert set(nothing[0]) == {"id", "image", "meta"}
    for annotation in table["annotations"]:
        del annotation["segmentation"]
    assert not open_data(put(tmp_path / "b", table)).has_outlines


def test_what_is_judged_by_has_the_files_own_ids(tmp_path):
    table = content([image_entry(11), image_entry(4)], [thing(0, 4, 90, area=None), thing(5, 11)])
    data = open_data(put(tmp_path, table))
    found = ground_truth(data.subset([1, 0]), [0, 1])
    assert [image["id"] for image in found["images"]] == [4, 11]
    # pycocotools takes id 0 for "not found".
    assert [a["id"] for a in found["annotations"]] == [1, 2]
    assert [(a["image_id"], a["category_id"], a["area"]) for a in found["annotations"]] == [
        (4, 90, 16.0), (11, 7, 16),
    ]  # fmt: skip
    assert found["categories"] == [{"id": 7, "name": "cat"}, {"id": 90, "name": "dog"}]


@pytest.mark.parametrize("area", ["1600", None, [16], float("nan"), float("inf"), -1], ids=str)
@pytest.mark.parametrize(("query", "real"), [("", 16), ("?label=boxes", 20)], ids=["mask", "box"])
def test_an_area_that_is_none_is_that_of_the_outline_or_box(tmp_path, area, query, real):
    """pycocotools tells small objects from large ones by it, and fails on a text."""
    table = content(
        [image_entry(1)], [thing(1, 1, area=area, bbox=[2, 1, 4, 5]), thing(2, 1, area=9)]
    )
    data = open_data(put(tmp_path, table) + query)
    assert [a["area"] for a in ground_truth(data, [0])["annotations"]] == [real, 9]


def test_the_fingerprint_knows_the_boxes(tmp_path):
    first = open_data(put(tmp_path / "a", content([image_entry(1)], [thing(1, 1)]))).fingerprint
    moved = thing(1, 1, bbox=[2, 1, 4, 5])
    assert open_data(put(tmp_path / "b", content([image_entry(1)], [moved]))).fingerprint != first
    assert (
        open_data(put(tmp_path / "c", content([image_entry(1)], [thing(1, 1)]))).fingerprint
        == first
    )


# ------------------------------------------------------------------------- numbers and ids


def floats(value):
    """As pandas writes a column of numbers with a missing one."""
    if isinstance(value, dict):
        return {key: floats(one) for key, one in value.items()}
    if isinstance(value, list):
        return [floats(one) for one in value]
    return float(value) if isinstance(value, int) else value


def test_numbers_written_as_floats_are_whole(tmp_path):
    crowd = {"iscrowd": 1, "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts(truth())}}
    table = content(
        [image_entry(1), image_entry(2)],
        [thing(1, 1), thing(2, 2, 90), thing(3, 2, **crowd), thing(4, 1, iscrowd=float("nan"))],
    )
    data, as_floats = (
        open_data(put(tmp_path / name, read)) for name, read in (("a", table), ("b", floats(table)))
    )
    assert as_floats.faults == []
    assert as_floats.categories == data.categories
    for i in range(2):
        ours, theirs = as_floats[i], data[i]
        for key in ("boxes", "box_labels", "masks"):
            assert np.array_equal(ours[key], theirs[key])
    assert [a["iscrowd"] for a in ground_truth(as_floats, [0, 1])["annotations"]] == [0, 0, 0, 1]
    assert [type(image["id"]) for image in ground_truth(as_floats, [0])["images"]] == [int]


@pytest.mark.parametrize(
    ("of_image", "of_annotation"), [(1, "1"), ("1", 1), ("1", 1.0), (1, "1.0")]
)
def test_ids_as_text_match_those_as_numbers_and_are_kept(tmp_path, of_image, of_annotation):
    image = image_entry(of_image, "a.png", width="12", height="8")
    table = content([image], [thing(1, of_annotation, "7.0")])
    data = open_data(put(tmp_path, table))
    assert (data.box_count(0), data.faults) == (1, [])
    (found,) = ground_truth(data, [0])["annotations"]
    assert (found["image_id"], found["category_id"]) == (of_image, 7)


@pytest.mark.parametrize(
    ("key", "value"),
    [("id", 1.5), ("id", True), ("id", float("nan")), ("width", 12.5), ("height", "8px"),
     ("width", float("nan")), ("height", True), ("file_name", 7)],
)  # fmt: skip
def test_what_is_no_whole_number_is_refused(tmp_path, key, value):
    spec = put(tmp_path, content([image_entry(1) | {key: value}], []))
    with pytest.raises(ValueError, match=f"an entry image has {key} = "):
        open_data(spec)


def test_an_id_of_no_image_is_not_rounded_to_one(tmp_path):
    things = [thing(1, 1), thing(2, 1.5), thing(3, True)]
    data = open_data(put(tmp_path, content([image_entry(1)], things)))
    assert data.box_count(0) == 1
    assert "2 annotations belong to images" in data.faults[0]
    with pytest.raises(ValueError, match=r"unlisted categories: ids 7\.5"):
        open_data(put(tmp_path / "b", content([image_entry(1)], [thing(1, 1, 7.5)])))


@pytest.mark.parametrize(
    "outline",
    [
        [[2, 1], [6, 1], [6, 5], [2, 5]],
        [[[2, 1], [6, 1], [6, 5], [2, 5]]],
        {"size": [HEIGHT, WIDTH], "counts": counts(truth())},
        {"size": [HEIGHT, WIDTH], "counts": encoded(truth())},
    ],
    ids=["points", "points of polygons", "rle", "compressed"],
)
@pytest.mark.parametrize("crowd", [0, 1])
def test_the_box_of_every_kind_of_outline(tmp_path, outline, crowd):
    table = content([image_entry(1)], [thing(1, 1, bbox=None, segmentation=outline, iscrowd=crowd)])
    data = open_data(put(tmp_path, table))
    (found,) = ground_truth(data, [0])["annotations"]
    assert found["bbox"] == BOX
    assert data[0]["boxes"].tolist() == [[2, 1, 6, 5]] * (1 - crowd)


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ([[2, 1, 8, 7], [6, 4, 11, 8], [0, 0, 12, 8]], "all fit as [left, top, right, bottom]"),
        ([[0.2, 0.1, 0.5, 0.5], [0, 0, 1, 1]], "as fractions of the image, such as [0.2, 0.1"),
        ([[2, 1, 4, 4], [0, 0, 12, 8], [6, 4, 7, 5]], ""),
        ([[0, 0, 13, 8], [5, 5, 7, 3], [0, 0, 3, 3]], ""),
    ],
    ids=["corners", "fractions", "right", "rounded"],
)
def test_boxes_in_another_convention_are_told(tmp_path, boxes, words):
    things = [thing(i, 1, bbox=box) for i, box in enumerate(boxes)]
    data = open_data(put(tmp_path, content([image_entry(1)], things)))
    assert [words in fault for fault in data.faults] == ([True] if words else [])


def far(left: float, top: float, side: float) -> list[list[float]]:
    return [[left, top, left + side, top, left + side, top + side, left, top + side]]


@pytest.mark.parametrize(
    ("outline", "words"),
    [
        (far(0.1, 0.1, 0.2), "lie within 0 to 1, as fractions of the image"),
        (far(9, 1, 3), "do not overlap their box"),
        ([[2, 1, 6, 5, 6, 5]], "contain no pixel"),
        (far(20, 20, 5), "contain no pixel"),
        (far(3, 3, 0.3), "contain no pixel"),
        ({"size": [WIDTH, HEIGHT], "counts": [9, 9, 78]}, "of another size"),
        ({"size": [HEIGHT, WIDTH], "counts": [80, 16]}, "do not overlap their box"),
        ({"size": [HEIGHT, WIDTH], "counts": [96]}, "contain no pixel"),
        (far(2, 1, 4), ""),
        (far(4, 3, 2), ""),
        ({"size": [HEIGHT, WIDTH], "counts": counts(truth())}, ""),
    ],
)
@pytest.mark.parametrize("crowd", [0, 1])
def test_an_outline_that_is_not_that_of_its_box_is_a_fault(tmp_path, outline, words, crowd):
    fits = thing(1, 1)
    other = thing(62, 1, segmentation=outline, iscrowd=crowd)
    data = open_data(put(tmp_path, content([image_entry(1)], [fits, other])))
    assert [words in fault and "ids 62." in fault for fault in data.faults] == [True] * bool(words)


def test_an_outline_that_covers_almost_none_of_its_box_is_a_fault(tmp_path):
    image = image_entry(1, width=400, height=400)
    boxes = [thing(i, 1, bbox=[10, 10, 200, 200], segmentation=far(50, 50, side))
             for i, side in enumerate((15, 40))]  # fmt: skip
    (fault,) = open_data(put(tmp_path, content([image], boxes))).faults
    assert fault == "1 of 2 outlines in train.json extend over less than 1% of their box: ids 0."


# ------------------------------------------------------------------------- layouts and names


def lay_out(root, table, file: str, folder: str) -> str:
    """An annotation file anywhere, and its images in a folder."""
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps(table))
    for number, image in enumerate(table["images"]):
        name = image["file_name"].replace("\\", "/").rpartition("/")[2].replace("%20", " ")
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0)).save(root / folder / name)
    return f"coco:{root}"


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        ({"train": ("train/_annotations.coco.json", "train"),
          "valid": ("valid/_annotations.coco.json", "valid")}, ["train", "valid"]),
        ({"": ("result.json", "images")}, ["result"]),
        ({"": ("annotations/instances_default.json", "images/default")}, ["default"]),
        ({"": ("annotations/instances_default.json", "images")}, ["default"]),
        ({"": ("annotations.json", ".")}, ["annotations"]),
        ({"train": ("instances_train.json", "images/train"),
          "val": ("instances_val.json", "images/val")}, ["train", "val"]),
    ],
    ids=["roboflow", "label studio", "cvat", "cvat flat", "beside", "two beside"],
)  # fmt: skip
def test_the_layouts_of_other_programs(tmp_path, files, splits):
    for id, (file, folder) in enumerate(files.values(), 1):
        spec = lay_out(tmp_path, content([image_entry(id)], [thing(1, id)]), file, folder)
        (tmp_path / file).with_name("._x.json").write_bytes(b"\0\5\x16\7")
        (tmp_path / file).with_name("README.txt").write_text("exported")
    data = open_data(f"{spec}?split=all")
    assert (data.splits, data.faults) == (splits, [])
    assert [data[i]["boxes"].tolist() for i in range(len(files))] == [[[2, 1, 6, 5]]] * len(files)
    alone = open_data(f"coco:{tmp_path / next(iter(files.values()))[0]}")
    assert alone[0]["boxes"].tolist() == [[2, 1, 6, 5]]


@pytest.mark.parametrize(
    "given",
    [
        "sub/a 1.png", "sub\\a 1.png", "sub/a%201.png", "./sub/a 1.png", "images/sub/a 1.png",
        ".\\images\\sub\\a 1.png", "/home/me/set/images/sub/a 1.png",
        "C:\\set\\images\\sub\\a 1.png", "d:/set/sub/a 1.png",
        "https://host.org/media/images/sub/a%201.png?token=3", "s3://bucket/images/sub/a 1.png",
        "..\\..\\media\\upload\\sub\\a 1.png", "file:///C:/set/sub/a%201.png",
    ],
)  # fmt: skip
def test_file_names_written_elsewhere_name_the_files_here(tmp_path, given):
    table = content([image_entry(1, given)], [thing(1, 1)])
    spec = lay_out(tmp_path, content([image_entry(1, "a 1.png")], []), "x.json", "images/sub")
    (tmp_path / "x.json").write_text(json.dumps(table))
    data = open_data(spec)
    assert data.faults == []
    assert (tmp_path / data.ids[0]).samefile(tmp_path / "images/sub/a 1.png")
    assert data[0]["boxes"].tolist() == [[2, 1, 6, 5]]


def test_no_image_is_taken_for_another_of_its_name(tmp_path):
    """A missing file is missing though another folder has one of its name; two paths from
    elsewhere cannot both be the one file of their name."""
    names = ["sub/a.png", "b.png", "gone/b.png"]
    table = content([image_entry(i, name) for i, name in enumerate(names)], [])
    put(tmp_path / "one", table)
    (tmp_path / "one/train/gone/b.png").unlink()
    data = open_data(f"coco:{tmp_path / 'one'}")
    assert data.ids == ["train/sub/a.png", "train/b.png"]
    names = ["/x/1/a.png", "/x/2/a.png", "/x/1/b.png"]
    table = content([image_entry(i, name) for i, name in enumerate(names)], [])
    data = open_data(lay_out(tmp_path / "two", table, "annotations/train.json", "train"))
    assert data.ids == ["train/b.png"]
    assert "2 images are missing in train/ and skipped: /x/1/a.png, /x/2/a.png." in data.faults[0]


def test_links_of_the_user_are_followed_and_files_outside_are_never_read(tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "secret.png")
    (tmp_path / "set/annotations").mkdir(parents=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "set/a.png")
    for name in (
        "../secret.png",
        str(tmp_path / "secret.png"),
        "..\\secret.png",
        "%2e%2e/secret.png",
    ):
        table = content([image_entry(1, "a.png"), image_entry(2, name)], [])
        (tmp_path / "set/annotations/train.json").write_text(json.dumps(table))
        data = open_data(f"coco:{tmp_path / 'set'}")
        assert len(data) == 1
        assert "1 images are missing" in data.faults[0]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.png").write_bytes((tmp_path / "secret.png").read_bytes())
    (tmp_path / "linked/annotations").mkdir(parents=True)
    (tmp_path / "linked/train").symlink_to(tmp_path / "elsewhere")
    spec = lay_out(tmp_path / "linked", content([], []), "annotations/train.json", "train")
    (tmp_path / "linked/annotations/train.json").write_text(
        json.dumps(content([image_entry(1, "a.png")], []))
    )
    assert len(open_data(spec)) == 1


def test_other_json_files_beside_the_splits_are_told(tmp_path):
    spec = put(tmp_path, content([image_entry(1)], []))
    put(tmp_path, "{}", file="holdout.json")
    data = open_data(spec)
    assert data.splits == ["train"]
    assert data.passed_over == {"other JSON files": 1}
    assert "holdout.json" in str(check(spec))


# ------------------------------------------------------------------------- categories


def test_classes_of_two_files_are_matched_by_name(tmp_path):
    put(
        tmp_path,
        content([image_entry(1)], [thing(1, 1, 5), thing(2, 1, 6)], [(5, "cat"), (6, "dog")]),
    )
    spec = put(
        tmp_path, content([image_entry(2)], [thing(1, 2, 5), thing(2, 2, 0)],
                          [(5, "dog"), (0, "cat")]), "val",
    )  # fmt: skip
    train, test = boxed_splits(spec, 0.2, 0)
    assert train.classes == test.classes == ["cat", "dog"]
    assert test[0]["box_labels"].tolist() == [1, 0]
    assert test.categories == [{"id": 0, "name": "cat"}, {"id": 5, "name": "dog"}]
    found = ground_truth(test, [0])["annotations"]
    assert [a["category_id"] for a in found] == [5, 0]  # the file's own
    both = open_data(f"{spec}?split=all")
    assert [both[i]["box_labels"].tolist() for i in range(2)] == [[0, 1], [1, 0]]
    assert both.categories == train.categories
    assert [a["category_id"] for a in both.annotated(1)[1]] == [6, 5]


@pytest.mark.parametrize("ids", [(4, 9), ("four", "nine")], ids=["numbers", "texts"])
def test_a_test_file_may_have_some_of_the_classes(tmp_path, ids):
    put(tmp_path, content([image_entry(1)], [], [(1, "ape"), (2, "cat"), (3, "dog")]))
    table = content([image_entry(2)], [thing(1, 2, ids[0])], [(ids[0], "dog"), (ids[1], "ape")])
    _, test = boxed_splits(put(tmp_path, table, "val"), 0.2, 0)
    assert test.classes == ["ape", "cat", "dog"]
    assert test[0]["box_labels"].tolist() == [2]
    found = [category["id"] for category in test.categories]
    assert (found[0], found[2]) == (ids[1], ids[0])
    assert len(set(found)) == len({type(one) for one in found}) + 2 == 3


@pytest.mark.parametrize(
    ("categories", "words"),
    [
        ([{"id": 0, "name": "objects", "supercategory": "none"},
          {"id": 7, "name": "cat", "supercategory": "objects"}],
         "a class without objects that is the supercategory of others: objects"),
        ([{"id": 7, "name": "cat"}, {"id": 8, "name": "cat"}], "duplicate category names: cat"),
        ([{"id": 7, "name": "cat", "supercategory": "cat"}], ""),
        ([{"id": 0, "name": "dog", "supercategory": "animal"},
          {"id": 7, "name": "cat", "supercategory": "animal"}], ""),
    ],
    ids=["roboflow", "twice", "its own", "above"],
)  # fmt: skip
def test_classes_that_cannot_be_meant_are_told(tmp_path, categories, words):
    table = content([image_entry(1)], [thing(1, 1)]) | {"categories": categories}
    data = open_data(put(tmp_path, table))
    assert [words in fault for fault in data.faults] == ([True] if words else [])


def test_a_file_that_is_listed_twice_is_told(tmp_path):
    table = content(
        [image_entry(1, "a.png"), image_entry(2, "./a.png")], [thing(1, 1), thing(2, 2)]
    )
    (fault,) = open_data(put(tmp_path, table)).faults
    assert "1 images are listed more than once" in fault


# ------------------------------------------------------------------------- what is left out


@pytest.mark.parametrize(
    "box",
    [None, [], [1, 2, 3], "four", [2, 1, 0, 4], [2, 1, 4, -1], [float("nan"), 1, 4, 4],
     [WIDTH, 1, 4, 4], [-9, 1, 4, 4], [1, 1, float("inf"), 4], [[1], 1, 4, 4], "1234",
     ["1", 1, 4, 4]],
    ids=str,
)  # fmt: skip
def test_what_is_no_box_is_that_of_the_outline_or_left_out_and_named(tmp_path, box):
    bare = thing(33, 1, bbox=box, segmentation=None)
    table = content([image_entry(1)], [thing(1, 1, segmentation=None), bare])
    data = open_data(put(tmp_path / "bare", table))
    assert len(data[0]["boxes"]) == data.box_count(0) == 1
    (fault,) = data.faults
    assert "1 annotations in train.json have no box with a width and a height" in fault
    assert "ids 33" in fault
    table = content([image_entry(1)], [thing(1, 1), thing(33, 1, bbox=box)])
    data = open_data(put(tmp_path / "outlined", table))
    assert data[0]["boxes"].tolist() == [[2, 1, 6, 5]] * 2
    assert [a["bbox"] for a in ground_truth(data, [0])["annotations"]] == [BOX] * 2
    told = ["1 annotations in train.json have a box without area inside the image" in fault
            for fault in data.faults]  # fmt: skip
    assert told == ([] if box in (None, []) else [True])


@pytest.mark.parametrize(
    ("iscrowd", "single", "crowds"),
    [(0, 2, 0), (False, 2, 0), (None, 2, 0), (1, 1, 1), (True, 1, 1),
     ("0", 1, 0), ("1", 1, 0), (2, 1, 0), ([], 1, 0)],
    ids=repr,
)  # fmt: skip
def test_a_crowd_is_what_the_file_calls_one(tmp_path, iscrowd, single, crowds):
    """A text is true, also "0": objects would be crowds, which nothing learns."""
    table = content([image_entry(1)], [thing(1, 1), thing(33, 1, iscrowd=iscrowd)])
    data = open_data(put(tmp_path, table))
    judged_by = [a["iscrowd"] for a in ground_truth(data, [0])["annotations"]]
    assert len(data[0]["boxes"]) == data.box_count(0) == judged_by.count(0) == single
    assert judged_by.count(1) == crowds
    if single + crowds == 2:
        assert data.faults == []
    else:
        assert "have an iscrowd other than 0, 1, false or true" in data.faults[0]
        assert "ids 33." in data.faults[0]


def test_a_box_is_cut_off_at_the_image(tmp_path):
    spec = put(tmp_path, content([image_entry(1)], [thing(1, 1, bbox=[-2, -3, 50, 5.5])]))
    assert open_data(spec)[0]["boxes"].tolist() == [[0, 0, WIDTH, 2.5]]


def test_annotations_of_no_image_are_named(tmp_path):
    stray = [thing(2, 77), thing(3, None), thing(4, [1]), thing(5, 77)]
    data = open_data(put(tmp_path, content([image_entry(1)], [thing(1, 1), *stray])))
    assert data.box_count(0) == 1
    assert "4 annotations belong to images that train.json does not list" in data.faults[0]
    assert "image ids 77, None, [1]." in data.faults[0]


def test_missing_files_are_named(tmp_path):
    spec = put(tmp_path, content([image_entry(i) for i in range(4)], [thing(1, 3), thing(2, 0)]))
    (tmp_path / "train/0.png").unlink()
    data = open_data(spec)
    assert data.ids == ["train/1.png", "train/2.png", "train/3.png"]
    assert "1 images are missing in train/ and skipped: 0.png." in data.faults[0]
    assert len(data[2]["boxes"]) == 1


def test_ids_of_annotations_given_twice_do_no_harm(tmp_path):
    data = open_data(put(tmp_path, content([image_entry(1)], [thing(8, 1), thing(8, 1, 90)])))
    assert data[0]["box_labels"].tolist() == [0, 1]
    assert "train.json has duplicate annotation ids: 8" in data.faults[0]
    assert len({a["id"] for a in ground_truth(data, [0])["annotations"]}) == 2


@pytest.mark.parametrize(
    ("outline", "reason"),
    [
        ([[1, 2, 3, "x", 5, 6]], "a value that is not a number"),
        ([[1, 2, 3, None, 5, 6]], "not finite"),
        ([[1, 2, 3, float("nan"), 5, 6]], "not finite"),
        ({"size": [9, 9], "counts": [81]}, r"size \[9, 9\]; expected \[8, 12\]"),
        ({"size": [8, 12], "counts": [90]}, "do not sum to 96 pixels"),
        ({"size": [8, 12], "counts": [97, -1]}, "do not sum to 96 pixels"),
        ({"size": [8, 12], "counts": [4e9]}, "do not sum to 96 pixels"),
        ({"size": [8, 12], "counts": "oooooooooooooooooooooooo"}, "do not sum to 96 pixels"),
        ({"size": [8, 12], "counts": "1" * 500}, "do not sum to 96 pixels"),
        ({"size": [8, 12], "counts": 96}, "do not sum to 96 pixels"),
        ({"counts": [96]}, "an RLE has size None"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("crowd", [0, 1], ids=["single", "crowd"])
def test_an_outline_that_is_none_is_named_when_its_image_is_read(tmp_path, outline, reason, crowd):
    """pycocotools would write behind its memory's end for counts that are too many, and judge by a
    broken crowd for ever."""
    broken = thing(61, 1, segmentation=outline, iscrowd=crowd)
    spec = put(tmp_path, content([image_entry(1)], [thing(1, 1), broken]))
    with pytest.raises(BadImage, match=rf"train/1.png: annotation 61: .*{reason}"):
        open_data(spec)[0]


def test_an_image_of_another_size_is_named(spec, tmp_path):
    Image.new("L", (HEIGHT, WIDTH)).save(tmp_path / "train/5.png")
    with pytest.raises(BadImage, match=r"has 8×12 pixels, its annotations are for 12×8"):
        open_data(spec)[0]


@pytest.mark.parametrize(
    ("orientation", "shape", "reason"),
    [
        (
            3,
            (WIDTH, HEIGHT),
            "its EXIF orientation is 3, and it is not known whether its labels are rotated too",
        ),
        (
            6,
            (HEIGHT, HEIGHT),
            "its EXIF orientation is 6, and it is not known whether its labels are rotated too",
        ),
        (6, (WIDTH, HEIGHT), "the image has 8×12 pixels, its annotations are for 12×8"),
        (6, (HEIGHT, WIDTH), ""),
    ],
    ids=["upside-down", "square", "sideways-as-stored", "sideways-as-shown"],
)
def test_no_box_lies_askew_on_an_image_that_exif_turns(tmp_path, orientation, shape, reason):
    width, height = shape
    image = image_entry(1, "1.jpg", width=width, height=height)
    spec = put(tmp_path, content([image], [thing(1, 1)]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = shape[::-1] if shape == (HEIGHT, WIDTH) else shape
    Image.new("RGB", stored).save(tmp_path / "train/1.jpg", exif=exif)
    if reason:
        with pytest.raises(BadImage, match=rf"train/1\.jpg: {reason}"):
            open_data(spec)[0]
        assert any(f"train/1.jpg ({reason}" in problem for problem in check(spec).problems)
    else:
        assert open_data(spec)[0]["boxes"].tolist() == [[2, 1, 6, 5]]
    assert open_data(f"{spec}?label=none")[0]["image"].mode == "RGB"


# ------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{", "train.json is not valid JSON"),
        ("[]", "train.json has no list 'images'"),
        (json.dumps({"images": [], "annotations": {}, "categories": []}), "no list 'annotations'"),
        (json.dumps({"images": [1], "annotations": [], "categories": []}), "no list 'images'"),
        (content([], []), "train.json has no image"),
        (content([image_entry(1)], [], ()), "train.json has no category"),
        (content([image_entry(1), image_entry(1, "b.png")], []), "has duplicate image ids: 1"),
        (content([image_entry(1)], [], ((2, "a"), (2, "b"))), "has duplicate category ids: 2"),
        (content([image_entry(1), image_entry("b")], []),
         "image ids that are numbers and others that are strings, such as 1 and 'b'"),
        (content([image_entry(1)], [], ((2, "a"), ("3", "b"))),
         "category ids that are numbers and others that are strings, such as 2 and '3'"),
        (content([image_entry(1)], [thing(1, 1, 8), thing(2, 1, 9), thing(3, 1, 8)]),
         "3 annotations in train.json have unlisted categories: ids 8, 9"),
        (content([image_entry(1)], [thing(1, 1, None)]), "unlisted categories: ids None"),
        (content([image_entry(1, width=0)], []), "an entry image has width = 0"),
        (content([{"id": 1, "file_name": "a.png"}], []), "image has width = None"),
        (content([image_entry([1])], []), r"image has id = \[1\]"),
        (content([image_entry(1, "../a.png")], []), r"'../a.png' is outside of"),
        (content([image_entry(1, "/etc/a.png")], []), r"'/etc/a.png' is outside of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_file_that_cannot_be_meant_is_refused(tmp_path, table, message):
    if isinstance(table, dict) and ".." not in str(table) and "/etc" not in str(table):
        put(tmp_path, table)
    else:
        put(tmp_path, json.dumps(table) if isinstance(table, dict) else table)
    with pytest.raises(ValueError, match=message):
        open_data(f"coco:{tmp_path}")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda root: shutil.rmtree(root), FileNotFoundError,
         "has no annotations/; it does not exist"),
        (lambda root: shutil.rmtree(root / "annotations"), FileNotFoundError,
         "has no annotations/; it contains train. Expected annotations/instances_train2017"),
        (lambda root: (root / "annotations/train.json").unlink(), FileNotFoundError,
         "contains no .json file"),
        (lambda root: shutil.rmtree(root / "train"), FileNotFoundError,
         "The images of 'train' are not in .* for example 5.png; looked in train/"),
        (lambda root: shutil.copy(root / "annotations/train.json",
                                  root / "annotations/train2017.json"), ValueError,
         "several files for train: train.json, train2017.json; keep one"),
    ],
    ids=["nothing", "no-annotations", "empty", "no-images", "twice"],
)  # fmt: skip
def test_what_is_missing_is_told_at_the_start(tmp_path, change, error, message):
    root = tmp_path / "data"
    spec = put(root, content([image_entry(5)], [thing(1, 5)]))
    change(root)
    with pytest.raises(error, match=message):
        open_data(spec)


def test_images_in_both_parts_are_told(tmp_path, caplog):
    for split in ("train", "val"):
        spec = put(tmp_path, content([image_entry(5)], [thing(1, 5)]), split, folder="images")
    boxed_splits(spec, 0.5, 0)
    assert "1 images are in both train and val, for example images/5.png" in caplog.text


def test_parts_of_different_classes_are_refused(tmp_path):
    put(tmp_path, content([image_entry(1)], [], [(1, "cat")]))
    spec = put(
        tmp_path, content([image_entry(2)], [thing(1, 2, 2)], [(1, "cat"), (2, "dog")]), "val"
    )
    with pytest.raises(ValueError, match=r"1 classes that are not among the 1 of .*: dog"):
        boxed_splits(spec, 0.2, 0)


def test_one_id_in_two_parts_cannot_be_judged_at_once(tmp_path):
    put(tmp_path, content([image_entry(1)], [thing(1, 1)]))
    data = open_data(put(tmp_path, content([image_entry(1)], []), "val") + "?split=all")
    assert data.ids == ["train/1.png", "val/1.png"]
    with pytest.raises(ValueError, match="evaluate one split at a time"):
        ground_truth(data, [0, 1])


def test_images_without_boxes_are_refused(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="has no boxes; give a folder in COCO's layout"):
        boxed_splits(str(tmp_path), 0.2, 0)


def test_without_pycocotools_boxes_alone_can_be_read(spec, monkeypatch):
    for name in ("pycocotools", "pycocotools.mask"):
        monkeypatch.setitem(sys.modules, name, None)
    assert len(open_data(f"{spec}?label=boxes")[0]["boxes"]) == 1
    with pytest.raises(ImportError, match=r"pip install 'vim-ssl\[detection\]'"):
        open_data(spec)[0]


def test_an_unknown_kind_of_label_is_refused(spec):
    with pytest.raises(ValueError, match="use label=boxes"):
        open_data(f"{spec}?label=masks")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_with_other_accents_or_another_letter_case_are_matched(tmp_path, form):
    names = [f"\u00e9{i}.PNG" for i in range(2)]
    given = [unicodedata.normalize(form, name) for name in names]
    table = content([image_entry(i, name) for i, name in enumerate(given)], [thing(1, 0)])
    spec = put(tmp_path, table)
    for name in given:  # on disk: the other form, and another case for the second
        other = unicodedata.normalize("NFD" if form == "NFC" else "NFC", name)
        file = tmp_path / "train" / name
        file.rename(file.with_name(other.lower() if name == given[1] else other))
    data = open_data(spec)
    assert len(data) == 2
    assert data[1]["image"].size == (WIDTH, HEIGHT)
    (fault,) = data.faults
    assert fault.startswith("the names of 1 images in train/ are in another letter case")


def test_images_that_are_listed_by_their_urls_only_as_in_lvis(tmp_path):
    images = [image_entry(i) for i in range(2)]
    spec = put(tmp_path, content(images, [thing(1, 0)]))
    for image in images:
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"
    (tmp_path / "annotations/train.json").write_text(json.dumps(content(images, [thing(1, 0)])))
    assert open_data(spec).ids == ["train/0.png", "train/1.png"]
    (tmp_path / "train").rename(tmp_path / "train2017")  # as COCO is unpacked
    assert open_data(spec).ids == ["./train2017/0.png", "./train2017/1.png"]
