"""Time to open data of each source at two sizes: it must grow no faster than the number of items.

    python benchmarks/readers.py                             # minutes of one core, 1 GB of disk
    python benchmarks/readers.py --only folder csv --out FOLDER
    python benchmarks/readers.py --scale 0.01 --out FOLDER   # a trial

A set of tiny files is made: one file is written and linked under as many names as there are
items, in ten class folders; shards and tables are written whole. A fresh process opens a small set
of the same kind, so that imports and caches of compilers do not count, then the set: `open_data`
(which lists, reads headers and counts), the ids with the fingerprint, and the first item. Seconds
are CPU seconds of the process with its threads, the least of `--rounds`. The target is a ratio of
at most 12 between two sizes that differ by 10. Rows are appended to results/readers.csv, or to
--out; sizes that it has at this commit are not measured again.
"""

import io
import json
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from process import peak_mib, reset_peak, run_apart
from rows import ORIGIN, append_rows, origin, read_rows, results_parser

FILE = "readers.csv"
COLUMNS = (
    *ORIGIN, "source", "items", "open_seconds", "list_seconds", "first_seconds", "cpu_seconds",
    "rise_mib", "ratio",
)  # fmt: skip
MANY, FEW = (10_000, 100_000), (1_000, 10_000)
TARGET = 12  # ratio of the seconds of two sizes that differ by 10
CLASSES, SHARD, LINKS = 10, 1_000, 20_000
SMALL = 20  # items of the set that is opened first


def png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def linked(root: Path, ending: str, count: int, write: Callable[[Path], Any]) -> list[str]:
    """Write a file and link it under ``count`` names in class folders; return the names."""
    root.mkdir(parents=True)
    names = [f"{i % CLASSES}/{i:06d}{ending}" for i in range(count)]
    for number in range(CLASSES):
        (root / str(number)).mkdir()
    for number, name in enumerate(names):
        if number % LINKS == 0:  # file systems limit the links of a file
            first = root / name
            write(first)
        else:
            os.link(first, root / name)
    return names


def images(root: Path, count: int) -> list[str]:
    return linked(root, ".png", count, lambda path: path.write_bytes(png()))


def folder(root: Path, count: int) -> str:
    images(root, count)
    return str(root)


def table(root: Path, count: int) -> str:
    names = images(root, count)
    rows = (f"{name},class {name[0]}\n" for name in names)
    (root / "table.csv").write_text("path,label\n" + "".join(rows))
    return f"csv:{root}/table.csv"


def shards(root: Path, count: int) -> str:
    root.mkdir(parents=True)
    image = png()
    for first in range(0, count, SHARD):
        with tarfile.open(root / f"{first // SHARD:05d}.tar", "w") as file:
            for number in range(first, min(first + SHARD, count)):
                for ending, content in ((".png", image), (".cls", b"1")):
                    member = tarfile.TarInfo(f"{number:07d}{ending}")
                    member.size = len(content)
                    file.addfile(member, io.BytesIO(content))
    return f"wds:{root}"


def coco(root: Path, count: int) -> str:
    names = images(root / "train", count)
    (root / "annotations").mkdir()
    content = {
        "images": [{"id": i, "file_name": name, "width": 8, "height": 8}
                   for i, name in enumerate(names)],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(CLASSES)],
        "annotations": [{"id": i, "image_id": i, "category_id": i % CLASSES, "area": 9,
                         "iscrowd": 0, "bbox": [1, 1, 3, 3]} for i in range(count)],
    }  # fmt: skip
    (root / "annotations/train.json").write_text(json.dumps(content))
    return f"coco:{root}"


def dicom(root: Path, count: int) -> str:
    def write(path: Path) -> None:
        from pydicom.dataset import FileDataset, FileMetaDataset
        from pydicom.uid import ExplicitVRLittleEndian, generate_uid

        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"  # CT
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        slice = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        slice.SOPClassUID = meta.MediaStorageSOPClassUID
        slice.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
        slice.Modality, slice.PatientID, slice.PhotometricInterpretation = "CT", "p", "MONOCHROME2"
        slice.Rows = slice.Columns = 8
        slice.SamplesPerPixel, slice.PixelRepresentation = 1, 0
        slice.BitsAllocated = slice.BitsStored = 16
        slice.HighBit = 15
        slice.PixelData = np.arange(64, dtype=np.uint16).tobytes()
        slice.save_as(path, enforce_file_format=True)

    linked(root, ".dcm", count, write)
    return f"dicom:{root}"


