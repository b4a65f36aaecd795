"""The command `vim-ssl COMMAND [...]`: every recipe and downstream script, and a few tools.

Each script in recipes/ and downstream/ is a command named after its file; only the chosen one is
imported. The overview reads the scripts' docstrings without running them.
"""

import ast
import importlib
import importlib.util
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vim_ssl.utils.environment import __version__, print_any_character
from vim_ssl.utils.names import did_you_mean


@dataclass(frozen=True)
class Command:
    """A command: ``module.function(argv) -> exit code``, and its line in the overview."""

    module: str
    function: str
    help: str


TOOLS = {
    "verify": Command(
        "vim_ssl.checkpoints.verify",
        "verify_main",
        "Describe a checkpoint and check that it loads.",
    ),
    "data": Command("vim_ssl.data.check", "main", "Check data: labels, images, splits."),
    "samples": Command("vim_ssl.data.samples.fetch", "main", "List or get small real image sets."),
    "report": Command("vim_ssl.report", "main", "Write the report of a run again."),
    "compare": Command("vim_ssl.report.compare", "main", "Compare runs on one page."),
}
SCRIPTS = {"recipes": "pretraining", "downstream": "tasks"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the command's name and its arguments; ``sys.argv[1:]`` by default.
    Returns: the command's exit code; 2 for a user error, printed in one line (with
        ``VIM_SSL_TRACEBACK=1``, the whole traceback); 130 after Ctrl-C.
    """
    print_any_character()
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"vim-ssl {__version__}")
        return 0
    name, commands = argv[0], all_commands()
    if name not in commands and (failed := guarded(lambda _: add_plugins(commands))):
        return failed
    if name not in commands:
        print(f"vim-ssl: unknown command {name!r}. {did_you_mean(name, commands)}", file=sys.stderr)
        return 2
    command = commands[name]

    def call(rest: Sequence[str] | None) -> int:
        return getattr(importlib.import_module(command.module), command.function)(rest)

    before, sys.argv = sys.argv, [f"vim-ssl {name}", *argv[1:]]  # parsers print argv[0]
    try:
        return guarded(call, argv[1:])
    finally:
        sys.argv = before


def guarded(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Call a script's ``main`` and report a user error in one line with exit code 2.

    User errors are those that vim_ssl raises (`ValueError`, `ImportError`, `OSError`, and
    `FloatingPointError` if a training diverges), and missing or unreadable paths. The same errors
    raised inside another library are bugs and keep their traceback.
    """
    print_any_character()
    try:
        return main(argv)
    except KeyboardInterrupt:
        return 130
    except (ValueError, ImportError, OSError, FloatingPointError) as error:
        if os.environ.get("VIM_SSL_TRACEBACK") == "1" or not _is_users_mistake(error):
            raise
        # The message of an error in a worker process starts with the worker's traceback.
        in_worker = "in DataLoader worker process" in str(error)
        message = str(error).strip().splitlines()[-1] if in_worker else error
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        return 2


def all_commands() -> dict[str, Command]:
    """Return name -> command: the scripts of each folder, then the tools."""
    return {name: c for folder in SCRIPTS for name, c in scripts(folder).items()} | TOOLS


def add_plugins(commands: dict[str, Command]) -> int:
    """Add the tasks that plugins register; see `vim_ssl.tasks.registry`. Returns: exit code 0."""
    from vim_ssl.tasks.registry import TASKS
    from vim_ssl.utils.plugins import load_plugins

    load_plugins()
    commands |= {name: Command(*task) for name, task in TASKS.items() if name not in commands}
    return 0


def scripts(folder: str) -> dict[str, Command]:
    """Return the commands of `recipes` or `downstream`: linear_probe.py is linear-probe."""
    spec = importlib.util.find_spec(f"vim_ssl.{folder}")
    locations = list(spec.submodule_search_locations or ()) if spec else []
    commands = {}
    for module in pkgutil.iter_modules(locations):
        if not module.name.startswith("_"):
            path = Path(module.module_finder.path, f"{module.name}.py")  # type: ignore[union-attr]
            commands[module.name.replace("_", "-")] = Command(
                f"vim_ssl.{folder}.{module.name}", "main", _summary(path)
            )
    return commands


def overview() -> str:
    """Return the text of ``vim-ssl --help``."""
    parts = {title: scripts(folder) for folder, title in SCRIPTS.items()} | {"tools": TOOLS}
    width = max(len(name) for commands in parts.values() for name in commands)
    lines = ["usage: vim-ssl COMMAND [...]", "       vim-ssl COMMAND --help", ""]
    for title, commands in parts.items():
        if commands:
            lines += [f"{title}:"]
            lines += [f"  {name:{width}}  {c.help}".rstrip() for name, c in commands.items()]
            lines += [""]
    lines += ["On several devices: accelerate launch -m vim_ssl.recipes.NAME [...]"]
    return "\n".join(lines)


def _summary(path: Path) -> str:
    """Return the first line of a script's docstring without importing the script."""
    try:
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    except (OSError, SyntaxError):
        return ""
    return (doc or "").partition("\n")[0]


def _is_users_mistake(error: BaseException) -> bool:
    if type(error).__name__ == "BadImage":  # bad data, wherever it was raised
        return True
    if isinstance(
        error, FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError
    ):
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_in = frames[-1][0].f_globals.get("__name__", "")
    return raised_in == "__main__" or raised_in.partition(".")[0] == "vim_ssl"


if __name__ == "__main__":
    sys.exit(main())
