"""Installed packages that extend `vim_ssl`, found by their entry points.

    [project.entry-points."vim_ssl.plugins"]
    my_package = "my_package.vim_ssl_plugin"

Importing the named module registers what it adds. (`vim_ssl/utils/plugins.py` is the same for the
library: kernels import nothing of it.)
"""

from importlib.metadata import entry_points

GROUP = "vim_ssl.plugins"
_loaded: set[tuple[str, str]] = set()  # (name, module) of entry points


def load_plugins() -> None:
    """Import every plugin that this process has not imported yet.

    Raises: ImportError that names the plugin which failed.
    """
    for plugin in entry_points(group=GROUP):
        key = plugin.name, plugin.value
        if key in _loaded:
            continue
        _loaded.add(key)  # before the import, which may come back here
        try:
            plugin.load()
        except Exception as error:  # a plugin may raise anything
            _loaded.remove(key)
            raise ImportError(
                f"The plugin {plugin.name!r} ({plugin.value}) failed to load: "
                f"{type(error).__name__}: {error}. Repair or uninstall it."
            ) from error
