"""Writers of dense predictions: masks of images, rasters and volumes; objects in COCO's format.

Each writer fills a folder with one file per image and tables over all of them. Tiles of a raster
and planes of a volume are kept in a hidden folder until `Writer.finish` joins them.
"""

import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, groupby
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from vim_ssl.data.images import EXTENSIONS
from vim_ssl.data.labels import IGNORE
from vim_ssl.data.sources.coco import mask_tools
from vim_ssl.data.sources.geotiff import TIFFS, core_of, open_labels, raster_grid, write_labels
from vim_ssl.data.sources.nifti import ENDINGS, write_volume
from vim_ssl.metrics.detection import coco_results
from vim_ssl.metrics.tables import ratio, write_csv
from vim_ssl.tasks.detection import MIN_SCORE
from vim_ssl.tasks.prediction import Writer
from vim_ssl.utils.drawing import (
    class_colours,
    image_grid,
    mask_legend,
    object_colours,
    object_panel,
    overlay_mask,
    overlay_size,
    panel_size,
)
from vim_ssl.utils.files import atomic_path, atomic_write, write_json

PARTS = ".parts"  # folder of tiles and planes
TILE = re.compile(r"\d{3,}-\d{3,}")  # row and column, at the end of a tile's id
ROWS, COLUMNS = 3, 4  # planes in the drawing of a volume
Record = dict[str, Any]


class _FolderWriter(Writer):
    """A writer of one file per image, in folders that mirror the ids of the images.

    Args:
        output: the folder to write.
        model: the model that predicts.
        data: the predicted data. It shows which images, rasters or volumes have the same name up
            to the ending; their files are named with the ending (``a.jpg.png``), or numbered.
        drawings: also draw each image.
    """

    items = "images"

    def __init__(self, output: str | Path, model: Any, data: Any = None, *, drawings: bool = True):
        super().__init__(output)
        self.classes, self.drawings = list(model.classes), drawings
        self._displayed = model.displayed
        wholes = dict.fromkeys(_whole(id) for id in getattr(data, "ids", ()))
        counts = Counter(map(_stem, wholes))
        used = {stem for stem, times in counts.items() if times == 1}
        self._names: dict[str, str] = {}  # of those that would share a file
        for name in wholes:
            if counts[_stem(name)] > 1:
                inside = (f"{_inside(name)}{f'-{i}' if i > 1 else ''}" for i in count(1))
                self._names[name] = next(one for one in inside if one not in used)
                used.add(self._names[name])

    def _file(self, folder: str, name: str, ending: str) -> Path:
        """Return the path of a file for an image, relative to the output; create its folder."""
        relative = Path(folder, self._names.get(name) or _stem(name))
        relative = relative.with_name(relative.name + ending)
        (self.output / relative).parent.mkdir(parents=True, exist_ok=True)
        return relative

    def _save(self, image: Image.Image, path: Path, **options: Any) -> None:
        """Save an image to ``path``, relative to the output."""
        kind = "PNG" if path.suffix == ".png" else "JPEG"
        with atomic_path(self.output / path, shared=False) as partial:
            image.save(partial, kind, **options)

    def _draw(
        self,
        name: str,
        folder: str,
        rows: Sequence[Sequence[Image.Image]],
        legend: Sequence[tuple[Sequence[int], str]],
    ) -> None:
        grid = image_grid(rows, [""] * len(rows[0]), legend)
        self._save(grid, self._file(folder, name, ".jpg"), quality=90, subsampling=0)

    def _table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
        with atomic_path(self.output / name, shared=False) as partial:
            write_csv(partial, columns, rows)


