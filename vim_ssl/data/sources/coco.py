"""``coco:``: images with objects (boxes and outlines) in COCO's format."""

import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import BadImage
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.sources.folder import FileImages, check_option
from vim_ssl.data.spec import SPLIT_NAMES, DataSpec, canonical_split, pick_split
from vim_ssl.data.walk import contents, list_files
from vim_ssl.utils.optional import require

EXAMPLES = 5  # maximum number of names in a message
PROBED = 20  # number of file names looked up to find a split's image folder
INSTANCES = "instances_"
LAYOUT = (
    "Expected annotations/instances_train2017.json and instances_val2017.json with train2017/ and "
    "val2017/, or annotations/train.json and val.json with train/ and val/."
)


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


@source("coco", extra="detection", options=("label",))
def open_coco(spec: DataSpec) -> Splits:
    """Open ``coco:ROOT``: COCO as it is unpacked (``annotations/instances_val2017.json`` with
    ``val2017/``), or ``annotations/val.json`` with ``val/`` or ``images/``.

    Classes are the categories sorted by id, numbered from 0. Objects have masks if any has an
    outline; ``label=boxes`` skips outlines, ``label=none`` also skips boxes. Skipped are: an
    annotation without a box, or of an unlisted image, or with an ``iscrowd`` other than 0 or 1, and
    an image whose file is missing; ``faults`` counts and names them. Nothing in the files is
    executed.

    Raises: FileNotFoundError naming the missing files; ValueError for a file that is not COCO, for
        duplicate ids or ids of two types, and for unlisted categories.
    """
    check_option(spec, "label", ("boxes", "none"))
    root = Path(spec.location).expanduser()
    files = _annotation_files(root)

    def choose(spec: DataSpec) -> ImageData:
        split = pick_split(spec.split, list(files), f"coco:{root}")
        chosen = {name: path for name, path in files.items() if split in ("all", name)}
        tables = [_read(str(path), path.stat().st_mtime_ns) for path in chosen.values()]
        check_same_categories(tables[0].categories, [table.categories for table in tables])
        names, faults = [], [fault for table in tables for fault in table.faults]
        missing: set[str] = set()
        for (name, path), table in zip(chosen.items(), tables, strict=True):
            listed = [image["file_name"] for image in table.images]
            folder = _image_folder(root, path.stem.removeprefix(INSTANCES), name, listed)
            below = folder.relative_to(root).as_posix()
            if absent := _missing(folder, listed):
                faults.append(
                    f"{len(absent):,} images are missing in {below}/ and skipped: {_some(absent)}."
                )
            names += [f"{below}/{name}" for name in listed]
            missing |= {f"{below}/{name}" for name in absent}
        outlines = spec.label is None and any(any(table.outlines) for table in tables)
        bare = sum(sum(table.boxes) - sum(table.outlines) for table in tables)
        if outlines and bare:
            faults.append(
                f"{bare:,} objects have a box but no outline and are skipped; label=boxes includes "
                "them, without outlines."
            )
        images = FileImages(str(root), names)
        objects = classes = None
        if spec.label != "none":
            objects = CocoObjects(tables, outlines)
            classes = [category["name"] for category in objects.categories]
        data = ImageData(
            images, names, name=str(spec), objects=objects, classes=classes,
            splits=list(files), split=split, faults=faults,
        )  # fmt: skip
        return data.subset(i for i, name in enumerate(names) if name not in missing)

    return Splits(list(files), choose)


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
    images = _needed(lists["images"], ("id", "file_name", "width", "height"), "image", name)
    categories = _needed(lists["categories"], ("id", "name"), "category", name)
    categories.sort(key=lambda category: category["id"])
    usable, faults = _usable(lists["annotations"], images, {x["id"] for x in categories}, name)
    ids = Counter(str(a.get("id")) for row in usable for a in row)
    if twice := [key for key, n in ids.items() if n > 1]:
        faults.append(
            f"{name} has duplicate annotation ids: {_some(twice)}; they are ignored here."
        )
    single = [[a for a in row if not a.get("iscrowd")] for row in usable]
    return Table(
        images,
        [json.dumps(row, separators=(",", ":")).encode() for row in usable],
        [len(row) for row in single],
        [sum(a["segmentation"] is not None for a in row) for row in single],
        categories,
        faults,
    )


