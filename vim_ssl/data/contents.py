"""The content of a file for comparing it with others, whatever its compression.

READERS["volume"](path)        the pieces of a file's content to hash, by kind; see `content_keys`
sampled(content)               those of bytes
"""

import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

WHOLE = 2**20  # bytes; of a larger file, evenly spaced pieces are read
PIECES, PIECE = 16, 2**16
DECODED_UP_TO = 2**30  # bytes of values; the files of larger rasters are compared as they are


def sampled(content: bytes) -> Iterator[Any]:
    """Yield the pieces of the bytes of a file, those that `sampled_file` yields."""
    return _sampled(len(content), lambda start, count: content[start : start + count])


def sampled_file(path: str) -> Iterator[Any]:
    """Yield a file of up to `WHOLE` bytes, or the size of a larger one and evenly spaced pieces."""
    with open(path, "rb") as file:

        def read(start: int, count: int) -> bytes:
            file.seek(start)
            return file.read(count)

        yield from _sampled(os.path.getsize(path), read)


def _sampled(size: int, read: Callable[[int, int], bytes]) -> Iterator[Any]:
    if size <= WHOLE:
        yield read(0, size)
        return
    yield str(size).encode()
    for number in range(PIECES):
        yield read(number * (size - PIECE) // (PIECES - 1), PIECE)


def volume(path: str) -> Iterator[Any]:
    """Yield size, checksum and start of the content of a NIfTI file, compressed or not.

    The end of a gzip file says the first two, thus it is not decompressed.
    """
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        if compressed:
            file.seek(-8, os.SEEK_END)
            end = file.read(8)
            checksum, size = (int.from_bytes(end[i : i + 4], "little") for i in (0, 4))
        file.seek(0)
        with gzip.GzipFile(fileobj=file) as content:
            start = (content if compressed else file).read(PIECE)
        if not compressed:
            checksum, size = _checksum(file, start)
        elif size <= 2 * PIECE:  # a small file, or one of many blocks: the end is of the last one
            file.seek(0)
            with gzip.GzipFile(fileobj=file) as content:
                checksum, size = _checksum(content, b"")
    yield f"volume {checksum} {size % 2**32}".encode()
    yield start


def _checksum(file: IO[bytes] | gzip.GzipFile, start: bytes) -> tuple[int, int]:
    """CRC-32 and number of bytes of ``start`` and what follows in the file."""
    checksum, size = zlib.crc32(start), len(start)
    while piece := file.read(WHOLE):
        checksum, size = zlib.crc32(piece, checksum), size + len(piece)
    return checksum, size


def raster(path: str) -> Iterator[Any]:
    """Yield the size, the georeference and the stored values of a raster."""
    from rasterio.windows import Window

    from vim_ssl.data.rasters import opened

    with opened(path) as file:
        row = sum(np.dtype(dtype).itemsize for dtype in file.dtypes) * file.width
        if row * file.height > DECODED_UP_TO:
            yield from sampled_file(path)
            return
        header = file.count, file.height, file.width, file.dtypes, tuple(file.transform)[:6]
        yield repr(header).encode()
        rows = max(1, 2**24 // max(row, 1))
        for top in range(0, file.height, rows):
            strip = Window(0, top, file.width, min(rows, file.height - top))
            for band in file.indexes:
                yield np.ascontiguousarray(file.read(band, window=strip))


def dicom(path: str) -> Iterator[Any]:
    """Yield shape, type and stored numbers of all frames of a DICOM file."""
    from vim_ssl.data.dicom_pixels import stored_frames

    values = stored_frames(path)
    yield f"{values.shape} {values.dtype.newbyteorder('=')}".encode()
    yield np.ascontiguousarray(values, values.dtype.newbyteorder("="))


READERS = {"bytes": sampled_file, "volume": volume, "raster": raster, "dicom": dicom}
