"""Files from the field that a reader gets wrong: each is read right, or refused in words that say
why, or named by ``vim-ssl data check``.

A strict xfail states what a user sees today; whoever mends the reader removes the mark.
"""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vim_ssl.data import ImageData, open_data
from vim_ssl.data.check import check
from vim_ssl.metrics.segmentation import SegmentationMetrics


def complaints(root: Path, spec: str) -> str:
    """What ``vim-ssl data check`` finds wrong or worth knowing, or why the data cannot be opened.

    In lower case and without the path of ``root``, which holds the words of the test's name.
    """
    try:
        found = check(spec)
    except (ValueError, OSError) as error:
        lines = [str(error)]
    else:
        lines = found.problems + found.remarks
    return "\n".join(lines).replace(str(root), "").lower()


def told(root: Path, spec: str, *words: str) -> bool:
    """Whether one line of the complaints has one of these words."""
    text = complaints(root, spec)
    return any(word in text for word in words)


def draw(low, high, shape, dtype=np.uint8, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def write_image(path: Path, values: np.ndarray | None = None, seed: int = 0) -> Path:
    """These values, or noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw(0, 255, (16, 16, 3), seed=seed) if values is None else values).save(path)
    return path


def pixels(spec: str, index: int = 0) -> np.ndarray:
    return np.asarray(open_data(spec)[index]["image"]).astype(int)


def near(values: np.ndarray, expected: np.ndarray) -> bool:
    """Whether 8-bit values are those expected but for rounding."""
    return values.shape == expected.shape and bool(np.abs(values - expected).max() <= 1)


# ------------------------------------------------------------------------- masks


def masks_of_png(root: Path, mask: np.ndarray) -> str:
    write_image(root / "images/a.png")
    write_image(root / "masks/a.png", mask)
    return f"masks:{root}"


def masks_of_geotiff(root: Path, mask: np.ndarray) -> str:
    write_raster(root / "images/a.tif", draw(1, 200, (3, *mask.shape)))
    write_raster(root / "masks/a.tif", mask[None])
    return f"geotiff:{root}"


def masks_of_nifti(root: Path, mask: np.ndarray) -> str:
    volume = np.stack([mask] * 3, axis=-1)
    write_volume(root / "images/a.nii.gz", draw(0, 900, volume.shape, np.int16))
    write_volume(root / "masks/a.nii.gz", volume)
    return f"nifti:{root}"


@pytest.mark.parametrize(
    "write", [masks_of_png, masks_of_geotiff, masks_of_nifti], ids=["masks", "geotiff", "nifti"]
)
def test_masks_of_0_and_255_are_told_although_classes_txt_names_the_object(tmp_path, write):
    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 3:12] = 255
    spec = write(tmp_path, mask)
    (tmp_path / "classes.txt").write_text("background\npolyp\n")
    assert told(tmp_path, spec, "255", "polyp")


def test_boolean_tiff_mask_reads_as_0_and_1(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    mask = np.zeros((16, 16), bool)
    mask[2:5, 2:5] = True
    write_image(tmp_path / "images/a.png")
    (tmp_path / "masks").mkdir()
    tifffile.imwrite(tmp_path / "masks/a.tif", mask)
    assert np.array_equal(open_data(f"masks:{tmp_path}")[0]["mask"], mask)


@pytest.mark.parametrize(
    ("ending", "values", "mode"),
    [
        ("png", draw(0, 2, (16, 16, 3)), "rgb"),
        ("png", draw(0, 2, (16, 16, 2)), "la"),
        ("tif", np.zeros((16, 16), np.float32), "f"),
    ],
    ids=["RGB", "LA", "F"],
)
def test_masks_of_a_wrong_mode_are_refused_by_its_name(tmp_path, ending, values, mode):
    write_image(tmp_path / "images/a.png")
    write_image(tmp_path / f"masks/a.{ending}", values)
    assert told(tmp_path, f"masks:{tmp_path}", f"mode {mode}")


def test_a_blank_line_in_classes_txt_keeps_the_later_names_in_place(tmp_path):
    spec = masks_of_png(tmp_path, draw(0, 3, (16, 16)))
    (tmp_path / "classes.txt").write_text("background\n\nroad\n")
    refused = told(tmp_path, spec, "blank", "empty line", "line 2")
    assert refused or open_data(spec).classes[2:] == ["road"]


# ------------------------------------------------------------------------- image files


def test_band_interleaved_16_bit_rgb_tiff_keeps_its_colours(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    bands = draw(0, 65535, (3, 32, 32), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", bands, photometric="rgb", planarconfig="separate")
    refused = told(tmp_path, str(tmp_path), "planar", "interleave", "separate")
    assert refused or near(pixels(str(tmp_path)), np.moveaxis(bands >> 8, 0, -1))


def test_signed_8_bit_tiff_keeps_the_order_of_its_values(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    rows = np.tile(np.arange(-128, 128, 16).astype(np.int8), (16, 1))
    tifffile.imwrite(tmp_path / "a.tif", rows, photometric="minisblack")
    refused = told(tmp_path, str(tmp_path), "signed", "int8")
    assert refused or (np.diff(pixels(str(tmp_path))[0].ravel()) > 0).all()


@pytest.mark.parametrize("ending", ["HEIC", "jxl"])
def test_images_of_a_format_that_is_not_read_are_counted(tmp_path, ending):
    for number in range(3):
        write_image(tmp_path / f"{number}.jpg", seed=number)
        (tmp_path / f"IMG_{number}.{ending}").write_bytes(b"content")
    lines = complaints(tmp_path, str(tmp_path)).splitlines()
    assert any("3" in line and ending.lower() in line for line in lines)


def test_the_pages_of_a_tiff_are_images_or_told(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", draw(0, 255, (30, 16, 16)))
    spec = str(tmp_path)
    assert told(tmp_path, spec, "page", "frame") or len(open_data(spec)) == 30


# ------------------------------------------------------------------------- tables


def table(root: Path, *lines: str) -> str:
    """A CSV file beside the images 0.png to 5.png."""
    for number in range(6):
        write_image(root / f"{number}.png", seed=number)
    (root / "t.csv").write_text("\n".join(lines) + "\n")
    return f"csv:{root}/t.csv"


def test_a_column_without_a_name_is_no_caption_and_no_group(tmp_path):
    data = open_data(table(tmp_path, ",path,label", "0,0.png,a", "1,1.png,b", "2,2.png,a"))
    assert (data.ids, data.classes) == (["0.png", "1.png", "2.png"], ["a", "b"])
    assert (data.has_captions, data.groups) == (False, None)


def test_classes_that_are_decimal_numbers_are_in_the_order_of_their_size(tmp_path):
    ranks = ["0.0", "2.0", "10.0", "-1.0"]
    rows = [f"{number}.png,{rank}" for number, rank in enumerate(ranks)]
    assert open_data(table(tmp_path, "path,label", *rows)).classes == sorted(ranks, key=float)


def test_a_csv_file_with_semicolons(tmp_path):
    data = open_data(table(tmp_path, "path;label", "0.png;x", "1.png;y"))
    assert (data.ids, data.classes, data.labels) == (["0.png", "1.png"], ["x", "y"], [0, 1])


def test_spaces_round_a_label_make_no_other_class(tmp_path):
    spec = table(tmp_path, "path,label", "0.png,cat", "1.png,cat ", "2.png, cat")
    assert told(tmp_path, spec, "space") or open_data(spec).classes == ["cat"]


def test_splits_spelled_in_two_letter_cases_are_one_or_told(tmp_path):
    splits = ["train", "Train", "test"] * 2
    rows = [f"{number}.png,{'ab'[number % 2]},{split}" for number, split in enumerate(splits)]
    spec = table(tmp_path, "path,label,split", *rows)
    refused = told(tmp_path, spec, "spell", "upper", "capital", "letter case")
    assert refused or len(open_data(spec, split="train")) == 4


def label_names(data: ImageData) -> list[str]:
    return [data.classes[label] for label in data.labels]


def test_parquet_parts_that_order_their_classes_differently_keep_the_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    for part, names, labels in (
        ("train", ["cat", "dog"], [0, 1]),
        ("test", ["dog", "cat"], [0, 1]),
    ):
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        columns = {"image": [{"bytes": png(), "path": None} for _ in labels], "label": labels}
        made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        made.to_parquet(tmp_path / f"{part}.parquet")
    spec = f"parquet:{tmp_path}"
    refused = told(tmp_path, spec, "order of the classes", "other classes", "classlabel")
    assert refused or label_names(open_data(spec, split="test")) == ["dog", "cat"]


# ------------------------------------------------------------------------- COCO


def coco(root: Path, file_name: str = "a.png", **annotation) -> str:
    """One image with one annotation."""
    write_image(root / "val/a.png")
    (root / "annotations").mkdir()
    content = {
        "images": [{"id": 1, "file_name": file_name, "width": 16, "height": 16}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1} | annotation],
        "categories": [{"id": 1, "name": "x"}],
    }
    (root / "annotations/val.json").write_text(json.dumps(content))
    return f"coco:{root}"


def test_an_image_id_written_as_a_float_is_that_image(tmp_path):
    data = open_data(coco(tmp_path, image_id=1.0, bbox=[1, 1, 4, 4]))
    assert data[0]["boxes"].tolist() == [[1, 1, 5, 5]]


def test_a_backslash_in_a_coco_file_name_parts_folders(tmp_path):
    data = open_data(coco(tmp_path, "val\\a.png", bbox=[1, 1, 4, 4]))
    assert data[0]["image"].size == (16, 16)
    assert data.box_count(0) == 1


@pytest.mark.parametrize("box", [{}, {"bbox": None}], ids=["absent", "null"])
def test_the_box_of_an_outline_without_one_follows_from_it(tmp_path, box):
    data = open_data(coco(tmp_path, segmentation=[[1, 1, 9, 1, 9, 9, 1, 9]], **box))
    assert data[0]["boxes"].tolist() == [[1, 1, 9, 9]]


# ------------------------------------------------------------------------- DICOM

RAMP = np.tile(np.arange(0, 4096, 256).astype(np.uint16), (8, 1))
SIGNED = (RAMP.astype(int) - 2048).astype(np.int16)


def dicom(values: np.ndarray = RAMP, syntax: str = "1.2.840.10008.1.2.1", **tags):
    """A CT slice of 16 bits or a palette image of 8 bits; explicit little endian by default."""
    pydicom = pytest.importorskip("pydicom", reason="needs pip install 'vim-ssl[medical]'")
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    ds.Modality, ds.PatientID = "CT", "p"
    ds.Rows, ds.Columns = values.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 8 * values.dtype.itemsize
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(values.dtype.kind == "i")
    ds.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(ds, name, value)
    return ds


def in_default_window(values: np.ndarray, measured: np.ndarray | bool = True) -> np.ndarray:
    """Grey from the 0.5th to the 99.5th percentile of what was measured; black elsewhere."""
    measured = np.broadcast_to(measured, values.shape)
    low, high = np.percentile(values[measured], [0.5, 99.5])
    grey = ((values.astype(float) - low) / (high - low) * 255).clip(0, 255).round()
    return np.where(measured, grey, 0)


def test_window_tags_without_a_value_count_as_absent(tmp_path):
    ds = dicom(WindowCenter=None, WindowWidth=None)
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert near(pixels(f"dicom:{tmp_path}"), in_default_window(RAMP))


def test_a_padding_value_written_unsigned_is_padding_in_signed_pixels(tmp_path):
    values = SIGNED.copy()
    values[:, :3] = -2000
    ds = dicom(values)
    ds.add_new("PixelPaddingValue", "US", 2**16 - 2000)
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert near(pixels(f"dicom:{tmp_path}"), in_default_window(values, values != -2000))


def test_a_range_of_padding_values_is_padding(tmp_path):
    values = SIGNED.copy()
    values[:, :3] = -2000, -1999, -1990
    ds = dicom(values, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1990)
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    measured = (values < -2000) | (values > -1990)
    assert near(pixels(f"dicom:{tmp_path}"), in_default_window(values, measured))


def test_a_deflated_dicom_file(tmp_path):
    ds = dicom(syntax="1.2.840.10008.1.2.1.99")
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert near(pixels(f"dicom:{tmp_path}"), in_default_window(RAMP))


def test_a_dicom_file_without_preamble_and_file_meta(tmp_path):
    ds = dicom()
    del ds.file_meta
    ds.save_as(tmp_path / "a.dcm", implicit_vr=True, little_endian=True)
    assert near(pixels(f"dicom:{tmp_path}"), in_default_window(RAMP))


def test_a_big_endian_palette_has_its_colours(tmp_path):
    colours = draw(64, 256, (256, 3), np.uint16)
    numbers = draw(0, 256, (8, 16))
    ds = dicom(numbers, "1.2.840.10008.1.2.2", PhotometricInterpretation="PALETTE COLOR")
    ds["PixelData"].VR = "OB"
    for band, name in enumerate(("Red", "Green", "Blue")):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        entries = (colours[:, band] << 8).astype(">u2").tobytes()
        setattr(ds, f"{name}PaletteColorLookupTableData", entries)
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert near(pixels(f"dicom:{tmp_path}"), colours[numbers].astype(int))


# ------------------------------------------------------------------------- NIfTI


def write_volume(path: Path, values: np.ndarray) -> None:
    nibabel = pytest.importorskip("nibabel", reason="needs pip install 'vim-ssl[medical]'")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)


def test_several_channels_of_nnunet_share_a_mask(tmp_path):
    for channel in range(2):
        values = draw(0, 9, (6, 6, 4), np.int16, seed=channel)
        write_volume(tmp_path / f"imagesTr/A_{channel:04}.nii.gz", values)
    write_volume(tmp_path / "labelsTr/A.nii.gz", draw(0, 2, (6, 6, 4)))
    spec = f"nifti:{tmp_path}"
    # The planes of one channel, or of each.
    assert told(tmp_path, spec, "channel") or len(open_data(spec)) in (4, 8)


# ------------------------------------------------------------------------- rasters


def write_raster(path: Path, values: np.ndarray, **profile) -> Path:
    """A GeoTIFF of values (bands, h, w), 10 m a pixel."""
    rasterio = pytest.importorskip("rasterio", reason="needs pip install 'vim-ssl[remote-sensing]'")
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)}
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=count, dtype=values.dtype,
        **place, **profile,
    ) as file:  # fmt: skip
        file.write(values)
    return path


def raster_of_noise(path: Path) -> None:
    write_raster(path, draw(1, 200, (3, 16, 16)))


def volume_of_one_plane(path: Path) -> None:
    write_volume(path, draw(0, 900, (16, 16, 1), np.int16))


def slice_of_a_ramp(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    dicom().save_as(path, enforce_file_format=True)


@pytest.mark.parametrize(
    ("scheme", "ending", "write"),
    [
        ("geotiff", "tif", raster_of_noise),
        ("nifti", "nii.gz", volume_of_one_plane),
        ("dicom", "dcm", slice_of_a_ramp),
    ],
    ids=["geotiff", "nifti", "dicom"],
)
def test_hidden_files_and_folders_are_passed_over(tmp_path, scheme, ending, write):
    write(tmp_path / f"a.{ending}")
    (tmp_path / f"._a.{ending}").write_bytes(b"\0\5\x16\7")  # as macOS leaves them
    write(tmp_path / f".ipynb_checkpoints/a-checkpoint.{ending}")
    data = open_data(f"{scheme}:{tmp_path}")
    assert (len(data), data.faults) == (1, [])


def test_a_palette_raster_has_its_colours(tmp_path):
    rasterio = pytest.importorskip("rasterio", reason="needs pip install 'vim-ssl[remote-sensing]'")
    numbers = draw(0, 3, (1, 16, 16))
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255)])
    path = write_raster(tmp_path / "a.tif", numbers, photometric="PALETTE")
    with rasterio.open(path, "r+") as file:
        file.write_colormap(1, {i: (*map(int, colour), 255) for i, colour in enumerate(colours)})
    spec = f"geotiff:{tmp_path}"
    refused = told(tmp_path, spec, "palette", "colour map", "colormap")
    assert refused or np.array_equal(pixels(spec), colours[numbers[0]])


def alike(data: ImageData) -> bool:
    """Whether two images have the same values."""
    one, other = (np.asarray(item["image"], float) for item in data)
    return np.allclose(one, other, atol=1e-4)


def test_scale_and_offset_of_a_raster_are_applied_or_told(tmp_path):
    rasterio = pytest.importorskip("rasterio", reason="needs pip install 'vim-ssl[remote-sensing]'")
    stored = draw(2000, 5000, (2, 16, 16), np.uint16)
    for name, values, offset in (("a", stored, -0.1), ("b", stored - 1000, 0.0)):
        path = write_raster(tmp_path / f"{name}.tif", values)
        with rasterio.open(path, "r+") as file:
            file.scales, file.offsets = (1e-4, 1e-4), (offset, offset)
    spec = f"geotiff:{tmp_path}"
    assert told(tmp_path, spec, "scale", "offset", "unit") or alike(open_data(spec))


def test_a_mask_whose_world_file_places_it_elsewhere_is_told(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("rasterio", reason="needs pip install 'vim-ssl[remote-sensing]'")
    for folder, values, left in (
        ("images", draw(1, 200, (32, 32, 3)), 500_000),
        ("masks", draw(0, 3, (32, 32)), 500_500),
    ):
        (tmp_path / folder).mkdir()
        tifffile.imwrite(tmp_path / folder / "a.tif", values)
        lines = f"10\n0\n0\n-10\n{left + 5}\n4999995\n"
        (tmp_path / folder / "a.tfw").write_text(lines)
    assert told(tmp_path, f"geotiff:{tmp_path}", "different positions")


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")  # of the file before its points
def test_predictions_keep_the_ground_control_points_of_their_raster(tmp_path):
    rasterio = pytest.importorskip("rasterio", reason="needs pip install 'vim-ssl[remote-sensing]'")
    from rasterio.control import GroundControlPoint

    from vim_ssl.data.sources.geotiff import write_labels

    corners = [(row, column) for row in (0, 32) for column in (0, 32)]
    points = [GroundControlPoint(r, c, 15 + c / 320, 45 - r / 320, 0) for r, c in corners]
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", width=32, height=32, count=1, dtype="uint8"
    ) as file:
        file.write(np.zeros((1, 32, 32), np.uint8))
        file.gcps = points, rasterio.CRS.from_epsg(4326)
    write_labels(tmp_path / "p.tif", str(tmp_path / "a.tif"), None, np.zeros((32, 32), np.uint8))
    with rasterio.open(tmp_path / "p.tif") as file:
        kept, crs = file.gcps
    assert [(p.row, p.col, p.x, p.y) for p in kept] == [(p.row, p.col, p.x, p.y) for p in points]
    assert crs == rasterio.CRS.from_epsg(4326)


def test_a_colour_with_bands_of_the_no_data_value_is_measured(tmp_path):
    values = draw(1, 200, (3, 16, 16))
    values[:, 0, 0] = 0, 0, 200
    values[:, 0, 1] = 0
    write_raster(tmp_path / "a.tif", values, nodata=0)
    image = np.asarray(open_data(f"geotiff:{tmp_path}")[0]["image"], float)
    assert np.isnan(image[0, 1]).all()
    np.testing.assert_allclose(image[0, 0], [0, 0, 200 / 255], rtol=1e-6)  # 8 bits stand for 0 to 1


# ------------------------------------------------------------------------- shards


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(path: Path, files: dict[str, bytes | tarfile.TarInfo]) -> str:
    with tarfile.open(path, "w") as shard:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                shard.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return f"wds:{path}"


def records(spec: str) -> list[dict]:
    stream = open_data(spec, streams=True)
    return [record for shard in range(len(stream.shards)) for record in stream.records(shard)]


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE], ids=["hard", "symbolic"])
def test_images_of_a_shard_that_are_links_are_read_or_told(tmp_path, kind):
    link = tarfile.TarInfo("b.png")
    link.type, link.linkname = kind, "a.png"
    files = {"a.png": png(), "a.txt": b"one", "b.png": link, "b.txt": b"two"}
    spec = tar(tmp_path / "a.tar", files)
    captions = [record.get("caption") for record in records(spec)]
    assert told(tmp_path, spec, "link") or captions == ["one", "two"]


@pytest.mark.parametrize("label", ["3.7", "true"])
def test_a_label_that_is_no_whole_number_is_refused(tmp_path, label):
    content = f'{{"label": {label}}}'.encode()
    spec = tar(tmp_path / "a.tar", {"a.png": png(), "a.json": content}) + "?label=label"
    assert told(tmp_path, spec, label)


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    (record,) = records(tar(tmp_path / "a.tar", {"a.png": png(), "a.txt": b"\xef\xbb\xbfa dog"}))
    assert record["caption"] == "a dog"


@pytest.mark.parametrize("name", ["a.tgz", "a.tar.gz", "a.TAR"])
def test_compressed_and_upper_case_shards_of_a_folder_are_found(tmp_path, name):
    tar(tmp_path / "made", {"a.png": png()})
    content = (tmp_path / "made").read_bytes()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / name).write_bytes(gzip.compress(content) if "gz" in name else content)
    assert len(records(f"wds:{tmp_path}/shards")) == 1


# ------------------------------------------------------------------------- videos


def test_the_red_of_a_bt_709_video(tmp_path):
    av = pytest.importorskip("av", reason="needs pip install 'vim-ssl[video]'")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.options = "yuv444p", {"crf": "0"}
        stream.codec_context.colorspace = stream.codec_context.color_range = 1
        for _ in range(5):
            frame = av.VideoFrame(64, 64, "yuv444p")
            frame.colorspace = frame.color_range = 1
            for plane, value in zip(frame.planes, (63, 102, 240), strict=True):
                plane.update(bytes([value]) * (plane.line_size * plane.height))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    video = open_data(f"video:{tmp_path}/a.mp4?frames=2")[0]["image"]
    colour = np.asarray(video.clips()[0][0]).reshape(-1, 3).mean(0)
    np.testing.assert_allclose(colour, [255, 0, 0], atol=3)


def test_class_folders_of_gifs_are_videos_with_labels(tmp_path):
    frames = [Image.new("RGB", (32, 32), (20 * i,) * 3) for i in range(8)]
    for name in ("a/0.gif", "a/1.gif", "b/0.gif", "b/1.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100)
    data = open_data(f"video:{tmp_path}")
    assert (len(data), data.classes, data.labels) == (4, ["a", "b"], [0, 0, 1, 1])


# ------------------------------------------------------------------------- results


def test_a_file_name_that_is_no_utf_8_does_not_lose_the_scores(tmp_path):
    scores, mask = SegmentationMetrics(["a", "b"]), np.eye(4, dtype=np.uint8)
    scores.add(os.fsdecode(b"caf\xe9.png"), mask, mask)
    scores.write(tmp_path)
    _, line = (tmp_path / "predictions.csv").read_text(encoding="utf-8").splitlines()
    assert line.startswith("caf")
