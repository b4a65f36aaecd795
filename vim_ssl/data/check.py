"""``vim-ssl data check SPEC``: find faults in data before training on it."""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from vim_ssl.data.bands import ORDERS, in_other_unit, mean_size
from vim_ssl.data.clips import still
from vim_ssl.data.copies import alike_images, equal_images
from vim_ssl.data.dataset import ImageData, captions_of
from vim_ssl.data.formats import explain
from vim_ssl.data.images import BadImage
from vim_ssl.data.labels import IGNORE
from vim_ssl.data.loading.streamed import ImageStream
from vim_ssl.data.loading.workers import Loader
from vim_ssl.data.lookalikes import MISSING, Look, look_of
from vim_ssl.data.open import Source, open_data, open_source, sets_of
from vim_ssl.data.pages import PAGES, count_pages
from vim_ssl.data.passed_over import some_of
from vim_ssl.data.ranges import fills, levels_of, narrow, undeclared
from vim_ssl.data.registry import SOURCES
from vim_ssl.data.spec import canonical_split
from vim_ssl.data.walk import UNREADABLE
from vim_ssl.utils.names import plural, printable

LISTED = 20  # maximum number of classes whose counts are listed


@dataclass(frozen=True)
class Decoded:
    """Properties of a decoded image, or the ``fault`` that prevented decoding.

    Attributes:
        pixels: hash of mode, size and values.
        size: (width, height).
        flat, holes: whether all values are equal; whether some are not finite.
        measure: of bands, the largest mean absolute value; else NaN.
        classes: the class indices in its mask, each once, or one per box.
        captioned: whether it has a caption.
        pages: number of images in its file.
        notes: in what it is read otherwise than meant; see `vim_ssl.data.clips.note`.
        look: what it looks like; None for a blank image, for bands, and without imagehash.
        fills, levels: see `vim_ssl.data.ranges`.
    """

    id: str
    fault: str = ""
    pixels: bytes = b""
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    flat: bool = False
    holes: bool = False
    measure: float = np.nan
    classes: tuple[int, ...] = ()
    captioned: bool = False
    pages: int = 1
    notes: tuple[str, ...] = ()
    look: Look | None = None
    fills: tuple[float, ...] = ()
    levels: tuple[int, int] | None = None


@dataclass
class Split:
    """One split: its columns as in `ImageData`, and its decoded images.

    Attributes:
        masks: whether the images have masks.
        boxes: number of boxes per image; None for data without boxes.
        classes: names of the classes that the labels number.
    """

    name: str
    ids: list[str]
    labels: list[Any] | None
    groups: list[str] | None
    masks: bool = False
    boxes: list[int] | None = None
    classes: list[str] | None = None
    decoded: list[Decoded] = field(default_factory=list)


@dataclass
class Report:
    """The result of `check`: facts about the data, problems, and remarks on possible problems."""

    facts: list[str]
    problems: list[str]
    remarks: list[str]

    def __str__(self) -> str:
        lines = list(self.facts)
        for title, sign, listed in (("Problems", "x", self.problems),
                                    ("Remarks", "-", self.remarks)):  # fmt: skip
            if listed:
                lines += ["", f"{title}:", *(f"  {sign} {line}" for line in listed)]
        end = f"{plural(len(self.problems), 'problem')}." if self.problems else "No problems."
        return "\n".join([*lines, "", end])


