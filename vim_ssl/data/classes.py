"""Classes of two data sets, or of a model and data: matched by name, never by position."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from vim_ssl.data.images import BadImage
from vim_ssl.data.labels import IGNORE
from vim_ssl.data.split import is_known
from vim_ssl.data.values import class_keys, fold, same_class

log = logging.getLogger(__name__)
LISTED = 5  # names of classes in a message


def match_classes(names: Sequence[str], known: Sequence[str]) -> list[int]:
    """Return the index in ``known`` of each name; -1 if it is not there.

    Equal names match. Of the others, spellings of one number match ("1", "1.0"; see `class_keys`);
    of the rest, those that differ only in letter case, spaces, "_", "-" or leading zeros, if no
    other name does.
    """
    keys = class_keys({*names, *known})
    numbers = [-1] * len(names)

    def match(key: Callable[[str], str], only: Callable[[str], bool] = lambda name: True) -> None:
        taken = set(numbers)
        free = {key(name): i for i, name in reversed(list(enumerate(known))) if i not in taken}
        for i, name in enumerate(names):
            if numbers[i] < 0 and only(name):
                numbers[i] = free.get(key(name), -1)

    def folded(name: str) -> str:
        return fold(keys[name])

    match(str)
    match(keys.__getitem__)
    times = Counter(map(folded, known)) | Counter(map(folded, names))
    match(folded, lambda name: times[folded(name)] == 1)
    return numbers


def unite_classes(
    lists: Sequence[Sequence[str]],
) -> tuple[list[str], list[list[int]], list[str]]:
    """Return the class names of all lists, each once, in the order of the first list that has them.

    Returns: the names; for each list the number of each of its names; a remark if spellings differ.
    """
    known: list[str] = []
    numbers, guessed = [], {}
    for names in lists:
        if list(names) == known:
            numbers.append(list(range(len(known))))
            continue
        local = match_classes(names, known)
        for i, name in enumerate(names):
            if local[i] < 0:
                known.append(name)
                local[i] = len(known) - 1
            elif not same_class(name, known[local[i]]):
                guessed[name] = known[local[i]]
        numbers.append(local)
    few = [f"{name!r} as {known!r}" for name, known in list(guessed.items())[:LISTED]]
    return known, numbers, [f"classes are read as others: {', '.join(few)}"] if few else []


def with_classes(data: Any, classes: Sequence[str] | None, source: str) -> Any:
    """Return the data with labels, masks and boxes numbered by the classes of another source.

    Args:
        data: an `ImageData` or `ImageStream`. Without class names, its labels are the names if all
            ``classes`` are whole numbers, else the numbers.
        classes: the class names of ``source``; None leaves the data as they are.
        source: name of what declares the classes, for messages.
    Raises: ValueError if the data have a class that is not among them, or rows of labels that lack
        one of them.
    """
    names = data.classes
    if classes is None or (names is None and not _are_numbers(classes)):
        return data
    if names is not None and list(names) == list(classes):
        return data
    if names is None:
        return _of_numbers(data, classes, source)
    numbers = match_classes(names, classes)
    _check(data, names, classes, numbers, source)
    _warn(data.name, names, classes, numbers, source)
    if data.is_stream:
        read = RenumberedRecords(data.read, dict(enumerate(numbers)), source)
        return data.with_reader(read, classes)
    return _renumbered(data, classes, numbers)


def _renumbered(data: Any, classes: Sequence[str], numbers: Sequence[int]) -> Any:
    """Return indexed data whose class i has the number ``numbers[i]``."""
    result = data.subset(range(len(data)))
    result.classes = list(classes)
    if data.multi_label:
        column = [numbers.index(i) for i in range(len(classes))]
        result.labels = [[row[i] for i in column] for row in data.labels]
    elif data.labels is not None:
        result.labels = [numbers[label] if label >= 0 else label for label in data.labels]
    if data.has_masks:
        result._masks = RenumberedMasks(data._masks, numbers)
    if data.has_boxes:
        result._objects = RenumberedObjects(data._objects, classes, numbers)
        result.categories = result._objects.categories
    return result


def _of_numbers(data: Any, classes: Sequence[str], source: str) -> Any:
    """Number data without class names, whose labels are numbers, by classes that are numbers."""
    number = {int(name): i for i, name in enumerate(classes)}
    if all(name == i for name, i in number.items()):
        return data
    if data.is_stream:
        return data.with_reader(RenumberedRecords(data.read, number, source), classes)
    if data.labels is None or data.multi_label:
        return data
    if unknown := sorted({label for label in data.labels if label >= 0} - set(number)):
        raise ValueError(_refusal(data.name, list(map(str, unknown)), classes, source))
    result = data.subset(range(len(data)))
    result.classes = list(classes)
    result.labels = [number.get(label, -1) for label in data.labels]
    return result


def _are_numbers(classes: Sequence[str]) -> bool:
    return all(name.isascii() and name.isdigit() for name in classes)


def _check(
    data: Any, names: Sequence[str], classes: Sequence[str], numbers: Sequence[int], source: str
) -> None:
    unknown = [i for i, number in enumerate(numbers) if number < 0]
    if unknown and not data.is_stream and data.labels is not None and not data.multi_label:
        used = set(data.labels)  # a declared class without images does no harm
        unknown = [i for i in unknown if i in used]
    if unknown:
        raise ValueError(_refusal(data.name, [names[i] for i in unknown], classes, source))
    matched = Counter(number for number in numbers if number >= 0)
    if twice := [classes[number] for number, times in matched.items() if times > 1]:
        raise ValueError(
            f"{data.name} has several classes that match {_few(twice)} of {source}; rename them."
        )
    lacking = [name for i, name in enumerate(classes) if i not in matched]
    if lacking and not data.is_stream and data.multi_label and any(map(is_known, data.labels)):
        raise ValueError(
            f"{data.name} has no labels for {_few(lacking)}, of the {len(classes)} classes of "
            f"{source}; give data with a label for each of them."
        )


def _refusal(name: str, unknown: Sequence[str], classes: Sequence[str], source: str) -> str:
    return (
        f"{name} has {len(unknown)} classes that are not among the {len(classes)} of {source} "
        f"({_few(classes)}): {_few(unknown)}. Use the same names in "
        "both, or leave their images out."
    )


def _warn(
    name: str, names: Sequence[str], classes: Sequence[str], numbers: Sequence[int], source: str
) -> None:
    for local, number in zip(names, numbers, strict=True):
        if number >= 0 and not same_class(local, classes[number]):
            _warn_once(f"{name}: its class {local!r} is read as {classes[number]!r} of {source}.")
    lacking = [known for i, known in enumerate(classes) if i not in set(numbers)]
    if lacking:
        _warn_once(
            f"{name} has {len(classes) - len(lacking)} of the {len(classes)} classes of {source}; "
            f"it lacks {_few(lacking)}."
        )


@cache
def _warn_once(text: str) -> None:
    log.warning(text)


def _few(names: Sequence[str]) -> str:
    more = f" … ({len(names)})" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


@dataclass(frozen=True)
class RenumberedRecords:
    """Reads the records of a stream, with labels in other numbers. A record with a label that has
    no number is a broken image."""

    read: Callable[[str], Iterator[dict[str, Any]]]
    numbers: dict[int, int]
    source: str

    def __call__(self, name: str) -> Iterator[dict[str, Any]]:
        for record in self.read(name):
            label = record.get("label")
            if label is not None and label >= 0:
                number = self.numbers.get(label, -1)
                reason = f"its label {label} is not among the classes of {self.source}"
                broken = {"image": BadImage(record["id"], reason)} if number < 0 else {}
                record = record | {"label": number} | broken
            yield record


class RenumberedMasks:
    """Masks with other class numbers."""

    def __init__(self, masks: Any, numbers: Sequence[int]):
        self.masks = masks
        self.table = np.full(IGNORE + 1, IGNORE, np.uint8)
        self.table[: len(numbers)] = numbers

    def read(self, row: int, size: tuple[int, int]) -> np.ndarray:
        return self.table[self.masks.read(row, size)]

    @property
    def classes_in(self) -> Callable[[int], frozenset[int]] | None:
        """See `vim_ssl.data.dataset.Masks`."""
        classes_in = getattr(self.masks, "classes_in", None)
        if classes_in is None:
            return None
        return lambda row: frozenset(self.table[[*classes_in(row)]].tolist()) - {IGNORE}

    def sizes(self, row: int) -> int | str:
        return self.masks.sizes(row)


class RenumberedObjects:
    """Objects with other class numbers; the category ids in their file stay."""

    def __init__(self, objects: Any, classes: Sequence[str], numbers: Sequence[int]):
        self.objects, self.numbers = objects, np.asarray(numbers)
        self.outlines, self.images = objects.outlines, objects.images
        local = dict(zip(numbers, objects.categories, strict=True))
        ids = [category["id"] for category in objects.categories]
        # Ids of classes that the file lacks; all ids of a file have one type.
        free = [f"{max(ids)}/{i}" if isinstance(ids[0], str) else max(ids) + 1 + i
                for i in range(len(classes))]  # fmt: skip
        self.categories = [
            local.get(i) or {"id": free[i], "name": name} for i, name in enumerate(classes)
        ]

    def read(self, row: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
        result = self.objects.read(row, size)
        return result | {"box_labels": self.numbers[result["box_labels"]]}

    def annotations(self, row: int) -> list[dict[str, Any]]:
        return self.objects.annotations(row)

    def count(self, row: int) -> int:
        return self.objects.count(row)

    def sizes(self, row: int) -> int | str:
        return self.objects.sizes(row)
