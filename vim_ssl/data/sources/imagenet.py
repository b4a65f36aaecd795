"""ImageNet-1k as it is handed out: ``imagenet:root``."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from timm.data import ImageNetInfo

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import EXTENSIONS
from vim_ssl.data.registry import source
from vim_ssl.data.sources.folder import FileImages
from vim_ssl.data.spec import DataSpec, pick_split

COUNTS = {"train": 1_281_167, "val": 50_000}
KAGGLE = "ILSVRC/Data/CLS-LOC"
SOLUTION = "LOC_val_solution.csv"
DEVKIT = "ILSVRC2012_devkit_t12/data"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


@source("imagenet", options=("label",))
def open_imagenet(spec: DataSpec) -> ImageData:
    """Open ``imagenet:root`` with the splits train and val, whichever is there.

    - ``root/train/SYNSET/*.JPEG``, ``root/val/SYNSET/*.JPEG``; both may lie in Kaggle's
      ``root/ILSVRC/Data/CLS-LOC`` instead.
    - A flat ``val/`` takes its labels from Kaggle's ``LOC_val_solution.csv``, or from the
      development kit, ``ILSVRC2012_devkit_t12/data`` with its ``meta.mat``; both lie in root.

    Labels are places among the 1,000 sorted synsets, as every released checkpoint counts them,
    also of a part of ImageNet. The ids are the paths below the folder of train and val.
    A part that is not complete opens with a warning; see `ImageData.faults`.

    Raises: FileNotFoundError and ValueError with one list of all that is missing or wrong.
    """
    root = Path(spec.location).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"imagenet:{spec.location}: there is no such folder.")
    top = root / KAGGLE if (root / KAGGLE).is_dir() else root
    splits = [split for split in COUNTS if (top / split).is_dir()]
    if not splits:
        raise FileNotFoundError(
            f"imagenet:{root} has neither train/ nor val/, nor {KAGGLE}/ with them. It holds "
            f"{', '.join(sorted(p.name for p in root.iterdir())[:8]) or 'nothing'}."
        )
    split = pick_split(spec.split, splits, f"imagenet:{root}")
    info = ImageNetInfo()
    synsets = info.label_names()
    number = {name: i for i, name in enumerate(synsets)}

    names: list[str] = []
    labels: list[int] = []
    faults: list[str] = []
    for part in [s for s in splits if split in ("all", s)]:
        found = list(_images(top, part))
        flat = [name for name in found if name.count("/") == 1]
        folders = {name.split("/")[1] for name in found} - {name.split("/")[1] for name in flat}
        if unknown := sorted(folders - set(synsets)):
            raise ValueError(
                f"imagenet:{root}/{part} has {len(unknown)} folders that are no synset of "
                f"ImageNet-1k, such as {', '.join(unknown[:5])}; for other classes give the folder "
                "without imagenet:."
            )
        truth = _flat_labels(root, flat) if flat else {}
        for name in found:
            synset = truth[name] if name in truth else name.split("/")[1]
            names.append(name)
            labels.append(number[synset])
        if len(found) < COUNTS[part]:
            there = len({*folders, *truth.values()})
            faults.append(
                f"{part}/ has {len(found):,} of {COUNTS[part]:,} images, of {there:,} of 1,000 "
                "classes"
            )
    if not names:
        raise ValueError(f"imagenet:{top}: {split} holds no image.")
    labelled = spec.label != "none"
    return ImageData(
        FileImages(str(top), names), names, name=str(spec),
        labels=labels if labelled else None,
        classes=[info.index_to_description(i) for i in range(1000)] if labelled else None,
        splits=splits, split=split, faults=faults,
    )  # fmt: skip


def _images(top: Path, part: str) -> Iterator[str]:
    """Sorted names below ``top``: part/image or part/folder/image."""
    for entry in sorted(os.scandir(top / part), key=lambda entry: entry.name):
        if entry.is_dir():
            for name in sorted(os.listdir(entry.path)):
                if name.lower().endswith(EXTENSIONS):
                    yield f"{part}/{entry.name}/{name}"
        elif entry.name.lower().endswith(EXTENSIONS):
            yield f"{part}/{entry.name}"


def _flat_labels(root: Path, names: list[str]) -> dict[str, str]:
    """The synset of every image that lies in no folder of its class."""
    stems = {name: Path(name).stem for name in names}
    if names[0].startswith("train/"):
        raise ValueError(
            f"imagenet:{root}: {len(names)} images lie in train/ itself, such as {names[0]}; "
            "unpack the archive of every synset into a folder of its name."
        )
    if (root / SOLUTION).is_file():
        with open(root / SOLUTION, newline="") as lines:
            synset = {row["ImageId"]: row["PredictionString"].split()[0]
                      for row in csv.DictReader(lines)}  # fmt: skip
    else:
        synset = _devkit(root)
    if missing := [stem for stem in stems.values() if stem not in synset]:
        raise ValueError(
            f"imagenet:{root}: {len(missing)} of {len(names)} images in val/ have no label, such "
            f"as {missing[0]}."
        )
    return {name: synset[stem] for name, stem in stems.items()}


def _devkit(root: Path) -> dict[str, str]:
    """Image → synset, by the development kit; its numbers are not the order of the synsets."""
    folder = root / DEVKIT
    if missing := [name for name in (TRUTH, META) if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"imagenet:{root}: val/ has no synset folders, so its labels are needed from "
            f"{SOLUTION} (not there) or from {DEVKIT}/ (missing: {', '.join(missing)}); put either "
            "into the root, or sort val/ into synset folders."
        )
    from scipy.io import loadmat  # reads matrices, runs nothing

    table = loadmat(folder / META, squeeze_me=True)["synsets"]
    synset = dict(zip(table["ILSVRC2012_ID"].tolist(), table["WNID"].tolist(), strict=True))
    truth = (folder / TRUTH).read_text().split()
    return {f"ILSVRC2012_val_{i:08d}": synset[int(line)] for i, line in enumerate(truth, 1)}
