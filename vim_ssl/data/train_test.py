"""The training and the test split of labelled, masked or boxed images."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.open import open_source, warn_once
from vim_ssl.data.spec import canonical_split
from vim_ssl.data.split import as_key, is_known, stratified_split


def labelled_only(data: ImageData) -> ImageData:
    """The images whose label is known."""
    return data.subset(i for i, label in enumerate(data.labels or []) if is_known(label))


def labelled_splits(
    spec: str | Path, test: float, seed: int, test_spec: str = ""
) -> tuple[ImageData, ImageData]:
    """The training and the test split of labelled images.

    A source's test (else validation) split is used where it has one, whatever split ``spec`` names,
    with a warning of groups that are in both; otherwise a stratified share is held out, groups kept
    together. Images without a label are left out.

    Args:
        test: share to hold out, in (0, 1), of a source without splits.
        seed: of that choice.
        test_spec: other data of the same classes, whose test split is taken (all of it, if it has
            no splits); of ``spec`` the training split still, so that an image held out in both is
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
        _warn_of_overlap(spec, train, other)
    train, other = labelled_only(train), labelled_only(other)
    for split in (train, other):
        if len({as_key(label) for label in split.labels or []}) < 2:
            raise ValueError(
                f"{split.name} ({split.split}) has no labels of two classes; it needs them."
            )
    return train, other


def _labelled(spec: str | Path, test: float, seed: int) -> tuple[ImageData, ImageData]:
    """Both splits, labelled or not; for ``test`` 0 a source without splits is both."""
    source = open_source(spec)
    if held_out := _held_out(source.splits):
        first = source.open(held_out[0])
        others = chain([first], map(source.open, held_out[1:]))
        # The labels of a test split are often withheld.
        return source.open("train"), next((o for o in others if o.labels is not None), first)
    everything = source.open("all")
    if everything.labels is None or not test:
        return everything, everything
    known = labelled_only(everything)
    labels = known.labels or []
    first, second = stratified_split(labels, test, seed, known.groups)
    if not known.multi_label and (left := set(labels) - {labels[i] for i in second}):
        name = known.classes[min(left)] if known.classes else min(left)
        warn_once(
            f"{spec}: {len(left)} of {len(set(labels))} classes, such as {name}, are not among the "
            "images held out: too few images, or a single group. They are not tested."
        )
    return known.subset(first), known.subset(second)


def _few(classes: Sequence[str] | None) -> str:
    names = classes or ()
    return ", ".join(names[:5]) + (f" … ({len(names)})" if len(names) > 5 else "")


def masked_splits(spec: str | Path, test: float, seed: int) -> tuple[ImageData, ImageData]:
    """The training and the test split of images with masks; as `labelled_splits`.

    Raises: ValueError for images without masks.
    """
    source = open_source(spec)
    held_out = _held_out(source.splits)
    train = source.open("train" if held_out else "all")
    if not train.has_masks:
        raise ValueError(
            f"{spec} has no masks; name a folder with images/ and masks/ as masks:FOLDER "
            "(nifti:FOLDER, geotiff:FOLDER), or ade20k:ROOT."
        )
    if not held_out:
        return _cut(train, test, seed)
    other = source.open(held_out[0])
    _warn_of_overlap(spec, train, other)
    return train, other


def boxed_splits(spec: str | Path, test: float, seed: int) -> tuple[ImageData, ImageData]:
    """The training and the test split of images with boxes; as `labelled_splits`. Of several splits
    to test on, the first in which there are boxes.

    Raises: ValueError for images without boxes, or splits of different classes.
    """
    from vim_ssl.data.sources.coco import check_same_categories  # of boxes alone

    source = open_source(spec)
    held_out = _held_out(source.splits)
    if len(source.splits) > 1 and not held_out:
        source.open(None)  # raises if the spec names no split and none is for training
    train = source.open("train" if held_out else "all")
    if not train.has_boxes:
        raise ValueError(f"{spec} has no boxes; name a folder in COCO's layout as coco:ROOT.")
    if not held_out:
        return _cut(train, test, seed)
    first = source.open(held_out[0])
    others = chain([first], map(source.open, held_out[1:]))
    other = next((o for o in others if any(map(o.box_count, range(len(o))))), first)
    check_same_categories(train.categories or [], [other.categories or []])
    _warn_of_overlap(spec, train, other)
    return train, other


def _warn_of_overlap(spec: str | Path, train: ImageData, other: ImageData) -> None:
    """Warn of images and groups that are in both splits of a source."""
    for what, one, two in (("images", train.ids, other.ids),
                           ("groups", train.groups, other.groups)):  # fmt: skip
        if both := set(one or ()) & set(two or ()) - {""}:  # "" is an empty field of a table
            warn_once(
                f"{spec}: {len(both):,} {what} are in both {train.split} and {other.split}, such "
                f"as {min(both)}: results on them say little about other {what}."
            )


def _cut(everything: ImageData, test: float, seed: int) -> tuple[ImageData, ImageData]:
    first, second = stratified_split([0] * len(everything), test, seed, everything.groups)
    return everything.subset(first), everything.subset(second)


def _held_out(splits: Sequence[str]) -> list[str]:
    """The splits to test on, of those of a source that has a training split too."""
    known = {canonical_split(name) for name in splits}
    return [name for name in ("test", "validation") if {name, "train"} <= known]
