"""Average precision: pycocotools' figures are another program's, and small cases by hand."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from vim_ssl.data import ImageData
from vim_ssl.data.sources.coco import CocoObjects, ground_truth, mask_tools, read_table
from vim_ssl.metrics.detection import DetectionMetrics, evaluate_coco
from vim_ssl.utils.drawing import class_colours, object_grid, overlay_objects

WIDTH, HEIGHT = 160, 120
CLASSES = [(3, "ape"), (7, "cat"), (90, "dog")]


def rectangle(box) -> list[list[float]]:
    left, top, width, height = box
    right, bottom = left + width, top + height
    return [[left, top, right, top, right, bottom, left, bottom]]


def images(*boxes_of_one, **more) -> ImageData:
    """One image for each list of (category, box, extra entries)."""
    annotations = [
        {"id": 0, "image_id": 100 + i, "category_id": key, "bbox": list(box), "iscrowd": 0,
         "segmentation": rectangle(box), "area": box[2] * box[3]} | extra
        for i, boxes in enumerate(boxes_of_one)
        for key, box, extra in boxes
    ]  # fmt: skip
    table = {
        "images": [
            {"id": 100 + i, "file_name": str(i), "width": WIDTH, "height": HEIGHT}
            for i in range(len(boxes_of_one))
        ],
        "annotations": annotations,
        "categories": [{"id": key, "name": name} for key, name in CLASSES],
    }
    names = [str(i) for i in range(len(boxes_of_one))]
    objects = CocoObjects([read_table(table, "here")], outlines=True)
    classes = [name for _, name in CLASSES]
    return ImageData(names, names, name="here", objects=objects, classes=classes)


def found(*objects) -> dict[str, np.ndarray]:
    """(class number, box as left, top, width, height, score)."""
    boxes = np.array([box for _, box, _ in objects], np.float32).reshape(-1, 4)
    masks = np.zeros((len(objects), HEIGHT, WIDTH), bool)
    for mask, (left, top, width, height) in zip(masks, boxes.astype(int), strict=True):
        mask[top : top + height, left : left + width] = True
    boxes[:, 2:] += boxes[:, :2]
    return {
        "boxes": boxes, "masks": masks,
        "labels": np.array([label for label, _, _ in objects], np.int64),
        "scores": np.array([score for _, _, score in objects], np.float32),
    }  # fmt: skip


A, B, C = (10, 10, 40, 40), (60, 20, 50, 30), (5, 60, 20, 20)


def figures(data: ImageData, *results, masks: bool = True) -> dict:
    scores = DetectionMetrics(data, masks)
    for i, result in enumerate(results):
        scores.add(i, result)
    return scores.compute()


def test_all_found_is_a_hundred_though_ids_are_zero():
    data = images([(3, A, {}), (7, B, {})], [])
    got = figures(data, found((0, A, 0.9), (1, B, 0.8)), found())
    assert [got[f"{kind}_{name}"] for kind in ("box", "mask") for name in ("ap", "ap50", "ar")] == [
        100.0
    ] * 6
    assert got["box_ap_small"] is None  # there is none below 32 x 32


@pytest.mark.parametrize(
    ("result", "ap50"),
    [
        (found(), 0.0),
        (found((0, A, 0.9)), 50.5),  # one of two: precision 1 at recalls 0 to 0.5, 51 of 101
        (found((0, A, 0.9), (0, A, 0.8), (0, B, 0.7)), 100 * (51 + 50 * 2 / 3) / 101),
        (found((1, A, 0.9), (2, B, 0.9)), 0.0),  # another class
    ],
    ids=["nothing", "one of two", "one twice", "other classes"],
)
def test_average_precision_by_hand(result, ap50):
    got = figures(images([(3, A, {}), (3, B, {})]), result)
    assert got["box_ap50"] == got["mask_ap50"] == pytest.approx(ap50, abs=0.01)


def test_what_is_found_in_a_crowd_is_neither_right_nor_wrong():
    crowd = {"iscrowd": 1}
    data = images([(3, A, {}), (3, B, crowd)])
    inside = [(0, (61 + 6 * i, 22, 5, 20), 0.95) for i in range(6)]
    assert figures(data, found((0, A, 0.9), *inside))["box_ap"] == 100
    assert figures(images([(3, A, {})]), found((0, A, 0.9), *inside))["box_ap"] < 50


def noisy(seed: int = 0) -> tuple[ImageData, list[dict]]:
    """Twelve images with objects of many sizes, some of them crowds; most found, by and by."""
    rng = np.random.default_rng(seed)
    truths, results = [], []
    for _ in range(12):
        truth, result = [], []
        for _ in range(rng.integers(0, 7)):
            size = rng.uniform(6, 100, 2)
            corner = rng.uniform(0, np.array([WIDTH, HEIGHT]) - size)
            box = tuple(float(round(x, 1)) for x in (*corner, *size))
            key = int(rng.integers(3))
            truth.append((CLASSES[key][0], box, {"iscrowd": int(rng.random() < 0.1)}))
            if rng.random() < 0.8:
                moved = np.array(box) + rng.normal(0, 3, 4)
                moved[2:] = moved[2:].clip(3)
                moved[:2] = moved[:2].clip(0)
                key = key if rng.random() < 0.8 else int(rng.integers(3))
                result.append((key, tuple(moved), float(rng.random())))
        truths.append(truth)
        results.append(found(*result))
    return images(*truths), results


def test_another_program_finds_the_same(tmp_path):
    """faster-coco-eval, of the files: the truth, and results.json as `loadRes` takes it."""
    faster = pytest.importorskip("faster_coco_eval")
    data, results = noisy()
    scores = DetectionMetrics(data, masks=True)
    for i, result in enumerate(results):
        scores.add(i, result)
    ours = scores.compute()
    scores.write(tmp_path)
    (tmp_path / "truth.json").write_text(json.dumps(ground_truth(data, range(len(data)))))
    for kind, name in (("box", "bbox"), ("mask", "segm")):
        entries = json.loads((tmp_path / "results.json").read_text())
        if kind == "mask":  # by whose area small and large are told apart
            entries = [{k: v for k, v in entry.items() if k != "bbox"} for entry in entries]
        known = faster.COCO(str(tmp_path / "truth.json"))
        judged = faster.COCOeval_faster(known, known.loadRes(entries), name, print_function=str)
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
        for figure, place in (("ap", 0), ("ap50", 1), ("ap75", 2), ("ap_small", 3),
                              ("ap_medium", 4), ("ap_large", 5), ("ar", 8)):  # fmt: skip
            assert ours[f"{kind}_{figure}"] == pytest.approx(100 * judged.stats[place], abs=0.006)
    assert 20 < ours["box_ap"] < 90


def test_results_are_in_the_files_own_numbers(tmp_path):
    scores = DetectionMetrics(images([(90, A, {})]), masks=True)
    scores.add(0, found((2, A, 0.123456)))
    (result,) = scores.results
    assert (result["image_id"], result["category_id"]) == (100, 90)
    assert result["bbox"] == list(A)
    assert result["score"] == 0.12346
    mask = mask_tools().decode(result["segmentation"])
    assert (mask.shape, mask.sum()) == ((HEIGHT, WIDTH), 1600)
    before = json.dumps(scores.results)
    scores.compute()
    assert json.dumps(scores.results) == before


def test_the_tables(tmp_path):
    scores = DetectionMetrics(images([(3, A, {}), (3, B, {}), (7, C, {"iscrowd": 1})]), masks=False)
    scores.add(0, found((0, A, 0.9), (2, C, 0.9)))
    scores.compute()
    scores.write(tmp_path)
    with open(tmp_path / "classes.csv") as file:
        rows = list(csv.DictReader(file))
    assert [tuple(row.values()) for row in rows] == [
        ("ape", "2", "1", "50.5"), ("cat", "0", "0", ""), ("dog", "0", "1", ""),
    ]  # fmt: skip
    lines = scores.table().splitlines()
    assert lines[0].split() == ["class", "objects", "found", "box", "AP"]
    assert lines[1].split() == ["ape", "2", "1", "50.5"]
    assert "segmentation" not in json.loads((tmp_path / "results.json").read_text())[0]


def test_nothing_to_find_is_an_error():
    with pytest.raises(ValueError, match="no image has an object"):
        figures(images([], [(3, A, {"iscrowd": 1})]), found((0, A, 0.9)), found())


def test_judging_prints_nothing(capsys):
    evaluate_coco(ground_truth(images([(3, A, {})]), [0]), [], "bbox")
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------- drawings


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_boxes_and_masks_are_drawn_in_their_classes_colours(channels):
    image = torch.zeros(channels, 40, 60, dtype=torch.uint8)
    boxes, labels = torch.tensor([[5.0, 5, 30, 30]]), torch.tensor([1])
    colour = class_colours(3)[2]
    drawn = overlay_objects(image, boxes, labels, ["one", "two"])
    assert (drawn.shape, drawn.dtype) == ((3, 40, 60), torch.uint8)
    assert torch.equal(drawn[:, 5, 29], colour)
    assert not drawn[:, 20, 20].any()
    masks = torch.zeros(1, 40, 60, dtype=torch.bool)
    masks[0, 18:22, 18:22] = True
    assert overlay_objects(image, boxes, labels, ["one", "two"], masks)[:, 20, 20].any()
    assert not overlay_objects(image, boxes[:0], labels[:0], ["one", "two"]).any()


def test_a_sheet_has_a_row_an_image():
    item = {"boxes": np.array([[1, 1, 9, 9]], np.float32), "box_labels": np.array([0])}
    nothing = found()
    rows = [(Image.new("L", (WIDTH, HEIGHT), 200), item, nothing)] * 2
    one, both = (object_grid(rows[:n], ["tree"]) for n in (1, 2))
    assert both.height > one.height + 200
    assert both.width == one.width
