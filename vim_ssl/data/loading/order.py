"""The order of a stream: which samples of which shards a batch has.

    shards → circle    every epoch, the shards are shuffled and their samples put in a circle, which
                       starts at a random sample
    circle → slots     whole batches of it are cut into ranges, one per slot, equal to within a unit
    slot → order       the samples of a slot are shuffled with a buffer
    slots → batches    unit k of the epoch is the next one of slot k % slots; a unit is the batch of
                       a process where the run started

The order is a function of the data, the seed, the epoch, and the number of slots and unit, which a
run keeps. Processes and workers only share the work: each reads the slots of its batches.
"""

import heapq
import re
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch

from vim_ssl.data.loading.indexed import stable_hash

SLOTS = 8  # for a new run on 1, 2, 4 or 8 readers; others have as many slots as readers


class Segment(NamedTuple):
    """Samples ``begin`` to ``end`` (excluded) of a shard."""

    shard: int
    begin: int
    end: int


class Order(Protocol):
    """The order of the epochs of a stream.

    Attributes:
        name: everything that the order depends on apart from data and seed; stored with a run.
        slots: number of slots.
        batches: number of batches per process and epoch.
    """

    @property
    def name(self) -> str: ...
    @property
    def slots(self) -> int: ...
    @property
    def batches(self) -> int: ...

    def positions(self, batch: int, rank: int) -> list[tuple[int, int]]:
        """Return slot, and position in its order, of every sample of a process's batch."""
        ...

    def segments(self, seed: int, epoch: int, slot: int) -> tuple[list[Segment], torch.Generator]:
        """Return the samples of a slot, and the generator that shuffles them."""
        ...


