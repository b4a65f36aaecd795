"""Extensions from other packages, declared as entry points of the group `vim_ssl.plugins`."""

from importlib.metadata import EntryPoint, entry_points

GROUP = "vim_ssl.plugins"
_loaded: set[EntryPoint] = set()


def load_plugins() -> None:
    """Load the plugins of all installed packages, each once per process.

    Raises: ImportError naming a plugin that fails.
    """
    for point in set(entry_points(group=GROUP)) - _loaded:
        try:
            point.load()
        except Exception as error:
            raise ImportError(
                f"the plugin {point.name!r} ({point.value}) failed: {error}; update the package "
                "that declares it, or uninstall it."
            ) from error
        _loaded.add(point)
