"""Splits: stratified ones by seed, and parts held out for good."""

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from hashlib import blake2b


def stratified_split(
    labels: Sequence[int], fraction: float, seed: int, groups: Sequence[Hashable] | None = None
) -> tuple[list[int], list[int]]:
    """Split indices in two, with every class in about the same proportion on both sides.

    The shares are rounded so that their sum comes right: of many classes with two pictures each,
    one in five gives a picture up at fraction 0.1. A group counts for the class it has most of.
    No library's random numbers are used, so a seed means the same split everywhere.

    Args:
        labels: one a picture.
        fraction: share of the second side, in (0, 1).
        seed: chooses the pictures.
        groups: one a picture; a group comes to one side as a whole, and shares are then kept as
            well as that allows.
    Returns: (first, second), sorted indices, neither empty.
    Raises: ValueError when there are not two pictures, or groups, to part.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction} is not between 0 and 1.")
    if groups is not None and len(groups) != len(labels):
        raise ValueError(f"{len(groups)} groups for {len(labels)} labels.")
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i in range(len(labels)):
        members[i if groups is None else groups[i]].append(i)
    if len(members) < 2:
        what = "picture" if groups is None else "group"
        raise ValueError(f"A split needs two {what}s at least; there is {len(members)}.")

    strata: dict[int, list[list[int]]] = defaultdict(list)
    for group in members.values():
        strata[Counter(labels[i] for i in group).most_common(1)[0][0]].append(group)
    draw = random.Random(seed)
    classes = sorted(strata)
    draw.shuffle(classes)
    held: list[list[int]] = []
    due = 0.0  # pictures the second side should still get; what rounding leaves goes on
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
    second = {i for group in held for i in group}
    return [i for i in range(len(labels)) if i not in second], sorted(second)


def hold_out(
    keys: Sequence[str], strata: Sequence[Hashable], fraction: float, salt: str
) -> set[str]:
    """The keys that are held out: in every stratum this share, chosen by a hash of the key.

    Neither the order nor any library's random numbers matter, so a split stays what it is.
    """
    members = defaultdict(list)
    for key, stratum in zip(keys, strata, strict=True):
        members[stratum].append(key)
    held: set[str] = set()
    for group in members.values():
        group.sort(key=lambda key: blake2b(f"{salt}/{key}".encode()).digest())
        held.update(group[: round(fraction * len(group))])
    return held