class SlotOrder:
    """The order described above.

    Args:
        counts: number of samples of each shard.
        batch_size: batch size per process.
        world: number of processes.
        slots, unit: see above.
    Raises: ValueError if the samples do not fill one global batch.
    """

    def __init__(self, counts: Sequence[int], batch_size: int, world: int, slots: int, unit: int):
        self.counts, self.slots, self.unit = counts, slots, unit
        self.batch_size, self.world, self.total = batch_size, world, sum(counts)
        self.batches = self.total // (batch_size * world)
        self.name = f"{slots} slot(s) of {unit} in batches of {batch_size * world}"
        if not self.batches:
            raise ValueError(
                f"{self.total} samples do not fill one batch of {batch_size} on {world} "
                f"process(es); use a batch_size of at most {self.total // world}."
            )
        units = -(-self.batches * batch_size * world // unit)
        sizes = [unit * len(range(slot, units, slots)) for slot in range(slots)]
        ends = [min(end, self.total) for end in accumulate(sizes)]
        self.ranges = list(zip([0, *ends], ends, strict=False))

    def positions(self, batch: int, rank: int) -> list[tuple[int, int]]:
        first = (batch * self.world + rank) * self.batch_size
        result = []
        for sample in range(first, first + self.batch_size):
            turn, slot = divmod(sample // self.unit, self.slots)
            result.append((slot, turn * self.unit + sample % self.unit))
        return result

    def segments(self, seed: int, epoch: int, slot: int) -> tuple[list[Segment], torch.Generator]:
        circle = torch.Generator().manual_seed(stable_hash("circle", seed, epoch))
        shards = torch.randperm(len(self.counts), generator=circle).tolist()
        shift = int(torch.randint(self.total, (), generator=circle))
        ends = list(accumulate(self.counts[shard] for shard in shards))
        begin, end = (at + shift for at in self.ranges[slot])
        result = []
        while begin < end:
            at = begin % self.total
            i = bisect_right(ends, at)
            skipped = at - (ends[i - 1] if i else 0)
            count = min(ends[i] - at, end - begin)
            result.append(Segment(shards[i], skipped, skipped + count))
            begin += count
        return result, torch.Generator().manual_seed(stable_hash("order", seed, epoch, slot))


class FixedShards:
    """The order of runs of earlier versions: every worker of every process is a slot and keeps its
    shards in all epochs; all slots give as many batches as the smallest.

    Raises: ValueError for more slots than shards, and if a slot does not fill one batch.
    """

    def __init__(self, counts: Sequence[int], batch_size: int, world: int, workers: int):
        self.counts, self.batch_size, self.workers = counts, batch_size, workers
        self.slots = world * workers
        self.name = f"{world} process(es) x {workers} worker(s)"
        self.shards = share_out(counts, self.slots)
        smallest = min(sum(counts[shard] for shard in shards) for shards in self.shards)
        self.batches = smallest // batch_size * workers
        if not self.batches:
            raise ValueError(
                f"With {self.name}, the shards of one worker have {smallest} samples, fewer than "
                f"a batch of {batch_size}; use fewer --workers, or --batch-size {smallest}."
            )

    def positions(self, batch: int, rank: int) -> list[tuple[int, int]]:
        turn, worker = divmod(batch, self.workers)
        first = turn * self.batch_size
        slot = rank * self.workers + worker
        return [(slot, position) for position in range(first, first + self.batch_size)]

    def segments(self, seed: int, epoch: int, slot: int) -> tuple[list[Segment], torch.Generator]:
        generator = torch.Generator().manual_seed(stable_hash("order", seed, epoch, slot))
        shards = self.shards[slot]
        order = torch.randperm(len(shards), generator=generator).tolist()
        return [Segment(shards[i], 0, self.counts[shards[i]]) for i in order], generator


def stream_order(
    counts: Sequence[int], batch_size: int, *, world: int, workers: int, stored: str = ""
) -> Order:
    """Return the order of a run.

    Args:
        counts: number of samples of each shard.
        batch_size, world, workers: batch size per process, processes, and workers of each.
        stored: name of the order that a run started with; "" for a new run.
    Raises: ValueError if no batch can be filled.
    """
    if "process" in stored:
        return FixedShards(counts, batch_size, world, workers)
    if kept := re.match(r"(\d+) slot\(s\) of (\d+) ", stored):
        slots, unit = int(kept[1]), int(kept[2])
    else:
        slots, unit = slot_count(len(counts), world * workers), batch_size
    return SlotOrder(counts, batch_size, world, slots, unit)


def slot_count(shards: int, readers: int) -> int:
    """Return the number of slots of a new run: `SLOTS`, or less for few shards, whatever the
    number of readers; but one per reader where each could not have equally many."""
    slots = 1 << (max(min(shards, SLOTS), 1).bit_length() - 1)
    return slots if slots % readers == 0 else readers


def share_out(counts: Sequence[int], slots: int) -> list[list[int]]:
    """Assign shards to slots, the largest first, each to the slot with the fewest samples so far.

    Raises: ValueError for more slots than shards.
    """
    if slots > len(counts):
        raise ValueError(
            f"{len(counts)} shard(s) are too few for {slots} readers (processes x workers), which "
            "need at least one each: use fewer --workers or processes, or split the data into more "
            "shards."
        )
    shards_of: list[list[int]] = [[] for _ in range(slots)]
    loads = [(0, slot) for slot in range(slots)]
    for shard in sorted(range(len(counts)), key=lambda number: -counts[number]):
        load, slot = loads[0]
        shards_of[slot].append(shard)
        heapq.heapreplace(loads, (load + counts[shard], slot))
    return shards_of


def buffered_order(size: int, buffer: int, generator: torch.Generator) -> array:
    """Return the permutation of range(size) that a shuffle buffer gives: the number at position p
    is below p + buffer.

    At each position, a number is drawn from the buffer and replaced by the next one.
    """
    held = list(range(min(buffer, size)))
    order = array("q")
    draws = torch.randint(len(held), (size - len(held),), generator=generator)
    for number, drawn in enumerate(draws.tolist(), start=len(held)):
        order.append(held[drawn])
        held[drawn] = number
    order.extend(held[i] for i in torch.randperm(len(held), generator=generator).tolist())
    return order
