"""Streams: images in shards that are read in order.

A shard is one file, such as a tar or a parquet table, with a known number of samples. Therefore the
order of an epoch is a function of (seed, epoch), as for indexed images; see
`vim_ssl.data.loading.order`. To resume, request epoch e starting at batch s; shards that are
finished by then are not opened.
"""

import io
import re
import time
import urllib.request
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
from vim_ssl.data.loading.indexed import ATTEMPTS, SeededSamples
from vim_ssl.data.loading.order import Order, Segment, buffered_order, stream_order
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
    passed_over: PassedOver = PassedOver()

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
        self._lost: set[int] = set()  # shards that are not waited for again

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
        stream = ImageStream(
            self.shards, read, name=self.name, classes=classes, splits=self.splits,
            split=self.split, faults=self.faults,
        )  # fmt: skip
        stream.passed_over = self.passed_over
        return stream

    def records(self, number: int) -> Iterator[dict[str, Any]]:
        """Yield the ``count`` undecoded samples of a shard; an unreadable one is a BadImage.
        After a broken connection, a remote shard is read again and continued where it broke."""
        shard, done = self.shards[number], 0
        fault = "the shard ends before this sample"
        again = is_remote(shard.name) and number not in self._lost
        for attempt in range(1 + RETRIES if again else 1):
            time.sleep(2**attempt if attempt else 0)
            try:
                for record in islice(self.read(shard.name), done, shard.count):
                    yield record
                    done += 1
            except Exception as error:  # readers raise errors of nearly any type for a damaged file
                fault = f"the shard cannot be read: {type(error).__name__}: {error}"
            if done == shard.count:
                return
        self._lost.add(number)
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


# ---------------------------------------------------------------- samples


class SlotReader:
    """The samples of one slot in one epoch, from position ``start`` of its order.

    The sample at a position depends only on the arguments. Samples are undecoded, with their index;
    those before ``start`` are skipped, and shards that contain no others are never opened.

    Args:
        segments: the samples of the slot.
        generator: shuffles them.
        buffer: number of undecoded images in memory.
    """

    def __init__(
        self,
        stream: ImageStream,
        segments: Sequence[Segment],
        generator: torch.Generator,
        buffer: int,
        start: int = 0,
    ):
        self.stream, self.segments = stream, segments
        # End of each segment among the slot's samples.
        self.ends = list(accumulate(segment.end - segment.begin for segment in segments))
        self.order = buffered_order(self.ends[-1], buffer, generator)
        self.position, self._incoming = 0, self._read()
        self._needed = np.ones(self.ends[-1], dtype=bool)
        self._held: dict[int, tuple[int, dict[str, Any]]] = {}
        self._skip_to(start)

    def candidates(self, position: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the sample at a position, then the following ones as substitutes for a broken
        image.

        Positions must be requested in ascending order; those between are skipped.
        """
        self._skip_to(position)
        sample = self._sample(self.order[position])
        self._skip_to(position + 1)
        yield sample
        for later in range(position + 1, position + ATTEMPTS):
            if later < len(self.order):
                yield self._sample(self.order[later])
            else:
                yield self._read_again(self.order[later % len(self.order)])

    def _skip_to(self, position: int) -> None:
        for number in self.order[self.position : position]:
            self._needed[number] = False
            self._held.pop(number, None)
        self.position = position

    def _sample(self, number: int) -> tuple[int, dict[str, Any]]:
        while number not in self._held:
            new, sample = next(self._incoming)
            self._held[new] = sample
        return self._held[number]

    def _read(self) -> Iterator[tuple[int, tuple[int, dict[str, Any]]]]:
        """Yield (number in the slot, sample), shard by shard, without those that are skipped."""
        bounds = pairwise([0, *self.ends])
        for segment, (begin, end) in zip(self.segments, bounds, strict=True):
            if self._needed[begin:end].any():
                for number, sample in enumerate(self._read_segment(segment), begin):
                    if self._needed[number]:
                        yield number, sample

    def _read_segment(self, segment: Segment) -> Iterator[tuple[int, dict[str, Any]]]:
        shard, begin, end = segment
        first = self.stream.starts[shard] + begin
        return enumerate(islice(self.stream.records(shard), begin, end), first)

    def _read_again(self, number: int) -> tuple[int, dict[str, Any]]:
        i = bisect_right(self.ends, number)
        skipped = number - (self.ends[i - 1] if i else 0)
        return next(islice(self._read_segment(self.segments[i]), skipped, None))


class StreamBatches(Sampler):
    """Batches of one process: lists of (epoch, position x slots + slot), for `StreamSamples`.

    Set the attributes ``epoch`` and ``start`` (the first batch) before iterating. ``readers`` is
    the name of the order.
    """

    def __init__(self, order: Order, rank: int = 0):
        self.order, self.rank, self.readers = order, rank, order.name
        self.batches_per_epoch = order.batches
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.batches_per_epoch - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        slots = self.order.slots
        for batch in range(self.start, self.batches_per_epoch):
            positions = self.order.positions(batch, self.rank)
            yield [(self.epoch, position * slots + slot) for slot, position in positions]


class StreamSamples(SeededSamples):
    """Samples from a stream, with a random transform applied. A sample's index is (epoch,
    position x slots + slot).

    Ascending positions of a slot are cheap; any other position restarts its reader. A DataLoader
    gives its batches to its workers in turn, so each worker reads the same few slots.

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
        self._counts = [shard.count for shard in data.shards]
        self.order: Order = stream_order(self._counts, 1, world=1, workers=1)
        self._epoch = 0
        self._readers: dict[int, SlotReader] = {}  # by slot, of this epoch

    def batches(
        self, batch_size: int, *, rank: int, world: int, workers: int, order: str = ""
    ) -> StreamBatches:
        """Return the batch sampler of one process.

        Args:
            order: name of the order that a resumed run started with.
        """
        self.order = stream_order(
            self._counts, batch_size, world=world, workers=max(workers, 1), stored=order
        )
        return StreamBatches(self.order, rank)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, address = key
        position, slot = divmod(address, self.order.slots)
        if epoch != self._epoch:
            self._epoch, self._readers = epoch, {}
        reader = self._readers.get(slot)
        if reader is None or position < reader.position:
            reader = self._readers[slot] = self._open(epoch, slot, position)
        return self._draw(epoch, self._loaders(reader, position))

    def preview(self, count: int) -> list[dict]:
        reader = self._open(0, 0, 0)  # a separate reader: the training reader keeps its position
        positions = range(min(count, len(reader.order)))
        return [self._draw(0, self._loaders(reader, position)) for position in positions]

    def _open(self, epoch: int, slot: int, start: int) -> SlotReader:
        segments, generator = self.order.segments(self.seed, epoch, slot)
        return SlotReader(self.data, segments, generator, self.buffer, start)

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
