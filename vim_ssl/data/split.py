"""Splits: stratified ones by seed, and parts held out for good."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from hashlib import blake2b


def stratified_split(
    labels: Sequence[int], fraction: float, seed: int, groups: Sequence[Hashable] | None = None
) -> tuple[list[int], list[int]]:
    """Split indices in two with every class in about the same proportion on both sides.

    Args:
        labels: one a picture. A class with a single picture stays on the first side.
        fraction: share of the second side, in (0, 1).
        seed: equal seeds give equal splits.
        groups: pictures of one group come to one side; ``fraction`` and the classes' shares are
            then kept as well as whole groups allow.
    Returns: (first, second), sorted indices.
    Raises: ValueError when the data are too few for such a split.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction} is not between 0 and 1.")
    if groups is not None:
        return _split_groups(labels, fraction, seed, groups)
    from sklearn.model_selection import train_test_split

    count = Counter(labels)
    splittable = [i for i, label in enumerate(labels) if count[label] > 1]
    strata = [labels[i] for i in splittable]
    try:
        # A share of all pictures, single ones included.
        size = round(fraction * len(labels))
        _, second = train_test_split(splittable, test_size=size, random_state=seed, stratify=strata)
    except ValueError as error:
        raise ValueError(
            f"{len(labels)} pictures of {len(count)} classes are too few to hold out "
            f"{fraction:.0%} of every class: {error}"
        ) from error
    held = set(second)
    return [i for i in range(len(labels)) if i not in held], sorted(second)


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


def _split_groups(
    labels: Sequence[int], fraction: float, seed: int, groups: Sequence[Hashable]
) -> tuple[list[int], list[int]]:
    import numpy as np
    from sklearn.model_selection import StratifiedGroupKFold

    if len(groups) != len(labels):
        raise ValueError(f"{len(groups)} groups for {len(labels)} labels.")
    names = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    if len(names) < 2:
        raise ValueError("All pictures are of one group; a split needs at least two.")
    # Whole groups are dealt into folds, and some folds make the second side. No more folds than
    # the largest class has pictures, which is what sklearn can deal.
    folds = min(20, len(names), max(Counter(labels).values()))
    held = min(folds - 1, max(1, round(fraction * folds)))
    if folds < 2:
        raise ValueError("No class has two pictures; a stratified split needs that.")
    dealer = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # as said: as well as can be
        deal = dealer.split(np.zeros(len(labels)), labels, [names[g] for g in groups])
        second = np.concatenate([part for _, part in list(deal)[:held]])
    side = set(second.tolist())
    return [i for i in range(len(labels)) if i not in side], sorted(side)
