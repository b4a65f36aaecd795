"""Drawings of ground truth and predictions: grids, overlays, legends of the classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F

SIDE = 320  # longer side of a panel in pixels
LARGE = 1024  # maximum longer side of an overlay in pixels
GAP = 6
GRID_ROWS = 8  # images per grid
UNLABELLED = 255  # class number of unlabelled pixels
OPACITY = 0.5  # of a class over the image
Colour = tuple[int, int, int]
# Colours of the classes from 1 on that stay apart on a photograph, in order of contrast.
VIVID = (
    (230, 25, 75), (0, 130, 255), (255, 225, 25), (60, 180, 75), (240, 50, 230), (245, 130, 48),
    (70, 240, 240), (145, 30, 180), (190, 240, 60), (250, 170, 200), (0, 128, 128), (170, 110, 40),
)  # fmt: skip


def image_grid(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str],
    legend: Sequence[tuple[Sequence[int], str]],
) -> Image.Image:
    """Arrange panels in rows and columns, with a legend below.

    Args:
        rows: lists of panels; all panels in a row have the same size.
        titles: titles of the columns; if all are empty, there is no line for them.
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
    title, below = 24 if any(titles) else GAP, y + 20 + GAP if legend else 0
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


def overlay_size(size: tuple[int, int]) -> tuple[int, int]:
    """Size (width, height) of a single overlay: the image's, unless it is too large, or too small
    for a legend."""
    scale = min(LARGE / max(size), max(SIDE / max(size), 1), 8)
    width, height = (max(round(side * scale), 1) for side in size)
    return width, height


def class_colours(classes: int) -> Tensor:
    """Return class colours, (classes + 1, 3) uint8; the last one is for unlabelled pixels. They are
    distinct for up to 255 classes.

    The first class, usually the background, is black, the next ones are `VIVID`. The others, and
    nearly white for unlabelled pixels (255), are PASCAL VOC's: the bits of the class index, spread
    over red, green and blue.
    """
    numbers = torch.tensor([*range(classes), UNLABELLED])
    shifts = torch.arange(8)
    bits = numbers[:, None, None] >> (3 * shifts + torch.arange(3)[:, None]) & 1  # (n, 3, 8)
    colours = (bits << (7 - shifts)).sum(2).to(torch.uint8)
    vivid = torch.tensor(VIVID[: max(classes - 1, 0)], dtype=torch.uint8)
    colours[1 : 1 + len(vivid)] = vivid
    return colours


def overlay_mask(image: Image.Image, mask: np.ndarray, classes: int) -> Image.Image:
    """Paint the classes over an image, with their borders; class 0 stays as it is.

    Args:
        image: any size and mode.
        mask: class numbers (h, w), 255 for unlabelled pixels; resized to the image.
    """
    size = image.size
    if mask.shape != (size[1], size[0]):
        mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    colours = class_colours(classes).numpy().astype(np.float32)
    pixels = np.asarray(image.convert("RGB"), np.float32)
    number = np.minimum(mask, classes)
    opacity = np.where(number == 0, 0, OPACITY)
    border = np.zeros(mask.shape, bool)
    for axis in (0, 1):
        differs = np.diff(number, axis=axis) != 0
        after = [(int(i == axis), 0) for i in (0, 1)]
        border |= np.pad(differs, after) | np.pad(differs, [pair[::-1] for pair in after])
    opacity = np.where(border & (number > 0), 1, opacity)[..., None]
    painted = pixels * (1 - opacity) + colours[number] * opacity
    return Image.fromarray(painted.round().astype(np.uint8))


