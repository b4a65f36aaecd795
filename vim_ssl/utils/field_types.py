"""Supported types of config fields: convert values and command-line words to them.

A type is bool, int, float, str, `Path`, `Literal`, a tuple of these, or ``dict[str, Any]``; each
may be ``| None``.
"""

import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from vim_ssl.utils.names import did_you_mean

WORDS = {bool: "true or false", int: "int", float: "float", str: "text", Path: "a path"}


def is_supported(hint: Any) -> bool:
    """True if a flag can have this type."""
    kind, items, _ = split_type(hint)
    if kind is dict:
        return True
    parts = [item for item in items if item is not ...] if kind is tuple else [kind]
    return all(part in WORDS or (get_origin(part) or part) is Literal for part in parts)


def split_type(hint: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """``X[a, b] | None`` -> (X, (a, b), True); ``X`` -> (X, (), False)."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()
    optional = len(members) == 2 and type(None) in members
    if optional:
        hint = next(member for member in members if member is not type(None))
    return get_origin(hint) or hint, get_args(hint), optional


def _each(items: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """Return the types of a tuple's values; ``int, ...`` means ``count`` times int."""
    return items[:1] * count if items[-1] is ... else items


def _describe(hint: Any) -> str:
    """Describe the values that a field accepts, for a message."""
    kind, items, optional = split_type(hint)
    if kind is Literal:
        text = "one of " + ", ".join(map(str, items))
    elif kind is tuple and items[-1] is ...:
        text = f"a list of {_describe(items[0])} values"
    elif kind is tuple:
        text = f"a list of {len(items)} values ({', '.join(map(_describe, items))})"
    else:
        text = "a mapping" if kind is dict else WORDS[kind]
    return f"{text} or none" if optional else text


def convert(value: Any, hint: Any, label: str) -> Any:
    """Convert a plain value to the field's type. Nothing is rounded; a bool is not a number."""
    kind, items, optional = split_type(hint)
    if value is None and optional:
        return None
    if kind is Literal:
        check_choice(value, items, label)
        return value
    if kind is tuple and isinstance(value, list | tuple):
        items = _each(items, len(value))
        if len(items) == len(value):
            return tuple(convert(v, item, label) for v, item in zip(value, items, strict=True))
    elif kind is dict and isinstance(value, Mapping):
        return dict(value)
    elif kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # also a string: YAML reads 1e-4, without a point, as one
        except ValueError:
            pass
    elif kind is Path and isinstance(value, str | Path):
        return Path(value)
    elif kind in (bool, int, str) and type(value) is kind:
        return value
    quotes = " (put it in quotes)" if kind is str and isinstance(value, int | float) else ""
    raise ValueError(f"{label}: expected {_describe(hint)}{quotes}, got {value!r}.")


def check_choice(value: Any, choices: Sequence[Any], label: str) -> None:
    for item in value if isinstance(value, tuple) else (value,):
        if item is not None and item not in choices:
            names = list(map(str, choices))
            raise ValueError(
                f"{label}: {item!r} is not a valid choice. {did_you_mean(str(item), names)}"
            )


def from_text(text: Any, hint: Any, flag: str) -> Any:
    """Convert a flag's words to a value. Invalid words stay strings; `convert` rejects them."""
    kind, items, optional = split_type(hint)
    if kind is bool:
        return text  # --flag and --no-flag already give a bool
    words = [text] if isinstance(text, str) else text
    if optional and [word.lower() for word in words] == ["none"]:
        return None
    if kind is tuple:
        padded = [*_each(items, len(words)), *[str] * len(words)]  # their number is checked later
        return [from_text(word, item, flag) for word, item in zip(words, padded, strict=False)]
    if kind is dict:
        pairs = [word.partition("=") for word in words]
        if bad := [word for word, sign, _ in pairs if not sign]:
            raise ValueError(f"{flag}: expected key=value, got {bad[0]!r}.")
        return {key: _scalar(value) for key, _, value in pairs}
    if kind is Literal:
        return {str(choice): choice for choice in items}.get(words[0], words[0])
    return _number(words[0], int) if kind is int else words[0]


def _scalar(text: str) -> Any:
    """Parse a value of ``key=value`` as YAML, including numbers such as 1e-4."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return _number(value, float) if isinstance(value, str) else value


def _number(text: str, kind: type) -> Any:
    """Convert a string to a number; return it unchanged if it is not one."""
    try:
        return kind(text)
    except ValueError:
        return text
