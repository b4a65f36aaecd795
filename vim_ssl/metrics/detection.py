"""How good found objects are: COCO's average precision, tables, drawings."""

import csv
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.sources.coco import ground_truth, mask_tools

KINDS = {"box": "bbox", "mask": "segm"}  # our names, pycocotools' names
# Of pycocotools' twelve figures: "" is the mean over IoU 0.5 to 0.95.
FIGURES = {
    "ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5, "ar": 8,
}  # fmt: skip


class BoxScores:
    """Results, image by image.

    Args:
        data: the images with their boxes.
        masks: whether masks are judged too.
    Attributes: ``results``, a list of dicts as pycocotools' ``loadRes`` takes it: the ids are the
        data's own, boxes are left, top, width, height in pixels, masks compressed RLE.
    """

    def __init__(self, data: ImageData, masks: bool):
        self.data, self.kinds = data, list(KINDS) if masks else ["box"]
        self.classes = list(data.classes or [])
        self.results: list[dict[str, Any]] = []
        self._judged: list[int] = []
        self._by_class: dict[str, list[float]] = {}

    def add(self, index: int, found: dict[str, np.ndarray]) -> None:
        """Take what was found in image ``index``; see `Detection.predict`."""
        self._judged.append(index)
        image, _ = self.data.annotated(index)
        for i, (left, top, right, bottom) in enumerate(found["boxes"].tolist()):
            result = {
                "image_id": image["id"],
                "category_id": (self.data.categories or [])[int(found["labels"][i])]["id"],
                "bbox": [round(x, 2) for x in (left, top, right - left, bottom - top)],
                "score": round(float(found["scores"][i]), 5),
            }
            if "mask" in self.kinds:
                rle = mask_tools().encode(np.asfortranarray(found["masks"][i].astype(np.uint8)))
                size = [int(side) for side in rle["size"]]
                result["segmentation"] = {"size": size, "counts": rle["counts"].decode()}
            self.results.append(result)

    def figures(self) -> dict[str, float | None]:
        """In per cent, rounded to 0.01, of boxes (``box_…``) and masks (``mask_…``): ``ap`` (mean
        over IoU 0.5 to 0.95), ``ap50``, ``ap75``, ``ap_small`` (objects below 32² pixels),
        ``ap_medium``, ``ap_large`` (from 96² on), and ``ar``, the recall with 100 objects an
        image; None where there is no such object.

        Raises: ValueError when no image has an object; ImportError without pycocotools.
        """
        figures: dict[str, float | None] = {}
        for kind in self.kinds:
            truth = ground_truth(self.data, self._judged)
            if not any(not entry["iscrowd"] for entry in truth["annotations"]):
                raise ValueError("no image has an object; there is nothing to judge.")
            judged = judge(truth, self.results, KINDS[kind])
            for name, place in FIGURES.items():
                figures[f"{kind}_{name}"] = _percent(judged.stats[place])
            precision = judged.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class by its id
            self._by_class[kind] = [_mean(of_one) for of_one in np.moveaxis(precision, 2, 0)]
        return figures

    def per_class(self) -> list[dict[str, Any]]:
        """A row a class: objects, found, and the average precisions in per cent; None where the
        class is absent. After `figures`."""
        objects, found = [0] * len(self.classes), [0] * len(self.classes)
        number = {c["id"]: i for i, c in enumerate(self.data.categories or [])}
        for index in self._judged:
            for entry in self.data.annotated(index)[1]:
                objects[number[entry["category_id"]]] += not entry.get("iscrowd")
        for result in self.results:
            found[number[result["category_id"]]] += 1
        return [
            {"class": name, "objects": objects[i], "found": found[i]}
            | {f"{kind}_ap": _percent(self._by_class[kind][i]) for kind in self.kinds}
            for i, name in enumerate(self.classes)
        ]

    def write(self, folder: Path) -> None:
        """``results.json`` and ``classes.csv`` (a line a class)."""
        (folder / "results.json").write_text(json.dumps(self.results))
        rows = self.per_class()
        with open(folder / "classes.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)

    def table(self, most: int = 20) -> str:
        """For a person: the classes with most objects, one a line."""
        rows = sorted(self.per_class(), key=lambda row: -row["objects"])
        width = max(5, *(len(row["class"]) for row in rows[:most]))
        head = "  ".join(f"{kind + ' AP':>7}" for kind in self.kinds)
        lines = [f"{'class':{width}}  {'objects':>7}  {'found':>7}  {head}"]
        for row in rows[:most]:
            values = [row[f"{kind}_ap"] for kind in self.kinds]
            cells = "  ".join(f"{'-' if v is None else format(v, '.1f'):>7}" for v in values)
            lines.append(f"{row['class']:{width}}  {row['objects']:7}  {row['found']:7}  {cells}")
        if len(rows) > most:
            lines.append(f"… and {len(rows) - most} more in classes.csv")
        return "\n".join(lines)


def judge(truth: dict[str, Any], results: list[dict[str, Any]], kind: str) -> Any:
    """pycocotools' COCOeval, evaluated: ``stats``, ``eval``.

    Args:
        truth: the content of an annotation file, ids of annotations from 1 on.
        results: see `BoxScores`; none will do.
        kind: "bbox" or "segm".
    Raises: ImportError that says how to get pycocotools.
    """
    mask_tools()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(io.StringIO()):
        known, found = COCO(), COCO()
        known.dataset = truth
        known.createIndex()
        if results:
            # It writes into what it is given. And where a result has a box, its area counts for
            # the mask's, by which small and large are told apart.
            left_out = {"bbox"} if kind == "segm" else {"segmentation"}
            kept = [{k: v for k, v in one.items() if k not in left_out} for one in results]
            found = known.loadRes(kept)
        else:  # which loadRes does not take
            found.dataset = truth | {"annotations": []}
            found.createIndex()
        judged = COCOeval(known, found, kind)
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return judged


def _mean(precision: np.ndarray) -> float:
    """Over what is there; pycocotools writes -1 for what is not."""
    there = precision[precision > -1]
    return float(there.mean()) if there.size else -1.0


def _percent(share: float) -> float | None:
    return None if share < 0 else round(100 * float(share), 2)