class MaskWriter(_FolderWriter):
    """Writes the predictions of a segmentation model to a folder.

    - ``masks/``: a grey PNG of class numbers per image, of the image's size and relative path, as
      ``masks:`` reads it; a GeoTIFF per raster, with its position, and a ``.nii.gz`` per volume,
      with its axes and position. 255 marks pixels without a prediction: no-data pixels of a raster,
      and tiles and planes that could not be read.
    - ``overlays/``: each image, raster or volume with painted classes and a legend.
    - ``classes.csv``: number, name, colour, pixels and fraction of each class.
    - ``classes.txt``: the names, one per line: with the images in ``images/``, the folder is a
      data set to train on.
    - ``images.csv``: pixels of each class per image, raster or volume, and the size of a pixel.

    Args: see `_FolderWriter`; the model is a `Segmentation`.
    """

    unit = "pixels"

    def __init__(self, output: str | Path, model: Any, data: Any = None, *, overlays: bool = True):
        super().__init__(output, model, data, drawings=overlays)

    def describe(self) -> dict[str, Any]:
        return {"output": "masks", "overlays": self.drawings}

    def write(self, item: dict[str, Any], result: np.ndarray) -> Record:
        """See `Writer.write`; ``result`` is uint8 (h, w)."""
        image, meta = item["image"], item.get("meta", {})
        if isinstance(image, np.ndarray) and image.dtype.kind == "f":
            result = np.where(np.isfinite(image).any(-1), result, IGNORE).astype(np.uint8)
        if "raster" in meta:
            return self._write_raster(item, meta, result)
        if "file" in meta and "volume" in meta:
            return self._write_plane(item, meta, result)
        path = self._file("masks", item["id"], ".png")
        self._save(Image.fromarray(result), path)
        if self.drawings:
            self._draw_whole(item["id"], image, result)
        return {"file": str(path), **self._counted(result)}

    def finish(self, records: Iterable[Record]) -> Path:
        self._table(
            "images.csv",
            ["id", "file", "width", "height", "pixel_size", "unit", *self.classes, "no_prediction"],
            (self._image_row(record) for record in self._joined(records)),
        )
        pixels = Counter[str]()
        for record in records:
            pixels.update(record["counts"])
        total, colours = sum(pixels.values()), class_colours(len(self.classes)).tolist()
        self._table(
            "classes.csv", ["number", "name", "colour", "pixels", "fraction"],
            (
                [i, name, _hex(colours[i]), pixels[name], ratio(pixels[name], total)]
                for i, name in enumerate(self.classes)
            ),
        )  # fmt: skip
        atomic_write(self.output / "classes.txt", "".join(f"{name}\n" for name in self.classes))
        parts, done = self.output / PARTS, self.output / f"{PARTS}-joined"
        shutil.rmtree(done, ignore_errors=True)
        if parts.exists():
            parts.rename(done)  # at once, so that a kill leaves all of them or none
            shutil.rmtree(done)
        return self.output

    def _counted(self, labels: np.ndarray) -> Record:
        """Return the entries of a record that every item has."""
        pixels = np.bincount(labels.ravel(), minlength=IGNORE + 1)
        counts = {name: int(n) for name, n in zip(self.classes, pixels, strict=False) if n}
        return {"size": labels.shape[::-1], "counts": counts}

    def _legend(self, record: Record) -> list[tuple[Sequence[int], str]]:
        width, height = record["size"]
        pixels = [record["counts"].get(name, 0) for name in self.classes]
        total = width * height * record.get("planes", 1)
        return mask_legend([*pixels, total - sum(pixels)], self.classes)

    def _draw_whole(self, name: str, image: Image.Image | np.ndarray, labels: np.ndarray) -> None:
        panel = self._small(image, overlay_size(labels.shape[::-1]))
        painted = overlay_mask(panel, labels, len(self.classes))
        self._draw(name, "overlays", [[painted]], self._legend(self._counted(labels)))

    def _small(self, image: Image.Image | np.ndarray, size: tuple[int, int]) -> Image.Image:
        """Return the visible image at ``size`` (width, height)."""
        if isinstance(image, np.ndarray):  # fewer pixels before they become floats
            step = max(min(image.shape[0] // size[1], image.shape[1] // size[0]) // 2, 1)
            image = image[::step, ::step]
        return self._displayed(image).convert("RGB").resize(size)

    # ------------------------------------------------------------ rasters

    def _write_raster(self, item: Record, meta: Record, labels: np.ndarray) -> Record:
        name, source, box = meta["name"], meta["raster"], meta["core"]
        width, height, area = raster_grid(source)
        record = {"raster": name, "size": [width, height], "area": area}
        if box is None:
            path = self._raster_file(name)
            with atomic_path(self.output / path, shared=False) as partial:
                write_labels(partial, source, None, labels, self.classes)
            if self.drawings:
                self._draw_whole(name, item["image"], labels)
            return {**self._counted(labels), **record, "file": str(path)}
        part, labels = self._file(PARTS, item["id"], ".png"), core_of(labels, meta)
        self._save(Image.fromarray(labels), part)
        left, top, right, bottom = _scaled(box, record["size"])
        if self.drawings and right > left and bottom > top:
            core = core_of(np.asarray(item["image"]), meta)
            image = Image.fromarray(core) if isinstance(item["image"], Image.Image) else core
            drawn = self._small(image, (right - left, bottom - top))
            self._save(drawn, part.with_suffix(".jpg"), quality=95)
        return {**self._counted(labels), **record, "part": str(part), "source": source, "box": box}

    def _raster_file(self, name: str) -> Path:
        return self._file("masks", name, Path(name).suffix if name.endswith(TIFFS) else ".tif")

    def _join_tiles(self, name: str, tiles: Sequence[Record]) -> Record:
        """Write the tiles of a raster to one file, and draw it."""
        path = self._raster_file(name)
        whole = _summed(tiles) | {"file": str(path)}
        if not (self.output / PARTS).exists():  # joined before a kill
            return whole
        size = whole["size"]
        small = overlay_size(size)
        canvas, mask = Image.new("RGB", small, "white"), np.full(small[::-1], IGNORE, np.uint8)
        with (
            atomic_path(self.output / path, shared=False) as partial,
            open_labels(partial, tiles[0]["source"], classes=self.classes) as write,
        ):
            for tile in tiles:
                part = self.output / tile["part"]
                labels = _read(part)
                write(tuple(tile["box"]), labels)
                left, top, right, bottom = _scaled(tile["box"], size)
                if self.drawings and part.with_suffix(".jpg").exists():
                    with Image.open(part.with_suffix(".jpg")) as drawn:
                        canvas.paste(drawn, (left, top))
                    mask[top:bottom, left:right] = _nearest(labels, (right - left, bottom - top))
        if self.drawings:
            painted = overlay_mask(canvas, mask, len(self.classes))
            self._draw(name, "overlays", [[painted]], self._legend(whole))
        return whole

    # ------------------------------------------------------------ volumes

    def _write_plane(self, item: Record, meta: Record, labels: np.ndarray) -> Record:
        part = self._file(PARTS, item["id"], ".png")
        self._save(Image.fromarray(labels), part)
        step = max(meta["planes"] / (ROWS * COLUMNS), 1)  # at the middle of equal sections
        if self.drawings and int(meta["plane"] // step * step + step / 2) == meta["plane"]:
            _, high, wide = meta["spacing"]  # planes may have pixels that are not square
            height, width = labels.shape
            size = panel_size((round(width * wide / min(wide, high)),
                               round(height * high / min(wide, high))))  # fmt: skip
            self._save(self._small(item["image"], size), part.with_suffix(".jpg"), quality=95)
        keys = ("volume", "plane", "planes", "axis")
        return {
            **self._counted(labels), **{key: meta[key] for key in keys}, "part": str(part),
            "source": meta["file"], "volume_mm3": float(np.prod(meta["spacing"])),
        }  # fmt: skip

    def _join_planes(self, name: str, planes: Sequence[Record]) -> Record:
        """Write the planes of a volume to one file, and draw some of them."""
        path = self._file("masks", name, ".nii.gz")
        whole = _summed(planes) | {"file": str(path)}
        if not (self.output / PARTS).exists():  # joined before a kill
            return whole
        parts = {plane["plane"]: self.output / plane["part"] for plane in planes}
        with atomic_path(self.output / path, shared=False) as partial:
            write_volume(
                partial, planes[0]["source"], planes[0]["axis"],
                ((number, _read(part)) for number, part in parts.items()),
            )  # fmt: skip
        drawn = [part for part in parts.values() if part.with_suffix(".jpg").exists()]
        panels = [
            overlay_mask(Image.open(part.with_suffix(".jpg")), _read(part), len(self.classes))
            for part in drawn
        ]
        if panels:
            columns = min(COLUMNS, len(panels))
            panels += [Image.new("RGB", panels[0].size, "white")] * (-len(panels) % columns)
            rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
            self._draw(name, "overlays", rows, self._legend(whole))
        return whole

    # ------------------------------------------------------------ tables

    def _joined(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yield a record per image, raster and volume; join those that are in parts."""

        def whole(record: Record) -> tuple[str, str]:
            kind = next((key for key in ("raster", "volume") if key in record), "id")
            return kind, record[kind]

        for (kind, name), group in groupby(records, whole):
            parts = list(group)
            if "part" not in parts[0]:
                yield from parts
            else:
                join = self._join_tiles if kind == "raster" else self._join_planes
                yield join(name, parts)

    def _image_row(self, record: Record) -> list[Any]:
        size, unit = 1.0, "pixel"
        if record.get("area"):
            size, unit = record["area"], "m2"
        elif "volume_mm3" in record:
            size, unit = record["volume_mm3"], "mm3"
        counts = [record["counts"].get(name, 0) for name in self.classes]
        width, height = record["size"]
        rest = width * height * record.get("planes", 1) - sum(counts)
        return [record["id"], record["file"], width, height, f"{size:g}", unit, *counts, rest]


class BoxWriter(_FolderWriter):
    """Writes the predictions of a detection model to a folder.

    - ``predictions.json``: a COCO file with images, categories, and the objects from ``score`` on
      as annotations, with their scores, and masks as compressed RLE.
    - ``results.json``: the list of all detections, for pycocotools' ``loadRes``, and for average
      precision, which needs those with a low score too.
    - ``drawings/``: each image with the objects from ``score`` on.
    - ``classes.csv`` and ``images.csv``: numbers of these objects per class, and per image.

    Images and categories have the ids of the data if it is ``coco:`` with the model's classes;
    otherwise they are numbered from 1.

    Args: see `_FolderWriter`; the model is a `Detection`.
        score: minimum score, 0 to 1.
    Raises: ValueError for another score; ImportError without pycocotools if the model has masks.
    """

    unit = "objects"

    def __init__(
        self, output: str | Path, model: Any, data: Any = None, *, score: float = MIN_SCORE,
        drawings: bool = True,
    ):  # fmt: skip
        super().__init__(output, model, data, drawings=drawings)
        if not 0 <= score <= 1:
            raise ValueError(f"score is {score}; expected 0 to 1.")
        self.score, self.masks = score, model.masks
        if self.masks:
            mask_tools()  # fail now if pycocotools is missing
        self.categories: list[dict[str, Any]] = [
            {"id": i, "name": name} for i, name in enumerate(self.classes, 1)
        ]
        known = getattr(data, "categories", None) or []
        if [category["name"] for category in known] == self.classes:
            self.categories = known

    def describe(self) -> dict[str, Any]:
        return {
            "output": "boxes", "score": self.score, "drawings": self.drawings,
            "categories": self.categories,
        }  # fmt: skip

    def write(self, item: dict[str, Any], result: dict[str, np.ndarray]) -> Record:
        """See `Writer.write`; ``result`` is that of `Detection.predict_image`."""
        image = self._displayed(item["image"])
        entry = item.get("meta", {}).get("entry") or {"file_name": item["id"]}
        entry = {**entry, "width": image.width, "height": image.height}
        chosen = result["scores"] >= self.score
        sure = {key: values[chosen] for key, values in result.items()}
        labels = Counter(sure["labels"].tolist())
        if self.drawings:
            size = overlay_size(image.size)
            panel = object_panel(image, sure, self.classes, size, sure["scores"].tolist())
            colours = object_colours(len(self.classes))
            legend = [(colours[i], f"{self.classes[i]}: {labels[i]}") for i in sorted(labels)]
            none = f"no object with a score of {100 * self.score:g} % or more"
            self._draw(item["id"], "drawings", [[panel]], legend or [((255, 255, 255), none)])
        return {
            "image": entry, "results": coco_results(result, self.categories, self.masks),
            "counts": {self.classes[i]: n for i, n in sorted(labels.items())},
        }  # fmt: skip

    def finish(self, records: Iterable[Record]) -> Path:
        document = {
            "info": {"description": "objects predicted by a vim_ssl detector"},
            "images": (image for image, _ in self._numbered(records)),
            "categories": iter(self.categories),
            "annotations": self._annotations(records),
        }
        write_json(self.output / "predictions.json", document)
        every = (
            {"image_id": image["id"], **one}
            for image, record in self._numbered(records)
            for one in record["results"]
        )
        write_json(self.output / "results.json", every)
        objects, images = Counter[str](), Counter[str]()
        for record in records:
            objects.update(record["counts"])
            images.update(record["counts"].keys())
        colours = object_colours(len(self.classes))
        self._table(
            "classes.csv", ["id", "name", "colour", "objects", "images"],
            (
                [category["id"], name, _hex(colours[i]), objects[name], images[name]]
                for i, category in enumerate(self.categories) for name in [category["name"]]
            ),
        )  # fmt: skip
        self._table(
            "images.csv", ["image_id", "file_name", "width", "height", "objects", *self.classes],
            (
                [*(image[key] for key in ("id", "file_name", "width", "height")),
                 sum(record["counts"].values()),
                 *(record["counts"].get(name, 0) for name in self.classes)]
                for image, record in self._numbered(records)
            ),
        )  # fmt: skip
        return self.output

    @staticmethod
    def _numbered(records: Iterable[Record]) -> Iterator[tuple[dict[str, Any], Record]]:
        """Yield each image's entry of the COCO file, and its record."""
        for number, record in enumerate(records, 1):
            yield {"id": number} | record["image"], record

    def _annotations(self, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
        number = 0
        for image, record in self._numbered(records):
            for one in record["results"]:
                if one["score"] >= self.score:
                    number += 1
                    _, _, width, height = one["bbox"]
                    area = round(width * height, 2)
                    if self.masks:
                        area = int(mask_tools().area(one["segmentation"]))
                    ids = {"id": number, "image_id": image["id"]}
                    yield {**ids, **one, "area": area, "iscrowd": 0}


def _inside(name: str) -> str:
    """Return a relative path without steps out of its folder."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return "/".join(part.strip("/:") for part in parts if part.strip("/:.")) or "image"


def _stem(name: str) -> str:
    """Return the relative path without the ending of an image or volume."""
    path = _inside(name)
    file = path.rpartition("/")[2].lower()
    ending = next((e for e in (*EXTENSIONS, *ENDINGS) if file.endswith(e) and file != e), "")
    return path[: len(path) - len(ending)]


def _whole(id: str) -> str:
    """Return the raster or volume of the id of a tile or plane, or the id of an image."""
    parent, _, last = id.rpartition("/")
    # Rasters of a pattern may have any ending; tiles of all are named by row and column.
    part = parent.lower().endswith((*TIFFS, *ENDINGS)) or TILE.fullmatch(last)
    return parent if parent and part else id


def _hex(colour: Sequence[int]) -> str:
    return "#" + bytes(colour).hex()


def _scaled(box: Sequence[int], size: Sequence[int]) -> tuple[int, int, int, int]:
    """Return a box of a raster of ``size`` as left, top, right, bottom in its drawing."""
    left, top, width, height = box
    across, down = (
        new / old for new, old in zip(overlay_size((size[0], size[1])), size, strict=True)
    )
    return (
        round(left * across), round(top * down), round((left + width) * across),
        round((top + height) * down),
    )  # fmt: skip


def _nearest(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))


def _read(part: Path) -> np.ndarray:
    with Image.open(part) as image:
        return np.asarray(image)


def _summed(parts: Sequence[Record]) -> Record:
    """Return the record of a raster or volume from those of its parts."""
    counts = Counter[str]()
    for part in parts:
        counts.update(part["counts"])
    name = parts[0].get("raster") or parts[0]["volume"]
    return parts[0] | {"id": name, "counts": counts}
