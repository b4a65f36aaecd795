"""Files with several images, of which the first is read: pages of a TIFF, animations."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

PAGES = "further pages or frames"
LOOKED_AT = 64  # files per group of formats that are opened to count their pages
_OFTEN = (".tif", ".tiff", ".gif")
_NO_PAGE = 1 | 4  # bits of NewSubfileType: a smaller version of a page, and its mask


def count_pages(source: str | Path | bytes) -> int:
    """Return the number of images in a file; 1 if that is unknown. Smaller versions of a page
    (pyramids, thumbnails) are not counted."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
            frames = int(getattr(image, "n_frames", 1))
            if frames == 1 or image.format != "TIFF":
                return frames
            return max(sum(_is_page(image, number) for number in range(frames)), 1)
    except Exception:  # decoders raise errors of nearly any type; decoding reports them
        return 1


def some_of(names: Sequence[str]) -> list[int]:
    """Choose files whose pages to count, spread evenly: of those that end in .tif or .gif, and of
    the others, which rarely have any."""
    often = [i for i, name in enumerate(names) if name.lower().endswith(_OFTEN)]
    known = set(often)
    others = [i for i in range(len(names)) if i not in known]
    return [
        group[i * len(group) // few]
        for group, few in ((group, min(len(group), LOOKED_AT)) for group in (often, others))
        for i in range(few)
    ]


def _is_page(image: Image.Image, number: int) -> bool:
    image.seek(number)
    return not getattr(image, "tag_v2", {}).get(254, 0) & _NO_PAGE
