"""One dataclass per script; its flags, presets and files.

    @dataclass
    class Config:
        '''Train something.'''

        lr: float = opt(1.5e-4, "learning rate per 256 images", group="optimiser")
        mask_ratio: float = opt(0.75, "share of the patches that is hidden", group="masking")

    config = parse(Config, {"demo": demo}, argv)

Later wins: the dataclass's defaults < ``--preset NAME`` < ``--config FILE`` < flags. Nothing is
guessed and nothing is dropped: an unknown name or a value of the wrong type is an error.

A field is a bool, int, float, str, `Path`, `Literal`, tuple of those or ``dict[str, Any]``, or one
of these ``| None``. Shared fields come by inheritance. A ``__post_init__`` may check a config; it
should not rewrite fields, since a preset is built before files and flags are laid over it. What is
not given may follow what is: a classmethod ``follow(defaults, given)`` returns the defaults to use.
"""

import argparse
import copy
import dataclasses
import difflib
import json
import math
import os
import shutil
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from vim_ssl.utils.names import did_you_mean

C = TypeVar("C")
Presets = Mapping[str, Callable[[], C]]
RESERVED = ("help", "preset", "config")


def opt(
    default: Any, help: str, group: str | None = None, choices: Iterable[Any] | None = None
) -> Any:
    """A dataclass field with what its flag needs.

    Args:
        default: the default value; a list or dict is copied for each instance.
        help: one line: the unit, or the reason for the default.
        group: heading under which ``--help`` lists the flag.
        choices: the values allowed, where a `Literal` cannot name them (a registry's keys).
    """
    metadata = {
        "help": help,
        "group": group,
        "choices": None if choices is None else tuple(choices),
    }
    if isinstance(default, list | dict | set):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(
    config_cls: type[C],
    presets: Presets | None = None,
    argv: Sequence[str] | None = None,
    *,
    default_preset: str | Callable[[dict[str, Any]], str | dict[str, Any] | None] | None = None,
    description: str | None = None,
    prog: str | None = None,
) -> C:
    """Build a config from the command line. Every field is a flag: ``batch_size`` is
    ``--batch-size`` or ``--batch_size``, a bool is ``--flag`` or ``--no-flag``, a tuple takes
    several values, and ``none`` is `None` where the field allows it.

    Args:
        config_cls: a dataclass; its docstring opens the help.
        presets: name -> function that returns an instance; its docstring's first line is shown.
        argv: the arguments without the program's name; ``sys.argv[1:]`` by default.
        default_preset: the preset when none is asked for: a name, or a function of the values
            that file and flags give (a dict) which returns a name, a dict of values (a stored
            config's: they count as given), or `None` (the defaults).
        description: replaces the docstring.
        prog: the program's name in messages.
    Raises:
        SystemExit: code 2 after a one-line message for a wrong flag, file or value;
            code 0 after ``--help``.
    """
    presets = presets or {}
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser(config_cls, presets, prog)
    raw, unknown = parser.parse_known_args([_dashed(arg) for arg in argv])
    given = vars(raw)
    wants_help, preset, file = given.pop("help"), given.pop("preset"), given.pop("config")
    try:
        _refuse_unknown(unknown, config_cls, presets)
        values: dict[str, Any] = {}
        if file is not None:
            found = read(file)
            found.pop("recipe", None)  # a run's own config.json names its recipe
            values = checked(config_cls, found, where=f"{file}: ")
        hints = _hints(config_cls)
        for name, text in given.items():
            values[name] = _from_text(text, hints[name], _flag(name))
        values = checked(config_cls, values, spelled=_flag)
        if preset is None:
            preset = default_preset(values) if callable(default_preset) else default_preset
        stored: dict[str, Any] = {}
        if isinstance(preset, dict):
            stored, preset = checked(config_cls, preset), None
        base = _defaults(config_cls) if preset is None else _preset_values(presets, preset)
        if derive_defaults := getattr(config_cls, "derive_defaults", None):
            base = derive_defaults(base, stored | values)
        base |= stored
        if wants_help:
            _print_help(parser, config_cls, presets, preset, base, description)
            raise SystemExit(0)
        return from_dict(config_cls, base | values)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def check_between(config: Any, low: float, high: float, *names: str) -> None:
    """Raises: ValueError for a setting among ``names`` below ``low`` or above ``high``."""
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high:
            wanted = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
            raise ValueError(f"{name} is {value:g}; it must be {wanted}.")


