"""Count what a source finds but does not read, so that nothing is left out in silence.

Code that lists files calls `pass_over` wherever it skips something, and `add_warning` where their
layout is probably not what was meant. The registry collects both while a source is opened, and
stores them as ``passed_over`` of the data.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from vim_ssl.utils.names import printable

EXAMPLES = 3  # names that are kept per reason


class PassedOver(dict[str, int]):
    """Reason -> number of files or folders, with the first names of each.

    Attributes:
        examples: reason -> some of the names.
        warnings: what is probably wrong with the layout of the files.
    """

    def __init__(self, counts: Mapping[str, int] | None = None):
        super().__init__(counts or {})
        self.examples: dict[str, list[str]] = {
            reason: list(names) for reason, names in getattr(counts, "examples", {}).items()
        }
        self.warnings: list[str] = list(getattr(counts, "warnings", ()))

    def add(self, reason: str, count: int = 1, names: Iterable[str] = ()) -> None:
        """Count ``count`` more files or folders."""
        self[reason] = self.get(reason, 0) + count
        kept = self.examples.setdefault(reason, [])
        kept += [name for name in names if name not in kept][: max(EXAMPLES - len(kept), 0)]

    def __add__(self, other: Mapping[str, int]) -> "PassedOver":
        total, examples = PassedOver(self), getattr(other, "examples", {})
        for reason, count in other.items():
            total.add(reason, count, examples.get(reason, ()))
        warnings = getattr(other, "warnings", ())
        total.warnings += [text for text in warnings if text not in total.warnings]
        return total

    def by_count(self) -> list[str]:
        """The reasons, the largest count first."""
        return sorted(self, key=lambda reason: -self[reason])

    def __str__(self) -> str:
        """For example "12 HEIC, 3 hidden"; the largest count first."""
        return ", ".join(f"{self[reason]:,} {reason}" for reason in self.by_count())


def some_of(names: Iterable[str], count: int = 3) -> str:
    """List the first names, printable: "a, b, c …"."""
    texts = list(map(printable, names))
    return ", ".join(texts[:count]) + (" …" if len(texts) > count else "")


_counting: ContextVar[PassedOver | None] = ContextVar("passed_over", default=None)


@contextmanager
def counted() -> Iterator[PassedOver]:
    """Collect what is passed over in the ``with`` block; an inner block collects its own."""
    counts = PassedOver()
    token = _counting.set(counts)
    try:
        yield counts
    finally:
        _counting.reset(token)


def pass_over(reason: str, count: int = 1, names: Iterable[str] = ()) -> None:
    """Count files or folders that are not read; without effect unless a source is being opened.

    Args:
        reason: what they are, in words that may follow any number: "HEIC", "hidden".
        names: some of their names, for messages.
    """
    if (counts := _counting.get()) is not None and count:
        counts.add(reason, count, names)


def add_warning(text: str) -> None:
    """Add a warning about the layout of the source that is being opened."""
    if (counts := _counting.get()) is not None and text not in counts.warnings:
        counts.warnings.append(text)