def nifti(root: Path, count: int) -> str:
    def write(path: Path) -> None:
        import nibabel

        volume = np.arange(128, dtype=np.int16).reshape(8, 8, 2)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)

    linked(root, ".nii.gz", count, write)
    return f"nifti:{root}"


def slide(root: Path, count: int) -> str:
    def write(path: Path) -> None:
        import tifffile

        pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
        tifffile.imwrite(path, pixels, tile=(16, 16), photometric="rgb")

    linked(root, ".tif", count, write)
    return f"slide:{root}?tile=32&shrink=1&tissue=none"


def video(root: Path, count: int) -> str:
    def write(path: Path) -> None:
        import av

        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width = stream.height = 16
            for grey in range(4):
                frame = np.full((16, 16, 3), 40 * grey, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
            container.mux(stream.encode())

    linked(root, ".mp4", count, write)
    return f"video:{root}?frames=2"


SOURCES: dict[str, tuple[Callable[[Path, int], str], tuple[int, ...]]] = {
    "folder": (folder, MANY), "csv": (table, MANY), "wds": (shards, MANY), "coco": (coco, MANY),
    "dicom": (dicom, FEW), "nifti": (nifti, FEW), "slide": (slide, FEW), "video": (video, FEW),
}  # fmt: skip


def opened(spec: str) -> tuple[float, float, float]:
    """Open data; return the CPU seconds to open it, to list it, and to read the first item."""
    from vim_ssl.data import open_data

    began = time.process_time()
    data = open_data(spec, streams=True)
    opening = time.process_time()
    assert len(data), spec
    _ = data.fingerprint, getattr(data, "ids", None)
    listing = time.process_time()
    item = data.decode(next(data.records(0))) if data.is_stream else data[0]
    if data.kind == "video":
        item["image"].clips()
    return opening - began, listing - opening, time.process_time() - listing


def measure(source: str, small: str, large: str) -> dict[str, Any]:
    """Open a small set, then the large one, in this process."""
    import torch

    torch.set_num_threads(1)
    opened(small)
    reset_peak()
    before = peak_mib()
    seconds = opened(large)
    names = ("open_seconds", "list_seconds", "first_seconds", "cpu_seconds")
    return {
        "rise_mib": round(peak_mib() - before, 1),
        **dict(zip(names, (*seconds, sum(seconds)), strict=True)),
    }


def measure_size(source: str, items: int, rounds: int) -> dict[str, Any]:
    """Make a set of a source, and return the fastest of some measurements."""
    make = SOURCES[source][0]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        small, large = make(root / "small/set", SMALL), make(root / "large/set", items)
        fastest: dict[str, Any] = {}
        for number in range(rounds):
            os.environ["VIM_SSL_CACHE"] = str(root / f"cache{number}")
            row = run_apart(measure, source, small, large)
            if not fastest or row["cpu_seconds"] < fastest["cpu_seconds"]:
                fastest = row
    return fastest


def main() -> int:
    parser = results_parser(__doc__, FILE)
    add = parser.add_argument
    add("--only", nargs="+", choices=tuple(SOURCES), default=tuple(SOURCES), help="to measure")
    add(
        "--rounds", type=int, default=3, help="measurements of each size, of which the least counts"
    )
    add("--scale", type=float, default=1.0, help="factor of the numbers of items, for a trial")
    args = parser.parse_args()
    here, worst = origin(), 0.0
    for source in args.only:
        before: float | None = None
        for items in (max(int(size * args.scale), 1) for size in SOURCES[source][1]):
            requested = (source, str(items), here["commit"])
            rows = read_rows(args.out / FILE)
            known = [r for r in rows if (r["source"], r["items"], r["commit"]) == requested]
            if known:
                seconds, ratio = float(known[-1]["cpu_seconds"]), float(known[-1]["ratio"] or 0)
            else:
                row = measure_size(source, items, args.rounds)
                seconds = row["cpu_seconds"]
                ratio = seconds / before if before else 0.0
                row |= {key: f"{row[key]:.4f}" for key in row if key.endswith("_seconds")}
                row |= {"source": source, "items": items, "ratio": f"{ratio:.1f}" if ratio else ""}
                append_rows(args.out / FILE, COLUMNS, [here | row])
            times = f", {ratio:.1f} x the smaller" if ratio else ""
            print(f"{source}, {items:,} items: {seconds:.2f} s{times}", flush=True)
            before, worst = seconds, max(worst, ratio)
    print(f"Largest ratio {worst:.1f}, target {TARGET}.")
    return int(worst > TARGET)


if __name__ == "__main__":
    sys.exit(main())
