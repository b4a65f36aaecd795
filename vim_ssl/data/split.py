"""Train/test splits: stratified and seeded, or fixed by hashing image ids."""

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from hashlib import blake2b
from typing import Any


def is_known(label: Any) -> bool:
    """True if a label is known: a class (0 or more), or a row of 0 and 1; -1 is unknown."""
    return bool((min(label) if hasattr(label, "__len__") else label) >= 0)


def as_key(label: Any) -> Hashable:
    """A label as a hashable key; a row of 0 and 1 becomes a tuple."""
    return tuple(int(value) for value in label) if hasattr(label, "__len__") else label


def few_of_each(labels: Sequence[int], count: int, seed: int) -> list[int]:
    """Draw ``count`` indices of each class, seeded; all indices of a class that has fewer."""
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    chosen: dict[int, list[int]] = {}
    for i in order:
        if len(chosen.setdefault(labels[i], [])) < count:
            chosen[labels[i]].append(i)
    return sorted(i for members in chosen.values() for i in members)


def stratified_split(
    labels: Sequence[Any], fraction: float, seed: int, groups: Sequence[Hashable] | None = None
) -> tuple[list[int], list[int]]:
    """Split indices in two, with about the same class proportions on both sides.

    Shares are rounded so that their total is right: with many classes of two images each, at
    fraction 0.1 every fifth class gives one image to the second side. A group counts as its most
    frequent class. A seed gives the same split on every machine and with every library version.

    Args:
        labels: one per image; each combination in rows of 0 and 1 counts as a class.
        fraction: share of the second side, in (0, 1).
        seed: seed of the draw.
        groups: one per image. A group is never divided; shares are kept as closely as this allows.
            A class with at least two groups is on both sides if the second side is due half an
            image of it or more. A class with a single group is on the first side, to be learned.
            (Rows of several labels are exempt: nearly every combination would be in one group.)
    Returns: (first, second), sorted indices, neither empty.
    Raises: ValueError for fewer than two images, or groups.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction} is not between 0 and 1.")
    if groups is not None and len(groups) != len(labels):
        raise ValueError(f"{len(groups)} groups for {len(labels)} labels.")
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i in range(len(labels)):
        members[i if groups is None else groups[i]].append(i)
    if len(members) < 2:
        if groups is None:
            raise ValueError(f"Splitting needs at least two images; got {len(members)}.")
        raise ValueError(
            f"Splitting needs at least two groups; got {len(members)}. Name smaller groups by "
            "?group= (a column of a table; folder; of DICOM files study or series), leave group= "
            "out, or make folders train/ and test/."
        )

    strata: dict[Any, list[list[int]]] = defaultdict(list)
    for group in members.values():
        strata[Counter(as_key(labels[i]) for i in group).most_common(1)[0][0]].append(group)
    draw = random.Random(seed)
    classes = sorted(strata)
    draw.shuffle(classes)
    held: list[list[int]] = []
    due = 0.0  # images that the second side should still get; rounding errors carry over
    for label in classes:
        draw.shuffle(strata[label])
        due += fraction * sum(map(len, strata[label]))
        for group in strata[label]:
            if abs(due - len(group)) < abs(due):
                held.append(group)
                due -= len(group)
    if not held:
        held = [min(members.values(), key=len)]
    elif len(held) == len(members):
        held.remove(min(held, key=len))
    if groups is not None and not any(isinstance(label, tuple) for label in strata):
        held = _with_every_class(held, strata, [as_key(label) for label in labels], fraction)
    second = {i for group in held for i in group}
    return [i for i in range(len(labels)) if i not in second], sorted(second)


def _with_every_class(
    held: list[list[int]],
    strata: Mapping[Hashable, list[list[int]]],
    labels: Sequence[Hashable],
    fraction: float,
) -> list[list[int]]:
    """Exchange held-out groups so that both sides have every class of several groups, and the first
    side has every class, unless nothing would be left to hold out.

    Groups round coarsely: after one huge group, small classes would be held out whole.
    """
    total = Counter(labels)
    second = Counter(labels[i] for group in held for i in group)
    for label, groups in strata.items():
        if len(groups) > 1 and not second[label] and fraction * total[label] >= 0.5:
            smallest = min(groups, key=len)
            held = [*held, smallest]
            second.update(labels[i] for i in smallest)
        elif second[label] == total[label] and len(held) > 1:
            largest = max(groups, key=len)
            held = [group for group in held if group is not largest]
            second.subtract(labels[i] for i in largest)
    return held


def hold_out(
    keys: Sequence[str], strata: Sequence[Hashable], fraction: float, salt: str
) -> set[str]:
    """Return the held-out keys: ``fraction`` of every stratum, chosen by a hash of the key.

    The split depends neither on the order of the keys nor on a random number generator.
    """
    members = defaultdict(list)
    for key, stratum in zip(keys, strata, strict=True):
        members[stratum].append(key)
    held: set[str] = set()
    for group in members.values():
        group.sort(key=lambda key: blake2b(f"{salt}/{key}".encode()).digest())
        held.update(group[: round(fraction * len(group))])
    return held
