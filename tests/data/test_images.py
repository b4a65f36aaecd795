"""Odd images are decoded right, or are BadImage; nothing else comes out."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vim_ssl.data import BadImage, clean_image, decode_image
from vim_ssl.data.images import DEFAULT_MAX_PIXELS

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corner_image() -> Image.Image:
    """48 × 32, another colour in every quarter, so that no turn or mirror maps it to itself."""
    image = Image.new("RGB", (48, 32), WHITE)
    for colour, place in ((RED, (0, 0)), (GREEN, (24, 0)), (BLUE, (0, 16))):
        image.paste(colour, (*place, place[0] + 24, place[1] + 16))
    return image


def saved(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def assert_colours(image: Image.Image, expected, tolerance: int = 6) -> None:
    """Compare the centres of the four quarters, row by row."""
    w, h = image.size
    places = [
        (w // 4, h // 4),
        (3 * w // 4, h // 4),
        (w // 4, 3 * h // 4),
        (3 * w // 4, 3 * h // 4),
    ]
    got = np.array([image.getpixel(place) for place in places], dtype=int)
    assert np.abs(got - np.array(expected)).max() <= tolerance, got


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


QUARTERS = (RED, GREEN, BLUE, WHITE)


# What the stored image needs so that it looks upright again, as EXIF numbers it.
@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (1, None),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_90),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_exif_orientation_is_applied(orientation, stored):
    image = corner_image()
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = image if stored is None else image.transpose(stored)
    decoded = decode_image(saved(turned, "JPEG", exif=exif, quality=95, subsampling=0))
    assert decoded.size == (48, 32)
    assert_colours(decoded, QUARTERS, tolerance=12)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize(
    ("size", "orientation", "told"),
    [((48, 32), 1, True), ((48, 32), 3, False), ((48, 32), 2, False), ((48, 32), 6, True),
     ((32, 32), 6, False), ((32, 32), 1, True)],
    ids=lambda value: str(value),
)  # fmt: skip
def test_what_was_drawn_on_lies_as_its_size_tells(format, size, orientation, told):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(corner_image().resize(size), format, exif=exif)
    shown = decode_image(content)
    if told:
        assert decode_image(content, dense=True) == shown
    else:
        reason = f"its EXIF orientation is {orientation}, .* not known .* save image and labels"
        with pytest.raises(BadImage, match=reason):
            decode_image(content, dense=True)


def test_a_cut_off_image_that_was_drawn_on_is_none():
    with pytest.raises(BadImage):
        decode_image(saved(corner_image(), "PNG")[:-40], dense=True)


def test_damaged_exif_does_not_lose_the_image():
    broken = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12garbage"
    decoded = decode_image(saved(corner_image(), "JPEG", exif=broken, quality=95))
    assert decoded.size == (48, 32)


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_has_the_colours_of_its_inks(format):
    decoded = decode_image(saved(corner_image().convert("CMYK"), format))
    assert decoded.mode == "RGB"
    assert_colours(decoded, QUARTERS, tolerance=12)


def test_adobe_inverted_cmyk_is_told_by_its_bytes():
    # Adobe stores 255 − ink: no ink at all is 255 in the file and white on paper.
    data = saved(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG")
    assert b"Adobe" in data
    assert decode_image(data).getpixel((8, 8)) == WHITE


def palette_with_transparent_entry() -> Image.Image:
    image = corner_image().quantize(8, dither=Image.Dither.NONE)
    image.info["transparency"] = image.getpixel((12, 24))  # what is blue
    return image


def with_alpha(mode: str) -> Image.Image:
    image = corner_image().convert(mode)
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 16, 24, 32))  # the blue quarter
    alpha.paste(128, (0, 0, 24, 16))  # the red quarter: half
    image.putalpha(alpha)
    return image


def rgb_with_colour_key() -> bytes:
    return saved(corner_image(), "PNG", transparency=BLUE)


@pytest.mark.parametrize(
    ("data", "mode", "colours"),
    [
        pytest.param(
            saved(palette_with_transparent_entry(), "PNG"), "RGB", (RED, GREEN, WHITE, WHITE),
            id="palette-png",
        ),
        pytest.param(
            saved(palette_with_transparent_entry(), "GIF"), "RGB", (RED, GREEN, WHITE, WHITE),
            id="palette-gif",
        ),
        pytest.param(
            saved(with_alpha("RGBA"), "PNG"), "RGB", ((255, 127, 127), GREEN, WHITE, WHITE),
            id="rgba-png",
        ),
        pytest.param(
            saved(with_alpha("RGBA"), "WEBP", lossless=True), "RGB",
            ((255, 127, 127), GREEN, WHITE, WHITE), id="rgba-webp",
        ),
        pytest.param(
            saved(with_alpha("LA"), "PNG"), "L", (165, 150, 255, 255), id="la-png"
        ),
        pytest.param(rgb_with_colour_key(), "RGB", (RED, GREEN, WHITE, WHITE), id="colour-key"),
    ],
)  # fmt: skip
def test_transparency_is_laid_on_white(data, mode, colours):
    decoded = decode_image(data)
    assert decoded.mode == mode
    expected = colours if mode == "RGB" else np.array(colours)
    assert_colours(decoded, expected, tolerance=2)


def test_one_bit_becomes_black_and_white():
    image = Image.new("1", (20, 10), 0)
    image.paste(1, (10, 0, 20, 10))
    decoded = decode_image(saved(image, "PNG"))
    assert decoded.mode == "L"
    assert np.unique(np.asarray(decoded)).tolist() == [0, 255]
    assert decoded.getpixel((15, 5)) == 255


def deep(dtype: str) -> np.ndarray:
    """Lowest, middle and highest value of a type in three columns."""
    info = np.iinfo(dtype)
    middle = (int(info.min) + int(info.max)) // 2
    return np.tile(np.array([info.min, middle, info.max], dtype=dtype), (4, 1))


def tiff(values: np.ndarray) -> bytes:
    """A plain little-endian grey TIFF of any type; Pillow itself does not write all of them."""
    height, width = values.shape
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    entries = [
        (256, width), (257, height), (258, values.dtype.itemsize * 8), (259, 1), (262, 1),
        (273, 8 + 2 + 10 * 12 + 4), (277, 1), (278, height), (279, values.nbytes), (339, kind),
    ]  # fmt: skip
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries))
    return head + body + bytes(4) + values.astype(values.dtype.newbyteorder("<")).tobytes()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(saved(Image.fromarray(deep("uint16")), "PNG"), id="png-16"),
        pytest.param(saved(Image.fromarray(deep("uint16")), "TIFF"), id="tiff-16"),
        pytest.param(tiff(deep("int16")), id="tiff-int16"),
        pytest.param(tiff(deep("uint32")), id="tiff-uint32"),
        pytest.param(tiff(deep("int32")), id="tiff-int32"),
        pytest.param(b"P5 3 1 65535\n" + deep("uint16")[0].astype(">u2").tobytes(), id="pgm-16"),
    ],
)
def test_deep_grey_maps_the_types_range(data):
    decoded = decode_image(data)
    assert decoded.mode == "L"
    np.testing.assert_allclose(np.asarray(decoded)[0], [0, 127, 255], atol=1)


def test_16_bit_grey_is_linear_and_not_stretched():
    values = np.array([[0, 257, 4096, 30000]], dtype=np.uint16)
    decoded = decode_image(saved(Image.fromarray(values), "PNG"))
    assert np.asarray(decoded).tolist() == [[0, 1, 16, 117]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param([0.0, 0.5, 0.8], [0, 128, 204], id="within-0-1"),
        pytest.param([-100.0, 0.0, 300.0], [0, 64, 255], id="own-range"),
        pytest.param([np.nan, 10.0, 20.0], [0, 0, 255], id="nan"),
        pytest.param([7.0, 7.0, 7.0], [0, 0, 0], id="constant"),
    ],
)
def test_float_grey(values, expected):
    decoded = decode_image(tiff(np.array([values], dtype=np.float32)))
    assert np.asarray(decoded)[0].tolist() == expected


def test_float_image_without_a_finite_value_is_bad():
    with pytest.raises(BadImage, match="finite"):
        decode_image(tiff(np.full((2, 2), np.nan, dtype=np.float32)))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(format):
    first, second = Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), BLUE)
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(first, format, save_all=True, append_images=[second], duration=100, **options)
    decoded = decode_image(data)
    assert decoded.mode == "RGB"
    assert decoded.getpixel((8, 8)) == RED


def test_content_decides_not_the_name(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(saved(corner_image(), "PNG"))
    assert_colours(decode_image(path), QUARTERS, tolerance=0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "empty", id="empty"),
        pytest.param(b"this is no image at all", "Pillow", id="text"),
        pytest.param(saved(corner_image(), "JPEG")[:400], "", id="truncated-jpeg"),
        pytest.param(saved(corner_image(), "PNG")[:100], "", id="truncated-png"),
        pytest.param(saved(corner_image(), "GIF")[:100], "", id="truncated-gif"),
        pytest.param(saved(corner_image(), "WEBP")[:60], "", id="truncated-webp"),
        pytest.param(saved(corner_image(), "TIFF")[:500], "", id="truncated-tiff"),
        pytest.param(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "Pillow", id="eps"
        ),
        pytest.param(
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", b"not zlib") + chunk(b"IEND", b""), "", id="damaged-png",
        ),
    ],
)  # fmt: skip
def test_broken_images_are_bad_images(tmp_path, data, reason):
    path = tmp_path / "broken.jpg"
    path.write_bytes(data)
    for source in (path, str(path), data):
        with pytest.raises(BadImage, match=reason or None) as error:
            decode_image(source)
        assert error.value.reason
    with pytest.raises(BadImage, match=r"broken\.jpg"):
        decode_image(path)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_bytes_never_crash(format):
    """Flip bytes all over real files: every outcome is an image or BadImage."""
    data = bytearray(saved(corner_image(), format))
    draw = np.random.default_rng(0)
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(data)
        for place in draw.integers(0, len(data), 8):
            damaged[place] = draw.integers(256)
        try:
            outcomes.add(decode_image(bytes(damaged), max_pixels=10**6).mode)
        except BadImage:
            outcomes.add("bad")
    assert "bad" in outcomes
    assert outcomes <= {"bad", "RGB", "L"}


def test_a_missing_file_and_a_folder_are_bad_images(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(BadImage):
            decode_image(path)


def test_too_large_images_say_their_size_and_the_way_out(monkeypatch):
    data = saved(Image.new("L", (300, 200)), "PNG")
    with pytest.raises(BadImage, match=r"300×200 pixels; the limit is 59999 .*VIM_SSL_MAX_PIXELS"):
        decode_image(data, max_pixels=59_999)
    monkeypatch.setenv("VIM_SSL_MAX_PIXELS", "59999")
    with pytest.raises(BadImage, match="59999"):
        decode_image(data)
    monkeypatch.setenv("VIM_SSL_MAX_PIXELS", "60000")
    assert decode_image(data).size == (300, 200)


def bomb(side: int) -> bytes:
    """A PNG header that claims side × side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_before_it_is_unpacked():
    with pytest.raises(BadImage, match="VIM_SSL_MAX_PIXELS"):
        decode_image(bomb(100_000))


