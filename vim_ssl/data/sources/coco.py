"""Images with objects, boxes and outlines, in COCO's format."""

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
from vim_ssl.data.registry import source
from vim_ssl.data.sources.folder import FileImages
from vim_ssl.data.spec import SPLIT_NAMES, DataSpec, canonical_split, pick_split

NAMED = 5  # examples of one fault
LOOKED_FOR = 20  # images by which their folder is found
INSTANCES = "instances_"
LAYOUT = (
    "Expected are annotations/instances_train2017.json and instances_val2017.json with train2017/ "
    "and val2017/, or annotations/train.json and val.json with train/ and val/."
)


@dataclass(frozen=True)
class Table:
    """What an annotation file says, checked, and small enough to be sent to workers.

    Attributes:
        images: ``id``, ``file_name``, ``width`` and ``height`` of each.
        annotations: JSON of each image's, those that are usable; in them ``segmentation`` is a list
            of polygons, an RLE, or None.
        boxes, outlines: how many of each image's are single objects, and how many of those have
            an outline.
        categories: ``id`` and ``name`` of each, by rising id.
        faults: what is left out, and other things wrong, in words.
    """

    images: list[dict[str, Any]]
    annotations: list[bytes]
    boxes: list[int]
    outlines: list[int]
    categories: list[dict[str, Any]]
    faults: list[str]


class CocoObjects:
    """Boxes and masks by row; what `ImageData` takes as its objects.

    Args:
        tables: their images, one table after another. All have the same categories.
        outlines: whether objects have masks; those without an outline are then left out.
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
        """As in the file, crowds too."""
        found = json.loads(self._annotations[row])
        return [a for a in found if a["segmentation"] is not None or not self.outlines]

    def count(self, row: int) -> int:
        """How many objects there are to learn."""
        return self._counts[row]

    def read(self, row: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """The single objects of an image of ``size`` (width, height); crowds are left out.

        Returns: ``boxes`` float32 (n, 4), left, top, right, bottom in pixels, inside the image;
            ``box_labels`` int64 (n,), class numbers from 0; with outlines ``masks`` uint8 (n, h,
            w), 1 = object.
        Raises: BadImage for another size than the annotations are for, and for an outline that
            cannot be one.
        """
        image = self.images[row]
        name, (width, height) = image["file_name"], size
        if (image["width"], image["height"]) != size:
            raise BadImage(
                name,
                f"the image has {width}×{height} pixels, its annotations are for "
                f"{image['width']}×{image['height']}",
            )
        every = self.annotations(row)
        single = [a for a in every if not a.get("iscrowd")]
        boxes = [clipped(a["bbox"], width, height) for a in single]
        found: dict[str, np.ndarray] = {
            "boxes": np.array(boxes, np.float32).reshape(-1, 4),
            "box_labels": np.array([self._number[a["category_id"]] for a in single], np.int64),
        }
        if self.outlines:
            # Crowds too: pycocotools, which judges by them, never ends on a broken one.
            checked = [(a, _checked(a, name, height, width)) for a in every]
            masks = [mask_tools().decode(rle) for a, rle in checked if not a.get("iscrowd")]
            found["masks"] = np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)
        return found

    def sizes(self, row: int) -> str:
        """A hash of a row's annotations."""
        return blake2b(self._annotations[row], digest_size=8).hexdigest()


