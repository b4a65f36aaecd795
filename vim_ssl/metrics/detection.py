"""Detection metrics: COCO's average precision, and tables."""

import io
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.sources.coco import ground_truth, mask_tools
from vim_ssl.metrics.tables import class_table, write_csv
from vim_ssl.utils.numbers import REMEDY, require_finite

KINDS = {"box": "bbox", "mask": "segm"}  # our names, pycocotools' names
# Positions in pycocotools' twelve statistics; "ap" is the mean over IoU 0.5 to 0.95.
STATISTICS = {
    "ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5, "ar": 8,
}  # fmt: skip


class DetectionMetrics:
    """Metrics of detections that are added image by image.

    Args:
        data: the images with their boxes.
        masks: also evaluate masks.
    Attributes: ``results``, a list of dicts as input for pycocotools' ``loadRes``: the ids are
        those of the data, boxes are left, top, width, height in pixels, masks compressed RLE.
    """

    def __init__(self, data: ImageData, masks: bool):
        self.data, self.kinds = data, list(KINDS) if masks else ["box"]
        self.classes = list(data.classes or [])
        self.results: list[dict[str, Any]] = []
        self._evaluated: list[int] = []
        self._by_class: dict[str, list[float]] = {}

    def add(self, index: int, detections: dict[str, np.ndarray]) -> None:
        """Add the detections in image ``index``; see `Detection.predict`.

        Raises: ValueError for boxes or scores that are not finite.
        """
        for what in ("boxes", "scores"):
            require_finite(detections[what], f"{self.data.ids[index]}: the {what}", REMEDY)
        self._evaluated.append(index)
        image, _ = self.data.annotated(index)
        for one in coco_results(detections, self.data.categories or [], "mask" in self.kinds):
            self.results.append({"image_id": image["id"], **one})

    def compute(self) -> dict[str, float | None]:
        """Compute, in per cent rounded to 0.01, for boxes (``box_…``) and masks (``mask_…``):
        ``ap`` (mean over IoU 0.5 to 0.95), ``ap50``, ``ap75``, ``ap_small`` (objects below 32²
        pixels), ``ap_medium``, ``ap_large`` (from 96² on), and ``ar``, the recall with 100
        detections per image; None without such objects.

        Raises: ValueError if no image has an object; ImportError without pycocotools.
        """
        metrics: dict[str, float | None] = {}
        for kind in self.kinds:
            truth = ground_truth(self.data, self._evaluated)
            if all(entry["iscrowd"] for entry in truth["annotations"]):
                raise ValueError("no image has an object; evaluation needs at least one.")
            coco = evaluate_coco(truth, self.results, KINDS[kind])
            for name, position in STATISTICS.items():
                metrics[f"{kind}_{name}"] = _percent(coco.stats[position])
            precision = coco.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class by its id
            self._by_class[kind] = [_mean(one) for one in np.moveaxis(precision, 2, 0)]
        return metrics

    def per_class(self) -> list[dict[str, Any]]:
        """One row per class: ``objects`` (ground truth), ``found`` (detections), and AP in per cent
        (None if the class is absent). Call `compute` first."""
        objects = Counter(
            entry["category_id"]
            for index in self._evaluated
            for entry in self.data.annotated(index)[1]
            if not entry.get("iscrowd")
        )
        matches = Counter(result["category_id"] for result in self.results)
        ids = [category["id"] for category in self.data.categories or []]
        position = {id: k for k, id in enumerate(sorted(ids))}  # pycocotools sorts classes by id
        return [
            {"class": name, "objects": objects[ids[i]], "found": matches[ids[i]]}
            | {
                f"{kind}_ap": _percent(self._by_class[kind][position[ids[i]]])
                for kind in self.kinds
            }
            for i, name in enumerate(self.classes)
        ]

    def write(self, folder: Path) -> None:
        """Write ``results.json`` and ``classes.csv`` (one row per class)."""
        (folder / "results.json").write_text(json.dumps(self.results), encoding="utf-8")
        rows = self.per_class()
        cells = [[str(v) if isinstance(v, float) else v for v in row.values()] for row in rows]
        write_csv(folder / "classes.csv", list(rows[0]), cells)

    def table(self) -> str:
        """Table of the classes with the most objects, as text."""
        columns = {"objects": "objects", "found": "found"}
        columns |= {f"{kind} AP": f"{kind}_ap" for kind in self.kinds}
        return class_table(self.per_class(), "objects", columns)


def coco_results(
    detections: dict[str, np.ndarray], categories: Sequence[dict[str, Any]], masks: bool
) -> list[dict[str, Any]]:
    """Convert the detections in an image to COCO's results, without the id of the image.

    Args:
        detections: see `Detection.predict_image`.
        categories: the ``id`` of each class.
        masks: also convert the masks, to compressed RLE.
    """
    results = []
    for i, (left, top, right, bottom) in enumerate(detections["boxes"].tolist()):
        result = {
            "category_id": categories[int(detections["labels"][i])]["id"],
            "bbox": [round(x, 2) for x in (left, top, right - left, bottom - top)],
            "score": round(float(detections["scores"][i]), 5),
        }
        if masks:
            rle = mask_tools().encode(np.asfortranarray(detections["masks"][i].astype(np.uint8)))
            size = [int(side) for side in rle["size"]]
            result["segmentation"] = {"size": size, "counts": rle["counts"].decode()}
        results.append(result)
    return results


def evaluate_coco(truth: dict[str, Any], results: list[dict[str, Any]], kind: str) -> Any:
    """Run pycocotools' COCOeval and return it, with ``stats`` and ``eval`` filled.

    Args:
        truth: the content of an annotation file, with annotation ids from 1.
        results: see `DetectionMetrics`; may be empty.
        kind: "bbox" or "segm".
    Raises: ImportError with the package to install.
    """
    mask_tools()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(io.StringIO()):
        reference, detections = COCO(), COCO()
        reference.dataset = truth
        reference.createIndex()
        if results:
            # loadRes modifies its argument. If a result has a box, loadRes replaces the area of the
            # mask, which separates small from large objects, with the area of the box.
            unused = "bbox" if kind == "segm" else "segmentation"
            kept = [{k: v for k, v in one.items() if k != unused} for one in results]
            detections = reference.loadRes(kept)
        else:  # loadRes does not accept an empty list
            detections.dataset = truth | {"annotations": []}
            detections.createIndex()
        evaluation = COCOeval(reference, detections, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _mean(precision: np.ndarray) -> float:
    """Mean of the defined values, or -1; pycocotools writes -1 for undefined ones."""
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else -1.0


def _percent(share: float) -> float | None:
    return None if share < 0 else round(100 * float(share), 2)
