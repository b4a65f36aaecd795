"""The order of streams: every sample as often as every other, whoever reads it, and after a resume
by others."""

from collections import Counter

import numpy as np
import pytest
import torch

from vim_ssl.data.loading.order import SLOTS, buffered_order, share_out, slot_count
from vim_ssl.data.loading.streamed import ImageStream, Shard, StreamSamples


def stream(*counts: int) -> ImageStream:
    def read(name):
        return ({"id": f"{name}/{i}", "image": b""} for i in range(counts[int(name)]))

    return ImageStream([Shard(str(i), n) for i, n in enumerate(counts)], read, name="counted")


class Indices(StreamSamples):
    """Without decoding and seeding."""

    def _draw(self, epoch, candidates):
        return {"index": next(iter(candidates))[0]}


def epoch_of(counts, epoch=0, start=0, *, batch=2, world=1, workers=0, order="", seed=5):
    """The samples' indices by global batch, in order; the numbers of the workers that read each
    shard; and the name of the order."""
    samples = Indices(stream(*counts), dict, seed, buffer=6)
    batches: list[list[int]] = []
    readers: dict[int, set] = {}
    ends = np.cumsum(counts)
    for rank in range(world):
        sampler = samples.batches(batch, rank=rank, world=world, workers=workers, order=order)
        sampler.epoch, sampler.start = epoch, start
        if not rank:
            batches = [[] for _ in range(len(sampler))]
        for number, keys in enumerate(sampler):
            indices = [samples[key]["index"] for key in keys]
            batches[number] += indices
            for index in indices:
                shard = int(np.searchsorted(ends, index, side="right"))
                readers.setdefault(shard, set()).add((rank, (start + number) % max(workers, 1)))
    return batches, readers, sampler.readers


@pytest.mark.parametrize(
    ("counts", "more"),
    [
        ((50, 10), {"workers": 2, "batch": 4}),
        ((30, 30, 30), {"workers": 2, "batch": 7}),
        ((61,), {"workers": 3, "batch": 5}),  # fewer shards than workers
        ((25, 0, 9, 27), {"world": 2, "workers": 3, "batch": 3}),
        ((3, 40, 5, 1, 13), {"world": 3, "batch": 6}),
    ],
    ids=str,
)
def test_every_sample_is_seen_as_often_as_every_other(counts, more):
    seen: Counter[int] = Counter()
    total, epochs = sum(counts), 50
    size = more["batch"] * more.get("world", 1)
    for epoch in range(epochs):
        batches, _, _ = epoch_of(counts, epoch, **more)
        now = Counter(index for batch in batches for index in batch)
        assert set(now.values()) == {1}
        assert len(now) == total // size * size  # what is left out fills no batch
        seen.update(now)
    share = len(now) / total
    spread = 4.5 * np.sqrt(epochs * share * (1 - share))
    assert [i for i in range(total) if abs(seen[i] - epochs * share) > spread + 1e-9] == []


def test_shards_change_workers_between_epochs():
    readers: dict[int, set] = {}
    for epoch in range(12):
        for shard, by in epoch_of([30] * 8, epoch, world=2, workers=2)[1].items():
            readers.setdefault(shard, set()).update(by)
    assert all(len(by) == 4 for by in readers.values())


@pytest.mark.parametrize("counts", [[30] * 9, [40, 9, 3]], ids=str)
@pytest.mark.parametrize("workers", [1, 2])
def test_the_order_of_an_epoch_does_not_depend_on_who_reads_it(counts, workers):
    whole = epoch_of(counts, batch=8)[0]
    assert epoch_of(counts, batch=8, workers=workers)[0] == whole
    assert epoch_of(counts, 1, batch=8)[0] != whole
    assert epoch_of(counts, batch=8, seed=6)[0] != whole


