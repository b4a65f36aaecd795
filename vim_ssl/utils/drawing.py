"""Image grids of ground truth and predictions, with a legend of the classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F

SIDE = 320  # longer side of a panel in pixels
GAP = 6
GRID_ROWS = 8  # images per grid


def image_grid(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str],
    legend: Sequence[tuple[Sequence[int], str]],
) -> Image.Image:
    """Arrange panels in rows and columns, with a legend below.

    Args:
        rows: lists of panels; all panels in a row have the same size.
        titles: titles of the columns.
        legend: pairs of colour (red, green, blue, 0 to 255) and name.
    """
    font = ImageFont.load_default(14)
    column = max([80, *(panel.width for row in rows for panel in row)])  # 80: width of a title
    width = len(titles) * column + (len(titles) + 1) * GAP
    entries, x, y = [], GAP, GAP
    for colour, name in legend:  # wrapped into lines
        need = 20 + int(font.getlength(name)) + 3 * GAP
        if x > GAP and x + need > width:
            x, y = GAP, y + 20
        entries.append((x, y, colour, name))
        x += need
    title, below = 24, y + 20 + GAP
    height = title + sum(row[0].height + GAP for row in rows)
    grid = Image.new("RGB", (width, height + below), "white")
    pen = ImageDraw.Draw(grid)
    lefts = [GAP + i * (column + GAP) for i in range(len(titles))]
    for left, text in zip(lefts, titles, strict=True):
        pen.text((left, 3), text, "black", font)
    top = title
    for row in rows:
        for left, panel in zip(lefts, row, strict=True):
            grid.paste(panel, (left, top))
        top += row[0].height + GAP
    for x, y, (red, green, blue), name in entries:
        box = (x, top + y, x + 14, top + y + 14)
        pen.rectangle(box, (int(red), int(green), int(blue)), "black")
        pen.text((x + 20, top + y - 2), name, "black", font)
    return grid


def panel_size(size: tuple[int, int]) -> tuple[int, int]:
    """Size (width, height) of an image's panel; small images are enlarged at most fourfold."""
    scale = min(SIDE / max(size), 4)
    width, height = (max(round(side * scale), 1) for side in size)
    return width, height


def class_colours(classes: int) -> Tensor:
    """Return class colours, (classes + 1, 3) uint8; the last one is for unlabelled pixels. They are
    distinct for up to 255 classes.

    These are PASCAL VOC's colours: the bits of a class index, spread over red, green and blue. The
    first class, usually the background, is black; unlabelled pixels (255) are nearly white.
    """
    numbers = torch.tensor([*range(classes), 255])
    shifts = torch.arange(8)
    bits = numbers[:, None, None] >> (3 * shifts + torch.arange(3)[:, None]) & 1  # (n, 3, 8)
    return (bits << (7 - shifts)).sum(2).to(torch.uint8)


def mask_grid(
    rows: Sequence[tuple[Image.Image, np.ndarray, np.ndarray]],
    classes: Sequence[str],
    colours: np.ndarray,
) -> Image.Image:
    """Draw the grid image | truth | prediction, one row per image.

    Args:
        rows: (image, truth, prediction); the masks (h, w) have the image's size.
        classes: names of the classes.
        colours: uint8 (classes + 1, 3); the last one is for unlabelled pixels.
    """
    panels = []
    for image, truth, guess in rows:
        size = panel_size(image.size)
        painted = [
            Image.fromarray(colours[np.minimum(mask, len(classes))]).resize(
                size, Image.Resampling.NEAREST
            )
            for mask in (truth, guess)
        ]
        panels.append([image.convert("RGB").resize(size), *painted])
    used = sorted({int(i) for _, *masks in rows for mask in masks for i in np.unique(mask)})
    names = [(min(i, len(classes)), classes[i] if i < len(classes) else "no class") for i in used]
    legend = [(colours[number].tolist(), name) for number, name in names]
    return image_grid(panels, ("image", "truth", "prediction"), legend)


def overlay_objects(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    masks: Tensor | None = None,
) -> Tensor:
    """Draw boxes, and masks if given, over an image in the colours of their classes.

    Args:
        image: uint8 (c, h, w); unless there are three channels, the first is drawn in grey.
        boxes: (n, 4), left, top, right, bottom in pixels.
        labels: (n,), class indices.
        masks: bool (n, h, w).
    Returns: uint8 (3, h, w).
    """
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    image = image if len(image) == 3 else image[:1].expand(3, -1, -1)
    if not len(boxes):
        return image
    palette = _object_colours(len(classes))
    colours = [tuple(palette[label]) for label in labels.tolist()]
    if masks is not None:
        image = draw_segmentation_masks(image, masks, 0.5, colours)
    names = [classes[label] for label in labels.tolist()]
    return draw_bounding_boxes(image, boxes, names if len(classes) > 1 else None, colours)


def object_grid(
    rows: Sequence[tuple[Image.Image, dict[str, Any], dict[str, Any]]], classes: Sequence[str]
) -> Image.Image:
    """Draw the grid truth | prediction, one row per image.

    Args:
        rows: (image, item of the data, detections); see `ImageData` and `Detection.predict`.
        classes: names of the classes.
    """
    panels, used = [], set()
    for image, item, detections in rows:
        width, height = panel_size(image.size)
        pixels = F.pil_to_tensor(image.convert("RGB").resize((width, height)))
        factors = torch.tensor([width / image.width, height / image.height] * 2)
        row = []
        for objects, labels in ((item, item["box_labels"]), (detections, detections["labels"])):
            masks = objects.get("masks")
            if masks is not None and len(masks):
                masks = F.resize(torch.from_numpy(masks.astype(np.uint8)), [height, width]) > 0
            else:
                masks = None
            boxes = torch.from_numpy(objects["boxes"]) * factors
            panel = overlay_objects(pixels, boxes, torch.from_numpy(labels), classes, masks)
            row.append(F.to_pil_image(panel))
            used |= set(labels.tolist())
        panels.append(row)
    palette = _object_colours(len(classes))
    legend = [(palette[i], classes[i]) for i in sorted(used)]
    return image_grid(panels, ("truth", "prediction"), legend)


def _object_colours(classes: int) -> list[list[int]]:
    """Class colours without black, the colour of the background."""
    return class_colours(classes + 1)[1:].tolist()
