"""Drawings of truth and prediction side by side, with the classes' colours below."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIDE = 320  # pixels of a drawn picture's longer side
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
    """(width, height) of a picture -> of its panel; a small one grows fourfold at most."""
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