@pytest.mark.parametrize("counts", [[30] * 9, [40, 9], [77]], ids=str)
@pytest.mark.parametrize(
    ("batch", "world", "workers"), [(6, 1, 3), (3, 2, 2), (2, 3, 1), (1, 6, 5)], ids=str
)
def test_a_run_resumed_by_other_processes_and_workers_goes_on_as_before(
    counts, batch, world, workers
):
    """With the same effective batch, in the middle of an epoch and in later ones."""
    for first in ({"batch": 6, "workers": 2}, {"batch": 3, "world": 2, "workers": 3}):
        order = epoch_of(counts, **first)[2]
        for epoch, start in ((0, 3), (1, 0)):
            whole = epoch_of(counts, epoch, **first)[0]
            resumed, _, name = epoch_of(
                counts, epoch, start, batch=batch, world=world, workers=workers, order=order
            )
            assert resumed == whole[start:]
            assert name == order


def test_samples_of_a_shard_are_spread_over_the_epoch():
    """The buffer is much smaller than a shard, and data often come sorted by class."""
    batches, _, _ = epoch_of([60] * 12, batch=6)
    thirds = np.array_split(np.concatenate(batches) // 60, 3)
    assert all(len(set(third)) >= 10 for third in thirds)
    neighbours = np.abs(np.diff(np.concatenate(batches))) == 1
    assert neighbours.mean() < 0.2


# Indices by batch, as read by the version that gave each worker its own shards.
EARLIER = [[1, 0], [22, 21], [4, 6], [20, 9], [2, 7], [24, 11], [8, 14], [12, 10], [3, 16],
           [13, 18], [17, 15], [23, 19]]  # fmt: skip
EARLIER_OF_TWO = [[0, 1, 12, 10], [21, 22, 19, 15], [4, 5, 9, 13], [25, 24, 16, 17]]


def test_runs_of_an_earlier_version_go_on_in_their_order():
    samples = [9, 5, 4, 2, 6]
    for world, expected in ((1, EARLIER), (2, EARLIER_OF_TWO)):
        order = f"{world} process(es) x 2 worker(s)"
        for start in (0, 1, 3):
            found, _, name = ordered(samples, start, world, order)
            assert found == expected[start:]
            assert name == order
    other = ordered(samples, 0, 1, "2 process(es) x 2 worker(s)")[2]
    assert other == "1 process(es) x 2 worker(s)"  # the run is told, and refuses
    with pytest.raises(ValueError, match=r"2 shard\(s\) are too few for 4 readers .*--workers"):
        epoch_of([5, 5], workers=4, order="1 process(es) x 4 worker(s)")
    with pytest.raises(ValueError, match=r"have 3 samples.*--batch-size 3"):
        epoch_of([9, 3], workers=2, batch=4, order="1 process(es) x 2 worker(s)")


def ordered(counts, start, world, order):
    samples = Indices(stream(*counts), dict, seed=5, buffer=4)
    found: list[list[int]] = []
    for rank in range(world):
        sampler = samples.batches(2, rank=rank, world=world, workers=2, order=order)
        sampler.epoch, sampler.start = 1, start
        rows = [[samples[key]["index"] for key in keys] for keys in sampler]
        found = [one + other for one, other in zip(found, rows, strict=True)] if rank else rows
    return found, samples, sampler.readers


def test_slots_are_as_many_for_any_usual_number_of_readers():
    assert {slot_count(100, readers) for readers in (1, 2, 4, 8)} == {SLOTS}
    assert [slot_count(100, readers) for readers in (3, 6, 12, 16)] == [3, 6, 12, 16]
    assert [slot_count(shards, 1) for shards in (1, 2, 3, 7, 8)] == [1, 2, 2, 4, 8]
    assert slot_count(1, 4) == 4


def test_a_stream_that_fills_no_batch_is_refused():
    with pytest.raises(ValueError, match="5 samples do not fill one batch of 4 on 2 process"):
        epoch_of([3, 2], batch=4, world=2)


def test_the_buffer_shuffles_and_never_looks_far_ahead():
    order = list(buffered_order(100, 10, torch.Generator().manual_seed(0)))
    assert sorted(order) == list(range(100))
    assert order != sorted(order)
    assert all(number < place + 10 for place, number in enumerate(order))
    assert len(buffered_order(3, 10, torch.Generator())) == 3


def test_shards_are_shared_out_evenly():
    assert share_out([5, 9, 3, 4, 3], 2) == [[1, 2], [0, 3, 4]]
