"""The compilations of Triton kernels and their seconds, which are no part of any measured time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Compilation:
    """One variant of a kernel.

    Attributes:
        constants: those that are numbers, such as "N=16 C=2".
        cached: it was read from TRITON_CACHE_DIR.
    """

    kernel: str
    constants: str
    seconds: float
    cached: bool


Heard = Callable[[Compilation], object]


@contextmanager
def heard(call: Heard) -> Iterator[None]:
    """Call ``call`` for every variant that is compiled or read from the cache inside, beside the
    listener around it. Without Triton nothing is."""
    try:
        from triton import knobs
    except ImportError:
        yield
        return
    before = knobs.compilation.listener

    def listener(**details) -> None:
        if before is not None:
            before(**details)
        call(_described(details["src"], details["times"], details["cache_hit"]))

    knobs.compilation.listener = listener
    try:
        yield
    finally:
        knobs.compilation.listener = before


def _described(src, times, cached: bool) -> Compilation:
    names = src.fn.arg_names
    constants = " ".join(
        f"{names[path[0]]}={value:d}" for path, value in src.constants.items()
        if len(path) == 1 and isinstance(value, int)
    )  # fmt: skip
    return Compilation(src.name, constants, round(times.total / 1e6, 2), cached)
