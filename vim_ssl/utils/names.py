"""Names and numbers in messages."""

import difflib
import re
from collections.abc import Iterable, Sequence

# What other projects call it -> our name.
SYNONYMS = {
    word: name
    for name, words in {
        "base_lr": "lr learning_rate",
        "batch_size": "batch bs",
        "data": "dataset data_dir data_path train_data train_dir input root",
        "device": "gpu cuda",
        "encoder": "model arch backbone pretrained weights checkpoint ckpt",
        "img_size": "image_size input_size resolution",
        "max_steps": "steps iterations iters",
        "optimizer": "opt optim",
        "output": "out out_dir output_dir save_dir log_dir",
        "precision": "amp fp16 bf16 mixed_precision",
        "schedule": "scheduler lr_schedule lr_scheduler",
        "weight_decay": "wd",
        "workers": "num_workers jobs",
    }.items()
    for word in words.split()
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest matches, or all known names."""
    known = list(known)
    if near := closest(name, known):
        return f"Did you mean {' or '.join(map(repr, near))}?"
    if len(known) > 50:
        return f"{len(known):,} others are known."
    return f"Known: {', '.join(known)}." if known else "None is known."


def closest(name: str, known: Iterable[str]) -> list[str]:
    """Return the known names that ``name`` most likely means: at most three, or none.

    A synonym comes first, then a misspelling, then the names that contain all its words (``lr`` in
    ``min_lr``), then anything similar. Dashes and underscores are the same.
    """
    by_key = {_key(other): other for other in known}
    key = _key(name)
    if (usual := SYNONYMS.get(key, "")) in by_key:
        return [by_key[usual]]
    misspelt = difflib.get_close_matches(key, by_key, n=1, cutoff=0.85)
    words = set(key.split("_"))
    longer = [other for other in by_key if words <= set(other.split("_"))]
    similar = difflib.get_close_matches(key, by_key, n=1, cutoff=0.6)
    return [by_key[other] for other in misspelt or longer[:3] or similar]


def _key(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()


def number(value: float, digits: int = 4) -> str:
    """Format a number for reading: 0.4312, 12,345, 1.5e-4."""
    if min(10**digits, 10_000) - 0.5 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    if 0 < abs(value) < 1e-3 or abs(value) >= 1e7:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.{digits}g}"


def printable(text: str) -> str:
    """Escape the bytes of a file name that are not UTF-8, as ``\\udce9``; see `original`.

    Tables, JSON and parquet files hold names in this form, because they must be UTF-8.
    """
    return text.encode("utf-8", "backslashreplace").decode()


def original(text: str) -> str:
    """Return the file name that `printable` escaped."""
    return re.sub(r"\\(udc[89a-f][0-9a-f])", lambda match: chr(int(match[1][1:], 16)), text)


def plural(count: float, noun: str) -> str:
    """Format a count with its noun: 1 step, 1,200 steps, 0.5 epochs."""
    text = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{text} {noun}{'s' * (count != 1)}"


def rough_time(seconds: float) -> str:
    """Format a duration to about two digits: 40 s, 12 min, 3.5 h, 4 days."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.2g} h" if hours < 48 else f"{hours / 24:.0f} days"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)
