"""Values of labels, groups and splits as people write them: one rule for all sources.

name_of(" cat "), name_of(1.0), name_of(None), name_of("nan")     "cat", "1", None, None
class_keys(["1", "1.0", "True"])                                  one class: the key "1"
class_keys(["1", "1.0", "1.5"])                                   three classes
fold("Golden_Retriever") == fold("golden retriever")              probably one class
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Sequence
from decimal import Decimal
from typing import Any, TypeVar

# Texts that programs write for a missing value. ("none" and "Na" are names of classes.)
MISSING = frozenset({
    "", "nan", "NaN", "NAN", "-nan", "NA", "N/A", "n/a", "#N/A", "<NA>", "None", "null", "NULL",
    "NaT",
})  # fmt: skip
_EDGES = re.compile("^[\\s\ufeff\u200b\u2060]+|[\\s\ufeff\u200b\u2060]+$")
_NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)([eE][+-]?\d+)?")
_WHOLE = re.compile(r"(-?(?:0|[1-9]\d*))(?:\.0)?")  # "1.0" is what pandas makes of 1
_PLAIN = re.compile(r"[+-]?\d+(\.0)?")
_TRUTH = {"true": "1", "false": "0"}

N = TypeVar("N")


def text_of(value: Any) -> str:
    """Return a value as text: without spaces and invisible signs at its ends, accents composed,
    whole numbers without a decimal point; "" for None and NaN."""
    text = value if isinstance(value, str) else _text_of_object(value)
    if text.isascii():
        return text.strip()
    return _EDGES.sub("", unicodedata.normalize("NFC", text))


def _text_of_object(value: Any) -> str:
    value = value.item() if hasattr(value, "item") else value  # numpy and torch numbers
    if value is None:
        return ""
    if isinstance(value, float) and not value % 1:  # nan % 1 and inf % 1 are nan, which is true
        return str(int(value))
    return str(value)


def name_of(value: Any) -> str | None:
    """Return the name that a value stands for; None if it is missing (see `MISSING`)."""
    text = text_of(value)
    return None if text in MISSING else text


def number_of(name: str) -> Decimal | None:
    """Return the number that a text is, with a decimal point or comma; None for other texts."""
    if not _NUMBER.fullmatch(name.strip()):
        return None
    return Decimal(name.strip().replace(",", "."))


def whole_number_of(name: str) -> int | None:
    """Return the whole number that a text is, such as "12", "012" or "12.0"; None for others."""
    match = re.fullmatch(r"([+-]?\d+)(\.0*)?", name.strip())
    return int(match[1]) if match else None


def class_keys(names: Collection[str]) -> dict[str, str]:
    """Return a key of each name, the same for spellings of one class: "1", "1.0" and "True".

    If any name is another number, such as "1.10", "250.00" or "1E2", the names are codes or
    versions, and "1.0" is not "1". Numbers with leading zeros are codes: "007" is not "7".
    """
    codes = any(number_of(name) is not None and not _PLAIN.fullmatch(name) for name in names)

    def key(name: str) -> str:
        if name.lower() in _TRUTH:
            return _TRUTH[name.lower()]
        match = None if codes else _WHOLE.fullmatch(name)
        return match[1] if match else unicodedata.normalize("NFC", name)

    return {name: key(name) for name in names}


def same_class(name: str, other: str) -> bool:
    """Whether two names are spellings of one class, if no others say that they are codes."""
    keys = class_keys((name, other))
    return keys[name] == keys[other]


def fold(name: str) -> str:
    """Return a key that ignores letter case, spaces, "_" and "-", and leading zeros of whole
    numbers."""
    text = unicodedata.normalize("NFKC", name).casefold()
    if text.strip().isdecimal():
        return text.strip().lstrip("0") or "0"
    if number_of(text) is not None:  # the sign and the fraction are more than spelling
        return text.strip()
    return " ".join(re.split(r"[\s_-]+", text)).strip()


def sort_classes(names: Collection[N]) -> list[N]:
    """Sort class names: by number if all are numbers (-1.5, 9, 10), else alphabetically."""
    numbers = {name: number_of(str(name)) for name in names}
    numeric = all(number is not None for number in numbers.values())
    return sorted(names, key=lambda name: (numbers[name] if numeric else 0, name))


class Names:
    """The names in a column of labels or groups, each in one spelling.

    Args:
        values: all values of the column, of any type; see `name_of`.
        what: singular of what they are, for the remarks.
    Attributes:
        classes: the different names, sorted by `sort_classes`.
        remarks: what a user should know: texts read as missing, spellings read as one name, and
            names that differ only in letter case or spaces.
    """

    def __init__(self, values: Iterable[Any], what: str = "label"):
        counts = Counter(map(text_of, values))
        spellings: dict[Hashable, list[str]] = defaultdict(list)
        keys = class_keys(counts.keys() - MISSING)
        for text in sorted(keys, key=lambda text: (-counts[text], text)):
            spellings[keys[text]].append(text)
        self._name = {text: texts[0] for texts in spellings.values() for text in texts}
        self.classes = sort_classes({texts[0] for texts in spellings.values()})
        self._number = {name: i for i, name in enumerate(self.classes)}
        self.remarks = list(self._remarks(what, counts, spellings))

    def name(self, value: Any) -> str | None:
        """Return the name of one of the values; None if it is missing."""
        return self._name.get(text_of(value))

    def number(self, value: Any) -> int:
        """Return the index of a value's name in ``classes``; -1 if it is missing."""
        name = self.name(value)
        return -1 if name is None else self._number[name]

    def _remarks(
        self, what: str, counts: Counter[str], spellings: dict[Hashable, list[str]]
    ) -> Iterable[str]:
        for text in sorted(set(counts) & MISSING - {""}):
            yield (
                f"{counts[text]:,} {what}s are {text!r}, which is read as a missing value; rename "
                f"the {what} if it is a real one"
            )
        if merged := [texts for texts in spellings.values() if len(texts) > 1]:
            yield f"{_listed(merged)} are read as one {what}; write it in one way"
        alike: dict[Hashable, list[str]] = defaultdict(list)
        for name in self.classes:
            alike[fold(re.sub(r"(?<=\d)\.0$", "", name))].append(name)
        if several := [names for names in alike.values() if len(names) > 1]:
            yield (
                f"{_listed(several)} are different {what}s, though only letter case, spaces or "
                "zeros differ; write them in one way if they are one"
            )


