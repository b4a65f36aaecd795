"""Patches, class and register tokens among patch tokens, and the position table."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# cls_position -> the names of the class tokens, in scan order.
CLS_TOKENS = {
    "middle": ("cls_token",),
    "first": ("cls_token",),
    "double": ("cls_token_head", "cls_token_tail"),
    "none": (),
}


def cut_patches(x: Tensor, size: Sequence[int]) -> Tensor:
    """Cut images (b, c, h, w), or clips (b, c, t, h, w), into patches of this size: (b, m, pixels),
    in raster order, the pixels of a patch channel by channel, as the weights of a convolution."""
    n = len(size)
    for i, side in enumerate(size):
        x = x.unflatten(2 + 2 * i, (-1, side))  # (b, c, rows, side, columns, side)
    order = (0, *range(2, 2 + 2 * n, 2), 1, *range(3, 3 + 2 * n, 2))
    return x.permute(order).flatten(1 + n).flatten(1, n)


def select_tokens(tokens: Tensor, ids: Tensor | None) -> Tensor:
    """Select tokens of (b, m, d), or of a table for all sequences (1, m, d), by indices (b, k): (b,
    k, d). Without indices return all."""
    if ids is None:
        return tokens
    if len(tokens) == 1:
        return F.embedding(ids, tokens[0])
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[2]))


def cls_slots(m: int, cls_position: str) -> list[int]:
    """Return the indices of the class tokens in the joined sequence of m patches and them."""
    return {"middle": [m // 2], "first": [0], "double": [0, m + 1], "none": []}[cls_position]


def register_slots(length: int, count: int) -> list[int]:
    """Return the indices of ``count`` registers evenly spaced in a sequence of this length."""
    return [(i + 1) * length // (count + 1) + i for i in range(count)]


def insert_tokens(sequence: Tensor, extra: Tensor, slots: list[int]) -> Tensor:
    """Insert extra (b, c, d) into sequence (b, l, d); ``slots`` are ascending output indices."""
    pieces, start = [], 0
    for i, slot in enumerate(slots):
        pieces += [sequence[:, start : slot - i], extra[:, i : i + 1]]
        start = slot - i
    return torch.cat([*pieces, sequence[:, start:]], dim=1)


def remove_tokens(sequence: Tensor, slots: list[int]) -> tuple[Tensor, Tensor]:
    """The inverse of `insert_tokens`: (the other tokens, the tokens at the slots)."""
    if not slots:
        return sequence, sequence[:, :0]
    ends = [*slots, sequence.shape[1]]
    rest = [sequence[:, a + 1 : b] for a, b in zip([-1, *slots], ends, strict=True)]
    taken = [sequence[:, slot : slot + 1] for slot in slots]
    return torch.cat(rest, dim=1), torch.cat(taken, dim=1)


def split_pos_embed(table: Tensor, cls_position: str) -> tuple[Tensor, Tensor]:
    """Split a position table (1, m + c, d) into rows of patches and of class tokens.

    The middle class token has row m // 2. Treating it as a prefix, as upstream's dense-task code
    does, would shift half of the grid by one patch.
    """
    m = table.shape[1] - len(CLS_TOKENS[cls_position])
    return remove_tokens(table, cls_slots(m, cls_position))


def join_pos_embed(patches: Tensor, cls: Tensor, cls_position: str) -> Tensor:
    """The inverse of `split_pos_embed`, for a grid of any size."""
    return insert_tokens(patches, cls, cls_slots(patches.shape[1], cls_position))
