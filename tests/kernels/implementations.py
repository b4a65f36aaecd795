"""What the tests of the small kernels share: choosing an implementation, and poisoned memory."""

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there, in the interpreter


def use(backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Lets ``auto`` choose this backend, and returns the device that it runs on."""
    if backend != "torch" and find_spec(backend) is None:
        pytest.skip(f"needs the package {backend}")
    torch.compiler.reset()  # a compiled function keeps the choice it was traced with
    monkeypatch.setenv("VIM_SSL_BACKEND", backend)
    return TRITON_DEVICE if backend == "triton" else "cpu"


def poison_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what `new_empty` returns with NaN, so that an element nobody writes is seen."""
    new_empty = Tensor.new_empty

    def poisoned(*args, **kwargs):
        return new_empty(*args, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm of the expected tensor, both in float64."""
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


def half_precision_budget(dtype: torch.dtype, device: str) -> float:
    """How many times the plain path's error a kernel may have in this dtype on this device.

    Triton's interpreter cuts bfloat16 off where a GPU rounds it, which is twice as inexact alone.
    """
    return 3 if dtype == torch.bfloat16 and device == TRITON_DEVICE == "cpu" else 2
