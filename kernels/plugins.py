"""Plugins: installed packages that extend `vim_ssl` through entry points.

    [project.entry-points."vim_ssl.plugins"]
    my_package = "my_package.vim_ssl_plugin"

Importing the named module registers its extensions. (`vim_ssl/utils/plugins.py` does the same for
the library, which kernels must not import.)
"""

from importlib.metadata import entry_points

GROUP = "vim_ssl.plugins"
_loaded: set[tuple[str, str]] = set()  # (name, module) of entry points


def load_plugins() -> None:
    """Import every plugin that this process has not imported yet.

    Raises: ImportError naming the plugin that failed.
    """
    for plugin in entry_points(group=GROUP):
        key = plugin.name, plugin.value
        if key in _loaded:
            continue
        _loaded.add(key)  # before the import, which may call this function again
        try:
            plugin.load()
        except Exception as error:  # a plugin may raise anything
            _loaded.remove(key)
            raise ImportError(
                f"The plugin {plugin.name!r} ({plugin.value}) failed to load: "
                f"{type(error).__name__}: {error}. Repair or uninstall it."
            ) from error
