"""A hash of a sample of a data set's content: it tells images that were written again with the same
sizes from a copy of the data, which has other times and paths."""

import os
from collections.abc import Iterator
from contextlib import suppress
from hashlib import blake2b
from typing import Any

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import BadImage

SAMPLES = 64
BYTES = 2**15  # at the beginning of a file, and at its end


def content_hash(data: Any) -> str:
    """Hash the beginning and end of the files of up to `SAMPLES` images, evenly spread, with their
    masks and captions, or of the local shards of a stream.

    Returns: 16 hex digits; "" for data without files, such as images in memory.
    """
    digest, files = blake2b(digest_size=8), 0
    for part in _parts(data):
        if isinstance(part, bytes):
            digest.update(b"text" + part)
            continue
        with suppress(OSError), open(part, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(b"file" + file.read(BYTES))
            file.seek(max(size - BYTES, 0))
            digest.update(file.read(BYTES))
            files += 1
    return digest.hexdigest() if files else ""


def _parts(data: Any) -> Iterator[str | bytes]:
    """Yield the paths of the files, and texts as bytes."""
    if getattr(data, "is_stream", False):
        yield from (data.shards[i].name for i in _spread(len(data.shards)))
    elif isinstance(data, ImageData):
        for i in _spread(len(data)):
            yield from (*data.paths(i), *data.mask_paths(i))
            if data.has_captions:
                with suppress(BadImage):
                    yield "\0".join(data.captions(i)).encode(errors="replace")


def _spread(count: int) -> list[int]:
    """Up to `SAMPLES` indices from the first to the last of ``count``."""
    few = min(count, SAMPLES)
    return [i * (count - 1) // max(few - 1, 1) for i in range(few)]
