"""Objects, boxes and outlines, as COCO's format describes them: check a file's entries, read them
by image, and write them for evaluation."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import BadImage
from vim_ssl.data.outlines import (
    MISFITS,
    clipped,
    mask_tools,
    misfit,
    outline_box,
    read_outline,
    to_rle,
    whole,
)

EXAMPLES = 5  # maximum number of names in a message
ENCODED = 1000  # run-length encodings that are compared to their boxes; decoding them is slow
BEYOND = 2.0  # pixels by which a box may reach beyond its image because of rounding


@dataclass(frozen=True)
class Table:
    """The checked content of an annotation file, small enough to be sent to workers.

    Attributes:
        images: ``id``, ``file_name``, ``width`` and ``height`` per image.
        annotations: the usable annotations of each image, as JSON; their ``segmentation`` is a list
            of polygons, an RLE, or None.
        boxes, outlines: number of single objects (not crowds) per image, and of those with an
            outline.
        categories: ``id`` and ``name`` per category, sorted by id.
        faults: descriptions of skipped entries and other faults.
    """

    images: list[dict[str, Any]]
    annotations: list[bytes]
    boxes: list[int]
    outlines: list[int]
    categories: list[dict[str, Any]]
    faults: list[str]


class CocoObjects:
    """Boxes and masks by row: the ``objects`` of an `ImageData`.

    Args:
        tables: tables whose rows are concatenated; all have the same categories.
        outlines: return masks, and skip objects without an outline.
    """

    def __init__(self, tables: Sequence[Table], outlines: bool):
        self.outlines, self.categories = outlines, tables[0].categories
        self.images = [image for table in tables for image in table.images]
        self._annotations = [text for table in tables for text in table.annotations]
        self._counts = [
            count for table in tables for count in (table.outlines if outlines else table.boxes)
        ]
        self._number = {category["id"]: i for i, category in enumerate(self.categories)}

    def annotations(self, row: int) -> list[dict[str, Any]]:
        """Return the annotations of a row as in the file, including crowds."""
        annotations = json.loads(self._annotations[row])
        return [a for a in annotations if a["segmentation"] is not None or not self.outlines]

    def count(self, row: int) -> int:
        """Return the number of single objects in a row."""
        return self._counts[row]

    def read(self, row: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """Read the single objects of an image of ``size`` (width, height), without crowds.

        Returns: ``boxes`` float32 (n, 4): left, top, right, bottom in pixels, clipped to the image;
            ``box_labels`` int64 (n,): classes from 0; with outlines ``masks`` uint8 (n, h, w), 1 =
            object.
        Raises: BadImage if the annotations are for another size, or an outline is invalid.
        """
        image = self.images[row]
        name, (width, height) = image["file_name"], size
        if (image["width"], image["height"]) != size:
            raise BadImage(
                name,
                f"the image has {width}×{height} pixels, its annotations are for "
                f"{image['width']}×{image['height']}",
            )
        annotations = self.annotations(row)
        single = [a for a in annotations if not a.get("iscrowd")]
        boxes = [clipped(a["bbox"], width, height) for a in single]
        objects: dict[str, np.ndarray] = {
            "boxes": np.array(boxes, np.float32).reshape(-1, 4),
            "box_labels": np.array([self._number[a["category_id"]] for a in single], np.int64),
        }
        if self.outlines:
            # Check crowds too: evaluation uses them, and pycocotools hangs on a broken one.
            checked = [(a, _checked(a, name, height, width)) for a in annotations]
            masks = [mask_tools().decode(rle) for a, rle in checked if not a.get("iscrowd")]
            objects["masks"] = np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)
        return objects

    def sizes(self, row: int) -> str:
        """Return a hash of the annotations of a row."""
        return blake2b(self._annotations[row], digest_size=8).hexdigest()


def read_table(content: Any, name: str) -> Table:
    """Check the content of an annotation file.

    Args:
        content: the parsed JSON.
        name: name of the file, for messages.
    Raises: ValueError for content that is not COCO, for duplicate ids or ids of two types, and for
        unlisted categories.
    """
    lists: dict[str, list[dict]] = {}
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(x, dict) for x in entries):
            raise ValueError(
                f"{name} has no list {key!r} of JSON objects; a COCO file has images, annotations "
                "and categories."
            )
        lists[key] = entries
    for image in lists["images"]:  # LVIS lists only URLs
        if "file_name" not in image and isinstance(image.get("coco_url"), str):
            image["file_name"] = urlsplit(image["coco_url"]).path.lstrip("/")
    images = _needed(lists["images"], ("id", "file_name", "width", "height"), "image", name)
    categories = _needed(lists["categories"], ("id", "name"), "category", name)
    categories.sort(key=lambda category: category["id"])
    usable, faults = _usable(lists["annotations"], images, [x["id"] for x in categories], name)
    single = [[a for a in row if not a.get("iscrowd")] for row in usable]
    faults += _strange_boxes(usable, images, name) or _strange_outlines(usable, images, name)
    faults += _repeated(usable, categories, name)
    faults += _supercategories(lists["categories"], usable, name)
    return Table(
        images,
        [json.dumps(row, separators=(",", ":")).encode() for row in usable],
        [len(row) for row in single],
        [sum(a["segmentation"] is not None for a in row) for row in single],
        categories,
        faults,
    )


# Fault of annotations -> its description, and the noun of the values that are named.
_FAULTS = {
    "image": ("belong to images that {} does not list and are skipped", "image ids"),
    "box": ("in {} have no box with a width and a height inside the image and are skipped", "ids"),
    "crowd": ("in {} have an iscrowd other than 0, 1, false or true and are skipped", "ids"),
    "derived": (
        "in {} have a box without area inside the image; the box of their outline is used", "ids"
    ),
}  # fmt: skip


def _usable(
    annotations: list[dict], images: list[dict], categories: list, name: str
) -> tuple[list[list[dict]], list[str]]:
    """Return each image's usable annotations, with outlines, and descriptions of skipped ones.

    Raises: ValueError for unlisted categories.
    """
    row_of, number_of = _finder(image["id"] for image in images), _finder(categories)
    usable: list[list[dict]] = [[] for _ in images]
    faulty: dict[str, list] = {fault: [] for fault in _FAULTS}
    strange = []
    for annotation in annotations:
        row = row_of(annotation.get("image_id"))
        number = number_of(annotation.get("category_id"))
        if row is None:
            faulty["image"].append(annotation.get("image_id"))
        elif number is None:
            strange.append(annotation.get("category_id"))
        else:
            ids = {"image_id": images[row]["id"], "category_id": categories[number]}
            entry, fault = _entry(annotation | ids, images[row])
            if fault:
                faulty[fault].append(annotation.get("id"))
            usable[row] += entry
    if strange:
        raise ValueError(
            f"{len(strange):,} annotations in {name} have unlisted categories: ids {some(strange)}."
        )
    faults = [
        f"{len(ids):,} annotations {_FAULTS[fault][0].format(name)}: {_FAULTS[fault][1]} "
        f"{some(ids)}."
        for fault, ids in faulty.items()
        if ids
    ]
    return usable, faults


def _entry(annotation: dict, image: dict) -> tuple[list[dict], str]:
    """Return an annotation with a checked outline and box, or none; and its fault, if any."""
    width, height, fault = image["width"], image["height"], ""
    outline = read_outline(annotation.get("segmentation"))
    box, crowd = annotation.get("bbox"), annotation.get("iscrowd")
    if clipped(box, width, height) is None:
        fault = "" if _absent(box) else "derived"
        box = outline_box(outline, height, width)
        if clipped(box, width, height) is None:
            return [], "box"
    checked = {"bbox": box, "segmentation": outline}
    if isinstance(crowd, float) and math.isnan(crowd):  # as tables write a missing value
        crowd = checked["iscrowd"] = 0
    if crowd not in (0, 1, None):  # true and false are 1 and 0
        return [], "crowd"
    return [annotation | checked], fault


def _absent(value: Any) -> bool:
    """True for a missing value: null, an empty list, and NaN, which tables write for it."""
    return value is None or value == [] or (isinstance(value, float) and math.isnan(value))


def _finder(ids: Iterable[Any]) -> Callable[[Any], int | None]:
    """Return a function that finds the position of an id; 1, 1.0 and "1" are the same id."""
    position = {key: i for i, key in enumerate(ids)}

    def find(value: Any) -> int | None:
        number = whole(value)
        if number is not None:
            return position.get(number, position.get(str(number)))
        if not isinstance(value, str):
            return None
        if value not in position and re.fullmatch(r"-?\d+(\.0*)?", value):
            return position.get(int(value.partition(".")[0]))
        return position.get(value)

    return find


def _strange_boxes(usable: list[list[dict]], images: list[dict], name: str) -> list[str]:
    """Describe boxes that are given in another convention than COCO's."""
    pairs = [(a["bbox"], image) for image, row in zip(images, usable, strict=True) for a in row]
    if not pairs:
        return []
    boxes = np.array([box for box, _ in pairs], np.float64)
    sizes = np.array([(image["width"], image["height"]) for _, image in pairs], np.float64)
    if boxes.max() <= 1 < sizes.max():
        return [
            f"all boxes in {name} lie within 0 to 1, as fractions of the image, such as "
            f"{pairs[0][0]}; COCO's are in pixels. Multiply them by the size of their image."
        ]
    beyond = ((boxes[:, :2] + boxes[:, 2:]) > sizes + BEYOND).any(1)
    corners = ((boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= sizes + BEYOND)).all(1)
    if beyond.mean() > 0.1 and corners.all():
        return [
            f"{int(beyond.sum()):,} of {len(boxes):,} boxes in {name} reach beyond their image, "
            "and all fit as [left, top, right, bottom], such as "
            f"{pairs[int(beyond.argmax())][0]}; COCO's are [left, top, width, height]. Convert "
            "them."
        ]
    return []


