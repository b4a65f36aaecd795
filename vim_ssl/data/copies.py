"""Copies of images in the splits that `vim_ssl.data.check` has decoded: equal, or alike."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from vim_ssl.data.lookalikes import lookalikes
from vim_ssl.data.passed_over import some_of
from vim_ssl.utils.names import plural


def equal_images(splits: Sequence[Any]) -> tuple[list[str], list[str]]:
    """Return problems and remarks on identical images in two splits, twice in one split, or with
    different labels.

    Args:
        splits: see `vim_ssl.data.check.Split`.
    """
    label_of: dict[str, Any] = {}
    for split in splits:
        if split.labels is not None:
            label_of.update(zip(split.ids, split.labels, strict=True))
    copies: dict[bytes, list[tuple[str, str]]] = defaultdict(list)
    for split in splits:
        for image in split.decoded:
            # Images with a single value (blank) are not counted as duplicates.
            if not image.fault and not image.flat:
                copies[image.pixels].append((split.name, image.id))
    across, within, relabelled = [], [], []
    for same in (same for same in copies.values() if len(same) > 1):
        ids = " = ".join(id for _, id in same[:4])
        in_splits = len({name for name, _ in same})
        if in_splits > 1:
            across.append(" = ".join(f"{name}:{id}" for name, id in same[:4]))
        if len(same) > in_splits:
            within.append(ids)
        if len({str(label_of.get(id)) for _, id in same}) > 1:
            relabelled.append(ids)
    problems, remarks = [], []
    if across:
        problems.append(f"{len(across):,} images are in more than one split: {some_of(across)}.")
    if within:
        remarks.append(f"{len(within):,} images are duplicates: {some_of(within)}.")
    if relabelled:
        remarks.append(
            f"{len(relabelled):,} images have copies with another label: {some_of(relabelled)}."
        )
    return problems, remarks


def alike_images(splits: Sequence[Any]) -> tuple[list[str], list[str]]:
    """Return problems and remarks on images that look alike but are not equal, except those of one
    group; see `vim_ssl.data.lookalikes`."""
    seen: list[tuple[str, Any]] = []
    groups: dict[tuple[str, str], str] = {}
    for split in splits:
        named = zip(split.ids, split.groups or (), strict=False)
        groups |= {(split.name, id): group for id, group in named}
        seen += [(split.name, image) for image in split.decoded if image.look is not None]
    across, within = [], []
    for a, b in lookalikes([image.look for _, image in seen]):
        (split, image), (other, copy) = seen[a], seen[b]
        group = groups.get((split, image.id))
        if image.pixels == copy.pixels or (group and group == groups.get((other, copy.id))):
            continue
        if split == other:
            within.append(f"{image.id} ≈ {copy.id}")
        else:
            across.append(f"{split}:{image.id} ≈ {other}:{copy.id}")
    what = "look alike (resized, recompressed, cropped or brightened copies)"
    problems, remarks = [], []
    if across:
        pairs = f"{plural(len(across), 'pair')} of images in different splits"
        problems.append(f"{pairs} {what}: {some_of(across)}.")
    if within:
        remarks.append(f"{plural(len(within), 'pair')} of images {what}: {some_of(within)}.")
    return problems, remarks
