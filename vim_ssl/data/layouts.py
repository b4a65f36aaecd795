"""Warn of folders whose names say that their files are not meant as they are read: splits that are
not named as such, and masks beside their images.

Only names are looked at, and nothing is read otherwise because of them, so that the data of earlier
runs stay the same.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from vim_ssl.data.labels import MASK_NAME
from vim_ssl.data.passed_over import add_warning, some_of
from vim_ssl.data.spec import SPLIT_NAMES, canonical_split

_SPLIT = r"training|train|validation|valid|val|dev|testing|test"
_MASK = (
    r"masks?|labels?|lbls?|annotations?|annots?|annos?|ground[-_ ]?truths?|gts?|segmentations?|"
    r"segs?|trimaps?|mattes?"
)
_IMAGE = r"images?|imgs?|inputs?|photos?|originals?|leftimg"
# Words that do not say what a folder contains; numbers and single letters are left out too.
_FILLER = (
    r"datasets?|data|sets?|split|folder|files?|frames?|videos?|scans?|slices?|stage|stg|final|new|"
    r"jpe?gs?|pngs?|tiff?s?|class(?:es)?|objects?|pixels?|level|semantic|instance|bit"
)
_WORD = re.compile(rf"{_SPLIT}|{_MASK}|{_IMAGE}|{_FILLER}|[a-z]+")
_KINDS = [
    (kind, re.compile(words))
    for kind, words in (
        ("split", _SPLIT), ("mask", _MASK), ("image", _IMAGE), ("filler", f"{_FILLER}|[a-z]")
    )
]  # fmt: skip
_ENDING = r"(?:\.nii)?\.\w+$"
_MASK_FILE = re.compile(rf"{MASK_NAME.pattern[:-1]}(?:_\d+)?{_ENDING}", re.IGNORECASE)
_RARE = 10  # masks are reported if at least one file of so many is one
_LEVELS = 3  # folders inside each other that are looked at


def warn_of_layout(names: Sequence[str], splits: Sequence[str]) -> None:
    """Warn if folders look like splits and are not read as such, and if masks are among the images.

    Args:
        names: paths below the root, with forward slashes.
        splits: the split folders; empty if the folders below the root are not splits.
    """
    paths = [folder.split("/") for folder in {name.rpartition("/")[0] for name in names} - {""}]
    levels = [sorted({path[i] for path in paths if len(path) > i}) for i in range(_LEVELS)]
    if not splits and not _warn_of_splits(levels[0]):
        _warn_of_deep_splits(levels[0], levels[1])
    if not any(map(_warn_of_mask_folders, levels)):
        _warn_of_mask_files(names)


def _words(folder: str) -> dict[str, list[str]]:
    """Return the words of a folder's name by kind: "split", "mask", "image", "filler", "other"."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for word in _WORD.findall(folder.lower()):
        kinds[next((kind for kind, known in _KINDS if known.fullmatch(word)), "other")].append(word)
    return kinds


def _like_splits(folders: Iterable[str]) -> dict[str, str]:
    """Map the folders that look like different splits of the same images to canonical splits:
    train2017 and val2017, or train_cat and test_cat, but not "train station" and "test tube"."""
    groups: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for folder in folders:
        words = _words(folder)
        if words["split"]:
            groups[tuple(words["other"])][folder] = canonical_split(words["split"][0])
    several = [group for group in groups.values() if len(set(group.values())) > 1]
    return {folder: split for group in several for folder, split in group.items()}


def _warn_of_splits(folders: Sequence[str]) -> bool:
    """Warn of folders such as train2017 and val2017. Return whether any look like splits."""
    alike = _like_splits(folders)
    if not all(canonical_split(folder) in SPLIT_NAMES for folder in alike):
        splits = [split for split in SPLIT_NAMES if split in alike.values()]
        add_warning(
            f"{_listed(alike)} look like splits, but are not read as splits: the images of all of "
            "them are read together, and each folder may be read as a class. Rename them to "
            f"{_listed(splits)}, with no other folder or image beside them, or give one of them as "
            "the data."
        )
    return bool(alike)


def _warn_of_deep_splits(tops: Sequence[str], folders: Sequence[str]) -> None:
    """Warn of splits one level too deep: archive/train, or cat/train and dog/train."""
    if alike := _like_splits(folders):
        remedy = (
            f"give {tops[0]}/ as the data" if len(tops) == 1
            else f"move their content into folders such as train/{tops[0]}/"
        )  # fmt: skip
        add_warning(
            f"{_listed(alike)} below {_listed(tops)} look like splits, but are not read as splits: "
            f"the images of all of them are read together. To use them, {remedy}."
        )


def _warn_of_mask_folders(folders: Sequence[str]) -> bool:
    """Warn of folders such as images and masks, or train and train_labels, side by side. Return
    whether there are any."""
    masks, images = [], []
    for folder in folders:
        words = _words(folder)
        if words["mask"] and not words["other"]:
            masks.append(folder)
        elif (words["image"] or words["split"]) and not words["other"]:
            images.append(folder)
    if masks and images:
        add_warning(
            f"{_listed(masks)} look like the masks of {_listed(images)}, but are read as images. "
            "If they are masks, name the folders images/ and masks/ and write masks:FOLDER "
            "(nifti:FOLDER, geotiff:FOLDER); for the images alone, give their folder."
        )
    return bool(masks and images)


def _warn_of_mask_files(names: Sequence[str]) -> None:
    """Warn of files such as a_mask.png beside a.png, or case_seg.nii.gz beside case_t1.nii.gz."""
    matches = ((name, _MASK_FILE.search(name)) for name in names)
    base_of = {name: name[: match.start()] for name, match in matches if match}
    if not base_of:
        return
    stems = {re.sub(_ENDING, "", name) for name in names if name not in base_of}
    stems |= {re.sub(r"[-_.][^-_./]+$", "", stem) for stem in stems}
    masks = [name for name, base in base_of.items() if base in stems]
    if len(masks) * _RARE >= len(names):
        add_warning(
            f"{len(masks):,} of {len(names):,} files look like masks of others, but are read as "
            f"images: {some_of(masks)}. If they are masks, move the images to images/ and the "
            "masks to masks/ and write masks:FOLDER (nifti:FOLDER, geotiff:FOLDER)."
        )


def _listed(folders: Iterable[str]) -> str:
    return some_of(f"{folder}/" for folder in folders)
