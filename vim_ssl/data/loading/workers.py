"""A DataLoader whose workers start fast, and end with one line where they would hang or die
unexplained."""

import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

SHARED_MEMORY = Path("/dev/shm")
PATIENCE_S = 10.0  # for other batches to be consumed
PRELOADED = ("vim_ssl.data", "timm")  # what workers need; the import takes seconds


class Loader(DataLoader):
    """`torch.utils.data.DataLoader` with the same arguments.

    Raises, when iterated: OSError if the workers' batches do not fit into the shared memory, as in
        containers with a small /dev/shm, where torch would wait forever; and if a worker is killed,
        for example by a system without memory.
    """

    def __init__(self, dataset: Any, *args: Any, num_workers: int = 0, **options: Any):
        options["num_workers"] = num_workers
        super().__init__(dataset, *args, **options)
        if num_workers:
            preload()
            self.collate_fn = _Fitting(self.collate_fn, num_workers)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise OSError(
                f"a process that reads images was killed ({str(error).splitlines()[0]}); the "
                f"memory may be full: use fewer --workers than {self.num_workers}, or a smaller "
                "batch."
            ) from error
        except _SharedMemoryFull as error:  # its text starts with the worker's traceback
            raise OSError(str(error).strip().rpartition("\n")[2].partition(": ")[2]) from error


def preload() -> None:
    """Let a fork server, with which Python 3.14 starts processes on Linux, import `PRELOADED` once;
    every worker would import it again. A list of modules that the user set is kept."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        from multiprocessing import forkserver

        server: Any = forkserver._forkserver  # type: ignore[attr-defined]
        if server._preload_modules == ["__main__"]:  # Python's default
            server.set_forkserver_preload(["__main__", *PRELOADED])


class _SharedMemoryFull(OSError):
    pass


class _Fitting:
    """Collate a batch, then wait until the shared memory has space for it and for one of every
    other worker."""

    def __init__(self, collate: Callable[[Any], Any], workers: int):
        self.collate, self.workers = collate, workers

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        needed = _nbytes(batch) * self.workers
        if not SHARED_MEMORY.is_dir():  # macOS, Windows
            return batch
        end = time.monotonic() + PATIENCE_S
        while (free := shutil.disk_usage(SHARED_MEMORY).free) < needed:
            if time.monotonic() > end:
                raise _SharedMemoryFull(
                    f"{SHARED_MEMORY} has {free / 2**20:,.0f} MiB of shared memory free, but the "
                    f"batches of {self.workers} workers need {needed / 2**20:,.0f} MiB; start the "
                    "container with a larger one (docker run --shm-size=8g), or use --workers 0."
                )
            time.sleep(0.05)
        return batch


def _nbytes(batch: Any) -> int:
    """Bytes of the tensors in a batch: workers pass these through the shared memory."""
    if isinstance(batch, Tensor):
        return batch.nbytes
    if isinstance(batch, dict):
        return sum(map(_nbytes, batch.values()))
    return sum(map(_nbytes, batch)) if isinstance(batch, list | tuple) else 0
