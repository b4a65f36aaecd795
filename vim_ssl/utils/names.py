"""Names and numbers in messages."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest match, or all known names."""
    known = list(known)
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.6):
        return f"Did you mean {near[0]!r}?"
    if len(known) > 50:
        return f"{len(known):,} others are known."
    return f"Known: {', '.join(known)}." if known else "None is known."


def number(value: float, digits: int = 4) -> str:
    """Format a number for reading: 0.4312, 12,345, 1.5e-4."""
    if min(10**digits, 10_000) - 0.5 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    if 0 < abs(value) < 1e-3 or abs(value) >= 1e7:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.{digits}g}"
