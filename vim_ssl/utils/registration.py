"""Register with another package without importing it, and folders beside this one.

    import_after("timm", "vim_ssl.checkpoints.timm_registry")

imports `vim_ssl.checkpoints.timm_registry`, which adds the presets to timm's registry: now if timm
is loaded, else as soon as it is imported.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType


def import_after(package: str, module: str) -> None:
    """Import ``module`` now if ``package`` is loaded, else right after ``package`` is imported.

    Args:
        package: a top-level package; it need not be installed.
        module: a module of this project that registers something with ``package`` when imported.
    """
    if package in sys.modules:
        import_module(module)
    elif _Finder(package, module) not in sys.meta_path:
        sys.meta_path.insert(0, _Finder(package, module))


def register_folders(package: str, *names: str) -> None:
    """Make folders beside a package importable as its subpackages: the checkout's kernels/ as
    vim_ssl.kernels.

    In a wheel they are inside the package. In a checkout they are next to it, without an
    ``__init__.py``, because other packages use those names at the top level. Registering only these
    avoids ``vim_ssl.tests``, ``vim_ssl.setup`` and a second ``vim_ssl.vim_ssl``.
    """
    (location,) = sys.modules[package].__path__
    for name in names:
        folder = Path(location).resolve().parent / name
        if Path(location, name).is_dir() or not folder.is_dir():
            continue
        spec = ModuleSpec(f"{package}.{name}", loader=None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        module = module_from_spec(spec)
        sys.modules[spec.name] = module
        setattr(sys.modules[package], name, module)


@dataclass(frozen=True)
class _Finder:
    """A meta-path finder that delegates to the finders after it and extends the loader's
    ``exec_module``.

    It changes only the loader instance, and only until the package is executed, so that the spec
    keeps its usual loader.
    """

    package: str
    module: str

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.package:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._extend(spec.loader)
        return spec

    def _extend(self, loader) -> None:
        before = dict(vars(loader))  # another finder for the package may have extended it already

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            vars(loader).update(before)
            loader.exec_module(module)
            import_module(self.module)

        loader.exec_module = exec_module
