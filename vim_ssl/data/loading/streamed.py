"""Streams: images in shards that are read in order.

A shard is one file, such as a tar or a parquet table, with a known number of samples. Therefore the
order of an epoch is a function of (seed, epoch), as for indexed images. To resume, request epoch e
starting at batch s; shards that are finished by then are not opened.

    shards → slots   every worker of every process is a slot; it keeps its shards in all epochs
    slot → order     its shards are shuffled, then their samples with a shuffle buffer
    slots → batches  batch n of a process comes from its slot n % workers; all slots give as many
                     batches as the smallest slot
"""

import io
import re
import time
import urllib.request
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from hashlib import blake2b
from itertools import accumulate, islice, pairwise
from typing import IO, Any, ClassVar, Literal

import numpy as np
import torch
from torch.utils.data import Sampler

from vim_ssl.data.images import BadImage, decode_image
from vim_ssl.data.loading.indexed import ATTEMPTS, SeededSamples, stable_hash
from vim_ssl.data.passed_over import PassedOver

BUFFER = 1000  # undecoded images in a reader's shuffle buffer
RETRIES = 3  # retries after a broken connection to a remote shard, after 2, 4 and 8 seconds


@dataclass(frozen=True)
class Shard:
    """One file of a stream, with ``count`` samples. ``version`` (its size, or its ETag) is part of
    the stream's fingerprint."""

    name: str
    count: int
    version: str = ""


