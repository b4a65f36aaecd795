"""Tasks of plugins: commands of `vim-ssl` besides the scripts of recipes/ and downstream/."""

from collections.abc import Callable

TASKS: dict[str, tuple[str, str, str]] = {}  # command -> module, function, help


def register_task(name: str, main: str | Callable[..., int], help: str) -> None:
    """Register ``vim-ssl NAME`` to run a task; called by a plugin's module on import.

    Args:
        name: the command, such as "cell-counting".
        main: ``main(argv) -> exit code``, or a module with such a ``main``, which is imported when
            the command runs.
        help: one line about the task.
    Raises: ValueError if another task has this name.
    """
    module, function = (main, "main") if isinstance(main, str) else (main.__module__, main.__name__)
    task = module, function, help
    if TASKS.setdefault(name, task) != task:
        raise ValueError(f"the task {name!r} is already registered by {TASKS[name][0]}.")
