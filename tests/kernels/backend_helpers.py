"""Helpers of the tests of the small kernels: backend selection, and poisoned memory."""

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there, in the interpreter


def use(backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make ``auto`` select this backend, and return the device that it runs on."""
    if backend != "torch" and find_spec(backend) is None:
        pytest.skip(f"needs the package {backend}")
    torch.compiler.reset()  # a compiled function keeps the choice it was traced with
    monkeypatch.setenv("VIM_SSL_BACKEND", backend)
    return TRITON_DEVICE if backend == "triton" else "cpu"


def poison_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what `new_empty` returns with NaN, which reveals elements that no kernel writes."""
    new_empty = Tensor.new_empty

    def poisoned(*args, **kwargs):
        m = new_empty(*args, **kwargs)
        return m.fill_(torch.nan) if m.is_floating_point() else m

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
