"""Batches whose random draws are functions of (seed, epoch, index), so that training resumes
exactly in the middle of an epoch, with any number of workers.

Nothing has state: the order of an epoch is a function of (seed, epoch), a sample's augmentation and
mask of (seed, epoch, index). To resume, request epoch e from batch s on.
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
from torch.utils.data import DataLoader, Dataset, Sampler

from vim_ssl.data.images import BadImage

ATTEMPTS = 20  # broken images in a row after which loading fails


def stable_hash(*parts) -> int:
    """A 32-bit hash that is the same in every process and on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


class EpochBatches(Sampler):
    """Batches of one process: lists of (epoch, index).

    Args:
        size: number of samples.
        batch_size: per process; an epoch's last incomplete global batch is dropped.
        rank, world: this process among all.
        seed: of the shuffling.
        repeats: consecutive repetitions of a sample; an epoch keeps its length and has so many
            times fewer samples (repeated augmentation, arXiv:1902.05509). The k-th repetition has
            an index k x size higher.
    Attributes ``epoch`` and ``start`` (the first batch) are set before iterating.
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
    """A data set seen through a random transform, addressed by (epoch, index).

    Args:
        data: by index; items are dicts with ``image``; may raise `BadImage`.
        transform: dict -> dict of tensors and numbers; draws from the global generators of
            ``random``, numpy and torch, which are seeded for every sample; may raise `BadImage`
            for an item that it cannot use.
        seed: of the run.
        repeats: see `EpochBatches`.

    An image that cannot be decoded is replaced by another one, chosen by hash, and listed in the
    sample's ``skipped``.
    """

    def __init__(self, data, transform: Callable[[dict], dict], seed: int = 0, *, repeats: int = 1):
        self.data, self.transform, self.seed, self.repeats = data, transform, seed, repeats

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        return self._draw(epoch, self._candidates(index))

    def batches(self, batch_size: int, *, rank: int, world: int, workers: int):
        """The batch sampler of one process; its order does not depend on ``workers``."""
        return EpochBatches(
            len(self), batch_size, rank=rank, world=world, seed=self.seed, repeats=self.repeats
        )

    def preview(self, count: int) -> list[dict]:
        """A few samples to look at, the same in every call."""
        size = len(self)
        indices = [i * size // count for i in range(count)] if size >= count else [0]
        return [self[(0, i)] for i in indices]

    def _candidates(self, index: int) -> Iterator[tuple[int, Callable[[], dict]]]:
        """The image at ``index`` and its substitutes: indices, and what loads them."""
        for attempt in range(ATTEMPTS):
            other = index if not attempt else stable_hash("in place of", index, attempt)
            yield other, partial(self.data.__getitem__, other % len(self))

    def _draw(self, epoch: int, candidates: Iterable[tuple[int, Callable[[], dict]]]) -> dict:
        """The transformed sample of the first candidate (index, loader) that can be read; the seed
        is that of the first of all."""
        skipped: list[str] = []
        seed = None
        for index, load in candidates:
            if seed is None:
                seed = stable_hash("sample", self.seed, epoch, index)
            try:
                item = load()
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002 (timm's augmentations draw from it)
                # The CPU's generator alone: torch.manual_seed formats a stack trace for every
                # other kind of device, which takes longer than a small image, and keeps it.
                torch.default_generator.manual_seed(seed)
                return self.transform(item) | {"index": index % len(self), "skipped": skipped}
            except BadImage as bad:
                skipped.append(str(bad))
        raise BadImage("twenty images in a row", f"none could be read; the last: {skipped[-1]}")


def collate(samples: list[dict]) -> dict:
    """Stack tensors and numbers; join the lists of skipped images. Dicts, whose values differ in
    shape between samples, stay a list."""
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
) -> DataLoader:
    """A loader of ``samples.batches(…)``; the workers stay alive between epochs."""
    if num_workers:
        # Not atexit: processes started by multiprocessing, as by some launchers, end without it
        # and would wait for ever, and a fork that ends would kill its parent's workers.
        Finalize(None, _kill_workers, exitpriority=0)
    return DataLoader(
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
    # and exit; a worker that died of it would end the run first. Workers end with the loader, when
    # their parent is gone, or by `_kill_workers`.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _kill_workers() -> None:
    # After an exception workers still run. multiprocessing would send them SIGTERM, which they
    # ignore, and wait for them for ever. (torch's handler of SIGCHLD would report each as a
    # failure.)
    if hasattr(signal, "SIGCHLD"):  # Windows has none
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