def _usable(
    annotations: list[dict], images: list[dict], categories: set, name: str
) -> tuple[list[list[dict]], list[str]]:
    """Return each image's usable annotations, with outlines, and descriptions of skipped ones.

    Raises: ValueError for unlisted categories.
    """
    row_of = {image["id"]: row for row, image in enumerate(images)}
    usable: list[list[dict]] = [[] for _ in images]
    unlisted, strange, flat, unclear = [], [], [], []
    for annotation in annotations:
        row = row_of.get(_id(annotation.get("image_id")))
        if row is None:
            unlisted.append(annotation.get("image_id"))
        elif _id(annotation.get("category_id")) not in categories:
            strange.append(annotation.get("category_id"))
        elif clipped(annotation.get("bbox"), images[row]["width"], images[row]["height"]) is None:
            flat.append(annotation.get("id"))
        elif annotation.get("iscrowd") not in (0, 1, None):  # true and false are 1 and 0
            unclear.append(annotation.get("id"))
        else:
            outline = _outline(annotation.get("segmentation"))
            usable[row].append(annotation | {"segmentation": outline})
    if strange:
        raise ValueError(
            f"{len(strange):,} annotations in {name} have unlisted categories: ids "
            f"{_some(strange)}."
        )
    faults = [
        f"{len(ids):,} annotations {fault} and are skipped: {what} {_some(ids)}."
        for ids, fault, what in (
            (unlisted, f"belong to images that {name} does not list", "image ids"),
            (flat, f"in {name} have no box with a width and a height inside the image", "ids"),
            (unclear, f"in {name} have an iscrowd other than 0, 1, false or true", "ids"),
        )
        if ids
    ]
    return usable, faults


def clipped(box: Any, width: int, height: int) -> tuple[float, float, float, float] | None:
    """Convert COCO's [left, top, width, height] to left, top, right, bottom, clipped to the image.
    Return None for an invalid box and for one without area inside the image."""
    try:
        left, top, wide, high = box
        if not all(map(math.isfinite, (left, top, wide, high))):
            return None
    except (TypeError, ValueError):
        return None
    right, bottom = min(left + wide, width), min(top + high, height)
    left, top = max(left, 0.0), max(top, 0.0)
    return (left, top, right, bottom) if right > left and bottom > top else None


def to_rle(outline: list | dict, height: int, width: int) -> dict[str, Any]:
    """Convert polygons or an RLE, compressed or not, to pycocotools' RLE.

    Raises: ValueError for an invalid outline; ImportError without pycocotools.
    """
    tools = mask_tools()
    if isinstance(outline, list):
        try:
            polygons = [np.array(polygon, np.float64).reshape(-1, 2) for polygon in outline]
        except (TypeError, ValueError) as error:
            raise ValueError("a polygon contains a value that is not a number") from error
        if not all(np.isfinite(polygon).all() for polygon in polygons):
            raise ValueError("a polygon contains a number that is not finite")
        # pycocotools' memory grows with the length of an edge, so distant points are clipped.
        far = np.array([width, height])
        near = [polygon.clip(-far, 2 * far).reshape(-1).tolist() for polygon in polygons]
        return tools.merge(tools.frPyObjects(near, height, width))
    if outline.get("size") != [height, width]:
        raise ValueError(f"an RLE has size {outline.get('size')}; expected {[height, width]}")
    counts = outline.get("counts")
    if isinstance(counts, list):
        if not all(isinstance(n, int) and n >= 0 for n in counts) or sum(counts) != height * width:
            raise ValueError(f"the counts of an RLE do not sum to {height * width} pixels")
        return tools.frPyObjects(dict(outline), height, width)
    if not isinstance(counts, str) or _run_lengths(counts) != height * width:
        raise ValueError(f"the counts of an RLE do not sum to {height * width} pixels")
    return {"size": [height, width], "counts": counts}


def _checked(annotation: dict[str, Any], name: str, height: int, width: int) -> dict[str, Any]:
    """Return the outline of an annotation as an RLE. Raises: BadImage for an invalid one."""
    try:
        return to_rle(annotation["segmentation"], height, width)
    except ValueError as error:
        raise BadImage(name, f"annotation {annotation.get('id')}: {error}") from error


def mask_tools() -> Any:
    """Return the module pycocotools.mask. Raises: ImportError with the package to install."""
    return require("pycocotools.mask", "detection", "Outlines and average precision")


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


def check_same_categories(first: list[dict], others: Iterable[list[dict]]) -> None:
    """Raise ValueError, naming the differing categories, unless all splits have the same."""
    for other in others:
        names = [{(c["id"], c["name"]) for c in split} for split in (first, other)]
        if names[0] != names[1]:
            differing = sorted(f"{name} (id {key})" for key, name in names[0] ^ names[1])
            raise ValueError(
                f"the splits have different categories: {_some(differing)} are not in both. Use "
                "the same list in all files."
            )


# ------------------------------------------------------------------------- files


@lru_cache(maxsize=4)  # a large file takes half a minute, and is opened once per split
def _read(path: str, stamp: int) -> Table:
    try:
        content = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return read_table(content, Path(path).name)


