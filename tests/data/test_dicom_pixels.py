"""DICOM pixels against what the standard says: numbers, padding, tables, palettes, colours."""

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason="needs pip install 'vim-ssl[medical]'")

from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import CTImageStorage  # noqa: E402

from vim_ssl.data import BadImage, open_data  # noqa: E402
from vim_ssl.data.check import check  # noqa: E402

IMPLICIT, EXPLICIT, BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
RAMP = np.arange(0, 2048, 32, dtype=np.int16).reshape(8, 8)


def dataset(pixels=RAMP, syntax=EXPLICIT, **tags) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.SOPInstanceUID = pydicom.uid.generate_uid()
    ds.PatientID, ds.SeriesInstanceUID = "P-1", "1.2.3"
    ds.Rows, ds.Columns = pixels.shape[:2]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = pixels.dtype.itemsize * 8
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    values = pixels.astype(pixels.dtype.newbyteorder(">" if syntax == BIG else "<"))
    ds.PixelData = values.tobytes()
    ds["PixelData"].VR = "OW" if pixels.dtype.itemsize > 1 else "OB"
    for name, value in tags.items():
        if isinstance(value, tuple):
            ds.add_new(name, *value)
        else:
            setattr(ds, name, value)
    return ds


def item(**tags) -> list[Dataset]:
    one = Dataset()
    for name, value in tags.items():
        if isinstance(value, tuple):
            one.add_new(name, *value)
        else:
            setattr(one, name, value)
    return [one]


def read(tmp_path, ds, query="", save=True) -> np.ndarray:
    if save:
        ds.save_as(tmp_path / "one.dcm", enforce_file_format=True)
    return np.asarray(open_data(f"dicom:{tmp_path}{query}")[0]["image"]).astype(int)


def grey(values, low, high) -> np.ndarray:
    return ((np.asarray(values, float) - low) / (high - low) * 255).clip(0, 255).round().astype(int)


EMPTY = {
    "WindowCenter": None, "WindowWidth": None, "RescaleSlope": None, "RescaleIntercept": None,
    "VOILUTFunction": "", "VOILUTSequence": [], "ModalityLUTSequence": [],
    "PixelPaddingValue": ("US", None), "PixelPaddingRangeLimit": ("US", None),
    "NumberOfFrames": None, "InstanceNumber": None, "ImagePositionPatient": None,
    "ImageOrientationPatient": None, "PerFrameFunctionalGroupsSequence": [],
    "SharedFunctionalGroupsSequence": [], "HighBit": None, "PixelPresentation": None,
    "ImageType": None, "SOPInstanceUID": "", "Modality": None,
}  # fmt: skip


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG])
def test_elements_without_a_value_count_as_absent(tmp_path, syntax):
    ds = dataset(syntax=syntax, **EMPTY)
    ds.save_as(tmp_path / "one.dcm", implicit_vr=syntax == IMPLICIT, little_endian=syntax != BIG)
    assert np.array_equal(
        read(tmp_path, ds, save=False), grey(RAMP, *np.percentile(RAMP, (0.5, 99.5)))
    )


@pytest.mark.parametrize("missing", ["PhotometricInterpretation", "BitsStored",
                                     "PixelRepresentation", "SamplesPerPixel"])  # fmt: skip
def test_what_gives_pixels_their_meaning_is_named_when_it_is_missing(tmp_path, missing):
    for value in (None, ...):
        ds = dataset()
        if value is None:
            setattr(ds, missing, None)
        else:
            delattr(ds, missing)
        with pytest.raises(BadImage, match=f"no value of {missing}"):
            read(tmp_path, ds)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"RescaleIntercept": -1000}, RAMP - 1000.0),
        ({"RescaleSlope": 2}, RAMP * 2.0),
        ({"RescaleSlope": 0, "RescaleIntercept": -1000}, RAMP - 1000.0),
        ({"WindowCenter": 40, "WindowWidth": 0}, RAMP),
        ({"WindowCenter": 40, "WindowWidth": -5}, RAMP),
        ({"WindowCenter": ["", 1024], "WindowWidth": ["", 2048]}, None),
    ],
    ids=str,
)
def test_rescale_and_windows_of_which_a_part_is_missing(tmp_path, tags, expected):
    values = read(tmp_path, dataset(**tags), "" if expected is None else "?window=-1000,1000")
    expected = grey(RAMP, 0, 2047) if expected is None else grey(expected, -1000, 1000)
    assert np.abs(values - expected).max() <= 1
    if expected is RAMP:  # a window without a width is none
        assert np.ptp(read(tmp_path, dataset(**tags))) == 255


PADDED = RAMP.copy()
PADDED[0], PADDED[1] = -2000, -1990


