"""Class and register tokens among patch tokens, and the position table."""

import torch
from torch import Tensor

# The names of the class tokens, in scan order; their number follows.
CLS_TOKENS = {
    "middle": ("cls_token",),
    "first": ("cls_token",),
    "double": ("cls_token_head", "cls_token_tail"),
    "none": (),
}


def cls_slots(m: int, cls_position: str) -> list[int]:
    """Where the class tokens stand among m patches (indices into the joined sequence)."""
    return {"middle": [m // 2], "first": [0], "double": [0, m + 1], "none": []}[cls_position]


def register_slots(length: int, count: int) -> list[int]:
    """Where ``count`` registers stand, evenly spread through a sequence of this length."""
    return [(i + 1) * length // (count + 1) + i for i in range(count)]


def insert_tokens(sequence: Tensor, extra: Tensor, slots: list[int]) -> Tensor:
    """Put extra (b, c, d) into sequence (b, l, d) so that they stand at the (ascending) slots."""
    pieces, start = [], 0
    for i, slot in enumerate(slots):
        pieces += [sequence[:, start : slot - i], extra[:, i : i + 1]]
        start = slot - i
    return torch.cat([*pieces, sequence[:, start:]], dim=1)


def remove_tokens(sequence: Tensor, slots: list[int]) -> tuple[Tensor, Tensor]:
    """The inverse of `_insert`: (what stands elsewhere, what stands at the slots)."""
    if not slots:
        return sequence, sequence[:, :0]
    ends = [*slots, sequence.shape[1]]
    rest = [sequence[:, a + 1 : b] for a, b in zip([-1, *slots], ends, strict=True)]
    taken = [sequence[:, slot : slot + 1] for slot in slots]
    return torch.cat(rest, dim=1), torch.cat(taken, dim=1)


def split_pos_embed(table: Tensor, cls_position: str) -> tuple[Tensor, Tensor]:
    """Split a position table (1, m + c, d) into the grid's rows and the class tokens' own.

    The class token of the middle has row m // 2; treating it as a prefix, as upstream's dense-task
    code does, shifts half of the grid by one patch.
    """
    m = table.shape[1] - len(CLS_TOKENS[cls_position])
    return remove_tokens(table, cls_slots(m, cls_position))


def join_pos_embed(patches: Tensor, cls: Tensor, cls_position: str) -> Tensor:
    """The inverse of `split_pos_embed`, for a grid of any size."""
    return insert_tokens(patches, cls, cls_slots(patches.shape[1], cls_position))
