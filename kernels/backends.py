"""The table of backends for each operation, and the selection of a backend.

A backend is a module that implements the functions of one operation. To add one, write the module
and add a line to the table at the end of this file. Another package calls `register` in the module
that its entry point names (see `plugins.py`).
"""

import difflib
import logging
import os
import sys
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vim_ssl.kernels.plugins import load_plugins

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Backend:
    """One implementation of an operation; `register` documents the fields."""

    name: str
    module: str
    device: str | None
    priority: int
    requires: str | None
    float64: bool
    forward_mode: bool
    loaded: ModuleType | None = field(default=None, init=False)

    def why_not(self, device: str) -> str | None:
        """Return why it cannot run on this device type, or None if it can."""
        interpreted = self.requires == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        if self.device not in (None, device) and not (interpreted and device == "cpu"):
            return f"Backend {self.name!r} runs on {self.device} tensors; these are on {device}."
        if self.requires is not None and find_spec(self.requires) is None:
            needs = f"needs the package {self.requires}: pip install {self.requires}."
            return f"Backend {self.name!r} {needs}"
        return None


# Operation -> name -> backend. Every operation has "torch".
BACKENDS: dict[str, dict[str, Backend]] = {
    op: {} for op in ("selective_scan", "causal_conv1d", "rms_norm", "mixer")
}


def register(
    *,
    op: str,
    name: str,
    module: str,
    device: str | None = None,
    priority: int = 0,
    requires: str | None = None,
    float64: bool = True,
    forward_mode: bool = False,
) -> None:
    """Add a backend to an operation.

    Args:
        op: "selective_scan", "causal_conv1d", "rms_norm" or "mixer".
        name: the value of ``backend`` that selects it.
        module: import path of the implementation, imported when the backend is first selected. It
            defines the same functions as the operation's module ``torch_backend``.
        device: device type of the tensors that it accepts; None for any.
        priority: "auto" selects the backend with the highest priority that runs on the device.
        requires: a package that must be installed.
        float64: False for a kernel that computes only in float32; calls with a float64 tensor then
            use the torch backend.
        forward_mode: True if it supports forward-mode differentiation; otherwise that is an error.

    Raises: ValueError for an unknown operation, and for a name that is already registered for it.
    """
    if op not in BACKENDS:
        raise ValueError(f"Unknown operation {op!r}; {_choices(op, [*BACKENDS])}")
    if name == "auto":
        raise ValueError("A backend cannot be named 'auto', which selects one; rename it.")
    if name in BACKENDS[op]:
        module = BACKENDS[op][name].module
        raise ValueError(f"{op} already has a backend {name!r} ({module}); choose another name.")
    BACKENDS[op][name] = Backend(name, module, device, priority, requires, float64, forward_mode)
    _auto.cache_clear()


def select(op: str, name: str, *tensors: Tensor | None) -> ModuleType:
    """Return the module that runs the operation on these tensors; the first one sets the device.

    Inside a transform of `torch.func`, which cannot look into the compiled kernels, "auto" selects
    a backend of plain torch operations.

    Raises: ValueError as `resolve` does; RuntimeError for dual tensors (forward-mode
        differentiation) if the backend would drop their tangents.
    """
    present = [m for m in tensors if m is not None]
    device = present[0].device.type
    if name == "auto" and _transformed():
        name = next(n for n, b in BACKENDS[op].items() if b.forward_mode)
    backend = BACKENDS[op][resolve(op, name, device)]
    if not backend.float64 and any(m.dtype == torch.float64 for m in present):
        backend = BACKENDS[op][resolve(op, "torch", device)]
    dual = not (backend.forward_mode or torch.compiler.is_compiling()) and (
        forward_ad._current_level >= 0  # dual tensors exist only inside `dual_level`
    )
    if dual and any(forward_ad.unpack_dual(m).tangent is not None for m in present):
        raise RuntimeError(
            "the compiled kernels do not support forward-mode differentiation (dual tensors); set "
            "VIM_SSL_BACKEND=reference for it."
        )
    assert backend.loaded is not None
    return backend.loaded


