"""Time calls in one process, in turns, by the CPU clock of the thread."""

import statistics
import time
from collections.abc import Callable, Sequence

TURN_SECONDS = 0.02  # duration of a turn for one kind of call, or one call if it takes longer
Values = dict[str, tuple[float, str]]  # name -> value, unit


def in_turns(calls: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Return CPU seconds per call, for each call and turn."""
    repeats = {name: max(int(TURN_SECONDS / _seconds(call, 2)), 1) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            seconds[name].append(_seconds(call, repeats[name]))
    return seconds


def _seconds(call: Callable[[], object], repeats: int) -> float:
    """CPU seconds, the mean of `repeats` calls after one that warms the caches."""
    call()
    started = time.thread_time()
    for _ in range(repeats):
        call()
    return (time.thread_time() - started) / repeats


def medians(seconds: dict[str, list[float]], ratios: Sequence[tuple[str, str]]) -> Values:
    """Return the median time of each call, and the median over the turns of each ratio (slower,
    faster) whose calls were both timed."""
    values: Values = {name: (round(1e3 * statistics.median(s), 3), "ms")
                      for name, s in seconds.items()}  # fmt: skip
    for a, b in ratios:
        if a in seconds and b in seconds:
            ratio = statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))
            values[f"{a} / {b}"] = (round(ratio, 3), "times")
    return values
