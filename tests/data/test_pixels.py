"""Numbers of image files: shown as their file means them, or refused; masks keep them."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vim_ssl.data import BadImage, decode_image, open_data
from vim_ssl.data.check import check
from vim_ssl.data.images import array_image
from vim_ssl.data.items import as_mask
from vim_ssl.data.pixels import label_numbers, look_up, to_8bit

tifffile = pytest.importorskip("tifffile")


def draw(high, shape, dtype, low=0) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, shape).astype(dtype)


def tiff(values, **options) -> bytes:
    options = {"photometric": "rgb" if values.ndim > 2 else "minisblack"} | options
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(row: bytes, width: int, bits: int, colour: int, *extra: tuple[bytes, bytes]) -> bytes:
    """One row of pixels as they are stored."""
    head = struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), *extra, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def shown(content: bytes) -> np.ndarray:
    return np.asarray(decode_image(content)).astype(int)


def near(values: np.ndarray, expected: np.ndarray) -> bool:
    return values.shape == expected.shape and bool(np.abs(values - expected).max() <= 1)


# ------------------------------------------------------------------------- TIFF


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["int8", "uint16", "int16", "int32", "float32"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zlib"},
        {"compression": "zlib", "predictor": True},
        {"compression": "lzw", "tile": (16, 16)},
    ],
    ids=str,
)
def test_grey_of_every_type_keeps_its_values(dtype, order, options):
    if dtype == "float32":
        values = draw(1000, (20, 33), dtype) / np.float32(1000)
        expected = values * 255
    else:
        info = np.iinfo(dtype)
        values = draw(info.max, (20, 33), dtype, info.min)
        expected = (values.astype(float) - info.min) / (float(info.max) - info.min) * 255
    assert near(shown(tiff(values, byteorder=order, **options)), expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("bands", [3, 4])
def test_separate_planes_of_16_bits_keep_their_colours(order, tile, compression, bands):
    values = draw(65535, (bands, 33, 40), np.uint16)
    values[3:] = 65535  # opaque
    content = tiff(values, planarconfig="separate", byteorder=order, tile=tile,
                   compression=compression, extrasamples=["unassalpha"] * (bands - 3))  # fmt: skip
    assert near(shown(content), np.moveaxis(values[:3] / 257, 0, -1))


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("uint8", {}), ("uint16", {}), ("uint16", {"compression": "zlib"}), ("float32", {})],
    ids=str,
)
def test_white_is_zero_is_inverted_for_images_and_not_for_masks(dtype, options):
    values = draw(200, (20, 33), dtype)
    content = tiff(values, photometric="miniswhite", **options)
    top = {"uint8": 255, "uint16": 65535}.get(dtype, float(values.max()))
    expected = 255 - values * (255 / top)
    assert near(shown(content), expected)
    if dtype != "float32":
        assert np.array_equal(label_numbers(content), values)


@pytest.mark.parametrize(
    ("values", "options", "reason"),
    [
        (draw(9, (2, 8, 8), np.uint8), {"photometric": "minisblack", "planarconfig": "separate",
         "extrasamples": ["unassalpha"]}, "separate planes of mode LA"),
        (draw(9, (4, 8, 8), np.uint16), {"photometric": "separated", "planarconfig": "separate"},
         "separate planes of mode CMYK"),
        (draw(9, (8, 8), np.float64), {}, "1 × 64 float bits per pixel.*geotiff:"),
        (draw(9, (8, 8, 3), np.uint32), {}, "3 × 32 bits per pixel.*geotiff:"),
        (draw(9, (8, 8, 3), np.int16), {}, "3 × 16 signed bits per pixel.*geotiff:"),
        (draw(9, (8, 8, 3), np.float32), {"bigtiff": True}, "3 × 32 float bits per pixel"),
    ],
    ids=["LA", "CMYK", "float64", "uint32", "int16", "BigTIFF"],
)  # fmt: skip
def test_a_tiff_that_would_be_read_wrongly_is_refused_by_its_kind(values, options, reason):
    with pytest.raises(BadImage, match=reason):
        decode_image(tiff(values, **options))


@pytest.mark.parametrize(
    ("photometric", "stored", "expected"),
    [
        ("cielab", (128, 40, 226), (166, 92, 172)),  # L 50, a 40, b -30, of light D50
        ("ycbcr", (128, 90, 170), (187, 111, 61)),
        ("separated", (0, 128, 255, 0), (255, 127, 0)),
    ],
)
def test_colours_of_other_spaces(photometric, stored, expected):
    values = np.tile(np.array(stored, np.uint8), (8, 8, 1))
    content = tiff(values, photometric=photometric, compression="zlib")
    assert near(shown(content), np.tile(expected, (8, 8, 1)))


def test_premultiplied_colours_are_divided_by_their_alpha():
    values = np.zeros((8, 8, 4), np.uint8)
    values[...] = 60, 30, 0, 128  # of (120, 60, 0), half transparent, on white
    expected = np.array([120, 60, 0]) * 128 / 255 + 255 * (127 / 255)
    assert near(shown(tiff(values, extrasamples=["assocalpha"])), np.tile(expected, (8, 8, 1)))


# ------------------------------------------------------------------------- other formats


@pytest.mark.parametrize(
    ("bits", "row", "expected"),
    [
        (2, b"\x1b", [0, 255, 170, 255]),  # 0, 1, 2, 3: white where transparent
        (4, b"\x01\x23", [0, 255, 34, 51]),
        (8, bytes([0, 1, 2, 3]), [0, 255, 2, 3]),
        (16, struct.pack(">4H", 0, 1, 514, 65535), [0, 255, 2, 255]),
    ],
)
def test_the_transparent_grey_of_a_png_is_of_the_depth_of_the_file(bits, row, expected):
    content = png(row, 4, bits, 0, (b"tRNS", struct.pack(">H", 1)))
    assert shown(content).tolist() == [expected]


def test_a_transparent_colour_of_16_bits_is_refused():
    content = png(bytes(6), 1, 16, 2, (b"tRNS", struct.pack(">3H", 0, 0, 0)))
    with pytest.raises(BadImage, match="16-bit image with one transparent colour"):
        decode_image(content)


def test_deep_jpeg_2000_is_right_in_grey_and_refused_in_colour():
    """The decoder turns its white into black."""
    imagecodecs = pytest.importorskip("imagecodecs")
    grey = draw(4096, (16, 16), np.uint16)
    content = imagecodecs.jpeg2k_encode(grey, level=0, reversible=True, bitspersample=12)
    assert near(shown(content), grey / 4095 * 255)
    colours = np.full((16, 16, 3), 65535, np.uint16)
    content = imagecodecs.jpeg2k_encode(colours, level=0, reversible=True, codecformat="jp2")
    with pytest.raises(BadImage, match="JPEG 2000 in colour with more than 8 bits"):
        decode_image(content)


def test_fits_is_no_image():
    """Its offset would be ignored."""
    keys = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": 2, "NAXIS2": 2}
    cards = "".join(f"{key:8}= {value:>20}".ljust(80) for key, value in keys.items()) + "END"
    with pytest.raises(BadImage):
        decode_image(cards.ljust(2880).encode() + bytes(2880))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint16", "uint32"])
def test_a_grey_array_has_the_range_of_its_type(dtype):
    info = np.iinfo(dtype)
    values = np.array([[info.min, info.max]], dtype)
    assert np.asarray(array_image(values)).tolist() == [[0, 255]]


def test_pixels_without_a_finite_value_are_black_and_counted(tmp_path):
    values = np.array([[np.nan, 0.5, np.inf, -np.inf, 1.0]], np.float32)
    (tmp_path / "a.tif").write_bytes(tiff(values))
    image = open_data(tmp_path)[0]["image"]
    assert np.asarray(image).tolist() == [[0, 128, 0, 0, 255]]
    assert any("NaN or infinite" in line for line in check(tmp_path).remarks)


# ------------------------------------------------------------------------- class numbers


def saved(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def palette_file(format: str, bits: int, number: int) -> bytes:
    image = Image.fromarray(np.full((1, 8), number, np.uint8), "L").copy()
    image = image.convert("P")
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200] * 85)
    image.putdata([number, 0] * 4)
    return saved(image, format, **({"bits": bits} if format == "PNG" else {}))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (tiff(np.array([[True, False]])), [1, 0]),
        (tiff(np.array([[True, False]]), photometric="miniswhite"), [1, 0]),
        (png(b"\x50", 4, 1, 0), [0, 1, 0, 1]),
        (png(b"\x1b", 4, 2, 0), [0, 1, 2, 3]),
        (png(b"\x0f", 2, 4, 0), [0, 15]),
        (png(b"\0\1\1\0", 2, 16, 0), [1, 256]),
        (tiff(draw(99, (1, 3), np.uint32) * 0 + np.uint32(2**31 + 5)), [2**31 + 5] * 3),
        (palette_file("PNG", 1, 1), [1, 0] * 4),
        (palette_file("PNG", 2, 2), [2, 0] * 4),
        (palette_file("PNG", 8, 2), [2, 0] * 4),
        (palette_file("TIFF", 8, 2), [2, 0] * 4),
        (palette_file("BMP", 8, 2), [2, 0] * 4),
        (saved(Image.fromarray(np.array([[False, True]])), "BMP"), [0, 1]),
    ],
    ids=["bool-tiff", "bool-white-is-zero", "1-bit", "2-bit", "4-bit", "16-bit", "uint32",
         "palette-1", "palette-2", "palette-8", "palette-tiff", "palette-bmp", "1-bit-bmp"],
)  # fmt: skip
def test_a_mask_holds_the_numbers_of_its_file(content, expected):
    assert label_numbers(content).tolist() == [expected]
    assert label_numbers(Image.open(io.BytesIO(content))).tolist() == [expected]


GREY = Image.fromarray(draw(3, (16, 16), np.uint8))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (saved(GREY.convert("RGB"), "PNG"), "mode RGB; expected one class number"),
        (saved(GREY.convert("LA"), "PNG"), "mode LA"),
        (tiff(np.zeros((4, 4), np.float32)), "mode F"),
        (saved(GREY, "JPEG"), "as JPEG its class numbers are not preserved; save it as PNG"),
        (saved(GREY, "GIF"), "as GIF"),
        (saved(GREY, "TIFF", compression="jpeg"), "not preserved"),
        (tiff(np.array([[-1, 2]], np.int16)), "it contains -1; class numbers start at 0"),
        (tiff(np.zeros((4, 4, 2), np.uint8), photometric="minisblack",
              extrasamples=["unspecified"]), "2 numbers per pixel|2 × 8 bits"),
        (saved(GREY, "PNG")[:60], "cannot be read"),
        (b"", "cannot be read"),
    ],
    ids=["RGB", "LA", "F", "JPEG", "GIF", "JPEG-in-TIFF", "negative", "2-samples", "cut", "empty"],
)  # fmt: skip
def test_a_file_without_class_numbers_is_refused_by_name(tmp_path, content, reason):
    (tmp_path / "mask_7.png").write_bytes(content)
    with pytest.raises(BadImage, match=reason) as error:
        label_numbers(tmp_path / "mask_7.png")
    assert "mask_7.png" in str(error.value)


def test_a_mask_in_memory_holds_the_numbers_of_its_file():
    mask = Image.open(io.BytesIO(png(b"\x1b", 4, 2, 0)))
    assert as_mask(mask).tolist() == [[0, 1, 2, 3]]


# ------------------------------------------------------------------------- conversions


def test_missing_pixels_are_black_also_when_inverted():
    values = np.array([0, 5, 10, np.nan, np.inf])
    missing = np.array([False, True, False, False, False])
    grey = to_8bit(values, 0, 10, white_is_zero=True, missing=missing)
    assert grey.tolist() == [255, 0, 0, 0, 0]


def test_a_table_is_extended_by_its_ends():
    numbers = np.array([-5, 10, 11, 500], np.int16)
    assert look_up(numbers, np.array([7, 8, 9]), 10).tolist() == [7, 7, 8, 9]