class ImageStream:
    """Images that are read in order, shard by shard; `ImageData` is the indexed counterpart.

    Args:
        shards: the shards; empty ones are dropped.
        read: maps a shard's name to its samples in order: items of `ImageData` with an undecoded
            ``image`` (a path, the bytes of a file, or a BadImage). Picklable.
        name, classes, splits, split, faults: see `ImageData`.
    Attributes: the arguments, and ``is_stream``, ``kind``, ``sampling``, ``bands``,
        ``passed_over`` of `ImageData`.
    """

    is_stream: ClassVar[Literal[True]] = True
    kind: ClassVar[str] = "image"
    sampling: Any = None
    bands: None = None
    passed_over: dict[str, int] = PassedOver()

    def __init__(
        self,
        shards: Sequence[Shard],
        read: Callable[[str], Iterator[dict[str, Any]]],
        *,
        name: str,
        classes: Sequence[str] | None = None,
        splits: Sequence[str] = (),
        split: str = "all",
        faults: Sequence[str] = (),
    ):
        self.shards = [shard for shard in shards if shard.count]
        self.read, self.name, self.split, self.splits = read, name, split, list(splits)
        self.classes = None if classes is None else list(classes)
        self.faults = list(faults)

    def __len__(self) -> int:
        return sum(shard.count for shard in self.shards)

    @cached_property
    def starts(self) -> list[int]:
        """Index of each shard's first sample among all samples."""
        return [0, *accumulate(shard.count for shard in self.shards)][:-1]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the shards' names (without folder), versions or counts."""
        digest = blake2b(digest_size=8)
        for shard in self.shards:
            digest.update(f"{file_name(shard.name)}\0{shard.version}\0{shard.count}\n".encode())
        return digest.hexdigest()

    def samples(
        self, transform: Callable[[dict], dict], seed: int = 0, *, buffer: int = BUFFER
    ) -> "StreamSamples":
        """Return training samples with a random transform applied; see `StreamSamples`."""
        return StreamSamples(self, transform, seed, buffer)

    def limited(self, limit: int) -> "ImageStream":
        """Select at most ``limit`` samples: the first ones of each shard, in proportion."""
        total = len(self)
        cut = [start * min(limit, total) // total for start in [*self.starts, total]]
        shards = [replace(shard, count=cut[i + 1] - cut[i]) for i, shard in enumerate(self.shards)]
        return ImageStream(
            shards, self.read, name=self.name, classes=self.classes, splits=self.splits,
            split=self.split, faults=self.faults,
        )  # fmt: skip

    def with_reader(
        self, read: Callable[[str], Iterator[dict[str, Any]]], classes: Sequence[str]
    ) -> "ImageStream":
        """Return the same shards, read in another way, with labels of these classes."""
        return ImageStream(
            self.shards, read, name=self.name, classes=classes, splits=self.splits,
            split=self.split, faults=self.faults,
        )  # fmt: skip

    def records(self, number: int) -> Iterator[dict[str, Any]]:
        """Yield the ``count`` undecoded samples of a shard; an unreadable one is a BadImage.
        After a broken connection, a remote shard is read again and continued where it broke."""
        shard, done = self.shards[number], 0
        fault = "the shard ends before this sample"
        for attempt in range(1 + RETRIES if is_remote(shard.name) else 1):
            time.sleep(2**attempt if attempt else 0)
            try:
                for record in islice(self.read(shard.name), done, shard.count):
                    yield record
                    done += 1
            except Exception as error:  # readers raise errors of nearly any type for a damaged file
                fault = f"the shard cannot be read: {type(error).__name__}: {error}"
            if done == shard.count:
                return
        for position in range(done, shard.count):
            name = f"{file_name(shard.name)}[{position}]"
            yield {"id": name, "image": BadImage(name, fault)}

    @staticmethod
    def decode(record: dict[str, Any]) -> dict[str, Any]:
        """Decode a record into an item. Raises: BadImage."""
        image = record["image"]
        try:
            if isinstance(image, BadImage):
                raise image
            item = record | {"image": decode_image(image)}
        except BadImage as error:
            raise BadImage(record["id"], error.reason) from error
        return item | {"meta": {"path": image}} if isinstance(image, str) else item

    def __repr__(self) -> str:
        return f"ImageStream({self.name!r}, {len(self)} images in {len(self.shards)} shards)"


# ---------------------------------------------------------------- the order of an epoch


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
    loads = [0] * slots
    for shard in sorted(range(len(counts)), key=lambda number: -counts[number]):
        slot = loads.index(min(loads))
        shards_of[slot].append(shard)
        loads[slot] += counts[shard]
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


class SlotReader:
    """The samples of one slot in one epoch, starting at position ``start`` of its order.

    The sample at a position depends only on the arguments. Samples are undecoded, with their index;
    those before ``start`` are skipped, and shards that contain no others are never opened.
    """

    def __init__(
        self, stream: ImageStream, shards: Sequence[int], seed: int, buffer: int, start: int = 0
    ):
        generator = torch.Generator().manual_seed(seed)
        self.stream = stream
        self.shards = [shards[i] for i in torch.randperm(len(shards), generator=generator).tolist()]
        counts = [stream.shards[shard].count for shard in self.shards]
        self.ends = list(accumulate(counts))  # end of each shard among the slot's samples
        self.order = buffered_order(self.ends[-1], buffer, generator)
        self._start, self._incoming = start, self._read()
        self._held: dict[int, tuple[int, dict[str, Any]]] = {}

    def candidates(self, position: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the sample at a position, then the following ones as substitutes for a broken
        image.

        Positions must be requested in order, starting at ``start``.
        """
        sample = self._sample(self.order[position])
        del self._held[self.order[position]]
        yield sample
        for later in range(position + 1, position + ATTEMPTS):
            if later < len(self.order):
                yield self._sample(self.order[later])
            else:
                yield self._read_again(self.order[later % len(self.order)])

    def _sample(self, number: int) -> tuple[int, dict[str, Any]]:
        while number not in self._held:
            new, sample = next(self._incoming)
            self._held[new] = sample
        return self._held[number]

    def _read(self) -> Iterator[tuple[int, tuple[int, dict[str, Any]]]]:
        """Yield (number in the slot, sample), shard by shard, without those before ``start``."""
        needed = np.ones(self.ends[-1], dtype=bool)
        needed[self.order[: self._start]] = False
        for shard, (begin, end) in zip(self.shards, pairwise([0, *self.ends]), strict=True):
            if needed[begin:end].any():
                for number, sample in enumerate(self._read_shard(shard), begin):
                    if needed[number]:
                        yield number, sample

    def _read_shard(self, shard: int) -> Iterator[tuple[int, dict[str, Any]]]:
        return enumerate(self.stream.records(shard), self.stream.starts[shard])

    def _read_again(self, number: int) -> tuple[int, dict[str, Any]]:
        i = bisect_right(self.ends, number)
        skipped = number - (self.ends[i - 1] if i else 0)
        return next(islice(self._read_shard(self.shards[i]), skipped, None))


class StreamBatches(Sampler):
    """Batches of one process: lists of (epoch, position x slots + slot), for `StreamSamples`.

    Args:
        sizes: number of samples in each slot of all processes.
        batch_size: batch size per process.
        rank, world: index of this process, and number of processes.
    Set the attributes ``epoch`` and ``start`` (the first batch) before iterating. ``readers``
    describes the processes and workers that the order depends on.
    Raises: ValueError if a slot does not fill one batch.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, *, rank: int = 0, world: int = 1):
        self.slots, self.batch_size, self.rank = len(sizes), batch_size, rank
        self.workers = len(sizes) // world
        self.readers = f"{world} process(es) x {self.workers} worker(s)"
        self.rounds = min(sizes) // batch_size
        self.epoch = self.start = 0
        if self.rounds == 0:
            raise ValueError(
                f"With {self.readers}, the shards of one worker have {min(sizes)} samples, fewer "
                f"than a batch of {batch_size}; use fewer --workers, or --batch-size {min(sizes)}."
            )

    @property
    def batches_per_epoch(self) -> int:
        return self.rounds * self.workers

    def __len__(self) -> int:
        return self.batches_per_epoch - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in range(self.start, self.batches_per_epoch):
            turn, worker = divmod(batch, self.workers)
            slot, first = self.rank * self.workers + worker, turn * self.batch_size
            positions = range(first, first + self.batch_size)
            yield [(self.epoch, position * self.slots + slot) for position in positions]


class StreamSamples(SeededSamples):
    """Samples from a stream, with a random transform applied. A sample's index is (epoch,
    position x slots + slot).

    Consecutive positions are cheap; any other position restarts the reader. A DataLoader gives its
    batches to its workers in turn, so each worker reads consecutive positions of one slot.

    Args:
        data, transform, seed: see `SeededSamples`; a broken image is replaced by the next one.
        buffer: number of undecoded images in a reader's shuffle buffer.
    """

    data: ImageStream

    def __init__(
        self,
        data: ImageStream,
        transform: Callable[[dict], dict],
        seed: int = 0,
        buffer: int = BUFFER,
    ):
        super().__init__(data, transform, seed)
        self.buffer = buffer
        self.slots = [list(range(len(data.shards)))]
        self._reader: SlotReader | None = None
        self._next = (0, 0, 0)  # epoch, slot and position of the reader

    def batches(self, batch_size: int, *, rank: int, world: int, workers: int) -> StreamBatches:
        counts = [shard.count for shard in self.data.shards]
        self.slots = share_out(counts, world * max(workers, 1))
        sizes = [sum(counts[shard] for shard in slot) for slot in self.slots]
        return StreamBatches(sizes, batch_size, rank=rank, world=world)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, address = key
        position, slot = divmod(address, len(self.slots))
        if self._reader is None or self._next != (epoch, slot, position):
            self._reader = self._open(epoch, slot, position)
        self._next = (epoch, slot, position + 1)
        return self._draw(epoch, self._loaders(self._reader, position))

    def preview(self, count: int) -> list[dict]:
        reader = self._open(0, 0, 0)  # a separate reader: the training reader keeps its position
        positions = range(min(count, len(reader.order)))
        return [self._draw(0, self._loaders(reader, position)) for position in positions]

    def _open(self, epoch: int, slot: int, start: int) -> SlotReader:
        seed = stable_hash("order", self.seed, epoch, slot)
        return SlotReader(self.data, self.slots[slot], seed, self.buffer, start)

    def _loaders(self, reader: SlotReader, position: int) -> Iterator[tuple[int, Callable]]:
        for index, record in reader.candidates(position):
            yield index, partial(self.data.decode, record)


# ---------------------------------------------------------------- files


def is_remote(name: str) -> bool:
    return "://" in name


def open_file(name: str) -> IO[bytes]:
    """Open a local file, an http(s) URL, or an fsspec URL (hf://, s3://, gs://) for reading."""
    if not is_remote(name):
        return open(name, "rb")
    if name.startswith(("http://", "https://")):
        return _CheckedResponse(urllib.request.urlopen(name, timeout=60))  # type: ignore[return-value]
    import fsspec

    return fsspec.open(name, "rb").open()


def file_name(name: str) -> str:
    return re.split(r"[/\\]", name)[-1]


class _CheckedResponse(io.RawIOBase):
    """A response that raises if the connection ends early; urllib returns truncated data."""

    def __init__(self, response):
        self.response, self.headers = response, response.headers

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self.response.read(None if size < 0 else size)
        if not data and size and self.response.length:
            raise ConnectionError(f"the connection ended {self.response.length:,} bytes early")
        return data

    def close(self) -> None:
        self.response.close()
        super().close()
