"""Stateless data loading: training resumes exactly in the middle of an epoch, with any number of
workers.

The order of an epoch is a function of (seed, epoch); a sample's augmentation and mask are functions
of (seed, epoch, index). To resume, request epoch e starting at batch s.
"""

import hashlib
import multiprocessing
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from vim_ssl.data.images import BadImage
from vim_ssl.data.loading.workers import Loader

ATTEMPTS = 20  # consecutive broken images after which loading fails


def stable_hash(*parts) -> int:
    """Return a 32-bit hash that is the same in every process and on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


class EpochBatches(Sampler):
    """Batches of one process: lists of (epoch, index).

    Args:
        size: number of samples.
        batch_size: batch size per process; an epoch's last incomplete global batch is dropped.
        rank, world: index of this process, and number of processes.
        seed: seed of the shuffling.
        repeats: consecutive repetitions of each sample (repeated augmentation, arXiv:1902.05509).
            The length of an epoch stays the same, so it has fewer distinct samples. The k-th
            repetition of index i has the index i + k x size.
    Set the attributes ``epoch`` and ``start`` (the first batch) before iterating.
    Raises: ValueError if no global batch can be filled.
    """

    readers = ""  # the order does not depend on the number of workers

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        repeats: int = 1,
    ):
        self.size, self.batch_size, self.rank, self.world = size, batch_size, rank, world
        self.seed, self.repeats, self.epoch, self.start = seed, repeats, 0, 0
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"{size} samples do not fill one batch of {batch_size} on {world} process(es); "
                f"use a batch_size of at most {size // world}."
            )

    @property
    def batches_per_epoch(self) -> int:
        return self.size // (self.batch_size * self.world)

    def __len__(self) -> int:
        return self.batches_per_epoch - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(stable_hash("order", self.seed, self.epoch))
        order = torch.randperm(self.size, generator=generator).tolist()
        for batch in range(self.start, self.batches_per_epoch):
            first = (batch * self.world + self.rank) * self.batch_size
            positions = (divmod(i, self.repeats) for i in range(first, first + self.batch_size))
            yield [(self.epoch, order[i] + copy * self.size) for i, copy in positions]


class SeededSamples(Dataset):
    """Samples of a data set with a random transform applied, indexed by (epoch, index).

    Args:
        data: indexed data; items are dicts with ``image``; may raise `BadImage`.
        transform: dict -> dict of tensors and numbers; draws from the global generators of
            ``random``, numpy and torch, which are seeded for every sample; may raise `BadImage`
            for an item that it cannot use.
        seed: seed of the run.
        repeats: see `EpochBatches`.

    An undecodable image is replaced by another image, chosen by hash, and listed in the sample's
    ``skipped``.
    """

    def __init__(self, data, transform: Callable[[dict], dict], seed: int = 0, *, repeats: int = 1):
        self.data, self.transform, self.seed, self.repeats = data, transform, seed, repeats

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        return self._draw(epoch, self._candidates(index))

    def batches(self, batch_size: int, *, rank: int, world: int, workers: int, order: str = ""):
        """Return the batch sampler of one process; its order does not depend on ``workers``, and
        ``order`` is for streams."""
        return EpochBatches(
            len(self), batch_size, rank=rank, world=world, seed=self.seed, repeats=self.repeats
        )

    def preview(self, count: int) -> list[dict]:
        """Return `count` evenly spaced samples for display, or only the first if the data set has
        fewer. Every call returns the same samples."""
        size = len(self)
        indices = [i * size // count for i in range(count)] if size >= count else [0]
        return [self[(0, i)] for i in indices]

    def _load(self, index: int) -> dict[str, Any]:
        """Return the input of the transform. Raises: BadImage."""
        return self.data[index]

    def _candidates(self, index: int) -> Iterator[tuple[int, Callable[[], dict]]]:
        """Yield (index, loader) for the image at ``index``, then for its substitutes."""
        for attempt in range(ATTEMPTS):
            other = index if not attempt else stable_hash("in place of", index, attempt)
            yield other, partial(self._load, other % len(self))

    def _draw(self, epoch: int, candidates: Iterable[tuple[int, Callable[[], dict]]]) -> dict:
        """Return the transformed sample of the first readable candidate (index, loader). The first
        candidate's index determines the seed, even if that candidate is broken."""
        skipped: list[str] = []
        seed = None
        for index, load in candidates:
            if seed is None:
                seed = stable_hash("sample", self.seed, epoch, index)
            try:
                item = load()
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002 (timm's augmentations draw from it)
                # Seed only the CPU generator: torch.manual_seed formats and keeps a stack trace for
                # every other device type, which takes longer than loading a small image.
                torch.default_generator.manual_seed(seed)
                return self.transform(item) | {"index": index % len(self), "skipped": skipped}
            except BadImage as bad:
                skipped.append(str(bad))
        raise BadImage("20 consecutive images", f"none can be read; the last: {skipped[-1]}")


def collate(samples: list[dict]) -> dict:
    """Stack tensors and numbers; concatenate the lists of skipped images. Dicts become a list,
    because the shapes of their values differ between samples."""
    batch: dict[str, Any] = {}
    for key in samples[0]:
        values = [s[key] for s in samples]
        if key == "skipped":
            batch[key] = [name for names in values for name in names]
        elif isinstance(values[0], torch.Tensor):
            batch[key] = torch.stack(values)
        elif isinstance(values[0], dict):
            batch[key] = values
        else:
            batch[key] = torch.tensor(values)
    return batch


def training_loader(
    samples: SeededSamples, batches: Sampler, *, num_workers: int = 0, pin_memory: bool = False
) -> Loader:
    """Return a loader of ``samples.batches(…)``; its workers stay alive between epochs."""
    if num_workers:
        # Not atexit: processes that multiprocessing starts (some launchers use it) skip atexit
        # and would wait forever, and a fork that exits would kill its parent's workers.
        Finalize(None, _kill_workers, exitpriority=0)
    return Loader(
        samples,
        batch_sampler=batches,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker if num_workers else None,
    )


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # A signal to the process group, from Ctrl-C, `timeout` or a scheduler, makes the trainer save
    # and exit; a worker killed by it would end the run first. Workers exit with the loader, after
    # their parent, or through `_kill_workers`.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _kill_workers() -> None:
    # Workers still run after an exception. multiprocessing would send SIGTERM, which they ignore,
    # and wait forever. (torch's SIGCHLD handler would report each killed worker as a failure.)
    if hasattr(signal, "SIGCHLD"):  # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
