"""The training and the test split of labelled, masked or boxed images."""

from collections.abc import Sequence
from pathlib import Path

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.open import open_data, warn_once
from vim_ssl.data.spec import canonical_split
from vim_ssl.data.split import as_key, is_known, stratified_split


def labelled_only(data: ImageData) -> ImageData:
    """The images whose label is known."""
    return data.subset(i for i, label in enumerate(data.labels or []) if is_known(label))


def labelled_splits(
    spec: str | Path, test: float, seed: int, test_spec: str = ""
) -> tuple[ImageData, ImageData]:
    """The training and the test part of labelled images.

    The source's own test (or else validation) split is used where there is one, whatever split
    ``spec`` names, with a warning of groups that are on both its sides; otherwise a stratified
    share is held out, groups kept together. Images without a label are left out.

    Args:
        test: share to hold out, in (0, 1), of a source without splits.
        seed: of that choice.
        test_spec: other data of the same classes, whose test part is taken (all of it, if it has no
            splits); of ``spec`` the training part still, so that an image held out in both is
            new.
    Raises: ValueError for images without labels of at least two classes, or of other classes.
    """
    train, other = _labelled(spec, test, seed)
    if test_spec:
        other = _labelled(test_spec, 0.0, seed)[1]
        if train.classes != other.classes:
            raise ValueError(
                f"{spec} has the classes {_few(train.classes)}, {test_spec} {_few(other.classes)}; "
                "test on data of the same classes."
            )
    else:
        _tell_of_both(spec, train, other)
    parts = []
    for part in (train, other):
        part = labelled_only(part)
        if len({as_key(label) for label in part.labels or []}) < 2:
            raise ValueError(
                f"{part.name} ({part.split}) has no labels of two classes; it needs them."
            )
        parts.append(part)
    return parts[0], parts[1]


def _labelled(spec: str | Path, test: float, seed: int) -> tuple[ImageData, ImageData]:
    """Both parts, labelled or not; for ``test`` 0 a source without splits is both."""
    everything = open_data(spec, split="all")
    if held_out := _held_out(everything):
        others = [open_data(spec, split=name) for name in held_out]
        # The labels of a test split are often withheld.
        other = next((part for part in others if part.labels is not None), others[0])
        return open_data(spec, split="train"), other
    if everything.labels is None or not test:
        return everything, everything
    known = labelled_only(everything)
    labels = known.labels or []
    first, second = stratified_split(labels, test, seed, known.groups)
    if not known.multi_label and (left := set(labels) - {labels[i] for i in second}):
        name = known.classes[min(left)] if known.classes else min(left)
        warn_once(
            f"{spec}: {len(left)} of {len(set(labels))} classes, such as {name}, are not in the "
            "part that is held out: too few images, or a single group. Nothing is said of them."
        )
    return known.subset(first), known.subset(second)


def _few(classes: Sequence[str] | None) -> str:
    names = classes or ()
    return ", ".join(names[:5]) + (f" … ({len(names)})" if len(names) > 5 else "")


def masked_splits(spec: str | Path, test: float, seed: int) -> tuple[ImageData, ImageData]:
    """The training and the test part of images with masks; as `labelled_splits`.

    Raises: ValueError for images without masks.
    """
    everything = open_data(spec, split="all")
    if not everything.has_masks:
        raise ValueError(
            f"{spec} has no masks; name a folder with images/ and masks/ as masks:FOLDER "
            "(nifti:FOLDER, geotiff:FOLDER), or ade20k:ROOT."
        )
    if held_out := _held_out(everything):
        train, other = open_data(spec, split="train"), open_data(spec, split=held_out[0])
        _tell_of_both(spec, train, other)
        return train, other
    return _cut(everything, test, seed)


def boxed_splits(spec: str | Path, test: float, seed: int) -> tuple[ImageData, ImageData]:
    """The training and the test part of images with boxes; as `labelled_splits`. Of several splits
    to test on, the first in which there are boxes.

    Raises: ValueError for images without boxes, or parts of different classes.
    """
    from vim_ssl.data.sources.coco import check_same_categories  # of boxes alone

    train = open_data(spec)
    if not train.has_boxes:
        raise ValueError(f"{spec} has no boxes; name a folder in COCO's layout as coco:ROOT.")
    if not (held_out := _held_out(train)):
        return _cut(open_data(spec, split="all"), test, seed)
    train = open_data(spec, split="train")
    others = [open_data(spec, split=name) for name in held_out]
    other = next((o for o in others if any(map(o.box_count, range(len(o))))), others[0])
    check_same_categories(train.categories or [], [other.categories or []])
    _tell_of_both(spec, train, other)
    return train, other


def _tell_of_both(spec: str | Path, train: ImageData, other: ImageData) -> None:
    """Warn of images and groups that a source has on both sides of its split."""
    for what, one, two in (("images", train.ids, other.ids),
                           ("groups", train.groups, other.groups)):  # fmt: skip
        if both := set(one or ()) & set(two or ()) - {""}:  # "" is an empty field of a table
            warn_once(
                f"{spec}: {len(both):,} {what} are in both {train.split} and {other.split}, such "
                f"as {min(both)}: what is found in them says little about others."
            )


def _cut(everything: ImageData, test: float, seed: int) -> tuple[ImageData, ImageData]:
    alike = [0] * len(everything)
    first, second = stratified_split(alike, test, seed, everything.groups)
    return everything.subset(first), everything.subset(second)


def _held_out(everything: ImageData) -> list[str]:
    """The splits to test on, of a source that has such a one beside a training part."""
    splits = {canonical_split(name) for name in everything.splits}
    return [name for name in ("test", "validation") if {name, "train"} <= splits]
