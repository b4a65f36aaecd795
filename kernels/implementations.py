"""Which implementation of a small kernel runs: the companion of the scan's backend."""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from vim_ssl.kernels.selective_scan.dispatch import choose_backend, refuse_forward_mode

_all: dict[str, "Implementations"] = {}


class Implementations:
    """The modules ``<package>.<name>_backend`` of a small kernel, imported at their first use.

    Args:
        package: the kernel's.
        compiled: names of the scan's backends for which it has one, beside torch.
    """

    def __init__(self, package: str, *compiled: str):
        self.package, self.compiled = package, compiled
        # A dictionary for each kernel: torch.compile takes one as it is when it first meets it, and
        # would miss in a common one what a later kernel adds.
        self.loaded: dict[str, ModuleType] = {}
        _all[package] = self

    def of(self, *tensors: Tensor | None) -> ModuleType:
        """The module for these tensors; the first one's device counts.

        It is that of the scan's backend if there is one; otherwise, and for float64, which the
        compiled kernels do not compute in, it is torch's.
        Raises: ValueError as `choose_backend` does, RuntimeError as `refuse_forward_mode` does.
        """
        present = [m for m in tensors if m is not None]
        double = any(m.dtype == torch.float64 for m in present)
        name = _load(self.package, double, present[0].device.type)
        if name != "torch":  # plain torch differentiates both ways
            refuse_forward_mode(*present)
        return self.loaded[name]


@torch.compiler.assume_constant_result  # torch.compile cannot trace an import; it asks once
def _load(package: str, double: bool, device: str) -> str:
    kernel = _all[package]
    backend = choose_backend("auto", device) if kernel.compiled and not double else "torch"
    name = backend if backend in kernel.compiled else "torch"
    if name not in kernel.loaded:
        kernel.loaded[name] = import_module(f"{package}.{name}_backend")
    return name
