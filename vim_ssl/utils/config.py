"""Command-line flags, presets and config files from one dataclass per script.

    @dataclass
    class Config:
        '''Train something.'''

        lr: float = opt(1.5e-4, "learning rate per 256 images", group="optimiser")
        mask_ratio: float = opt(0.75, "fraction of masked patches", group="masking")

    config = parse(Config, {"demo": demo}, argv)

Precedence: the dataclass's defaults < ``--preset NAME`` < ``--config FILE`` < flags. An unknown
name or a value of the wrong type is an error. A field ``preset: str`` receives the name of the
preset that was used.

`field_types` lists the types that a field may have. Shared fields are inherited. A
``__post_init__`` may check a config; it should not modify fields, since a preset is built before
files and flags override it. For defaults that depend on the given values, a classmethod
``derive_defaults(defaults, given)`` returns the defaults to use.
"""

import argparse
import copy
import dataclasses
import json
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_type_hints

import yaml

from vim_ssl.utils.environment import is_main_rank
from vim_ssl.utils.field_types import check_choice, convert, from_text, is_supported, split_type
from vim_ssl.utils.files import atomic_write, reading
from vim_ssl.utils.names import closest, did_you_mean

C = TypeVar("C")
Presets = Mapping[str, Callable[[], C]]
RESERVED = ("help", "config")


@dataclasses.dataclass(frozen=True)
class Choice:
    """The preset that a script uses if none is given.

    Attributes:
        preset: its name.
        reason: a sentence, printed at the start and by ``--help``.
        changes: defaults that differ from the preset's.
    """

    preset: str
    reason: str = ""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# Maps the given values (a dict) to the preset to use: a `Choice` or a name, a dict of values (a
# stored config; they count as given), or None (the dataclass's defaults).
Chooser = Callable[[dict[str, Any]], Choice | str | dict[str, Any] | None]


def opt(
    default: Any,
    help: str,
    group: str | None = None,
    choices: Iterable[Any] | None = None,
    words: Mapping[str, Any] | None = None,
) -> Any:
    """Return a dataclass field with the metadata of its flag.

    Args:
        default: the default value; a list or dict is copied for each instance.
        help: help text, one line.
        group: heading under which ``--help`` lists the flag.
        choices: allowed values, if a `Literal` cannot list them (e.g. the keys of a registry).
        words: word -> value: words that can be given, and that ``--help`` shows, for some values.
    """
    choices = None if choices is None else tuple(choices)
    metadata = {"help": help, "group": group, "choices": choices, "words": dict(words or {})}
    if isinstance(default, list | dict | set):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(
    config_cls: type[C],
    presets: Presets | None = None,
    argv: Sequence[str] | None = None,
    *,
    default_preset: str | Chooser | None = None,
    description: str | None = None,
) -> C:
    """Build a config from the command line. Every field is a flag: ``batch_size`` is
    ``--batch-size`` or ``--batch_size``, a bool is ``--flag`` or ``--no-flag``, a tuple takes
    several values, and ``none`` is `None` where the field allows it.

    Args:
        config_cls: a dataclass; ``--help`` starts with its docstring.
        presets: name -> function that returns an instance; ``--help`` shows the first line of its
            docstring. Further names of one function are aliases of its first name.
        argv: the arguments without the program's name; ``sys.argv[1:]`` by default.
        default_preset: the preset to use without ``--preset``: a name, or a function of the values
            from file and flags; see `Chooser`.
        description: text to show instead of the docstring.
    Raises:
        SystemExit: code 2 after a one-line message for a wrong flag, file or value;
            code 0 after ``--help``.
    """
    presets = presets or {}
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser(config_cls, presets)
    raw, unknown = parser.parse_known_args([_dashed(arg) for arg in argv])
    words = vars(raw)
    wants_help, preset, file = words.pop("help"), words.pop("preset"), words.pop("config")
    try:
        _refuse_unknown(unknown, config_cls, presets)
        given: dict[str, Any] = {}
        if file is not None:
            content = read(file)
            content.pop("recipe", None)  # a run's own config.json names its recipe
            given = checked(config_cls, content, where=f"{file}: ")
        hints = _hints(config_cls)
        given |= {name: from_text(text, hints[name], _flag(name)) for name, text in words.items()}
        given = checked(config_cls, given, spelled=_flag)
        if preset is not None:
            given["preset"] = preset
        base, choice = _resolve(config_cls, presets, given, default_preset)
        if wants_help:
            _print_help(parser, config_cls, presets, choice, base, description)
            raise SystemExit(0)
        return _finish(config_cls, base | given, choice)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def build(
    config_cls: type[C],
    presets: Presets,
    given: Mapping[str, Any],
    default_preset: str | Chooser | None = None,
) -> C:
    """Build a config from plain values as `parse` does from flags; ``given["preset"]`` may name the
    preset.

    Raises: ValueError for an unknown preset, an unknown key or a wrong value.
    """
    preset = given.get("preset")
    values = checked(config_cls, {key: v for key, v in given.items() if key != "preset"})
    if preset:
        values["preset"] = preset
    base, choice = _resolve(config_cls, presets, values, default_preset)
    return _finish(config_cls, base | values, choice)


