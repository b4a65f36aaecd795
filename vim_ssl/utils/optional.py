"""Optional dependencies: import one where it is used, or say which extra installs it."""

from importlib import import_module
from types import ModuleType


def require(module: str, extra: str, what: str) -> ModuleType:
    """Import a module of an optional dependency.

    Args:
        module: its import name, such as "pycocotools.mask".
        extra: the extra of vim-ssl that installs it.
        what: the things that need it, in the plural, for the message.
    Raises: ImportError with the command that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{what} need {package}: pip install 'vim-ssl[{extra}]'") from error