@source("coco", extra="detection", options=("label",))
def open_coco(spec: DataSpec) -> ImageData:
    """Open ``coco:ROOT``: COCO as it is unpacked (``annotations/instances_val2017.json`` with
    ``val2017/``), or ``annotations/val.json`` with ``val/`` or ``images/``.

    Classes are the categories by rising id, numbered from 0; the ids may be any. Objects have masks
    if any has an outline; ``label=boxes`` leaves outlines out, ``label=none`` boxes too.
    Annotations without a box, of an image that is not listed, or with an ``iscrowd`` that is
    neither 0 nor 1, and images whose file is missing are left out, counted and named in
    ``faults``. Nothing in the files is executed.

    Raises: FileNotFoundError with what is missing; ValueError for a file that is no COCO, for ids
        given twice or of two types, and for categories that are not listed.
    """
    if spec.label not in (None, "boxes", "none"):
        raise ValueError(
            f"{spec}: label={spec.label} is nothing COCO has; it takes label=boxes, label=none."
        )
    root = Path(spec.location).expanduser()
    files = _annotation_files(root)
    split = pick_split(spec.split, list(files), f"coco:{root}")
    chosen = {name: path for name, path in files.items() if split in ("all", name)}
    tables = [_read(str(path), path.stat().st_mtime_ns) for path in chosen.values()]
    check_same_categories(tables[0].categories, [table.categories for table in tables])
    names, faults = [], [fault for table in tables for fault in table.faults]
    missing: set[str] = set()
    for (part, path), table in zip(chosen.items(), tables, strict=True):
        files_of = [image["file_name"] for image in table.images]
        folder = _image_folder(root, path.stem.removeprefix(INSTANCES), part, files_of)
        below = folder.relative_to(root).as_posix()
        lost = _missing(folder, files_of)
        if lost:
            faults.append(
                f"{len(lost):,} images are not in {below}/ and are left out: {_some(lost)}."
            )
        names += [f"{below}/{name}" for name in files_of]
        missing |= {f"{below}/{name}" for name in lost}
    outlines = spec.label is None and any(any(table.outlines) for table in tables)
    bare = sum(sum(table.boxes) - sum(table.outlines) for table in tables)
    if outlines and bare:
        faults.append(
            f"{bare:,} objects have a box and no outline, and are left out; label=boxes takes all, "
            "without outlines."
        )
    images = FileImages(str(root), names)
    common: dict[str, Any] = {"name": str(spec), "splits": list(files), "split": split}
    if spec.label == "none":
        data = ImageData(images, names, faults=faults, **common)
    else:
        classes = [category["name"] for category in tables[0].categories]
        objects = CocoObjects(tables, outlines)
        data = ImageData(images, names, objects=objects, classes=classes, faults=faults, **common)
    return data.subset(i for i, name in enumerate(names) if name not in missing)