def _resolve(
    config_cls: type, presets: Presets, given: dict[str, Any], default_preset: str | Chooser | None
) -> tuple[dict[str, Any], Choice | None]:
    """Return the values of all fields that are not given, and the preset that they come from.
    Replaces an alias in ``given["preset"]``; removes it if there is no such field."""
    chosen: Choice | str | dict[str, Any] | None = given.pop("preset", None)
    # A file with every setting, such as a run's config.json, leaves nothing to choose.
    if not chosen and given.keys() < {field.name for field in _flags(config_cls)}:
        chosen = default_preset(given) if callable(default_preset) else default_preset
    stored = checked(config_cls, chosen) if isinstance(chosen, dict) else {}
    choice = None if not chosen or isinstance(chosen, dict) else chosen
    choice = Choice(choice) if isinstance(choice, str) else choice
    base = _base(config_cls, presets, choice)
    if derive_defaults := getattr(config_cls, "derive_defaults", None):
        base = derive_defaults(base, stored | given)
    return base | stored, choice


def _finish(config_cls: type[C], values: dict[str, Any], choice: Choice | None) -> C:
    config = from_dict(config_cls, values)
    if choice is not None and choice.reason and is_main_rank():
        print(choice.reason, flush=True)
    return config


def check_between(config: Any, low: float, high: float, *names: str) -> None:
    """Raise ValueError if a setting in ``names`` is below ``low`` or above ``high``."""
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high:
            expected = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
            raise ValueError(f"{name} is {value:g}; it must be {expected}.")


def from_dict(config_cls: type[C], values: Mapping[str, Any]) -> C:
    """Build a config from plain values, strictly; the inverse of `to_dict`.

    Raises:
        ValueError: for an unknown key (suggests the closest one), a value of the wrong type or
            outside its choices, or a missing field without default.
    """
    values = checked(config_cls, values)
    for field in _fields(config_cls):
        if field.name not in values and _default(field) is dataclasses.MISSING:
            raise ValueError(f"{field.name} is required; set {_flag(field.name)}.")
    return config_cls(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config to a plain dict for JSON and YAML (tuples to lists, paths to strings)."""
    return {field.name: _plain(getattr(config, field.name)) for field in _fields(type(config))}


def save(config: Any, path: str | os.PathLike) -> None:
    """Write a config atomically as JSON, or as YAML if the name ends in .yaml; ``--config`` reads
    both."""
    path, values = Path(path), to_dict(config)
    is_yaml = path.suffix in (".yaml", ".yml")
    text = yaml.safe_dump(values, sort_keys=False) if is_yaml else json.dumps(values, indent=2)
    atomic_write(path, text.rstrip("\n") + "\n")


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Read the mapping in a YAML or JSON file.

    Raises: OSError if the file cannot be read; ValueError if it does not contain a mapping.
    """
    with reading(path, "a YAML or JSON file with settings", "correct it"):
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if values is None:  # empty, or only comments
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} contains a {type(values).__name__}; expected lines 'key: value'.")
    return values