def _transformed() -> bool:
    """True inside a transform of `torch.func`, such as grad, jacrev or vmap."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None


@torch.compiler.assume_constant_result  # torch.compile cannot trace an import
def resolve(op: str, name: str, device: str) -> str:
    """Select a backend by name or "auto", import its module and return its name.

    ``VIM_SSL_BACKEND`` overrides "auto" with the name of a backend of the scan. An operation
    without a backend of that name uses torch.

    Raises: ValueError for an unknown backend, or one that cannot run on this device type.
    """
    if name == "auto":
        name = os.environ.get("VIM_SSL_BACKEND") or "auto"
        if name != "auto" and name not in BACKENDS[op]:
            _find("selective_scan", name, device)
            name = name if name in BACKENDS[op] else "torch"
    backend = BACKENDS[op][_auto(op, device)] if name == "auto" else _find(op, name, device)
    if backend.loaded is None:
        backend.loaded = import_module(backend.module)
    return backend.name


def _find(op: str, name: str, device: str) -> Backend:
    backends = BACKENDS[op]
    if name not in backends:
        load_plugins()
    if name not in backends:
        raise ValueError(f"Unknown backend {name!r}; {_choices(name, ['auto', *backends])}")
    if reason := backends[name].why_not(device):
        raise ValueError(reason)
    return backends[name]


def is_compiling() -> bool:
    """True while a CPU kernel is being compiled; an exception of a signal handler would leave LLVM
    in a state in which the process crashes at its end."""
    module = sys.modules.get("vim_ssl.kernels.numba_kernels")
    return module is not None and module.NOTICE.running > 0


def available_backends(device: str | torch.device = "cpu", op: str = "selective_scan") -> list[str]:
    """Return the names of an operation's backends for this device type, the "auto" choice first."""
    kind = torch.device(device).type
    return [
        backend.name
        for backend in sorted(BACKENDS[op].values(), key=lambda backend: -backend.priority)
        if backend.device in (None, kind) and backend.why_not(kind) is None
    ]


@cache  # select, and log the selection, once per device type
def _auto(op: str, device: str) -> str:
    name = available_backends(device, op)[0]
    log.info("%s on %s: backend %r", op, device, name)
    return name


def _choices(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"choose one of {', '.join(known)}." + "".join(f" Did you mean {m!r}?" for m in near)


# --- the table -------------------------------------------------------------------------------

_TABLE: tuple[tuple[str, str, str, str | None, int, dict], ...] = (
    # operation, name, module, device, priority, further arguments of `register`
    ("selective_scan", "reference", "reference", None, -1, {"forward_mode": True}),
    ("selective_scan", "torch", "torch_backend", None, 0, {}),
    ("selective_scan", "numba", "numba_backend", "cpu", 1, {"requires": "numba"}),
    ("selective_scan", "triton", "triton_backend", "cuda", 1, {"requires": "triton"}),
    ("causal_conv1d", "torch", "torch_backend", None, 0, {"forward_mode": True}),
    ("causal_conv1d", "numba", "numba_backend", "cpu", 1, {"requires": "numba", "float64": False}),
    ("causal_conv1d", "triton", "triton_backend", "cuda", 1,
     {"requires": "triton", "float64": False}),
    ("rms_norm", "torch", "torch_backend", None, 0, {"forward_mode": True}),
    ("rms_norm", "numba", "numba_backend", "cpu", 1, {"requires": "numba", "float64": False}),
    ("rms_norm", "triton", "triton_backend", "cuda", 1, {"requires": "triton", "float64": False}),
    ("mixer", "torch", "torch_backend", None, 0, {"forward_mode": True}),
    ("mixer", "numba", "numba_backend", "cpu", 1, {"requires": "numba", "float64": False}),
    ("mixer", "triton", "triton_backend", "cuda", 1, {"requires": "triton", "float64": False}),
)  # fmt: skip
for _op, _name, _module, _device, _priority, _options in _TABLE:
    register(op=_op, name=_name, module=f"vim_ssl.kernels.{_op}.{_module}", device=_device,
             priority=_priority, **_options)  # fmt: skip