def _strange_outlines(usable: list[list[dict]], images: list[dict], name: str) -> list[str]:
    """Describe outlines that do not fit their boxes: all polygons, and `ENCODED` RLEs."""
    rows = zip(images, usable, strict=True)
    pairs = [(a, image) for image, row in rows for a in row if a["segmentation"] is not None]
    encoded = [pair for pair in pairs if isinstance(pair[0]["segmentation"], dict)]
    few = [encoded[i] for i in range(0, len(encoded), len(encoded) // ENCODED + 1)]
    ids: dict[str, list] = {}
    for annotation, image in [p for p in pairs if isinstance(p[0]["segmentation"], list)] + few:
        sides = image["height"], image["width"]
        if kind := misfit(annotation["segmentation"], annotation["bbox"], *sides):
            ids.setdefault(kind, []).append(annotation.get("id"))
    compared = len(pairs) - len(encoded) + len(few)
    return [
        f"{len(ids[kind]):,} of {compared:,} {MISFITS[kind].format(name)}: ids {some(ids[kind])}."
        for kind in MISFITS
        if kind in ids
    ]


def _repeated(usable: list[list[dict]], categories: list[dict], name: str) -> list[str]:
    """Describe ids of annotations and names of categories that occur more than once."""
    faults = []
    for what, keys, then in (
        ("annotation ids", (str(a.get("id")) for row in usable for a in row),
         "they are ignored here"),
        ("category names", (category["name"] for category in categories),
         "they are separate classes; join or rename them"),
    ):  # fmt: skip
        if twice := [key for key, n in Counter(keys).items() if n > 1]:
            faults.append(f"{name} has duplicate {what}: {some(twice)}; {then}.")
    return faults


def _supercategories(entries: list[dict], usable: list[list[dict]], name: str) -> list[str]:
    """Describe categories without objects that only stand for the others, as Roboflow adds one."""
    above = {str(x["supercategory"]) for x in entries if x.get("supercategory")}
    if not (suspects := {x["name"]: _id(x["id"]) for x in entries if x["name"] in above}):
        return []
    used = {a["category_id"] for row in usable for a in row}
    if not (idle := [key for key, number in suspects.items() if number not in used]):
        return []
    return [
        f"{name} has a class without objects that is the supercategory of others: {some(idle)}; "
        "remove it from the categories."
    ]


def _checked(annotation: dict[str, Any], name: str, height: int, width: int) -> dict[str, Any]:
    """Return the outline of an annotation as an RLE. Raises: BadImage for an invalid one."""
    try:
        return to_rle(annotation["segmentation"], height, width)
    except ValueError as error:
        raise BadImage(name, f"annotation {annotation.get('id')}: {error}") from error


def ground_truth(data: ImageData, indices: Iterable[int]) -> dict[str, Any]:
    """Return the file's entries of these images, including crowds, as input for pycocotools.

    Outlines become RLE. Images and categories keep their ids, so that results match the original
    file; annotations are numbered from 1, because pycocotools never matches an object with id 0.

    Raises: ValueError for two images with the same id, for example from two splits.
    """
    images: list[dict] = []
    annotations: list[dict] = []
    for index in indices:
        image, entries = data.annotated(index)
        images.append(image)
        for entry in entries:
            outline: dict[str, Any] = {}
            area = entry.get("area")
            if not (isinstance(area, int | float) and 0 <= area < math.inf):
                area = None
            if data.has_outlines:
                # Checked and clipped here, because pycocotools does not check outlines.
                rle = to_rle(entry["segmentation"], image["height"], image["width"])
                area = float(mask_tools().area(rle)) if area is None else area
                counts = rle["counts"]
                text = counts.decode() if isinstance(counts, bytes) else counts
                outline = {"segmentation": {"size": list(rle["size"]), "counts": text}}
            if area is None:
                area = entry["bbox"][2] * entry["bbox"][3]
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": image["id"],
                    "category_id": entry["category_id"], "bbox": entry["bbox"], "area": area,
                    "iscrowd": int(bool(entry.get("iscrowd"))),
                }
                | outline
            )  # fmt: skip
    if len({image["id"] for image in images}) < len(images):
        raise ValueError(f"{data.name}: two images have the same id; evaluate one split at a time.")
    return {"images": images, "annotations": annotations, "categories": data.categories}