def checked(
    config_cls: type,
    values: Mapping[str, Any],
    *,
    where: str = "",
    spelled: Callable[[str], str] = str,
) -> dict[str, Any]:
    """Check values and convert them to the types of their fields.

    Args:
        values: field name (dashes allowed) -> plain value; fields may be missing.
        where: prefix of every message, such as a file name.
        spelled: maps a field name to its spelling in messages.
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
        if isinstance(value, str):
            value = fields[name].metadata.get("words", {}).get(value.lower(), value)
        result[name] = convert(value, hints[name], label)
        choices = fields[name].metadata.get("choices")
        if choices is not None:
            check_choice(result[name], choices, label)
    return result


# ------------------------------------------------------------------------- fields


def _fields(config_cls: type) -> list[dataclasses.Field]:
    if not dataclasses.is_dataclass(config_cls):
        raise TypeError(f"{config_cls!r} is not a dataclass.")
    fields = [field for field in dataclasses.fields(config_cls) if field.init]
    if taken := [field.name for field in fields if field.name in RESERVED]:
        raise TypeError(f"{config_cls.__name__}.{taken[0]}: --{taken[0]} is reserved.")
    return fields


def _hints(config_cls: type) -> dict[str, Any]:
    """Map field names to types. Raises: TypeError for a type that a flag cannot have."""
    hints = get_type_hints(config_cls)
    for field in _fields(config_cls):
        if not is_supported(hints[field.name]):
            raise TypeError(
                f"{config_cls.__name__}.{field.name}: a flag cannot have the type "
                f"{hints[field.name]}; vim_ssl.utils.field_types lists the supported types."
            )
    return hints


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


def _base(config_cls: type, presets: Presets, choice: Choice | None) -> dict[str, Any]:
    """Map field names to the values of a preset, or to the dataclass's defaults."""
    if choice is None:
        defaults = {field.name: _default(field) for field in _fields(config_cls)}
        return {name: d for name, d in defaults.items() if d is not dataclasses.MISSING}
    if choice.preset not in presets:
        raise ValueError(
            f"unknown preset {choice.preset!r}. {did_you_mean(choice.preset, presets)}"
        )
    config: Any = presets[choice.preset]()
    values = {field.name: getattr(config, field.name) for field in _fields(type(config))}
    values |= choice.changes
    if "preset" in values:
        values["preset"] = _first_name(presets, choice.preset)
    return values


def _first_name(presets: Presets, name: str) -> str:
    """The name that ``name`` is an alias of, or itself."""
    return next(first for first, preset in presets.items() if preset is presets[name])


# --------------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line instead of argparse's usage text."""
        self.exit(2, f"{self.prog}: error: {message}  (--help lists the flags)\n")


def _flags(config_cls: type) -> list[dataclasses.Field]:
    """The fields that have a flag of their own; ``preset`` shares the one that chooses it."""
    return [field for field in _fields(config_cls) if field.name != "preset"]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _dashed(arg: str) -> str:
    """``--batch_size=3`` -> ``--batch-size=3``."""
    flag, sign, value = arg.partition("=")
    return flag.replace("_", "-") + sign + value if arg.startswith("--") else arg


def _parser(config_cls: type, presets: Presets) -> _Parser:
    """Build the parser that collects each flag's words; `from_text` converts them."""
    parser = _Parser(
        add_help=False,
        allow_abbrev=False,
        usage="%(prog)s " + "[--preset NAME] " * bool(presets) + "[--config FILE] [--flag value …]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=34, width=min(100, shutil.get_terminal_size().columns)
        ),
    )
    start = parser.add_argument_group("where to start")
    start.add_argument("--help", "-h", action="store_true", help="show this help")
    start.add_argument(
        "--preset", metavar="NAME", help="a named set of values" if presets else argparse.SUPPRESS
    )
    start.add_argument("--config", metavar="FILE", help="YAML or JSON file; overrides the preset")
    hints = _hints(config_cls)
    groups: dict[str, Any] = {}
    for field in _flags(config_cls):
        name = field.metadata.get("group") or "other"
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        words = _words_of(hints[field.name], field.metadata.get("choices"))
        groups[name].add_argument(
            _flag(field.name), dest=field.name, default=argparse.SUPPRESS, **words
        )
    return parser


