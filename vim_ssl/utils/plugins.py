"""Plugins: installed packages that register what they add when they are imported."""

from importlib.metadata import entry_points

GROUP = "vim_ssl.plugins"  # the group of entry points; each names a module or an object in one
_loaded: set[tuple[str, str]] = set()


def load_plugins() -> None:
    """Import every installed plugin, once per process.

    Raises: ImportError naming the plugin that cannot be loaded.
    """
    for plugin in entry_points(group=GROUP):
        if (plugin.name, plugin.value) in _loaded:
            continue
        try:
            plugin.load()
        except Exception as error:  # a plugin may raise anything
            raise ImportError(
                f"The plugin {plugin.name!r} ({plugin.value}) cannot be loaded: {error}. Repair "
                "or uninstall the package that it belongs to."
            ) from error
        _loaded.add((plugin.name, plugin.value))
