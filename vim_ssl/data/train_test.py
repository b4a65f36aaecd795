"""TrainingRecord and test splits of images with labels, masks or boxes."""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from vim_ssl.data.classes import with_classes
from vim_ssl.data.dataset import ImageData
from vim_ssl.data.identity import TrainingRecord, compare
from vim_ssl.data.open import Source, open_source, open_split, warn_once
from vim_ssl.data.spec import canonical_split, parse_spec
from vim_ssl.data.split import as_key, is_known, stratified_split

HELD_OUT = "held out for testing"


def labelled_only(data: ImageData) -> ImageData:
    """Select the images whose label is known."""
    known = (i for i, label in enumerate(data.labels or []) if is_known(label))
    return data.subset(known, "without a label")


def labelled_splits(
    spec: str | Path, test: float, seed: int, test_spec: str = "",
    trainings: Sequence[TrainingRecord] = (),
) -> tuple[ImageData, ImageData]:  # fmt: skip
    """Return the training and the test split of labelled images.

    The source's test split, else its validation split, is the test split, whatever split ``spec``
    names; images or groups in both splits cause a warning. A source without splits is split here:
    stratified, with groups kept together; so is the training split if no other has a label. Images
    without a label are skipped.

    Args:
        test: share to hold out of a source without splits, in (0, 1).
        seed: seed of this split.
        test_spec: other data with the same classes, in any order, or some of them; its test split
            (all images if it has no splits) is tested. Training still uses only the training split
            of ``spec``, so an image held out in both is never trained on.
        trainings: earlier trainings of the encoder. What they held out is held out again; else
            images whose labels they learnt are not drawn for testing (`hold_out_again`).
    Raises: ValueError if a split has labels of fewer than two classes, or the test split a class
        that the training data do not name.
    """
    train, other = _labelled(spec, test, seed, trainings)
    if test_spec:
        other = _labelled(test_spec, 0.0, seed)[1]
    elif other is not train:
        _warn_of_overlap(spec, train, other)
    other = with_classes(other, train.classes, str(spec))
    train, other = labelled_only(train), labelled_only(other)
    if test_spec or other.splits:
        _warn_of_absent_classes(spec, train, other)
    for split in (train, other):
        if len({as_key(label) for label in split.labels or []}) < 2:
            raise ValueError(
                f"{split.name} ({split.split}) has labels of fewer than two classes; put the "
                "images of each class into a folder, or name a column of labels with ?label=."
            )
    return train, other


def _warn_of_absent_classes(spec: str | Path, train: ImageData, other: ImageData) -> None:
    """Warn about classes of the training images that no test image has."""
    if train.multi_label or not train.classes:
        return
    if absent := set(train.labels or ()) - set(other.labels or ()):
        warn_once(
            f"{spec}: {len(absent):,} of {len(train.classes):,} classes, for example "
            f"{train.classes[min(absent)]}, have no image in {other.split} and are not tested."
        )


def _labelled(
    spec: str | Path, test: float, seed: int, trainings: Sequence[TrainingRecord] = ()
) -> tuple[ImageData, ImageData]:
    """Both splits, with or without labels. If ``test`` is 0 and the source has no splits, both are
    all its images."""
    source = open_source(spec)
    if held_out := _held_out(source.splits):
        # The labels of a test split are often withheld.
        others = map(source.open, held_out)
        if other := next((o for o in others if any(map(is_known, o.labels or ()))), None):
            return source.open("train"), other
    everything = _train_alone(source, spec) if held_out else _undivided(source, spec)
    if everything.labels is None or not test:
        return everything, everything
    known = labelled_only(everything)
    labels = known.labels or []
    drawn = stratified_split(labels, test, seed, known.groups)
    first, second = hold_out_again(known, drawn, trainings)
    if not known.multi_label and (left := set(labels) - {labels[i] for i in second}):
        name = known.classes[min(left)] if known.classes else min(left)
        warn_once(
            f"{spec}: {len(left)} of {len(set(labels))} classes, for example {name}, are not among "
            "the held-out images and not tested: they have too few images or a single group."
        )
    return known.subset(first, HELD_OUT), known.subset(second)


def _train_alone(source: Source, spec: str | Path) -> ImageData:
    """Return the training split as data without splits, because no other split has labels; warn of
    that."""
    train = source.open("train")
    others = " and ".join(name for name in source.splits if name != train.split)
    warn_once(
        f"{spec}: {others} cannot be tested on without labels; images of {train.split} are held "
        "out instead."
    )
    return _as_all(train)


def _undivided(source: Source, spec: str | Path) -> ImageData:
    """Return the images of a source without a test split, to be divided here: those of the training
    split, as others may be meant for other uses, unless the spec asks for all; warn of the rest."""
    known = [canonical_split(name) for name in source.splits]
    everything = len(known) < 2 or "train" not in known or parse_spec(spec).split == "all"
    if everything:
        return source.open("all")
    train = source.open("train")
    others = " and ".join(name for name in source.splits if name != train.split)
    warn_once(
        f"{spec}: {others} is neither a test nor a validation split, so it is not used; images of "
        f"{train.split} are held out for testing. ?split=all divides all images."
    )
    return _as_all(train)


