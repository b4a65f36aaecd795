"""What holds for every kernel test."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def interpreter_that_rounds(monkeypatch):
    """Triton's interpreter cuts bfloat16 off; a GPU rounds to nearest, and so it shall here."""
    if find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        rounded = torch.from_numpy(np.array(values)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", rounding)
