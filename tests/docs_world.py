"""The small world in which the pages' examples run: the data and runs that the pages name."""

import shutil
from pathlib import Path

import numpy as np
from earlier_runs import EARLIER, pixels, write, write_data
from PIL import Image

# Settings that make a command's training short; they are added to the command that a page shows.
TINY_ENCODER = ["--model-args", "depth=1", "embed_dim=8", "d_state=4", "patch_size=8",
                "img_size=16"]  # fmt: skip
SHORT = ["--max-steps", "1", "--batch-size", "4", "--workers", "0", "--trackers", "none"]
REDUCED = {
    "mim-pretrain": [*SHORT, *TINY_ENCODER, "--decoder-dim", "8"],
    "supervised-pretrain": [*SHORT, *TINY_ENCODER],
    "clip-pretrain": [
        *SHORT, *TINY_ENCODER, "--text-width", "8", "--text-depth", "1", "--text-heads", "2",
        "--embed-dim", "8", "--vocab-size", "270", "--context-length", "8",
    ],
    "finetune": SHORT,
    "video": SHORT,
    "segmentation": [*SHORT, "--crop", "16", "--channels", "4", "--auxiliary", "0"],
    "detection": [*SHORT, "--size", "64", "--channels", "4", "--hidden", "4", "--samples", "16"],
    "slide": ["--max-steps", "1", "--trackers", "none"],
    "linear-probe": ["--shot-seeds", "1", "--c-grid", "1", "--readouts", "token"],
}  # fmt: skip
RESUMED = SHORT[:2]  # what a resumed run may change


def reduced(name: str, argv: list[str]) -> list[str]:
    """The command's arguments and those that shorten it."""
    if "--resume" in argv:
        return [*argv, *RESUMED]
    if "--eval-only" in argv:
        return argv
    shorter = [*REDUCED.get(name, [])]
    if any(word.startswith("timm:") for word in argv) and "d_state=4" in shorter:
        shorter[shorter.index("d_state=4")] = "num_heads=2"
    return [*argv, *shorter]


def build(root: Path) -> None:
    """Make the data of all pages in ``root``, and the runs that take long to make."""
    write_data(root)
    (root / "data/images/plain").rename(root / "data/images/cat")
    (root / "data/images/steep").rename(root / "data/images/dog")
    shutil.copytree(root / "data/images", root / "photos")
    shutil.copytree(root / "data/images", root / "photos2")
    shutil.copytree(root / "data/pairs", root / "pairs")
    shutil.copytree(root / "data/masks", root / "cells")
    for i, path in enumerate(sorted((root / "cells/images/val").iterdir())):
        write(path, pixels(50 + i, 0, 32))  # the same image in two splits would be a fault
    shutil.copytree(root / "data/shapes", root / "shapes")
    shutil.copytree(root / "data/clips", root / "clips")
    for i, clip in enumerate(sorted((root / "clips").iterdir())[:8]):
        shutil.copytree(clip, root / "labelled-clips" / ("walk", "run")[i % 2] / clip.name)
    for i in range(3):
        write(root / f"new-photos/{i}.bmp", pixels(90 + i, i % 2, 48))
    Image.fromarray(pixels(3, 0, 64)).save(root / "image.png")
    tables(root)
    for name, run in {"clip": "clip", "cells": "segmentation", "shapes": "detection",
                      "other": "mae"}.items():  # fmt: skip
        shutil.copytree(EARLIER / "runs" / run, root / "runs" / name)


def slides(root: Path) -> None:
    """Labelled slides of two tiles, and new ones."""
    for i in range(8):
        name = f"slides/{('benign', 'tumour')[i % 2]}/{i}.bmp" if i < 6 else f"new-slides/{i}.bmp"
        write(root / name, np.tile(pixels(i, i % 2, 256), (1, 2, 1)))


def tables(root: Path) -> None:
    """Tables of the images in photos/."""
    names = sorted(path.relative_to(root).as_posix() for path in (root / "photos").rglob("*.bmp"))
    rows = [f"{name},{name.split('/')[1]},p{i % 6}" for i, name in enumerate(names)]
    (root / "table.csv").write_text("path,label\n" + "\n".join(r.rpartition(",")[0] for r in rows))
    (root / "xrays.csv").write_text("path,label,patient\n" + "\n".join(rows))


def xrays(root: Path) -> None:
    """DICOM files of eight patients, and the same in class folders."""
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

    (root / "xrays").mkdir()
    for i in range(8):
        values = pixels(i, 0, 32)[..., 0].astype(np.uint16) * 8
        file = Dataset()
        file.file_meta = FileMetaDataset()
        file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        file.SOPClassUID = DigitalXRayImageStorageForPresentation
        file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID
        file.SOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[str(i)])
        file.PatientID, file.Modality, file.SeriesInstanceUID = f"P-{i}", "DX", f"1.2.{i}"
        file.Rows, file.Columns = values.shape
        file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
        file.BitsAllocated = file.BitsStored = 16
        file.HighBit, file.PixelRepresentation = 15, 0
        file.PixelData = values.tobytes()
        file.save_as(root / f"xrays/{i}.dcm", enforce_file_format=True)
        folder = root / "labelled-xrays" / ("normal", "tumour")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / f"xrays/{i}.dcm", folder)


def scenes(root: Path) -> None:
    """Two rasters of four bands."""
    import rasterio

    (root / "scenes").mkdir()
    for i in range(2):
        values = np.concatenate([pixels(i, 0, 128), pixels(i, 1, 128)[..., :1]], -1)
        with rasterio.open(
            root / f"scenes/{i}.tif", "w", driver="GTiff", width=128, height=128, count=4,
            dtype="uint8", crs="EPSG:32633", transform=rasterio.Affine(10, 0, 5e5, 0, -10, 5e6),
        ) as file:  # fmt: skip
            file.write(values.transpose(2, 0, 1))
            file.descriptions = ("blue", "green", "red", "nir")
