"""Register with another package without importing it: now if it is loaded, else after its import.

    import_after("timm", "vim_ssl.models.encoder")

imports `vim_ssl.models.encoder`, which adds the presets to timm's registry, as soon as timm is
imported.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import ModuleSpec
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
