"""Drawings of truth and prediction side by side, with the classes' colours below."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F

SIDE = 320  # pixels of a drawn image's longer side
GAP = 6


def sheet(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str],
    legend: Sequence[tuple[Sequence[int], str]],
) -> Image.Image:
    """Panels in rows and columns.

    Args:
        rows: of each its panels, all of one size.
        titles: of the columns.
        legend: colours (red, green, blue, 0 to 255) and what they stand for.
    """
    font = ImageFont.load_default(14)
    column = max([80, *(panel.width for row in rows for panel in row)])  # 80: the titles' width
    width = len(titles) * column + (len(titles) + 1) * GAP
    places, x, y = [], GAP, GAP
    for colour, name in legend:  # wrapped into lines
        need = 20 + int(font.getlength(name)) + 3 * GAP
        if x > GAP and x + need > width:
            x, y = GAP, y + 20
        places.append((x, y, colour, name))
        x += need
    title, below = 24, y + 20 + GAP
    height = title + sum(row[0].height + GAP for row in rows)
    drawn = Image.new("RGB", (width, height + below), "white")
    pen = ImageDraw.Draw(drawn)
    lefts = [GAP + i * (column + GAP) for i in range(len(titles))]
    for left, text in zip(lefts, titles, strict=True):
        pen.text((left, 3), text, "black", font)
    top = title
    for row in rows:
        for left, panel in zip(lefts, row, strict=True):
            drawn.paste(panel, (left, top))
        top += row[0].height + GAP
    for x, y, (red, green, blue), name in places:
        box = (x, top + y, x + 14, top + y + 14)
        pen.rectangle(box, (int(red), int(green), int(blue)), "black")
        pen.text((x + 20, top + y - 2), name, "black", font)
    return drawn


def shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of an image -> of its panel; a small one grows fourfold at most."""
    scale = min(SIDE / max(size), 4)
    width, height = (max(round(side * scale), 1) for side in size)
    return width, height


def class_colours(classes: int) -> Tensor:
    """(classes + 1, 3) uint8, all different up to 255 classes, the last for pixels without one.

    PASCAL VOC's: the bits of a number, spread over red, green and blue. The first class, by custom
    the background, is black, and what has no class is 255, nearly white.
    """
    numbers = torch.tensor([*range(classes), 255])
    shifts = torch.arange(8)
    bits = numbers[:, None, None] >> (3 * shifts + torch.arange(3)[:, None]) & 1  # (n, 3, 8)
    return (bits << (7 - shifts)).sum(2).to(torch.uint8)


DRAWN = 8  # images


def draw(
    rows: Sequence[tuple[Image.Image, np.ndarray, np.ndarray]],
    classes: Sequence[str],
    colours: np.ndarray,
) -> Image.Image:
    """One sheet: image | truth | prediction, a row an image, and the classes' colours below.

    Args:
        rows: (image, truth, prediction), masks (h, w) of the image's size.
        classes: names.
        colours: uint8 (classes + 1, 3), the last for pixels without a class.
    """
    drawn = []
    for image, truth, guess in rows:
        size = shown_size(image.size)
        painted = [
            Image.fromarray(colours[np.minimum(mask, len(classes))]).resize(
                size, Image.Resampling.NEAREST
            )
            for mask in (truth, guess)
        ]
        drawn.append([image.convert("RGB").resize(size), *painted])
    used = sorted({int(i) for _, *masks in rows for mask in masks for i in np.unique(mask)})
    names = [(min(i, len(classes)), classes[i] if i < len(classes) else "no class") for i in used]
    legend = [(colours[number].tolist(), name) for number, name in names]
    return sheet(drawn, ("image", "truth", "prediction"), legend)


def draw_objects(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    masks: Tensor | None = None,
) -> Tensor:
    """Boxes, and masks if given, in their classes' colours.

    Args:
        image: uint8 (c, h, w); of other than three channels the first is shown, grey.
        boxes: (n, 4), left, top, right, bottom in pixels. labels: (n,), class numbers.
        masks: bool (n, h, w).
    Returns: uint8 (3, h, w).
    """
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    image = image if len(image) == 3 else image[:1].expand(3, -1, -1)
    if not len(boxes):
        return image
    palette = class_colours(len(classes) + 1)[1:].tolist()  # no background here
    colours = [tuple(palette[label]) for label in labels.tolist()]
    if masks is not None:
        image = draw_segmentation_masks(image, masks, 0.5, colours)
    names = [classes[label] for label in labels.tolist()]
    return draw_bounding_boxes(image, boxes, names if len(classes) > 1 else None, colours)


def sheet_of_objects(
    rows: Sequence[tuple[Image.Image, dict[str, Any], dict[str, Any]]], classes: Sequence[str]
) -> Image.Image:
    """Truth | prediction, a row an image, and the classes' colours below.

    Args:
        rows: (image, item of the data, found); see `ImageData` and `Detection.predict`.
        classes: names.
    """
    drawn, used = [], set()
    for image, item, found in rows:
        width, height = shown_size(image.size)
        shown = F.pil_to_tensor(image.convert("RGB").resize((width, height)))
        factors = torch.tensor([width / image.width, height / image.height] * 2)
        line = []
        for part, labels in ((item, item["box_labels"]), (found, found["labels"])):
            masks = part.get("masks")
            if masks is not None and len(masks):
                masks = F.resize(torch.from_numpy(masks.astype(np.uint8)), [height, width]) > 0
            boxes = torch.from_numpy(part["boxes"]) * factors
            panel = draw_objects(
                shown, boxes, torch.from_numpy(labels), classes,
                masks if masks is not None and len(masks) else None,
            )  # fmt: skip
            line.append(F.to_pil_image(panel))
            used |= set(labels.tolist())
        drawn.append(line)
    palette = class_colours(len(classes) + 1)[1:].tolist()  # no background here
    return sheet(drawn, ("truth", "prediction"), [(palette[i], classes[i]) for i in sorted(used)])