def read_table(content: Any, name: str) -> Table:
    """Check the content of an annotation file.

    Args:
        content: the parsed JSON.
        name: of the file, for messages.
    Raises: ValueError for what is no COCO, ids given twice or of two types, and categories that
        are not listed.
    """
    lists: dict[str, list[dict]] = {}
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(x, dict) for x in entries):
            raise ValueError(
                f"{name} has no list {key!r} of objects; a COCO file has images, annotations and "
                "categories."
            )
        lists[key] = entries
    images = [
        _needed(x, ("id", "file_name", "width", "height"), "image", name) for x in lists["images"]
    ]
    categories = [_needed(x, ("id", "name"), "category", name) for x in lists["categories"]]
    for what, entries in (("image", images), ("category", categories)):
        if twice := [key for key, n in Counter(x["id"] for x in entries).items() if n > 1]:
            raise ValueError(f"{name} gives {what} ids twice: {_some(twice)}.")
        if not entries:
            raise ValueError(f"{name} has no {what}.")
        of_kinds = {isinstance(x["id"], str): x["id"] for x in entries}
        if len(of_kinds) > 1:
            raise ValueError(
                f"{name} has {what} ids that are numbers and others that are texts, such as "
                f"{of_kinds[False]} and {of_kinds[True]!r}, which pycocotools cannot sort; use one "
                "kind."
            )
    categories.sort(key=lambda category: category["id"])
    known, place = {x["id"] for x in categories}, {x["id"]: i for i, x in enumerate(images)}
    usable: list[list[dict]] = [[] for _ in images]
    strange, stray, flat, unclear = [], [], [], []
    for annotation in lists["annotations"]:
        row = place.get(_id(annotation.get("image_id")))
        if row is None:
            stray.append(annotation.get("image_id"))
        elif _id(annotation.get("category_id")) not in known:
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
            f"{len(strange):,} annotations in {name} are of categories that it does not list: ids "
            f"{_some(dict.fromkeys(map(str, strange)))}."
        )
    faults = []
    if stray:
        faults.append(
            f"{len(stray):,} annotations are of images that {name} does not list, and are left "
            f"out: image ids {_some(dict.fromkeys(map(str, stray)))}."
        )
    if flat:
        faults.append(
            f"{len(flat):,} annotations in {name} have no box with a width and a height inside the "
            f"image, and are left out: ids {_some(flat)}."
        )
    if unclear:
        faults.append(
            f"{len(unclear):,} annotations in {name} have an iscrowd that is none of 0, 1, false "
            f"and true, and are left out: ids {_some(unclear)}."
        )
    ids = Counter(str(a.get("id")) for row in usable for a in row)
    if twice := [key for key, n in ids.items() if n > 1]:
        faults.append(
            f"annotation ids are given twice in {name}: {_some(twice)}; nothing here depends on "
            "them."
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


def clipped(box: Any, width: int, height: int) -> tuple[float, float, float, float] | None:
    """COCO's [left, top, width, height] -> left, top, right, bottom inside the image; None for
    what is no box, or has no width or height there."""
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
    """Polygons or an RLE, compressed or not, as pycocotools' RLE.

    Raises: ValueError for what cannot be an outline in such an image; ImportError without
        pycocotools.
    """
    tools = mask_tools()
    if isinstance(outline, list):
        try:
            polygons = [np.array(polygon, np.float64).reshape(-1, 2) for polygon in outline]
        except (TypeError, ValueError) as error:
            raise ValueError("a polygon holds something that is no number") from error
        if not all(np.isfinite(polygon).all() for polygon in polygons):
            raise ValueError("a polygon holds a number that is not finite")
        # pycocotools takes memory by the length of an edge; far outside, where does not matter.
        far = np.array([width, height])
        near = [polygon.clip(-far, 2 * far).reshape(-1).tolist() for polygon in polygons]
        return tools.merge(tools.frPyObjects(near, height, width))
    if outline.get("size") != [height, width]:
        raise ValueError(f"an RLE of size {outline.get('size')}; expected {[height, width]}")
    counts = outline.get("counts")
    if isinstance(counts, list):
        if not all(isinstance(n, int) and n >= 0 for n in counts) or sum(counts) != height * width:
            raise ValueError(f"the counts of an RLE are not of {height * width} pixels in all")
        return tools.frPyObjects(dict(outline), height, width)
    if not isinstance(counts, str) or _run_lengths(counts) != height * width:
        raise ValueError(f"the counts of an RLE are not of {height * width} pixels in all")
    return {"size": [height, width], "counts": counts}


def _checked(annotation: dict[str, Any], name: str, height: int, width: int) -> dict[str, Any]:
    """Its outline as an RLE. Raises: BadImage for one that cannot be."""
    try:
        return to_rle(annotation["segmentation"], height, width)
    except ValueError as error:
        raise BadImage(name, f"annotation {annotation.get('id')}: {error}") from error


def mask_tools() -> Any:
    """`pycocotools.mask`. Raises: ImportError that says how to get it."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError(
            "outlines and average precision need pycocotools: pip install 'vim-ssl[detection]'"
        ) from error
    return mask


def ground_truth(data: ImageData, indices: Iterable[int]) -> dict[str, Any]:
    """What pycocotools judges by: the file's own entries for these images, crowds too, with
    outlines as RLE.

    Images and categories keep their ids, so results fit the file they came from; annotations are
    numbered from 1 on, since pycocotools takes an object of id 0 for one that is never found.

    Raises: ValueError for two images of one id, as of two splits.
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
                # Checked and bounded: pycocotools takes any outline as it comes.
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
        raise ValueError(f"{data.name}: two images have one id; judge one split at a time.")
    return {"images": images, "annotations": annotations, "categories": data.categories}


def check_same_categories(first: list[dict], others: Iterable[list[dict]]) -> None:
    """Raises: ValueError that names a category which one part has and another lacks."""
    for other in others:
        names = [{(c["id"], c["name"]) for c in part} for part in (first, other)]
        if names[0] != names[1]:
            differing = sorted(f"{name} (id {key})" for key, name in names[0] ^ names[1])
            raise ValueError(
                f"the parts have different categories: {_some(differing)} are not in both. Give "
                "all files the same list."
            )


# ------------------------------------------------------------------------- files


@lru_cache(maxsize=4)  # a large file takes half a minute, and is opened for several reasons
def _read(path: str, stamp: int) -> Table:
    try:
        content = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    return read_table(content, Path(path).name)


def _annotation_files(root: Path) -> dict[str, Path]:
    """Split -> its file, train first."""
    folder = root / "annotations"
    if not folder.is_dir():
        held = sorted(path.name for path in root.iterdir())[:8] if root.is_dir() else []
        found = f"it holds {', '.join(held) or 'nothing'}" if root.is_dir() else "it is not there"
        raise FileNotFoundError(f"{root} lacks annotations/; {found}. {LAYOUT}")
    paths = sorted(folder.glob(f"{INSTANCES}*.json")) or sorted(folder.glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no .json file. {LAYOUT}")
    splits = defaultdict(list)
    for path in paths:
        # train2017 is the training part of a year.
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
    """Where the images of a part lie: of the usual places the one that has most of a few."""
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"the file name {name!r} leads out of {root}.")
    few = names[:: max(len(names) // LOOKED_FOR, 1)]
    places = [root / stem, root / split, *(root / "images" / x for x in (stem, split, "")), root]
    held = {place: sum((place / name).is_file() for name in few) for place in places}
    best = max(places, key=lambda place: held[place])
    if not held[best]:
        looked = ", ".join(f"{place.relative_to(root).as_posix()}/" for place in places[:-1])
        raise FileNotFoundError(
            f"None of the images of {split!r} is in {root}, such as {names[0]}; looked in "
            f"{looked}. {LAYOUT}"
        )
    return best


def _missing(folder: Path, names: list[str]) -> list[str]:
    """Those of the files that are not there; each folder is listed once."""
    there: dict[str, set[str]] = {}
    for below in {os.path.dirname(name) for name in names}:
        path = folder / below
        there[below] = set(os.listdir(path)) if path.is_dir() else set()
    return [name for name in names if os.path.basename(name) not in there[os.path.dirname(name)]]


# ------------------------------------------------------------------------- entries


def _needed(entry: dict, keys: Sequence[str], what: str, name: str) -> dict[str, Any]:
    """These keys of an entry. Raises: ValueError naming what is missing or no such value."""
    for key in keys:
        value = entry.get(key)
        if key in ("width", "height"):
            good = isinstance(value, int) and value > 0
        else:
            good = isinstance(value, str) or (key == "id" and isinstance(value, int))
        if not good:
            raise ValueError(f"{name}: an entry {what} has {key} = {value!r}: {str(entry)[:100]}")
    return {key: entry[key] for key in keys}


def _id(value: Any) -> int | str | None:
    return value if isinstance(value, int | str) else None


def _outline(value: Any) -> list | dict | None:
    """A segmentation as a list of polygons or an RLE; None for what has no area."""
    if isinstance(value, dict):
        return value if "counts" in value else None
    if not isinstance(value, list):
        return None
    if value and not isinstance(value[0], list):
        value = [value]  # one polygon, not in a list of its own
    # pycocotools takes four numbers for a box, and fails on two.
    return [p for p in value if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0] or None


def _run_lengths(counts: str) -> int:
    """The sum of a compressed RLE's counts; -1 for one that is broken. pycocotools itself writes
    on behind its memory's end if the counts are too many.

    Five bits a character from "0" on, the sixth says that more follow, the highest of the last five
    is the sign; from the fourth count on it is the difference to the count two before.
    """
    found: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return -1
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            found.append(value + (found[-2] if len(found) > 2 else 0))
            if found[-1] < 0:
                return -1
            value = shift = 0
    return sum(found) if not shift else -1


def _some(names: Iterable[Any]) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:NAMED]) + (" …" if len(names) > NAMED else "")