def from_dict(config_cls: type[C], values: Mapping[str, Any]) -> C:
    """Build a config from plain values, strictly; the inverse of `to_dict`.

    Raises:
        ValueError: for an unknown key (with the near match), a value of the wrong type or outside
            its choices, or a field without default that is missing.
    """
    values = checked(config_cls, values)
    for field in _fields(config_cls):
        if field.name not in values and _default(field) is dataclasses.MISSING:
            raise ValueError(f"{field.name} is needed; give {_flag(field.name)}.")
    return config_cls(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as a plain dict that JSON and YAML can hold (tuples as lists, paths as text)."""
    return {field.name: _plain(getattr(config, field.name)) for field in _fields(type(config))}


def save(config: Any, path: str | os.PathLike) -> None:
    """Write a config as JSON, or as YAML for a name that ends in .yaml; ``--config`` reads both.
    The file appears whole or not at all."""
    path = Path(path)
    values = to_dict(config)
    if path.suffix in (".yaml", ".yml"):
        text = yaml.safe_dump(values, sort_keys=False)
    else:
        text = json.dumps(values, indent=2) + "\n"
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def read(path: str | os.PathLike) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        OSError: when the file cannot be read.
        ValueError: when it does not hold a mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a YAML file: {reason}") from error
    if values is None:  # nothing but comments
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected lines 'key: value'.")
    return values


def checked(
    config_cls: type,
    values: Mapping[str, Any],
    *,
    where: str = "",
    spelled: Callable[[str], str] = str,
) -> dict[str, Any]:
    """The values under their fields' names and in their fields' types.

    Args:
        values: field name (dashes allowed) -> plain value; fields may be missing.
        where: put before every message, such as a file's name.
        spelled: how a message writes a field's name.
    Raises:
        ValueError: for an unknown key or a wrong value.
    """
    fields = {field.name: field for field in _fields(config_cls)}
    hints = _hints(config_cls)
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise ValueError(f"{where}unknown key {key!r}. {did_you_mean(name, fields)}")
        label = where + spelled(name)
        result[name] = _convert(value, hints[name], label)
        choices = fields[name].metadata.get("choices")
        if choices is not None:
            _check_choice(result[name], choices, label)
    return result


# ------------------------------------------------------------------------- values


def _fields(config_cls: type) -> list[dataclasses.Field]:
    if not dataclasses.is_dataclass(config_cls):
        raise TypeError(f"{config_cls!r} is not a dataclass.")
    fields = [field for field in dataclasses.fields(config_cls) if field.init]
    for field in fields:
        if field.name in RESERVED:
            raise TypeError(f"{config_cls.__name__}.{field.name}: --{field.name} is taken.")
    return fields


def _hints(config_cls: type) -> dict[str, Any]:
    hints = get_type_hints(config_cls)
    for field in _fields(config_cls):
        if not _supported(hints[field.name]):
            raise TypeError(
                f"{config_cls.__name__}.{field.name}: no flag can be made of the type "
                f"{hints[field.name]}; see the types that vim_ssl.utils.config lists."
            )
    return hints


def _supported(hint: Any) -> bool:
    inner, _ = _split_optional(hint)
    if get_origin(inner) is tuple:
        return all(_is_scalar(item) for item in get_args(inner) if item is not ...)
    return _is_scalar(inner) or _is_dict(inner)


def _is_scalar(hint: Any) -> bool:
    return hint in (bool, int, float, str, Path) or get_origin(hint) is Literal


def _is_dict(hint: Any) -> bool:
    return hint is dict or get_origin(hint) is dict


def _split_optional(hint: Any) -> tuple[Any, bool]:
    """``X | None`` -> (X, True); anything else -> (itself, False)."""
    if get_origin(hint) in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
        if len(members) == 1:
            return members[0], True
    return hint, False


def _describe(hint: Any) -> str:
    """What a field takes, in words for a message."""
    inner, optional = _split_optional(hint)
    if get_origin(inner) is Literal:
        text = "one of " + ", ".join(map(str, get_args(inner)))
    elif get_origin(inner) is tuple:
        items = get_args(inner)
        if items[-1] is ...:
            text = f"a list of {_describe(items[0])} values"
        else:
            text = f"a list of {len(items)} values ({', '.join(map(_describe, items))})"
    elif _is_dict(inner):
        text = "a mapping"
    else:
        text = {bool: "true or false", int: "int", float: "float", str: "text", Path: "a path"}[
            inner
        ]
    return f"{text} or none" if optional else text


def _convert(value: Any, hint: Any, label: str) -> Any:
    """A plain value in the field's type; nothing is rounded, and a bool is not a number."""
    inner, optional = _split_optional(hint)
    if value is None and optional:
        return None
    if get_origin(inner) is Literal:
        _check_choice(value, get_args(inner), label)
        return value
    if get_origin(inner) is tuple and isinstance(value, list | tuple):
        items = get_args(inner)
        if items[-1] is ...:
            items = items[:1] * len(value)
        if len(items) == len(value):
            return tuple(_convert(v, item, label) for v, item in zip(value, items, strict=True))
    elif _is_dict(inner) and isinstance(value, Mapping):
        return dict(value)
    elif inner is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # text too: YAML reads 1e-4, without a point, as text
        except ValueError:
            pass
    elif inner is Path and isinstance(value, str | Path):
        return Path(value)
    elif inner in (bool, int, str) and type(value) is inner:
        return value
    hint_quote = " (put it in quotes)" if inner is str and isinstance(value, int | float) else ""
    raise ValueError(f"{label}: expected {_describe(hint)}{hint_quote}, got {value!r}.")


def _check_choice(value: Any, choices: Sequence[Any], label: str) -> None:
    for item in value if isinstance(value, tuple) else (value,):
        if item is not None and item not in choices:
            names = list(map(str, choices))
            raise ValueError(f"{label}: {item!r} is not a choice. {did_you_mean(str(item), names)}")


def _from_text(text: Any, hint: Any, flag: str) -> Any:
    """What a flag's words stand for; `checked` has the last word on it."""
    inner, optional = _split_optional(hint)
    if inner is bool:
        return text  # --flag and --no-flag give a bool already
    words = [text] if isinstance(text, str) else text
    if optional and [word.lower() for word in words] == ["none"]:
        return None
    if get_origin(inner) is tuple:
        items = get_args(inner)
        items = items[:1] * len(words) if items[-1] is ... else items
        padded = [*items, *[str] * len(words)]  # `checked` complains where the numbers differ
        return [_from_text(word, item, flag) for word, item in zip(words, padded, strict=False)]
    if _is_dict(inner):
        pairs = [word.partition("=") for word in words]
        if bad := [word for word, sign, _ in pairs if not sign]:
            raise ValueError(f"{flag}: expected key=value, got {bad[0]!r}.")
        return {key: _scalar(value) for key, _, value in pairs}
    if get_origin(inner) is Literal:
        return {str(choice): choice for choice in get_args(inner)}.get(words[0], words[0])
    if inner is int:
        try:
            return int(words[0])
        except ValueError:
            return words[0]  # `checked` says what was expected
    return words[0]


def _scalar(text: str) -> Any:
    """A value of ``key=value`` as YAML reads it; numbers such as 1e-4 too."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


# --------------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's page of usage."""
        self.exit(2, f"{self.prog}: error: {message}  (--help lists the flags)\n")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _dashed(arg: str) -> str:
    """``--batch_size=3`` -> ``--batch-size=3``."""
    if not arg.startswith("--"):
        return arg
    flag, sign, value = arg.partition("=")
    return flag.replace("_", "-") + sign + value


def _parser(config_cls: type, presets: Presets, prog: str | None) -> _Parser:
    """Splits the command line into words per field; what they mean is `_from_text`'s work."""
    parser = _Parser(
        prog=prog,
        add_help=False,
        allow_abbrev=False,
        usage="%(prog)s " + "[--preset NAME] " * bool(presets) + "[--config FILE] [--flag value …]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=34, width=min(100, shutil.get_terminal_size().columns)
        ),
    )
    start = parser.add_argument_group("where to start")
    start.add_argument("--help", "-h", action="store_true", help="show this page")
    start.add_argument(
        "--preset", metavar="NAME", help="a named set of values" if presets else argparse.SUPPRESS
    )
    start.add_argument("--config", metavar="FILE", help="YAML or JSON file laid over the preset")
    hints = _hints(config_cls)
    groups: dict[str, Any] = {}
    for field in _fields(config_cls):
        name = field.metadata.get("group") or "other"
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        groups[name].add_argument(
            _flag(field.name),
            dest=field.name,
            default=argparse.SUPPRESS,
            **_splitting(hints, field),
        )
    return parser


