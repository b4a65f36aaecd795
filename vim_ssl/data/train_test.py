"""Training and test splits of images with labels, masks or boxes."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from vim_ssl.data.classes import with_classes
from vim_ssl.data.dataset import ImageData
from vim_ssl.data.open import open_source, warn_once
from vim_ssl.data.spec import canonical_split
from vim_ssl.data.split import as_key, is_known, stratified_split

HELD_OUT = "held out for testing"


def labelled_only(data: ImageData) -> ImageData:
    """Select the images whose label is known."""
    known = (i for i, label in enumerate(data.labels or []) if is_known(label))
    return data.subset(known, "without a label")


def labelled_splits(
    spec: str | Path, test: float, seed: int, test_spec: str = ""
) -> tuple[ImageData, ImageData]:
    """Return the training and the test split of labelled images.

    The source's test split, else its validation split, is the test split, whatever split ``spec``
    names; images or groups in both splits cause a warning. A source without splits is split here:
    stratified, with groups kept together. Images without a label are skipped.

    Args:
        test: share to hold out of a source without splits, in (0, 1).
        seed: seed of this split.
        test_spec: other data with the same classes, in any order, or some of them; its test split
            (all images if it has no splits) is tested. Training still uses only the training split
            of ``spec``, so an image held out in both is never trained on.
    Raises: ValueError if a split has labels of fewer than two classes, or the test split a class
        that the training data do not name.
    """
    train, other = _labelled(spec, test, seed)
    if test_spec:
        other = _labelled(test_spec, 0.0, seed)[1]
    elif other is not train:
        _warn_of_overlap(spec, train, other)
    other = with_classes(other, train.classes, str(spec))
    train, other = labelled_only(train), labelled_only(other)
    for split in (train, other):
        if len({as_key(label) for label in split.labels or []}) < 2:
            raise ValueError(
                f"{split.name} ({split.split}) has labels of fewer than two classes; put the "
                "images of each class into a folder, or name a column of labels with ?label=."
            )
    return train, other


def _labelled(spec: str | Path, test: float, seed: int) -> tuple[ImageData, ImageData]:
    """Both splits, with or without labels. If ``test`` is 0 and the source has no splits, both are
    all its images."""
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
            f"{spec}: {len(left)} of {len(set(labels))} classes, for example {name}, are not among "
            "the held-out images and not tested: they have too few images or a single group."
        )
    return known.subset(first, HELD_OUT), known.subset(second)


def masked_splits(spec: str | Path, test: float, seed: int) -> tuple[ImageData, ImageData]:
    """Return the training and the test split of images with masks, as `labelled_splits` does.

    Raises: ValueError for images without masks.
    """
    source = open_source(spec)
    held_out = _held_out(source.splits)
    train = source.open("train" if held_out else "all")
    if not train.has_masks:
        raise ValueError(
            f"{spec} has no masks; give a folder that contains images/ and masks/ as masks:FOLDER "
            "(nifti:FOLDER, geotiff:FOLDER), or ade20k:ROOT."
        )
    if not held_out:
        return _cut(train, test, seed)
    other = with_classes(source.open(held_out[0]), train.classes, str(spec))
    _warn_of_overlap(spec, train, other)
    return train, other


def boxed_splits(spec: str | Path, test: float, seed: int) -> tuple[ImageData, ImageData]:
    """Return the training and the test split of images with boxes, as `labelled_splits` does. The
    test split is the first of "test" and "validation" that has boxes.

    Raises: ValueError for images without boxes, or a class that only the test split has.
    """
    source = open_source(spec)
    held_out = _held_out(source.splits)
    if len(source.splits) > 1 and not held_out:
        source.open(None)  # raises if the spec names no split and none is for training
    train = source.open("train" if held_out else "all")
    if not train.has_boxes:
        raise ValueError(f"{spec} has no boxes; give a folder in COCO's layout as coco:ROOT.")
    if not held_out:
        return _cut(train, test, seed)
    first = source.open(held_out[0])
    others = chain([first], map(source.open, held_out[1:]))
    other = next((o for o in others if any(map(o.box_count, range(len(o))))), first)
    other = with_classes(other, train.classes, str(spec))
    _warn_of_overlap(spec, train, other)
    return train, other


def _warn_of_overlap(spec: str | Path, train: ImageData, other: ImageData) -> None:
    """Warn about images and groups that are in both splits of a source."""
    for what, one, two in (("images", train.ids, other.ids),
                           ("groups", train.groups, other.groups)):  # fmt: skip
        if both := set(one or ()) & set(two or ()) - {""}:  # "" is an empty field of a table
            warn_once(
                f"{spec}: {len(both):,} {what} are in both {train.split} and {other.split}, for "
                f"example {min(both)}; test results on them do not carry over to new {what}."
            )


def _cut(everything: ImageData, test: float, seed: int) -> tuple[ImageData, ImageData]:
    first, second = stratified_split([0] * len(everything), test, seed, everything.groups)
    return everything.subset(first, HELD_OUT), everything.subset(second)


def _held_out(splits: Sequence[str]) -> list[str]:
    """The candidate test splits of a source, canonical names; [] without a training split."""
    known = {canonical_split(name) for name in splits}
    return [name for name in ("test", "validation") if {name, "train"} <= known]