def _words_of(hint: Any, choices: Sequence[Any] | None) -> dict[str, Any]:
    """Return argparse's arguments for the number and the names of a flag's words."""
    kind, items, optional = split_type(hint)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind is dict:
        return {"nargs": "*", "metavar": "KEY=VALUE"}
    nargs = None
    if kind is tuple:
        nargs = "*" if items[-1] is ... or optional else len(items)  # `none` is one word
        kind, items, _ = split_type(items[0])
    if choices is None and kind is Literal:
        choices = items
    if choices is not None and sum(len(str(choice)) + 1 for choice in choices) <= 40:
        return {"nargs": nargs, "metavar": "{" + ",".join(map(str, choices)) + "}"}
    names = {int: "INT", float: "FLOAT", Path: "PATH"}
    return {"nargs": nargs, "metavar": names.get(kind, "TEXT")}


def _refuse_unknown(unknown: list[str], config_cls: type, presets: Presets) -> None:
    if not unknown:
        return
    flags = [arg for arg in unknown if arg.startswith("-")]
    if not flags:
        raise ValueError(f"unexpected argument {unknown[0]!r}; write options as --flag VALUE.")
    flag = flags[0].partition("=")[0]
    known = [_flag(field.name) for field in _flags(config_cls)]
    known += [f"--no-{name[2:]}" for name in known if flag.startswith("--no-")]
    known += ["--config", "--help", *["--preset"] * bool(presets)]
    near = closest(flag, known)
    raise ValueError(
        f"unknown flag {flag}." + (f" Did you mean {' or '.join(near)}?" if near else "")
    )


def _print_help(
    parser: _Parser,
    config_cls: type,
    presets: Presets,
    choice: Choice | None,
    base: dict[str, Any],
    description: str | None,
) -> None:
    """Add help texts and defaults to the parser, and print its help."""
    doc = config_cls.__doc__ or ""
    if doc.startswith(f"{config_cls.__name__}("):  # generated by @dataclass if there is none
        doc = ""
    lines = [(description or doc.partition("\n\n")[0]).strip()]
    if presets:
        lines += ["", "presets:", *_preset_lines(presets)]
    if choice is not None:
        source = f"{choice.reason} The defaults shown are those of the preset {choice.preset!r}."
        lines += ["", *textwrap.wrap(source.strip(), 98)]
    parser.description = "\n".join(lines)
    if sys.argv[0].startswith("vim-ssl "):  # the scripts may be installed without a checkout
        parser.description = _SCRIPT.sub(
            lambda match: f"vim-ssl {match[1].replace('_', '-')}", parser.description
        )
    actions = {action.dest: action for action in parser._actions}
    for field in _flags(config_cls):
        default = base.get(field.name, _default(field))
        note = "required"
        if default is not dataclasses.MISSING:
            note = f"default: {_show(default, field.metadata.get('words'))}"
        text = f"{field.metadata.get('help', '')} ({note})".strip()
        actions[field.name].help = text.replace("%", "%%")  # argparse fills in %-patterns
    parser.print_help()


_SCRIPT = re.compile(r"(?:accelerate launch|python) (?:recipes|downstream)/(\w+)\.py")


def _preset_lines(presets: Presets) -> list[str]:
    """The first paragraph of each preset's docstring, after its names."""
    names: dict[str, list[str]] = {}
    for name in presets:
        names.setdefault(_first_name(presets, name), []).append(name)
    lines = []
    for first, (_, *aliases) in names.items():
        text = " ".join((presets[first].__doc__ or "").partition("\n\n")[0].split())
        also = f" (also {', '.join(aliases)})" if aliases else ""
        lines += textwrap.wrap(
            f"{first}{also}: {text}", 98, initial_indent="  ", subsequent_indent="      "
        )
    return lines


def _show(value: Any, words: Mapping[str, Any] | None = None) -> str:
    for word, meaning in (words or {}).items():
        if value == meaning:
            return word
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return " ".join(map(_show, value)) or "nothing"
    if isinstance(value, dict):
        return " ".join(f"{key}={_show(item)}" for key, item in value.items()) or "nothing"
    return "none" if value is None else (str(value) or "''")