def _splitting(hints: dict[str, Any], field: dataclasses.Field) -> dict[str, Any]:
    """argparse's arguments that say how many words a field's flag takes, and their name."""
    inner, optional = _split_optional(hints[field.name])
    if inner is bool:
        return {"action": argparse.BooleanOptionalAction}
    if _is_dict(inner):
        return {"nargs": "*", "metavar": "KEY=VALUE"}
    nargs = None
    if get_origin(inner) is tuple:
        items = get_args(inner)
        open_ended = items[-1] is ... or optional  # `none` is one word
        nargs, inner = ("*" if open_ended else len(items)), items[0]
    choices = field.metadata.get("choices")
    if choices is None and get_origin(inner) is Literal:
        choices = get_args(inner)
    if choices is not None and sum(len(str(choice)) + 1 for choice in choices) <= 40:
        metavar = "{" + ",".join(map(str, choices)) + "}"
    else:
        metavar = {int: "INT", float: "FLOAT", Path: "PATH"}.get(inner, "TEXT")
    return {"nargs": nargs, "metavar": metavar}


def _refuse_unknown(unknown: list[str], config_cls: type, presets: Presets) -> None:
    if not unknown:
        return
    flags = [arg for arg in unknown if arg.startswith("-")]
    if not flags:
        raise ValueError(f"unexpected {unknown[0]!r}; values follow their --flag.")
    flag = flags[0].partition("=")[0]
    known = [_flag(field.name) for field in _fields(config_cls)]
    known += [f"--no-{name[2:]}" for name in known if flag.startswith("--no-")]
    known += ["--config", "--help", *["--preset"] * bool(presets)]
    near = difflib.get_close_matches(flag, known, n=1)
    raise ValueError(f"unknown flag {flag}." + (f" Did you mean {near[0]}?" if near else ""))


