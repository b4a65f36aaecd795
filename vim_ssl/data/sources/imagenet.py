"""``imagenet:``: ImageNet-1k in its published layouts."""

from pathlib import Path

from timm.data import ImageNetInfo

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import EXTENSIONS
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.sources.folder import FileImages
from vim_ssl.data.spec import DataSpec, pick_split
from vim_ssl.data.tables import load_table
from vim_ssl.data.walk import contents, walk_files
from vim_ssl.utils.files import read_text, reading

COUNTS = {"train": 1_281_167, "val": 50_000}
KAGGLE = "ILSVRC/Data/CLS-LOC"
SOLUTION = "LOC_val_solution.csv"
DEVKIT = "ILSVRC2012_devkit_t12/data"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


@source("imagenet", options=("label",))
def open_imagenet(spec: DataSpec) -> Splits:
    """Open ``imagenet:root`` with the splits train and val, or one of them.

    - ``root/train/SYNSET/*.JPEG``, ``root/val/SYNSET/*.JPEG``; both may be in Kaggle's
      ``root/ILSVRC/Data/CLS-LOC`` instead.
    - The labels of a flat ``val/`` come from Kaggle's ``LOC_val_solution.csv``, or from the
      development kit, ``ILSVRC2012_devkit_t12/data`` with its ``meta.mat``; either must be in root.

    A label is the synset's index among the 1,000 sorted synsets, as in every released checkpoint,
    also for a subset of ImageNet. The ids are the paths relative to the parent of train and val.
    ``faults`` names incomplete splits.

    Raises: FileNotFoundError and ValueError that list everything missing or wrong.
    """
    root = Path(spec.location).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"imagenet:{spec.location}: the folder does not exist.")
    top = root / KAGGLE if (root / KAGGLE).is_dir() else root
    splits = [split for split in COUNTS if (top / split).is_dir()]
    if not splits:
        raise FileNotFoundError(
            f"imagenet:{root} has neither train/ nor val/, nor {KAGGLE}/ with them. It "
            f"{contents(root)}."
        )

    def choose(spec: DataSpec) -> ImageData:
        split = pick_split(spec.split, splits, f"imagenet:{root}")
        info = ImageNetInfo()
        synsets = info.label_names()
        number = {name: i for i, name in enumerate(synsets)}

        synset_of: dict[str, str] = {}
        faults: list[str] = []
        for name in splits:
            if split in ("all", name):
                of_split = _synsets(root, top, name, set(synsets))
                synset_of |= of_split
                if len(of_split) < COUNTS[name]:
                    faults.append(
                        f"{name}/ has {len(of_split):,} of {COUNTS[name]:,} images, of "
                        f"{len(set(of_split.values())):,} of 1,000 classes"
                    )
        if not synset_of:
            raise ValueError(f"imagenet:{top}: {split} contains no images.")
        labelled = spec.label != "none"
        return ImageData(
            FileImages(str(top), list(synset_of)), synset_of, name=str(spec),
            labels=[number[synset] for synset in synset_of.values()] if labelled else None,
            classes=[info.index_to_description(i) for i in range(1000)] if labelled else None,
            splits=splits, split=split, faults=faults,
        )  # fmt: skip

    return Splits(splits, choose)


def _synsets(root: Path, top: Path, split: str, known: set[str]) -> dict[str, str]:
    """Map the images of a split (sorted names relative to ``top``) to their synsets.

    Raises: ValueError for folders that are not synsets; the errors of `_flat_labels`.
    """
    names = [f"{split}/{name}" for name in walk_files(top / split, EXTENSIONS)[0]]
    flat = [name for name in names if name.count("/") == 1]
    truth = _flat_labels(root, flat) if flat else {}
    synset_of = {name: truth.get(name) or name.split("/")[1] for name in names}
    if unknown := sorted(set(synset_of.values()) - set(truth.values()) - known):
        raise ValueError(
            f"imagenet:{root}/{split} has {len(unknown)} folders that are not synsets of "
            f"ImageNet-1k, such as {', '.join(unknown[:5])}; for other classes, give the folder "
            "without imagenet:."
        )
    return synset_of


def _flat_labels(root: Path, names: list[str]) -> dict[str, str]:
    """Map the images that are not in a synset folder to their synsets."""
    stems = {name: Path(name).stem for name in names}
    if names[0].startswith("train/"):
        raise ValueError(
            f"imagenet:{root}: {len(names)} images are directly in train/, such as {names[0]}; "
            "unpack the archive of each synset into a folder with the synset's name."
        )
    if (root / SOLUTION).is_file():
        table = load_table(root / SOLUTION, f"imagenet:{root}: {SOLUTION}")
        predictions = table.required(("PredictionString",), "label")
        first = ((prediction.split() or [""])[0] for prediction in predictions)
        synset = dict(zip(table.required(("ImageId",), "image"), first, strict=True))
    else:
        synset = _devkit(root)
    if missing := [stem for stem in stems.values() if stem not in synset]:
        raise ValueError(
            f"imagenet:{root}: {len(missing)} of {len(names)} images in val/ have no label, such "
            f"as {missing[0]}."
        )
    return {name: synset[stem] for name, stem in stems.items()}


def _devkit(root: Path) -> dict[str, str]:
    """Map images to synsets from the development kit, whose class numbers have another order."""
    folder = root / DEVKIT
    if missing := [name for name in (TRUTH, META) if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"imagenet:{root}: val/ has no synset folders, so its labels must come from "
            f"{SOLUTION} (missing) or from {DEVKIT}/ (missing: {', '.join(missing)}); put either "
            "into the root, or sort val/ into synset folders."
        )
    from scipy.io import loadmat  # executes nothing

    with reading(folder / META, "the table of ImageNet's classes"):
        table = loadmat(folder / META, squeeze_me=True)["synsets"]
        synset = dict(zip(table["ILSVRC2012_ID"].tolist(), table["WNID"].tolist(), strict=True))
    with reading(folder / TRUTH, "a list of class numbers"):
        truth = read_text(folder / TRUTH).split()
        return {f"ILSVRC2012_val_{i:08d}": synset[int(line)] for i, line in enumerate(truth, 1)}