def _annotation_files(root: Path) -> dict[str, Path]:
    """Map each split to its file, train first."""
    folder = root / "annotations"
    if not folder.is_dir():
        raise FileNotFoundError(f"{root} has no annotations/; it {contents(root)}. {LAYOUT}")
    files = list_files(folder, (".json",))
    paths = [folder / file for file in [f for f in files if f.startswith(INSTANCES)] or files]
    if not paths:
        raise FileNotFoundError(f"{folder} contains no .json file. {LAYOUT}")
    splits = defaultdict(list)
    for path in paths:
        # A year after the split is dropped: train2017 is the training split.
        splits[re.sub(r"_?(19|20)\d\d$", "", path.stem.removeprefix(INSTANCES))].append(path)
    known = {name: of for name, of in splits.items() if canonical_split(name) in SPLIT_NAMES}
    for name, of in known.items():
        if len(of) > 1:
            raise ValueError(
                f"{folder} has several files for {name}: {_some(p.name for p in of)}; keep one."
            )
    order = list(SPLIT_NAMES)
    chosen = known or splits
    return {
        name: chosen[name][0]
        for name in sorted(chosen, key=lambda n: order.index(canonical_split(n)) if known else 0)
    }


def _image_folder(root: Path, stem: str, split: str, names: list[str]) -> Path:
    """Return the folder of a split's images: the usual folder that has most of a few samples."""
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"the file name {name!r} is outside of {root}.")
    few = names[:: max(len(names) // PROBED, 1)]
    folders = [root / stem, root / split, *(root / "images" / x for x in (stem, split, "")), root]
    held = {folder: sum((folder / name).is_file() for name in few) for folder in folders}
    best = max(folders, key=lambda folder: held[folder])
    if not held[best]:
        looked = ", ".join(f"{folder.relative_to(root).as_posix()}/" for folder in folders[:-1])
        raise FileNotFoundError(
            f"The images of {split!r} are not in {root}, for example {names[0]}; looked in "
            f"{looked}. {LAYOUT}"
        )
    return best


def _missing(folder: Path, names: list[str]) -> list[str]:
    """Return the files that do not exist; lists each folder only once."""
    tops = {top: folder / top for top in map(os.path.dirname, names)}
    there = {top: set(os.listdir(at)) if at.is_dir() else set() for top, at in tops.items()}
    return [name for name in names if os.path.basename(name) not in there[os.path.dirname(name)]]


# ------------------------------------------------------------------------- entries


def _needed(entries: list[dict], keys: Sequence[str], what: str, name: str) -> list[dict[str, Any]]:
    """Return these keys of the entries.

    Raises: ValueError for a missing or wrong value, for duplicate ids or ids of two types, and for
        an empty list.
    """
    for entry in entries:
        for key in keys:
            value = entry.get(key)
            if key in ("width", "height"):
                good = isinstance(value, int) and value > 0
            else:
                good = isinstance(value, str) or (key == "id" and isinstance(value, int))
            if not good:
                raise ValueError(
                    f"{name}: an entry {what} has {key} = {value!r}: {str(entry)[:100]}"
                )
    if not entries:
        raise ValueError(f"{name} has no {what}.")
    if twice := [key for key, n in Counter(x["id"] for x in entries).items() if n > 1]:
        raise ValueError(f"{name} has duplicate {what} ids: {_some(twice)}.")
    of_types = {isinstance(x["id"], str): x["id"] for x in entries}
    if len(of_types) > 1:
        raise ValueError(
            f"{name} has {what} ids that are numbers and others that are strings, such as "
            f"{of_types[False]} and {of_types[True]!r}; pycocotools cannot sort them, use one type."
        )
    return [{key: entry[key] for key in keys} for entry in entries]


def _id(value: Any) -> int | str | None:
    return value if isinstance(value, int | str) else None


def _outline(value: Any) -> list | dict | None:
    """Return a segmentation as a list of polygons or an RLE; None if it has no area."""
    if isinstance(value, dict):
        return value if "counts" in value else None
    if not isinstance(value, list):
        return None
    if value and not isinstance(value[0], list):
        value = [value]  # one polygon, not in a list
    # pycocotools reads four numbers as a box and fails on two.
    return [p for p in value if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0] or None


def _run_lengths(counts: str) -> int:
    """Return the sum of a compressed RLE's counts; -1 if it is broken. Checked here because
    pycocotools overruns its buffer if there are too many counts.

    Each character, minus "0", has five data bits; the sixth bit is set if more characters follow,
    and the highest data bit of the last character is the sign. From the fourth count on, the
    difference to the count two before is stored.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return -1
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            if lengths[-1] < 0:
                return -1
            value = shift = 0
    return sum(lengths) if not shift else -1


def _some(names: Iterable[Any]) -> str:
    names = list(dict.fromkeys(map(str, names)))
    return ", ".join(names[:EXAMPLES]) + (" …" if len(names) > EXAMPLES else "")