@pytest.mark.parametrize("colours", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize(
    "tags",
    [
        {"PixelPaddingValue": ("US", 2**16 - 2000), "PixelPaddingRangeLimit": ("SS", -1990)},
        {"PixelPaddingValue": ("SS", -1990), "PixelPaddingRangeLimit": ("SS", -2000)},
        {"PixelPaddingValue": ("SS", -2000), "PixelPaddingRangeLimit": ("US", 2**16 - 1990),
         "WindowCenter": 1000, "WindowWidth": 2000},
        {"PixelPaddingValue": ("SS", -2000), "PixelPaddingRangeLimit": ("SS", -1990),
         "VOILUTSequence": item(LUTDescriptor=("US", [4096, 0, 12]),
                                LUTData=("US", list(range(4096))))},
    ],
    ids=["unsigned", "reversed", "window", "table"],
)  # fmt: skip
def test_padding_is_black(tmp_path, colours, tags):
    values = read(tmp_path, dataset(PADDED, PhotometricInterpretation=colours, **tags))
    assert (values[:2] == 0).all()
    steps = np.diff(values[2:].ravel())
    assert ((steps if colours == "MONOCHROME2" else -steps) >= 0).all()
    assert np.ptp(values[2:]) > 90


def test_padding_beyond_the_stored_bits(tmp_path):
    """Of 16 bits 12 are stored; padding uses the others, and 2096 = −2000 modulo 4096."""
    pixels = RAMP.astype(np.uint16)
    pixels[0], pixels[1] = 2**16 - 2000, 2096
    ds = dataset(pixels, BitsStored=12, HighBit=11, PixelPaddingValue=("US", 2**16 - 2000))
    values = read(tmp_path, ds, "?window=0,4095")
    assert (values[0] == 0).all()
    assert (values[1] == grey(2096, 0, 4095)).all()


@pytest.mark.parametrize("kind", ["Float", "DoubleFloat"])
def test_float_pixels_and_their_padding(tmp_path, kind):
    pixels = RAMP.astype(np.float32 if kind == "Float" else np.float64) / 1000
    pixels[0], pixels[1, 0] = -9.5, np.nan
    ds = dataset(pixels)
    del ds.PixelData, ds.BitsStored, ds.HighBit, ds.PixelRepresentation
    setattr(ds, f"{kind}PixelData", pixels.tobytes())
    setattr(ds, f"{kind}PixelPaddingValue", -9.5)
    values = read(tmp_path, ds)
    assert (values[0] == 0).all()
    assert values[1, 0] == 0
    inside = pixels[pixels > -1]
    expected = grey(pixels[2:], *np.percentile(inside[np.isfinite(inside)], (0.5, 99.5)))
    assert np.array_equal(values[2:], expected)


@pytest.mark.parametrize("high", [11, 15])
@pytest.mark.parametrize("signed", [False, True])
def test_unused_bits_hold_anything(tmp_path, high, signed):
    values = RAMP - 1024 if signed else RAMP
    noise = np.random.default_rng(0).integers(0, 16, RAMP.shape)
    bits = values & 0xFFF
    stored = bits << 4 | noise if high == 15 else noise << 12 | bits
    pixels = stored.astype(np.uint16).view(np.int16 if signed else np.uint16)
    shown = read(tmp_path, dataset(pixels, BitsStored=12, HighBit=high), "?window=-2048,2048")
    assert np.array_equal(shown, grey(values, -2048, 2048))


def words(values, syntax) -> bytes:
    return np.asarray(values).astype(">u2" if syntax == BIG else "<u2").tobytes()


@pytest.mark.parametrize("syntax", [EXPLICIT, BIG])
@pytest.mark.parametrize("form", ["US", "OW"])
def test_tables_of_any_depth_and_byte_order(tmp_path, syntax, form):
    draw = np.random.default_rng(0)
    # 512 entries of 8 bits, for values that a table of 12 bits gives.
    first, second = draw.integers(0, 512, 2048), draw.integers(0, 256, 512)
    tables = {
        f"{kind}LUTSequence": item(
            LUTDescriptor=("SS", [len(table), start, depth]),
            LUTData=(form, table.tolist() if form == "US" else words(table, syntax)),
            **({"ModalityLUTType": "US"} if kind == "Modality" else {}),
        )
        for kind, table, start, depth in (("Modality", first, -1024, 12), ("VOI", second, 0, 8))
    }
    shown = read(tmp_path, dataset(RAMP - 1024, syntax, **tables))
    assert np.array_equal(shown, second[first[RAMP]])


def palette(ds, colours, depth, syntax=EXPLICIT, first=0, data=None) -> Dataset:
    for band, name in enumerate(("Red", "Green", "Blue")):
        table = colours[:, band]
        ds.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [len(table), first, depth])
        content = words(table, syntax) if data is None else data(table)
        ds.add_new(f"{name}PaletteColorLookupTableData", "OW", content)
    return ds