def mask_legend(pixels: Sequence[int], classes: Sequence[str]) -> list[tuple[Sequence[int], str]]:
    """Return the legend of an overlay: colour, name and share of the classes that occur.

    Args:
        pixels: number of pixels of each class, and at the end of unlabelled ones.
    """
    colours, total = class_colours(len(classes)).tolist(), max(sum(pixels), 1)
    names = [f"{name} (not painted)" if not i else name for i, name in enumerate(classes)]
    return [
        (colour, f"{name} {100 * count / total:.1f} %")
        for colour, name, count in zip(colours, [*names, "no prediction"], pixels, strict=True)
        if count
    ]


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
    scores: Sequence[float] | None = None,
) -> Tensor:
    """Draw boxes, and masks and scores if given, over an image in the colours of their classes.

    Args:
        image: uint8 (c, h, w); unless there are three channels, the first is drawn in grey.
        boxes: (n, 4), left, top, right, bottom in pixels.
        labels: (n,), class indices.
        masks: bool (n, h, w).
        scores: n numbers. The object with the highest one is drawn last, above the others.
    Returns: uint8 (3, h, w).
    """
    image = image if len(image) == 3 else image[:1].expand(3, -1, -1)
    if not len(boxes):
        return image
    palette = object_colours(len(classes))
    colours = [tuple(palette[label]) for label in labels.tolist()]
    order = range(len(boxes)) if scores is None else np.argsort(scores, kind="stable")
    pixels = image.permute(1, 2, 0).numpy().copy()
    if masks is not None:
        for i in order:
            inside = masks[i].numpy()
            blended = (1 - OPACITY) * pixels[inside] + OPACITY * np.array(colours[i])
            pixels[inside] = blended.round().astype(np.uint8)
    drawn = Image.fromarray(pixels)
    for i in order:
        texts = [classes[int(labels[i])]] if len(classes) > 1 else []
        texts += [] if scores is None else [f"{100 * scores[i]:.0f} %"]
        _draw_box(drawn, boxes[i].tolist(), colours[i], " ".join(texts))
    return F.pil_to_tensor(drawn)


def _draw_box(image: Image.Image, box: Sequence[float], colour: Colour, text: str) -> None:
    """Draw a box, and its text above it, or inside if there is no room above."""
    large = max(image.size) >= 2 * SIDE
    font, width = ImageFont.load_default(14 if large else 10), 2 if large else 1
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = (round(value) for value in box)
    pen.rectangle((left, top, max(right, left + 1), max(bottom, top + 1)), None, colour, width)
    if not text:
        return
    ends = pen.textbbox((0, 0), text, font)
    wide, high = int(ends[2]) + 4, int(ends[3]) + 3
    x = max(min(left, image.width - wide), 0)
    y = top - high if top >= high else max(top, 0)
    pen.rectangle((x, y, x + wide, y + high), colour)
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    pen.text((x + 2, y + 1), text, "black" if bright else "white", font)


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
        truth = item | {"labels": item["box_labels"]}
        size = panel_size(image.size)
        panels.append([object_panel(image, one, classes, size) for one in (truth, detections)])
        used |= {*truth["labels"].tolist(), *detections["labels"].tolist()}
    palette = object_colours(len(classes))
    legend = [(palette[i], classes[i]) for i in sorted(used)]
    return image_grid(panels, ("truth", "prediction"), legend)


def object_panel(
    image: Image.Image,
    objects: dict[str, Any],
    classes: Sequence[str],
    size: tuple[int, int],
    scores: Sequence[float] | None = None,
) -> Image.Image:
    """Draw objects over an image resized to ``size`` (width, height).

    Args:
        objects: ``boxes``, ``labels`` and perhaps ``masks``; see `Detection.predict`.
        scores: see `overlay_objects`.
    """
    width, height = size
    pixels = F.pil_to_tensor(image.convert("RGB").resize(size))
    factors = torch.tensor([width / image.width, height / image.height] * 2)
    masks = objects.get("masks")
    if masks is not None and len(masks):
        grey = (Image.fromarray(255 * mask.astype(np.uint8)).resize(size) for mask in masks)
        masks = torch.from_numpy(np.stack([np.asarray(mask) >= 128 for mask in grey]))
    else:
        masks = None
    boxes, labels = (torch.from_numpy(objects[key]) for key in ("boxes", "labels"))
    drawn = overlay_objects(pixels, boxes * factors, labels, classes, masks, scores)
    return F.to_pil_image(drawn)


def object_colours(classes: int) -> list[list[int]]:
    """Class colours without black, the colour of the background."""
    return class_colours(classes + 1)[1:].tolist()