def test_the_limit_can_be_raised_above_pillows_own(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses above twice this
    data = saved(Image.new("L", (100, 100)), "PNG")
    with pytest.raises(BadImage, match="VIM_SSL_MAX_PIXELS"):
        decode_image(data)
    assert decode_image(data, max_pixels=DEFAULT_MAX_PIXELS + 1).size == (100, 100)


def test_a_wrong_limit_in_the_environment_is_no_bad_image(monkeypatch):
    monkeypatch.setenv("VIM_SSL_MAX_PIXELS", "2e8")
    with pytest.raises(ValueError, match="whole number") as error:
        decode_image(saved(corner_image(), "PNG"))
    assert not isinstance(error.value, BadImage)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_mode_converts(mode):
    grey = saved(Image.new("L", (4, 4), 100), "PNG")
    for data in (grey, saved(corner_image(), "PNG"), saved(with_alpha("LA"), "PNG")):
        assert decode_image(data, mode=mode).mode == mode


def test_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match="'CMYK'"):
        decode_image(b"", mode="CMYK")


def test_min_side_shrinks_large_jpegs_only_above_it():
    data = saved(Image.new("RGB", (800, 600), RED), "JPEG")
    small = decode_image(data, min_side=140)
    assert small.size == (200, 150)
    assert decode_image(data, min_side=500).size == (800, 600)
    assert decode_image(saved(Image.new("L", (800, 600)), "PNG"), min_side=10).size == (800, 600)


def test_clean_image_leaves_plain_images_as_they_are():
    image = corner_image()
    assert clean_image(image) is image


def test_bad_image_survives_pickling():
    error = pickle.loads(pickle.dumps(BadImage("a.png", "the file is empty")))
    assert (error.id, error.reason, str(error)) == (
        "a.png", "the file is empty", "a.png: the file is empty",
    )  # fmt: skip