def with_categories(table: Table, categories: list[dict[str, Any]]) -> Table:
    """Return a table with the category ids of another file, which has the same names.

    Raises: see `check_same_categories`.
    """
    if table.categories == categories:
        return table
    check_same_categories(categories, [table.categories])
    by_name = {category["name"]: category["id"] for category in categories}
    new = {category["id"]: by_name[category["name"]] for category in table.categories}
    rows = []
    for text in table.annotations:
        entries = [a | {"category_id": new[a["category_id"]]} for a in json.loads(text)]
        rows.append(json.dumps(entries, separators=(",", ":")).encode())
    return replace(table, annotations=rows, categories=categories)


def check_same_categories(first: list[dict], others: Iterable[list[dict]]) -> None:
    """Raise ValueError, naming the differing categories, unless all splits have the same names."""
    for other in others:
        one, two = ([(c["id"], c["name"]) for c in split] for split in (first, other))
        names = [Counter(name for _, name in split) for split in (one, two)]
        twice = any(count > 1 for count in names[0].values())
        if names[0] != names[1] or (twice and one != two):
            differing = sorted(f"{name} (id {key})" for key, name in set(one) ^ set(two))
            raise ValueError(
                f"the splits have different categories: {some(differing)} are not in both. Use "
                "the same list in all files."
            )


