"""A thread pool for the compiled CPU kernels, which release the GIL."""

import ctypes
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from vim_ssl.kernels.numba_kernels import LANES

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
PIECES_PER_THREAD = 4  # several, so that other threads can take over pieces of a delayed one


def _forget_pool() -> None:
    """Reset the pool in a forked child, which inherits the object but not its threads."""
    global _pool, _pool_size
    _pool, _pool_size = None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _zero_rows(n: int) -> torch.Tensor:
    """Aligned zeros. Not torch.zeros: it may start OpenMP, which a forked child must not."""
    rows = torch.empty(n, LANES, dtype=torch.float32, device="cpu")  # whatever the default is
    if n:
        ctypes.memset(rows.data_ptr(), 0, rows.nbytes)
    return rows


def run_tasks(
    kernel: Callable, args: tuple, tasks: int, *, work_per_task: float, scratch_rows: int
) -> None:
    """Run ``kernel(*args, scratch, first, end)`` over range(tasks) on `torch.get_num_threads()`
    threads.

    No two tasks write the same memory, so results do not depend on the number of threads.

    Args:
        kernel: a `numba_kernels.kernel`.
        work_per_task: approximate nanoseconds per task; small calls run on the calling thread.
        scratch_rows: number of zero rows of working memory per thread; passed as an address.
    """
    global _pool, _pool_size
    threads = min(torch.get_num_threads(), tasks, max(1, int(tasks * work_per_task / 50_000)))
    if threads <= 1:
        scratch = _zero_rows(scratch_rows)
        kernel(*args, scratch.data_ptr(), 0, tasks)
        return
    pieces = min(tasks, PIECES_PER_THREAD * threads)
    bounds = [tasks * i // pieces for i in range(pieces + 1)]
    counter = itertools.count()

    def work() -> None:
        scratch = _zero_rows(scratch_rows)
        while (i := next(counter)) < pieces:
            kernel(*args, scratch.data_ptr(), bounds[i], bounds[i + 1])

    if _pool is None or _pool_size < threads - 1:
        _pool_size = threads - 1
        _pool = ThreadPoolExecutor(_pool_size, thread_name_prefix="vim_ssl_scan")
    helpers = [_pool.submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        helper.result()