def check(spec: str | Path, *, sample: int = 0, workers: int = 0, quiet: bool = True) -> Report:
    """Check counts, labels, every image, and the overlap of the splits.

    Args:
        spec: see `open_data`; all splits are checked unless it names one.
        sample: number of images to decode per split, spread evenly; 0 decodes all. Duplicates are
            found only among decoded images.
        workers: number of processes that decode.
        quiet: show no progress bar.
    Raises: the errors of `open_data`.
    """
    source, data = _opened(spec)
    splits = list(_splits(source, data, sample, workers, quiet))
    # All images together have no classes if those of one split have no labels.
    classes = data.classes or next((s.classes for s in splits if s.classes), None)
    report = Report([f"{spec}: {_layout(data, splits, classes)}", ""], list(data.faults), [])
    _check_layout(data, report)
    _count(splits, report)
    _check_labels(splits, classes, report)
    _check_truth(splits, classes, report)
    _check_images(splits, report)
    if getattr(data, "has_captions", False):
        _check_captions(splits, report)
    _check_groups(splits, report)
    if MISSING:
        report.facts.append("Resized or cropped copies are not searched for: pip install imagehash")
    for problems, remarks in (equal_images(splits), alike_images(splits)):
        report.problems += problems
        report.remarks += remarks
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vim-ssl data check SPEC``. Return 0 if there are no problems, else 1."""
    parser = argparse.ArgumentParser(prog="vim-ssl data", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    action = actions.add_parser("check", help="check a data spec and report its faults")
    action.add_argument(
        "spec", metavar="SPEC", help=f"a folder, or SCHEME:LOCATION; schemes: {', '.join(SOURCES)}"
    )
    action.add_argument(
        "--sample", type=int, default=0, metavar="N", help="decode N images per split; 0: all"
    )
    action.add_argument("--workers", type=int, default=0, help="number of processes that decode")
    args = parser.parse_args(argv)
    try:
        report = check(args.spec, sample=args.sample, workers=args.workers, quiet=False)
    except (ValueError, OSError) as error:
        print(f"{args.spec} cannot be opened:\n  x {error}")
        return 1
    print(report)
    return 1 if report.problems else 0


# ---------------------------------------------------------------- decoding


def _opened(spec: str | Path) -> tuple[Source, ImageData | ImageStream]:
    """Open the source, and the split that its spec names or else all images."""
    joined = sets_of(str(spec))
    if len(joined) > 1:
        data = open_data(spec, streams=True)
        return Source(data.splits, lambda split: data), data
    source = open_source(spec, streams=True)
    return source, source.open(None if joined[0][1].split else "all")


def _splits(
    source: Source, data: ImageData | ImageStream, sample: int, workers: int, quiet: bool
) -> Iterator[Split]:
    if data.is_stream:
        yield _decode_stream(data.limited(sample) if sample else data, quiet)
        return
    for name in data.splits if data.split == "all" and data.splits else [data.split]:
        images = data if name == data.split else source.open(name)
        boxes = [images.box_count(i) for i in range(len(images))] if images.has_boxes else None
        split = Split(
            name, images.ids, images.labels, images.groups, images.has_masks, boxes, images.classes
        )  # fmt: skip
        few = min(sample, len(images)) if sample else len(images)
        chosen = images.subset(i * len(images) // few for i in range(few))
        loader = Loader(_Decoding(chosen), 16, num_workers=workers, collate_fn=list)
        with tqdm(total=few, desc=name, unit="images", disable=quiet) as bar:
            for decoded in loader:
                split.decoded += decoded
                bar.update(len(decoded))
        yield split


class _Decoding(Dataset):
    """`Decoded` images by index."""

    def __init__(self, data: ImageData):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Decoded:
        try:
            item = self.data[index]
            decoded = describe(self.data.ids[index], still(item["image"]))
        except BadImage as bad:
            return Decoded(bad.id, bad.reason)
        classes = item.get("box_labels", np.setdiff1d(item.get("mask", ()), IGNORE))
        captioned = bool(captions_of(item.get("caption")))
        return replace(
            decoded, classes=tuple(map(int, classes)), captioned=captioned,
            pages=_pages(self.data.file(index)),
        )  # fmt: skip


def _pages(file: Any) -> int:
    return count_pages(file) if isinstance(file, str | Path | bytes) else 1


def _decode_stream(stream: ImageStream, quiet: bool) -> Split:
    split = Split(stream.split, [], [], None)
    labels: list[Any] = []
    with tqdm(total=len(stream), unit="images", disable=quiet) as bar:
        for record in (r for shard in range(len(stream.shards)) for r in stream.records(shard)):
            split.ids.append(record["id"])
            labels.append(record.get("label"))
            try:
                decoded = describe(record["id"], stream.decode(record)["image"])
                captioned = bool(captions_of(record.get("caption")))
                pages = _pages(record["image"])
                split.decoded.append(replace(decoded, captioned=captioned, pages=pages))
            except BadImage as bad:
                split.decoded.append(Decoded(bad.id, bad.reason))
            bar.update()
    known = any(label is not None for label in labels)
    split.labels = [-1 if label is None else label for label in labels] if known else None
    return split


def describe(id: str, image: Image.Image | np.ndarray) -> Decoded:
    """Describe a decoded image: a PIL image, or an array (h, w, bands)."""
    values = np.asarray(image)
    mode = f"{values.shape[2]}×{values.dtype}" if isinstance(image, np.ndarray) else image.mode
    height, width = values.shape[:2]
    content = f"{mode} {width} {height}".encode() + np.ascontiguousarray(values).tobytes()
    flat = bool((values == values.flat[0]).all())
    pixels = blake2b(content, digest_size=16).digest()
    # `vim_ssl.data.pixels.grey_from` counts the missing pixels of a grey image.
    holes = not np.isfinite(values).all() or bool(getattr(image, "info", {}).get("missing"))
    notes = tuple(getattr(image, "info", {}).get("notes", ()))
    look = None if flat else look_of(image)
    measure = float(np.nanmax(mean_size(values))) if isinstance(image, np.ndarray) else np.nan
    probable = fills(values) or getattr(image, "info", {}).get("fills", ())
    return Decoded(
        id, "", pixels, (width, height), mode, flat, holes, measure, notes=notes, look=look,
        fills=probable, levels=levels_of(image),
    )  # fmt: skip


# ---------------------------------------------------------------- checks


def _layout(data: ImageData | ImageStream, splits: list[Split], classes: list[str] | None) -> str:
    what = "read in order, shard by shard" if data.is_stream else "read by index"
    names = ", ".join(split.name for split in splits) if data.splits else "no splits"
    return f"{what}; {names}; {f'{len(classes)} classes' if classes else 'no named classes'}"


def _check_layout(data: ImageData | ImageStream, report: Report) -> None:
    """Report what the source does not read, and doubtful layouts and names."""
    report.problems += data.passed_over.warnings
    for reason in data.passed_over.by_count():
        if not reason.startswith(PAGES):  # these are counted exactly when images are decoded
            line = explain(data.passed_over, reason)
            (report.problems if reason == UNREADABLE else report.remarks).append(line)
    if odd := [id for id in getattr(data, "ids", ()) if printable(id) != id]:
        report.remarks.append(f"{len(odd):,} names are not UTF-8: {some_of(odd)}.")


def _count(splits: list[Split], report: Report) -> None:
    splits_of = defaultdict(list)
    for split in splits:
        labelled = sum(not _unknown(label) for label in split.labels or ())
        columns: dict[str, int | None] = {"images": len(split.ids)}
        if split.masks:
            columns["masks"] = len(split.ids)
        if split.boxes is not None:
            columns |= {"with boxes": sum(map(bool, split.boxes)), "boxes": sum(split.boxes)}
        if split.labels is not None or len(columns) == 1:
            columns["labelled"] = labelled
        columns["groups"] = None if split.groups is None else len(set(split.groups))
        if split is splits[0]:
            report.facts.append(f"{'split':12}" + "".join(f"{name:>12}" for name in columns))
        cells = ("-" if count is None else f"{count:,}" for count in columns.values())
        report.facts.append(f"{split.name:12}" + "".join(f"{cell:>12}" for cell in cells))
        if not split.ids:
            report.problems.append(f"{split.name} has no images.")
        if split.labels is not None and labelled < len(split.ids):
            missing = len(split.ids) - labelled
            report.remarks.append(f"{split.name}: {missing:,} images have no label.")
        truth = split.labels is not None or split.masks or split.boxes is not None
        if truth and len(splits) == 1 and len(set(split.groups or "ab")) == 1 < len(split.ids):
            report.remarks.append(
                "all images are in one group, so none can be held out for a test; name smaller "
                "groups by ?group=, or leave it out."
            )
        for name in split.ids:
            splits_of[name].append(split.name)
    if twice := [name for name, names in splits_of.items() if len(names) > 1]:
        report.problems.append(f"{len(twice):,} ids occur more than once: {some_of(twice)}.")


def _check_labels(splits: list[Split], classes: list[str] | None, report: Report) -> None:
    counts = {
        split.name: _class_counts(split, classes, report)
        for split in splits
        if split.labels is not None and not all(map(_unknown, split.labels))
    }
    if not counts:
        return
    names = _list_classes("class", counts, classes, report)
    for name, count in counts.items():
        least, most = min(count, key=count.__getitem__), max(count, key=count.__getitem__)
        if len(count) < 2:
            report.problems.append(f"{name} has images of only one class, {names[most]}.")
        elif count[most] > 10 * max(count[least], 1):
            report.remarks.append(
                f"{name} is unbalanced: {count[most]:,} of {names[most]}, {count[least]:,} of "
                f"{names[least]}."
            )
    _compare_classes(counts, names, "image", report)


def _check_truth(splits: list[Split], classes: list[str] | None, report: Report) -> None:
    """Count the images whose mask contains a class, or the boxes of each class."""
    counts = {
        split.name: Counter(number for image in split.decoded for number in image.classes)
        for split in splits
        if split.masks or split.boxes is not None
    }
    if not counts:
        return
    one = "box" if splits[0].boxes is not None else "mask"
    title = "class (boxes)" if one == "box" else "class (images)"
    names = _list_classes(title, counts, classes, report)
    if all(len(split.decoded) == len(split.ids) for split in splits):
        _compare_classes(counts, names, one, report)
        if one == "mask" and (absent := [n for i, n in enumerate(classes or ()) if i not in names]):
            report.remarks.append(
                f"no {one} has {len(absent):,} of the classes: {some_of(absent)}."
            )


def _list_classes(
    title: str, counts: dict[str, Counter[int]], classes: list[str] | None, report: Report
) -> dict[int, str]:
    """Add a table of the class counts per split to the report. Return the class names."""
    known = sorted(set().union(*counts.values()))
    names = {label: _name(label, classes) for label in known}
    width = min(max(map(len, [title, *names.values(), 12 * " "])), 40)
    report.facts += ["", f"{title:{width}}" + "".join(f"{name:>12}" for name in counts)]
    for label in known[:LISTED]:
        row = "".join(f"{count[label]:12,}" for count in counts.values())
        report.facts.append(f"{names[label][:width]:{width}}{row}")
    if len(known) > LISTED:
        report.facts.append(f"… and {len(known) - LISTED:,} more classes")
    return names


def _compare_classes(
    counts: dict[str, Counter[int]], names: dict[int, str], one: str, report: Report
) -> None:
    """Report classes that only some splits have; ``one`` names the counted object."""
    train: Counter[int] = Counter()
    for name, count in counts.items():
        if canonical_split(name) == "train":
            train = count
    for name, count in counts.items() if train else ():
        if new := [names[label] for label in count if not train.get(label)]:
            report.problems.append(
                f"{name} has {len(new):,} classes that the training split lacks: {some_of(new)}."
            )
        if absent := [names[label] for label in train if not count.get(label)]:
            report.remarks.append(
                f"{name} has no {one} of {len(absent):,} classes: {some_of(absent)}."
            )


def _class_counts(split: Split, classes: list[str] | None, report: Report) -> Counter[int]:
    """Count the images of each class; a row of 0 and 1 counts for each class with a 1."""
    count: Counter[int] = Counter()
    wrong = []
    for name, label in zip(split.ids, split.labels or (), strict=True):
        if _unknown(label):
            continue
        if isinstance(label, list | tuple):
            if (classes is not None and len(label) != len(classes)) or not set(label) <= {0, 1}:
                wrong.append(f"{label} ({name})")
            count.update(number for number, has in enumerate(label) if has == 1)
        else:
            if label < 0 or (classes is not None and label >= len(classes)):
                wrong.append(f"{label} ({name})")
            count[label] += 1
    if wrong:
        allowed = f"0 to {len(classes) - 1}" if classes is not None else "0 and up"
        report.problems.append(
            f"{split.name}: {len(wrong):,} labels are out of range, {allowed}: {some_of(wrong)}."
        )
    return count


def _check_images(splits: list[Split], report: Report) -> None:
    good = [image for split in splits for image in split.decoded if not image.fault]
    total = sum(len(split.ids) for split in splits)
    decoded = sum(len(split.decoded) for split in splits)
    which = "all" if decoded == total else f"of {total:,}"
    broken = f", {decoded - len(good):,} of them broken" if decoded > len(good) else ""
    report.facts += ["", f"Read: {decoded:,} images, {which}{broken}."]
    if good:
        modes = Counter(image.mode for image in good).most_common()
        report.facts.append("Modes: " + ", ".join(f"{mode} {count:,}" for mode, count in modes))
        by_area = sorted((image.size for image in good), key=lambda size: size[0] * size[1])
        least, middle, most = (
            f"{w}×{h}" for w, h in (by_area[0], by_area[len(by_area) // 2], by_area[-1])
        )
        one = f"all {least}" if len(set(by_area)) == 1 else f"{least} to {most}, median {middle}"
        report.facts.append(f"Sizes (width×height): {one}")
        several = [image for image in good if image.pages > 1]
        if pages := sum(image.pages - 1 for image in several):
            examples = some_of(f"{image.id} ({image.pages})" for image in several)
            report.remarks.append(
                f"passed over: {pages:,} {PAGES}, of {len(several):,} files: {examples}; only the "
                "first is read. To use the others, save each as a file; video: reads animations."
            )
        if captioned := sum(image.captioned for image in good):
            report.facts.append(f"With a caption: {captioned:,} of these images.")
    for fault in (undeclared({im.id: im.fills for im in good}), narrow(im.levels for im in good)):
        report.problems += [f"{fault}."] if fault else []
    others = in_other_unit({image.id: image.measure for image in good})
    for split in splits:
        for what, names, lines in (
            ("cannot be decoded", [f"{image.id} ({image.fault})" for image in split.decoded
                                   if image.fault], report.problems),
            ("have a single value", [image.id for image in split.decoded if image.flat],
             report.remarks),
            ("have NaN or infinite values", [image.id for image in split.decoded if image.holes],
             report.remarks),
            (f"have values over {ORDERS:,} times larger or smaller than most (another unit?)",
             [image.id for image in split.decoded if image.id in others], report.problems),
            *((f"are {note}", [image.id for image in split.decoded if note in image.notes],
               report.remarks)
              for note in sorted({note for image in split.decoded for note in image.notes})),
        ):  # fmt: skip
            if names:
                lines.append(f"{split.name}: {len(names):,} images {what}: {some_of(names)}.")


def _check_captions(splits: list[Split], report: Report) -> None:
    for split in splits:
        if bare := [im.id for im in split.decoded if not im.fault and not im.captioned]:
            report.problems.append(
                f"{split.name}: {len(bare):,} images have no caption: {some_of(bare)}."
            )


def _check_groups(splits: list[Split], report: Report) -> None:
    """Report groups that are in two splits."""
    for one, other in combinations(splits, 2):
        if shared := sorted(set(one.groups or ()) & set(other.groups or ())):
            report.problems.append(
                f"{len(shared):,} groups are in {one.name} and in {other.name}: {some_of(shared)}."
            )


def _unknown(label: Any) -> bool:
    return label == -1 or (isinstance(label, list | tuple) and set(label) == {-1})


def _name(label: int, classes: list[str] | None) -> str:
    return classes[label] if classes and 0 <= label < len(classes) else str(label)


if __name__ == "__main__":
    sys.exit(main())