@pytest.mark.parametrize("syntax", [EXPLICIT, BIG])
@pytest.mark.parametrize("form", ["16", "8", "8-in-16", "8-declared-16", "512-entries"])
def test_palettes(tmp_path, syntax, form):
    entries = 512 if form == "512-entries" else 256
    colours = np.random.default_rng(0).integers(0, 256, (entries, 3))
    numbers = (np.arange(64).reshape(8, 8) * entries // 64).astype(
        np.uint16 if entries > 256 else np.uint8
    )
    ds = dataset(numbers, syntax, PhotometricInterpretation="PALETTE COLOR")

    def packed(table):  # two entries in a word
        return words(table[0::2] | table[1::2] << 8, syntax)

    stored = colours << 8 if form in ("16", "512-entries") else colours
    depth = 8 if form in ("8", "8-in-16") else 16
    palette(ds, stored, depth, syntax, data=packed if form == "8" else None)
    assert np.abs(read(tmp_path, ds) - colours[numbers]).max() <= 1


def test_a_supplemental_palette_colours_the_numbers_above_its_first(tmp_path):
    colours = np.array([[255, 0, 0], [0, 255, 0]]) << 8
    numbers = np.array([[0, 500, 1000, 1001]], np.uint16)
    ds = dataset(numbers, PixelPresentation="MIXED", WindowCenter=500.5, WindowWidth=1001)
    shown = read(tmp_path, palette(ds, colours, 16, first=1000))
    assert np.abs(shown[0, 2:] - [[255, 0, 0], [0, 255, 0]]).max() <= 1
    assert shown[0, 0].tolist() == [0, 0, 0]
    assert (np.abs(shown[0, 1] - 127) <= 1).all()


def full_range(ybr) -> np.ndarray:
    y, cb, cr = np.moveaxis(ybr.astype(float), -1, 0)
    cb, cr = cb - 128, cr - 128
    rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1)
    return rgb.clip(0, 255)


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
def test_colours_in_planes_or_pixels(tmp_path, planar, photometric):
    pixels = np.random.default_rng(0).integers(60, 200, (8, 8, 3)).astype(np.uint8)
    ds = dataset(pixels, SamplesPerPixel=3, PhotometricInterpretation=photometric,
                 PlanarConfiguration=planar)  # fmt: skip
    ds.PixelData = np.moveaxis(pixels, -1, 0).tobytes() if planar else pixels.tobytes()
    expected = pixels if photometric == "RGB" else full_range(pixels)
    assert np.abs(read(tmp_path, ds) - expected).max() <= 2


def test_colours_that_pairs_of_pixels_share(tmp_path):
    pixels = np.repeat(np.random.default_rng(0).integers(60, 200, (8, 4, 3)), 2, axis=1)
    ds = dataset(pixels.astype(np.uint8), SamplesPerPixel=3, PlanarConfiguration=0,
                 PhotometricInterpretation="YBR_FULL_422")  # fmt: skip
    y, chroma = pixels[:, :, 0], pixels[:, ::2, 1:]
    ds.PixelData = np.dstack([y[:, ::2], y[:, 1::2], chroma]).astype(np.uint8).tobytes()
    assert np.abs(read(tmp_path, ds) - full_range(pixels)).max() <= 2