# ------------------------------------------------------------------------- entries


def _needed(entries: list[dict], keys: Sequence[str], what: str, name: str) -> list[dict[str, Any]]:
    """Return these keys of the entries.

    Raises: ValueError for a missing or wrong value, for duplicate ids or ids of two types, and for
        an empty list.
    """
    readers = {"id": _id, "width": _side, "height": _side}
    rows = []
    for entry in entries:
        row = {}
        for key in keys:
            row[key] = readers.get(key, _text)(entry.get(key))
            if row[key] is None:
                raise ValueError(
                    f"{name}: an entry {what} has {key} = {entry.get(key)!r}: {str(entry)[:100]}"
                )
        rows.append(row)
    if not rows:
        raise ValueError(f"{name} has no {what}.")
    if twice := [key for key, n in Counter(x["id"] for x in rows).items() if n > 1]:
        raise ValueError(f"{name} has duplicate {what} ids: {some(twice)}.")
    of_types = {isinstance(x["id"], str): x["id"] for x in rows}
    if len(of_types) > 1:
        raise ValueError(
            f"{name} has {what} ids that are numbers and others that are strings, such as "
            f"{of_types[False]} and {of_types[True]!r}; pycocotools cannot sort them, use one type."
        )
    return rows


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _id(value: Any) -> int | str | None:
    return value if isinstance(value, str) else whole(value)


def _side(value: Any) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,9}(\.0*)?\s*", value):
        value = float(value)
    number = whole(value)
    return number if number is not None and number > 0 else None


def some(names: Iterable[Any]) -> str:
    """Join a few of the names for a message."""
    names = list(dict.fromkeys(map(str, names)))
    return ", ".join(names[:EXAMPLES]) + (" …" if len(names) > EXAMPLES else "")
