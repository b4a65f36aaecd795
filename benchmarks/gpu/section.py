"""A section of `gpu_check.py`: its settings, its output, and work in several processes."""

import functools
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path

import compiles
import targets
from rows import ORIGIN, append_rows, origin

COMPILE_COLUMNS = (*ORIGIN, "section", "kernel", "constants", "seconds", "cached")


@dataclass
class Section:
    """Settings of a section, and its output.

    Attributes:
        out: folder for its rows.
        cache: folder for everything else that it writes.
        started, until: `time.monotonic()` at its start, and when it will be stopped.
        dry: run everything tiny, on a CPU.
        failures: the number of checks and measurements that failed.
        cut: True if a check did not run to its end.
    """

    name: str
    out: Path
    cache: Path
    started: float
    until: float
    dry: bool
    failures: int = 0
    cut: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @functools.cached_property
    def origin(self) -> dict[str, str]:
        return origin()

    def left(self) -> float:
        """Return the seconds until the section is stopped."""
        return self.until - time.monotonic()

    def say(self, *words: object) -> None:
        """Print, with the seconds used and left."""
        used = time.monotonic() - self.started
        line = " ".join(map(str, (f"[{used:4.0f} s, {self.left():4.0f} left]", *words)))
        print(line, flush=True)  # in one piece, whatever other processes print

    def fail(self, *words: object) -> None:
        """Count a failure, and print it in the words that `gpu_check.py` looks for, which counts
        it also if the section is stopped later."""
        self.failures += 1
        self.say("BROKEN:", *words)

    def cut_off(self, *words: object) -> None:
        """Print what did not run to its end; the section is incomplete."""
        self.cut = True
        self.say("cut off:", *words)

    def row(self, name: str, columns: Sequence[str], row: dict, text: str = "") -> None:
        """Append a row to a file; print the text, if any, with the expected values."""
        append_rows(self.out / name, columns, [row])
        if text:
            self.say("  ".join(filter(None, (text, targets.remarks(name, row)))))

    def compiled(self, one: compiles.Compilation) -> None:
        """Write and print a compilation. Its seconds are no part of any measured time."""
        self.row("compiles.csv", COMPILE_COLUMNS, self.origin | {"section": self.name} | vars(one),
                 "" if one.cached or one.seconds < 1 else
                 f"compiled {one.kernel} {one.constants} in {one.seconds:.1f} s")  # fmt: skip


def apart(
    section: Section, function: Callable, tasks: Sequence[tuple], share: float = 1.0
) -> Iterator:
    """Results of ``function(device, *task)`` in several processes, in the order of completion.

    A task that fails is reported and has no result.

    Args:
        share: of the section's time that is left; then the processes are ended.
    Raises: TimeoutError when they are.
    """
    if section.dry:
        yield from (function(section.device, *task) for task in tasks)
        return
    cores = os.cpu_count() or 1
    workers = max(min(len(tasks), cores - 2, 12), 1)
    os.environ["OMP_NUM_THREADS"] = str(max(cores // workers, 1))
    pool = ProcessPoolExecutor(workers, get_context("spawn"))
    try:
        futures = [pool.submit(function, section.device, *task) for task in tasks]
        for future in as_completed(futures, share * section.left()):
            try:
                result = future.result()
            except Exception:
                section.fail(f"{function.__name__}{tasks[futures.index(future)]}")
                section.cut = True
                traceback.print_exc()
            else:
                yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in active_children():
            child.kill()


def compile_ahead(section: Section, function: Callable, tasks: Sequence[tuple]) -> None:
    """Fill TRITON_CACHE_DIR in several processes, since a process compiles one kernel at a time.

    ``function`` returns its compilations.
    """
    started, seconds = time.monotonic(), 0.0
    try:
        for compiled in apart(section, function, tasks, share=0.4):
            for one in compiled:
                section.compiled(one)
                seconds += 0.0 if one.cached else one.seconds
    except TimeoutError:
        section.say("cut off: compiling ahead")
    took = time.monotonic() - started
    section.say(f"compiled in {took:.0f} s what takes one process {seconds:.0f} s")
