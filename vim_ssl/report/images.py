"""The images of a page: previews over the steps of a training, and small images as data URLs."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vim_ssl.report.record import Record

SMALL, DRAWN = 96, 112  # images up to SMALL px wide are shown pixel by pixel, DRAWN px wide
DENSE = 2  # stored pixels per pixel of the page
WHOLE = (1000, 2600)  # the largest size in pixels of an image that is not cut
MAX_STEPS, MAX_ROWS = 6, 8  # of a strip
MAX_FRAMES = 64  # of a clip
TALL = 1000  # height of a strip on the page from which it has fewer rows
EXACT = 20_000  # bytes; larger PNG images become JPEG


@dataclass
class Panels:
    """The columns of the images that a recipe writes (`Run.save_images`).

    Attributes:
        columns: their number.
        fixed: column -> title, for those that are equal at every step.
        changing: the column that shows the progress.
        note: explains the columns.
    """

    columns: int
    fixed: dict[int, str]
    changing: int
    note: str


PANELS = {
    "mim_pretrain": Panels(
        4, {0: "original", 1: "what the encoder sees"}, 3,
        "Hidden patches are grey. After each step: the hidden patches as predicted, and the "
        "visible ones copied from the original, because training predicts only hidden patches.",
    ),
    "segmentation": Panels(
        3, {0: "image", 1: "truth"}, 2, "After each step: the predicted class of every pixel."
    ),
    "detection": Panels(2, {0: "truth"}, 1, "After each step: the predicted objects."),
}  # fmt: skip


@dataclass
class Strip:
    """A grid of images: one row per sample, one column per step after the fixed columns.

    Attributes:
        columns: titles.
        cells: data URLs, row by row.
        side: width of a column in pixels.
        pixelated: show the pixels of small images.
    """

    columns: list[str]
    cells: list[str]
    side: int
    pixelated: bool
    note: str = ""


def strips(run: Record) -> list[Strip]:
    """Return the previews of a run, one strip for each type; [] without readable images."""
    made = (_strip(run, evaluations) for evaluations in run.previews.values())
    return [strip for strip in made if strip is not None]


def _strip(run: Record, evaluations: list[tuple[int, Path]]) -> Strip | None:
    images = []
    for step, path in spread(evaluations, MAX_STEPS):
        if (image := read_image(path)) is not None:
            images.append((step, image))
    if not images:
        return None
    panels = PANELS.get(str(run.config.get("recipe")))
    steps: list[int] = []
    cut: list[list[list[Image.Image]]] = []
    for step, image in images:
        rows = _cut(image, panels.columns, _height(run)) if panels else None
        if rows and (not cut or (len(rows), rows[0][0].size) == (len(cut[0]), cut[0][0][0].size)):
            steps.append(step)
            cut.append(rows)
    if panels is None or not cut:  # of another form: whole, the first and the newest
        return _whole(images[:1] + images[1:][-1:])
    sample = cut[-1][0][0]
    count = max(min(MAX_ROWS, round(TALL * sample.width / sample.height / DRAWN)), 1)
    titles = [*panels.fixed.values(), *(f"step {step:,}" for step in steps)]
    cells = [
        cell
        for i, newest in enumerate(cut[-1][:count])
        for cell in (
            *(newest[column] for column in panels.fixed),
            *(rows[i][panels.changing] for rows in cut),
        )
    ]
    urls = [data_url(cell, DRAWN) for cell in cells]
    return Strip(titles, urls, DRAWN, sample.width <= SMALL, panels.note)


def _whole(images: list[tuple[int, Image.Image]]) -> Strip:
    for _, image in images:
        image.thumbnail(WHOLE)
    side = max(image.width for _, image in images)
    titles = [f"step {step:,}" for step, _ in images]
    return Strip(titles, [data_url(image) for _, image in images], max(side, DRAWN), False)


def spread(items: list, most: int) -> list:
    """Choose at most ``most`` items: the first, the last, and others at growing distances, because
    most of the progress is at the start."""
    if len(items) <= most:
        return items
    indices = np.geomspace(1, len(items), most).round().astype(int) - 1
    return [items[i] for i in np.maximum(indices, np.arange(most))]


def _height(run: Record) -> int:
    """The height of an encoder's input in pixels; 0 if unknown, or set by the task."""
    size = run.encoder.get("img_size") if run.config.get("recipe") == "mim_pretrain" else 0
    if isinstance(size, list | tuple) and size:
        size = size[0]
    return size if isinstance(size, int) and size > 0 else 0


def _cut(image: Image.Image, columns: int, height: int) -> list[list[Image.Image]] | None:
    """Split an image written by `Run.save_images` into rows of cells.

    Every row has a one-pixel border, except a single one.

    Args:
        height: of a sample in pixels, or of a frame of a clip, which is a column of frames; 0:
            square.
    Returns: rows of cells, or None if the size does not fit.
    """
    width, rest = divmod(image.width, columns)
    if not rest and image.height % (height or width) == 0:
        border, height = 0, image.height
    else:
        border, (width, rest) = 1, divmod(image.width - 2, columns)
        frame = height or max(width, 1)
        heights = range(frame, min(MAX_FRAMES * frame, image.height - 2) + 1, frame)
        height = next((h for h in heights if (image.height - 1) % (h + 1) == 0), 0)
    if rest or width < 1 or not height:
        return None
    lefts = range(border, border + columns * width, width)
    tops = range(border, image.height, height + border)
    return [[image.crop((x, y, x + width, y + height)) for x in lefts] for y in tops]


def read_image(path: Path) -> Image.Image | None:
    """Read a file as RGB; None if it is absent or incomplete."""
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, SyntaxError, ValueError, MemoryError, Image.DecompressionBombError):
        # being written, broken, or too large
        return None


def data_url(image: Image.Image, side: int | None = None) -> str:
    """Encode an image as a data URL: PNG, or JPEG if that is much smaller.

    Args:
        side: width on the page in pixels; larger images are reduced to twice that.
    """
    if side and image.width > DENSE * side:
        image = image.resize(
            (DENSE * side, max(round(DENSE * side * image.height / image.width), 1)),
            Image.Resampling.BOX,
        )
    content, kind = _encoded(image, "PNG", optimize=image.width <= SMALL), "png"
    if len(content) > EXACT:
        compressed = _encoded(image.convert("RGB"), "JPEG", quality=85)
        if 2 * len(compressed) < len(content):
            content, kind = compressed, "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()