def test_an_unknown_photometric_interpretation_is_refused(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    for photometric in ("HSV", "YBR_PARTIAL_420", "Doe^Jane"):
        ds = dataset(pixels, SamplesPerPixel=3, PlanarConfiguration=0)
        ds.PhotometricInterpretation = photometric
        with pytest.raises(BadImage, match="photometric interpretation is not read") as error:
            read(tmp_path, ds)
        assert "Doe" not in str(error.value)


def test_jpeg_2000_and_run_lengths_keep_signed_numbers_and_padding(tmp_path):
    pixels = np.repeat(np.repeat(RAMP - 1024, 8, axis=0), 8, axis=1)
    pixels[:8] = -2000
    for syntax in (pydicom.uid.RLELossless, pydicom.uid.JPEG2000Lossless):
        ds = dataset(pixels, PixelPaddingValue=("SS", -2000), RescaleIntercept=-5)
        try:
            ds.compress(syntax)
        except RuntimeError as error:
            pytest.skip(str(error))
        shown = read(tmp_path, ds, "?window=-1100,1100")
        assert (shown[:8] == 0).all()
        assert np.array_equal(shown[8:], grey(pixels[8:] - 5, -1100, 1100))


# ------------------------------------------------------------------------- files


def test_files_without_preamble_in_every_encoding(tmp_path):
    for name, implicit, little in (("i", True, True), ("e", False, True), ("b", False, False)):
        ds = dataset(syntax=EXPLICIT if little else BIG, SeriesInstanceUID=f"1.{ord(name)}")
        del ds.file_meta
        ds.save_as(tmp_path / name, implicit_vr=implicit, little_endian=little)
    (tmp_path / "notes.txt").write_bytes(b"\x08\0text of an editor that begins so")
    data = open_data(f"dicom:{tmp_path}?window=0,2047")
    assert len(data) == 3
    for index in range(3):
        assert np.array_equal(np.asarray(data[index]["image"]), grey(RAMP, 0, 2047))


def test_what_is_no_image_of_a_patient_is_counted(tmp_path):
    kinds = {
        "seg": "1.2.840.10008.5.1.4.1.1.66.4", "dose": "1.2.840.10008.5.1.4.1.1.481.2",
        "structures": "1.2.840.10008.5.1.4.1.1.481.3", "report": "1.2.840.10008.5.1.4.1.1.88.33",
        "state": "1.2.840.10008.5.1.4.1.1.11.1", "pdf": "1.2.840.10008.5.1.4.1.1.104.1",
    }  # fmt: skip
    for name, uid in kinds.items():
        ds = dataset(SOPClassUID=uid)
        if name not in ("seg", "dose"):
            del ds.Rows, ds.Columns, ds.PixelData
        ds.save_as(tmp_path / name, enforce_file_format=True)
    dataset(Modality="SEG").save_as(tmp_path / "old-seg", enforce_file_format=True)
    dataset().save_as(tmp_path / "image", enforce_file_format=True)
    data = open_data(f"dicom:{tmp_path}")
    assert (len(data), data.faults) == (1, [])
    assert data.passed_over == {
        "DICOM segmentations": 2, "DICOM dose grids": 1, "DICOM without pixels": 4,
    }  # fmt: skip


def test_a_file_without_decoder_is_named_and_costs_no_other(tmp_path):
    for number in range(3):
        ds = dataset(InstanceNumber=number)
        if number == 1:
            ds.compress(pydicom.uid.RLELossless)
            ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.57"  # JPEG Lossless
        ds.save_as(tmp_path / f"{number}.dcm", enforce_file_format=True)
    decoder = pydicom.pixels.get_decoder(pydicom.uid.UID("1.2.840.10008.1.2.4.57"))
    if decoder.is_available:
        pytest.skip("a decoder is installed")
    data = open_data(f"dicom:{tmp_path}")
    assert [name[-4:] for name in data.ids] == ["0000", "0002"]  # as with the decoder
    assert "JPEG Lossless" in data.faults[0]
    assert "(1.dcm)" in data.faults[0]
    assert any("1.dcm" in line for line in check(f"dicom:{tmp_path}").problems)


def test_copies_of_a_file_are_named(tmp_path):
    ds = dataset()
    for name in ("a", "b"):
        ds.save_as(tmp_path / f"{name}.dcm", enforce_file_format=True)
    dataset().save_as(tmp_path / "c.dcm", enforce_file_format=True)
    (fault,) = open_data(f"dicom:{tmp_path}").faults
    assert "1 files have the SOPInstanceUID of another one" in fault
    assert "a.dcm = b.dcm" in fault


def test_localizers_come_last_in_their_series(tmp_path):
    for z, kind in ((5, "AXIAL"), (0, "LOCALIZER"), (9, "AXIAL")):
        ds = dataset(RAMP + z * 40, ImageType=["ORIGINAL", "PRIMARY", kind], InstanceNumber=z)
        ds.save_as(tmp_path / f"{z}.dcm", enforce_file_format=True)
    data = open_data(f"dicom:{tmp_path}?window=0,2550")
    assert [int(np.asarray(one["image"])[0, 0]) for one in data] == [20, 36, 0]


def test_a_damaged_file_is_refused_by_its_name_alone(tmp_path):
    """Whatever a byte becomes, the answer is an image or a BadImage."""
    dataset(WindowCenter=1000, WindowWidth=2000).save_as(
        tmp_path / "a.dcm", enforce_file_format=True
    )
    content = (tmp_path / "a.dcm").read_bytes()
    draw = np.random.default_rng(1)
    for _ in range(30):
        damaged = bytearray(content)
        for place in draw.integers(132, len(content) - 200, 6):
            damaged[place] = draw.integers(256)
        (tmp_path / "a.dcm").write_bytes(damaged)
        try:
            open_data(f"dicom:{tmp_path}")[0]
        except ValueError as error:  # BadImage is one
            assert str(tmp_path) in str(error) or "/000" in str(error)  # noqa: PT017