def _defaults(config_cls: type) -> dict[str, Any]:
    defaults = {field.name: _default(field) for field in _fields(config_cls)}
    return {name: value for name, value in defaults.items() if value is not dataclasses.MISSING}


def _preset_values(presets: Presets, name: str) -> dict[str, Any]:
    if name not in presets:
        raise ValueError(f"unknown preset {name!r}. {did_you_mean(name, presets)}")
    config: Any = presets[name]()
    return {field.name: getattr(config, field.name) for field in _fields(type(config))}


def _print_help(
    parser: _Parser,
    config_cls: type,
    presets: Presets,
    preset: str | None,
    base: dict[str, Any],
    description: str | None,
) -> None:
    """Complete the parser with what only a reader needs, and print it."""
    own = config_cls.__doc__ or ""
    generated = own.startswith(f"{config_cls.__name__}(")  # what @dataclass writes if there is none
    parser.description = description or ("" if generated else own.partition("\n\n")[0])
    if presets:
        lines = [f"  {name}: {_first_line(make)}" for name, make in presets.items()]
        shown = f"Defaults shown are those of the preset {preset!r}." if preset else ""
        parser.epilog = "\n".join(["presets:", *lines, *[shown] * bool(shown)])
    actions = {action.dest: action for action in parser._actions}
    for field in _fields(config_cls):
        default = base.get(field.name, _default(field))
        note = "needed" if default is dataclasses.MISSING else f"default: {_show(default)}"
        actions[field.name].help = _escape(f"{field.metadata.get('help', '')} ({note})".strip())
    parser.print_help()


def _escape(text: str) -> str:
    return text.replace("%", "%%")  # argparse fills in %-patterns


def _first_line(function: Callable) -> str:
    return (function.__doc__ or "").strip().partition("\n")[0]


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return " ".join(map(_show, value)) or "nothing"
    if isinstance(value, dict):
        return " ".join(f"{key}={_show(item)}" for key, item in value.items()) or "nothing"
    return "none" if value is None else (str(value) or "''")
