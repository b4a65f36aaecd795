"""Which implementation of a small kernel runs: the companion of the scan's backend."""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from vim_ssl.kernels.selective_scan.dispatch import choose_backend, refuse_forward_mode

_loaded: dict[str, ModuleType] = {}  # full name -> module, imported at its first use


def implementation(package: str, compiled: tuple[str, ...], *tensors: Tensor | None) -> ModuleType:
    """The module ``<package>.<name>_backend`` for these tensors; the first one's device counts.

    The name is that of the scan's backend if it is among `compiled`; otherwise, and for float64,
    which the compiled kernels do not compute in, it is torch.
    Raises: ValueError as `choose_backend` does, RuntimeError as `refuse_forward_mode` does.
    """
    present = [m for m in tensors if m is not None]
    double = any(m.dtype == torch.float64 for m in present)
    name = _load(package, () if double else compiled, present[0].device.type)
    if not name.endswith(".torch_backend"):  # plain torch differentiates both ways
        refuse_forward_mode(*present)
    return _loaded[name]


@torch.compiler.assume_constant_result  # torch.compile cannot trace an import; it asks once
def _load(package: str, compiled: tuple[str, ...], device: str) -> str:
    backend = choose_backend("auto", device) if compiled else "torch"
    name = f"{package}.{backend if backend in compiled else 'torch'}_backend"
    if name not in _loaded:
        _loaded[name] = import_module(name)
    return name
