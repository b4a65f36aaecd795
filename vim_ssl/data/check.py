"""The data doctor, ``vim-ssl data check SPEC``: is this data what it should be?"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vim_ssl.data.clips import still
from vim_ssl.data.dataset import ImageData, captions_of
from vim_ssl.data.images import BadImage
from vim_ssl.data.labels import IGNORE
from vim_ssl.data.loading.streamed import ImageStream
from vim_ssl.data.open import Source, open_source, sets_of
from vim_ssl.data.registry import SOURCES
from vim_ssl.data.spec import SPLIT_NAMES, canonical_split

NAMED = 3  # examples of one fault
LISTED = 20  # classes whose numbers are written out


@dataclass(frozen=True)
class Look:
    """What one decoded image is like; or its ``fault``.

    ``pixels`` is a hash of mode, size and values; ``size`` is (width, height); ``flat`` says that
    all its values are one, ``holes`` that some are not finite. ``shown`` are the numbers of the
    classes in its mask, each once, or of its boxes; ``captioned`` says that it has a caption.
    """

    id: str
    fault: str = ""
    pixels: bytes = b""
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    flat: bool = False
    holes: bool = False
    shown: tuple[int, ...] = ()
    captioned: bool = False


@dataclass
class Part:
    """One split: its columns as in `ImageData`, and what its images are like.

    ``masks`` says whether every image has a mask, ``boxes`` how many each has (None: there are
    none in such data).
    """

    name: str
    ids: list[str]
    labels: list[Any] | None
    groups: list[str] | None
    masks: bool = False
    boxes: list[int] | None = None
    looks: list[Look] = field(default_factory=list)


@dataclass
class Diagnosis:
    """The result of `check`: lines about the data, what is wrong with them, and what may be."""

    facts: list[str]
    problems: list[str]
    remarks: list[str]

    def __str__(self) -> str:
        lines = list(self.facts)
        for title, sign, found in (("Wrong", "x", self.problems), ("To know", "-", self.remarks)):
            if found:
                lines += ["", f"{title}:", *(f"  {sign} {line}" for line in found)]
        end = f"{len(self.problems)} thing(s) wrong." if self.problems else "Nothing wrong found."
        return "\n".join([*lines, "", end])


def check(spec: str | Path, *, sample: int = 0, workers: int = 0, quiet: bool = True) -> Diagnosis:
    """Examine data: counts, labels, every image, and what the splits have in common.

    Args:
        spec: see `open_data`; all splits are examined unless it names one.
        sample: decode only so many images of each split, spread evenly; 0 decodes all. The same
            image on two sides of a split is then found only among those.
        workers: processes that decode.
        quiet: no progress bar.
    Raises: what `open_data` raises.
    """
    source, data = _opened(spec)
    parts = list(_parts(source, data, sample, workers, quiet))
    diagnosis = Diagnosis([f"{spec}: {_layout(data, parts)}", ""], list(data.faults), [])
    if not data.splits:
        _check_folders(parts, diagnosis)
    _count(parts, diagnosis)
    _check_labels(parts, data.classes, diagnosis)
    _check_truth(parts, data.classes, diagnosis)
    _check_images(parts, diagnosis)
    if getattr(data, "has_captions", False):
        _check_captions(parts, diagnosis)
    _check_sides(parts, diagnosis)
    return diagnosis


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``vim-ssl data check SPEC``; 0 when nothing is wrong, else 1."""
    parser = argparse.ArgumentParser(prog="vim-ssl data", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    action = actions.add_parser("check", help="examine a data spec and say what is wrong with it")
    action.add_argument(
        "spec", metavar="SPEC", help=f"a folder, or SCHEME:LOCATION; schemes: {', '.join(SOURCES)}"
    )
    action.add_argument(
        "--sample", type=int, default=0, metavar="N", help="decode N images a split, not all"
    )
    action.add_argument("--workers", type=int, default=0, help="processes that decode")
    args = parser.parse_args(argv)
    try:
        diagnosis = check(args.spec, sample=args.sample, workers=args.workers, quiet=False)
    except (ValueError, OSError) as error:
        print(f"{args.spec} cannot be opened:\n  x {error}")
        return 1
    print(diagnosis)
    return 1 if diagnosis.problems else 0


# ---------------------------------------------------------------- looking


def _opened(spec: str | Path) -> tuple[Source, ImageData | ImageStream]:
    """The source, and the split that its spec names, or all of it."""
    source = open_source(spec, streams=True)
    joined = sets_of(str(spec))
    named = len(joined) > 1 or joined[0][1].split
    return source, source.open(None if named else "all")


def _parts(
    source: Source, data: ImageData | ImageStream, sample: int, workers: int, quiet: bool
) -> Iterator[Part]:
    if data.is_stream:
        yield _look_along(data.limited(sample) if sample else data, quiet)
        return
    splits = data.splits if data.split == "all" and data.splits else [data.split]
    for name in splits:
        one = data if name == data.split else source.open(name)
        boxes = [one.box_count(i) for i in range(len(one))] if one.has_boxes else None
        part = Part(name, one.ids, one.labels, one.groups, one.has_masks, boxes)
        few = min(sample, len(one)) if sample else len(one)
        chosen = one.subset(i * len(one) // few for i in range(few))
        loader = DataLoader(_Looking(chosen), 16, num_workers=workers, collate_fn=list)
        with tqdm(total=few, desc=name, unit="images", disable=quiet) as bar:
            for looks in loader:
                part.looks += looks
                bar.update(len(looks))
        yield part


class _Looking(Dataset):
    def __init__(self, data: ImageData):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Look:
        try:
            item = self.data[index]
            found = look(self.data.ids[index], still(item["image"]))
        except BadImage as bad:
            return Look(bad.id, bad.reason)
        shown = item.get("box_labels", np.setdiff1d(item.get("mask", ()), IGNORE))
        captioned = bool(captions_of(item.get("caption")))
        return replace(found, shown=tuple(map(int, shown)), captioned=captioned)


def _look_along(stream: ImageStream, quiet: bool) -> Part:
    part = Part(stream.split, [], [], None)
    labels: list[Any] = []
    with tqdm(total=len(stream), unit="images", disable=quiet) as bar:
        for record in (r for shard in range(len(stream.shards)) for r in stream.records(shard)):
            part.ids.append(record["id"])
            labels.append(record.get("label"))
            try:
                found = look(record["id"], stream.decode(record)["image"])
                captioned = bool(captions_of(record.get("caption")))
                part.looks.append(replace(found, captioned=captioned))
            except BadImage as bad:
                part.looks.append(Look(bad.id, bad.reason))
            bar.update()
    known = any(label is not None for label in labels)
    part.labels = [-1 if label is None else label for label in labels] if known else None
    return part


def look(id: str, image: Image.Image | np.ndarray) -> Look:
    """Describe a decoded image: a PIL image, or an array (h, w, bands)."""
    values = np.asarray(image)
    mode = f"{values.shape[2]}×{values.dtype}" if isinstance(image, np.ndarray) else image.mode
    height, width = values.shape[:2]
    content = f"{mode} {width} {height}".encode() + np.ascontiguousarray(values).tobytes()
    flat = bool((values == values.flat[0]).all())
    pixels = blake2b(content, digest_size=16).digest()
    return Look(id, "", pixels, (width, height), mode, flat, not np.isfinite(values).all())


# ---------------------------------------------------------------- judging


def _layout(data: ImageData | ImageStream, parts: list[Part]) -> str:
    what = "read in order, shard by shard" if data.is_stream else "read by index"
    names = ", ".join(part.name for part in parts) if data.splits else "no splits"
    classes = f"{len(data.classes)} classes" if data.classes else "no named classes"
    return f"{what}; {names}; {classes}"


def _check_folders(parts: list[Part], diagnosis: Diagnosis) -> None:
    """Whether something beside folders called train and test made one part of it all."""
    tops = {name.split("/")[0] if "/" in name else "" for part in parts for name in part.ids}
    splits = {top for top in tops if canonical_split(top) in SPLIT_NAMES}
    if len({canonical_split(top) for top in splits}) > 1 and (others := sorted(tops - splits)):
        beside = _some([top or "images outside of any folder" for top in others])
        diagnosis.problems.append(
            f"{', '.join(sorted(splits))} are no splits, since beside them lie: {beside}. All is "
            "one part; move the others away."
        )


def _count(parts: list[Part], diagnosis: Diagnosis) -> None:
    where = defaultdict(list)
    for part in parts:
        labelled = sum(not _unknown(label) for label in part.labels or ())
        columns: dict[str, int | None] = {"images": len(part.ids)}
        if part.masks:
            columns["masks"] = len(part.ids)
        if part.boxes is not None:
            columns |= {"with boxes": sum(map(bool, part.boxes)), "boxes": sum(part.boxes)}
        if part.labels is not None or len(columns) == 1:
            columns["labelled"] = labelled
        columns["groups"] = None if part.groups is None else len(set(part.groups))
        if part is parts[0]:
            diagnosis.facts.append(f"{'split':12}" + "".join(f"{name:>12}" for name in columns))
        cells = ("-" if count is None else f"{count:,}" for count in columns.values())
        diagnosis.facts.append(f"{part.name:12}" + "".join(f"{cell:>12}" for cell in cells))
        if not part.ids:
            diagnosis.problems.append(f"{part.name} has no image.")
        if part.labels is not None and labelled < len(part.ids):
            missing = len(part.ids) - labelled
            diagnosis.remarks.append(f"{part.name}: {missing:,} images have no label.")
        for name in part.ids:
            where[name].append(part.name)
    if twice := [name for name, places in where.items() if len(places) > 1]:
        diagnosis.problems.append(f"{len(twice):,} ids are given twice: {_some(twice)}.")


def _check_labels(parts: list[Part], classes: list[str] | None, diagnosis: Diagnosis) -> None:
    counts = {
        part.name: _class_counts(part, classes, diagnosis)
        for part in parts
        if part.labels is not None and not all(map(_unknown, part.labels))
    }
    if not counts:
        return
    names = _list_classes("class", counts, classes, diagnosis)
    for name, count in counts.items():
        least, most = min(count, key=count.__getitem__), max(count, key=count.__getitem__)
        if len(count) < 2:
            diagnosis.problems.append(f"{name} has images of one class only, {names[most]}.")
        elif count[most] > 10 * max(count[least], 1):
            diagnosis.remarks.append(
                f"{name} is unbalanced: {count[most]:,} of {names[most]}, {count[least]:,} of "
                f"{names[least]}."
            )
    _compare_classes(counts, names, "image", diagnosis)


def _check_truth(parts: list[Part], classes: list[str] | None, diagnosis: Diagnosis) -> None:
    """The classes in masks, by images that show them, or of boxes."""
    counts = {
        part.name: Counter(number for look in part.looks for number in look.shown)
        for part in parts
        if part.masks or part.boxes is not None
    }
    if not counts:
        return
    one = "box" if parts[0].boxes is not None else "mask"
    title = "class, boxes of it" if one == "box" else "class, images of it"
    names = _list_classes(title, counts, classes, diagnosis)
    if all(len(part.looks) == len(part.ids) for part in parts):
        _compare_classes(counts, names, one, diagnosis)


def _list_classes(
    title: str, counts: dict[str, Counter[int]], classes: list[str] | None, diagnosis: Diagnosis
) -> dict[int, str]:
    """A table of what each part has of each class; returns the classes' names."""
    known = sorted(set().union(*counts.values()))
    names = {label: _name(label, classes) for label in known}
    width = min(max(map(len, [title, *names.values(), 12 * " "])), 40)
    diagnosis.facts += ["", f"{title:{width}}" + "".join(f"{name:>12}" for name in counts)]
    for label in known[:LISTED]:
        row = "".join(f"{count[label]:12,}" for count in counts.values())
        diagnosis.facts.append(f"{names[label][:width]:{width}}{row}")
    if len(known) > LISTED:
        diagnosis.facts.append(f"… and {len(known) - LISTED:,} classes more")
    return names


def _compare_classes(
    counts: dict[str, Counter[int]], names: dict[int, str], one: str, diagnosis: Diagnosis
) -> None:
    """What the training part and the others have not in common; ``one`` is what is counted."""
    train: Counter[int] = Counter()
    for name, count in counts.items():
        if canonical_split(name) == "train":
            train = count
    for name, count in counts.items() if train else ():
        if strange := [names[label] for label in count if not train.get(label)]:
            diagnosis.problems.append(
                f"{name} has {len(strange):,} classes that the training part lacks: "
                f"{_some(strange)}."
            )
        if absent := [names[label] for label in train if not count.get(label)]:
            diagnosis.remarks.append(
                f"{name} has no {one} of {len(absent):,} classes: {_some(absent)}."
            )


def _class_counts(part: Part, classes: list[str] | None, diagnosis: Diagnosis) -> Counter[int]:
    """Images of each class; of labels as lists of 0 and 1, those that have a 1 there."""
    count: Counter[int] = Counter()
    wrong = []
    for name, label in zip(part.ids, part.labels or (), strict=True):
        if _unknown(label):
            continue
        if isinstance(label, list | tuple):
            if (classes is not None and len(label) != len(classes)) or not set(label) <= {0, 1}:
                wrong.append(f"{label} ({name})")
            count.update(place for place, has in enumerate(label) if has == 1)
        else:
            if label < 0 or (classes is not None and label >= len(classes)):
                wrong.append(f"{label} ({name})")
            count[label] += 1
    if wrong:
        allowed = f"0 to {len(classes) - 1}" if classes is not None else "0 and up"
        diagnosis.problems.append(
            f"{part.name}: {len(wrong):,} labels are out of range, {allowed}: {_some(wrong)}."
        )
    return count


def _check_images(parts: list[Part], diagnosis: Diagnosis) -> None:
    good = [look for part in parts for look in part.looks if not look.fault]
    total = sum(len(part.ids) for part in parts)
    looked = sum(len(part.looks) for part in parts)
    which = "all" if looked == total else f"of {total:,}"
    diagnosis.facts += ["", f"Decoded: {looked:,} images, {which}."]
    if good:
        modes = Counter(look.mode for look in good)
        diagnosis.facts.append(
            "Modes: " + ", ".join(f"{mode} {count:,}" for mode, count in modes.most_common())
        )
        by_area = sorted((look.size for look in good), key=lambda size: size[0] * size[1])
        least, middle, most = (
            f"{w}×{h}" for w, h in (by_area[0], by_area[len(by_area) // 2], by_area[-1])
        )
        one = f"all {least}" if len(set(by_area)) == 1 else f"{least} to {most}, median {middle}"
        diagnosis.facts.append(f"Sizes (width×height): {one}")
        if captioned := sum(look.captioned for look in good):
            diagnosis.facts.append(f"With a caption: {captioned:,} of these images.")
    for part in parts:
        bad = [f"{look.id} ({look.fault})" for look in part.looks if look.fault]
        if bad:
            diagnosis.problems.append(
                f"{part.name}: {len(bad):,} images cannot be decoded: {_some(bad)}."
            )
        for what, names in (
            ("are of one single value", [look.id for look in part.looks if look.flat]),
            ("have values that are no number", [look.id for look in part.looks if look.holes]),
        ):
            if names:
                diagnosis.remarks.append(
                    f"{part.name}: {len(names):,} images {what}: {_some(names)}."
                )


def _check_captions(parts: list[Part], diagnosis: Diagnosis) -> None:
    for part in parts:
        if bare := [look.id for look in part.looks if not look.fault and not look.captioned]:
            diagnosis.problems.append(
                f"{part.name}: {len(bare):,} images have no caption: {_some(bare)}."
            )


def _check_sides(parts: list[Part], diagnosis: Diagnosis) -> None:
    """What must not be on two sides of a split; and what is there twice on one."""
    for one, other in ((a, b) for i, a in enumerate(parts) for b in parts[i + 1 :]):
        if shared := sorted(set(one.groups or ()) & set(other.groups or ())):
            diagnosis.problems.append(
                f"{len(shared):,} groups are in {one.name} and in {other.name}: {_some(shared)}."
            )
    twins: dict[bytes, list[tuple[str, str]]] = defaultdict(list)
    labels: dict[str, Any] = {}
    for part in parts:
        if part.labels is not None:
            labels.update(zip(part.ids, part.labels, strict=True))
    for part in parts:
        for look in part.looks:
            # Images of one value are alike without being the same.
            if not look.fault and not look.flat:
                twins[look.pixels].append((part.name, look.id))
    again = [found for found in twins.values() if len(found) > 1]
    across = [found for found in again if len({name for name, _ in found}) > 1]
    if across:
        pairs = [" = ".join(f"{name}:{id}" for name, id in found[:4]) for found in across]
        diagnosis.problems.append(
            f"{len(across):,} images are on two sides of a split: {_some(pairs)}."
        )
    within = [found for found in again if len(found) > len({name for name, _ in found})]
    if within:
        pairs = [" = ".join(id for _, id in found[:4]) for found in within]
        diagnosis.remarks.append(f"{len(within):,} images are there twice: {_some(pairs)}.")
    if unlike := [f for f in again if len({str(labels.get(id)) for _, id in f}) > 1]:
        pairs = [" = ".join(id for _, id in found[:4]) for found in unlike]
        diagnosis.remarks.append(
            f"{len(unlike):,} images are there again with another label: {_some(pairs)}."
        )


def _unknown(label: Any) -> bool:
    return label == -1 or (isinstance(label, list | tuple) and set(label) == {-1})


def _name(label: int, classes: list[str] | None) -> str:
    return classes[label] if classes and 0 <= label < len(classes) else str(label)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:NAMED]) + (" …" if len(names) > NAMED else "")


if __name__ == "__main__":
    sys.exit(main())