def number_labels(
    values: Iterable[Any], every: Iterable[Any]
) -> tuple[list[int] | None, list[str] | None, list[str]]:
    """Number labels by the sorted names in all splits.

    Args:
        values: labels of the chosen splits, of any type; see `name_of`.
        every: labels of all splits.
    Returns: the labels (-1 is unknown) and the class names, both None if no label is known; the
        remarks of `Names`.
    """
    names = Names(every)
    labels = [names.number(value) for value in values]
    others = [name for name in names.classes if name != "-1"]
    if "-1" in names.classes and others and all(name.isdigit() for name in others):
        names.remarks.append(
            "the label -1 is read as a class; leave the field empty if it means unknown"
        )
    if max(labels, default=-1) < 0:
        return None, None, names.remarks
    return labels, names.classes, names.remarks


def groups_or_ids(values: Iterable[Any], ids: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the groups of a column, and the remarks of `Names`. An image without a group is its
    own: the group has its id."""
    values = list(values)
    names = Names(values, "group")
    return [names.name(v) or id for v, id in zip(values, ids, strict=True)], names.remarks


def _listed(groups: list[list[str]], most: int = 3) -> str:
    listed = "; ".join(" and ".join(map(repr, names[:most])) for names in groups[:most])
    return listed + (f" (and {len(groups) - most:,} more)" if len(groups) > most else "")