def _as_all(data: ImageData) -> ImageData:
    """The images as data without splits."""
    data = data.subset(range(len(data)))
    data.split = "all"
    return data


def masked_splits(
    spec: str | Path, test: float, seed: int, trainings: Sequence[TrainingRecord] = ()
) -> tuple[ImageData, ImageData]:
    """Return the training and the test split of images with masks, as `labelled_splits` does.

    Raises: ValueError for images without masks.
    """
    source = open_source(spec)
    held_out = _held_out(source.splits)
    train = _with_masks(spec, source.open("train") if held_out else _undivided(source, spec))
    if not held_out:
        return _cut(train, test, seed, trainings)
    other = with_classes(source.open(held_out[0]), train.classes, str(spec))
    _warn_of_overlap(spec, train, other)
    return train, other


def masked_split(spec: str) -> ImageData:
    """Return the images with masks to evaluate a trained model on: the split that ``spec`` names,
    else the test split, else the validation split, else all images.

    Raises: ValueError for images without masks.
    """
    return _with_masks(spec, open_split(spec))


def _with_masks(spec: str | Path, data: ImageData) -> ImageData:
    if not data.has_masks:
        raise ValueError(
            f"{spec} has no masks; give a folder that contains images/ and masks/ as masks:FOLDER "
            "(nifti:FOLDER, geotiff:FOLDER), or ade20k:ROOT."
        )
    return data


def boxed_splits(
    spec: str | Path, test: float, seed: int, trainings: Sequence[TrainingRecord] = ()
) -> tuple[ImageData, ImageData]:
    """Return the training and the test split of images with boxes, as `labelled_splits` does. The
    test split is the first of "test" and "validation" that has boxes.

    Raises: ValueError for images without boxes, or a class that only the test split has.
    """
    source = open_source(spec)
    held_out = _held_out(source.splits)
    if len(source.splits) > 1 and not held_out:
        source.open(None)  # raises if the spec names no split and none is for training
    train = _with_boxes(spec, source.open("train") if held_out else _undivided(source, spec))
    if not held_out:
        return _cut(train, test, seed, trainings)
    other = _first_with_boxes(map(source.open, held_out))
    other = with_classes(other, train.classes, str(spec))
    _warn_of_overlap(spec, train, other)
    return train, other


def boxed_split(spec: str) -> ImageData:
    """`masked_split` for images with boxes.

    Raises: ValueError for images without boxes.
    """
    names = (("test", "validation"), ("validation", "test"))
    return _with_boxes(spec, _first_with_boxes(open_split(spec, requested) for requested in names))


def _first_with_boxes(splits: Iterable[ImageData]) -> ImageData:
    """Return the first split in which an image has boxes, else the first split."""
    splits = iter(splits)
    first = next(splits)  # the labels of a test split are often withheld
    return next(filter(_any_box, chain([first], splits)), first)


def _any_box(data: ImageData) -> bool:
    return any(map(data.box_count, range(len(data))))


def _with_boxes(spec: str | Path, data: ImageData) -> ImageData:
    if not data.has_boxes:
        raise ValueError(f"{spec} has no boxes; give a folder in COCO's layout as coco:ROOT.")
    return data


def _warn_of_overlap(spec: str | Path, train: ImageData, other: ImageData) -> None:
    """Warn about images and groups that are in both splits of a source."""
    for what, one, two in (("images", train.ids, other.ids),
                           ("groups", train.groups, other.groups)):  # fmt: skip
        if both := set(one or ()) & set(two or ()) - {""}:  # "" is an empty field of a table
            warn_once(
                f"{spec}: {len(both):,} {what} are in both {train.split} and {other.split}, for "
                f"example {min(both)}; test results on them do not carry over to new {what}."
            )


def hold_out_again(
    data: ImageData, drawn: tuple[list[int], list[int]], trainings: Sequence[TrainingRecord]
) -> tuple[list[int], list[int]]:
    """Return the training and the test indices of data without splits, after earlier trainings.

    What these held out is the test part. If they held nothing of it out, the images whose labels
    they learnt are moved from the drawn test part to the training part, unless none would be left.
    """
    if not any(training.labels for training in trainings):
        return drawn
    seen = compare(data, trainings)
    if seen.labels.any() and seen.held_out.any():
        tested = set(seen.held_out.nonzero()[0].tolist())
    else:
        tested = {i for i in drawn[1] if not seen.labels[i] and not seen.by_group[i]}
    if not tested or tested == set(drawn[1]):
        return drawn
    return [i for i in range(len(data)) if i not in tested], sorted(tested)


def _cut(
    everything: ImageData, test: float, seed: int, trainings: Sequence[TrainingRecord]
) -> tuple[ImageData, ImageData]:
    drawn = stratified_split([0] * len(everything), test, seed, everything.groups)
    first, second = hold_out_again(everything, drawn, trainings)
    return everything.subset(first, HELD_OUT), everything.subset(second)


def _held_out(splits: Sequence[str]) -> list[str]:
    """The candidate test splits of a source, canonical names; [] without a training split."""
    known = {canonical_split(name) for name in splits}
    return [name for name in ("test", "validation") if {name, "train"} <= known]
