"""What the Triton scan compiles to for an H100, counted without one (`benchmarks/sm90.py`).

A kernel that spills registers or issues more instructions than before is slower on a GPU; no other
test shows that on a machine without one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]

# Triton's version -> kernel -> registers, bytes spilled, instructions an element, at most.
SAME = {
    "forward, 2 channels a lane": (128, 0, 10.6),
    "forward, 1 channel a lane": (96, 16, 12.5),
    "backward": (255, 144, 42),
}
BOUNDS = {"3.6": SAME, "3.8": SAME}


SPECIALISED = """
from triton.runtime import JITFunction
from vim_ssl.kernels.selective_scan import triton_kernels
for name, kernel in vars(triton_kernels).items():
    if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
        print(name, *(p.name for p in kernel.params if not (p.is_constexpr or p.do_not_specialize)))
"""


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """The lines that one process without the interpreter prints, the table as JSON last."""
    code = SPECIALISED + (
        "import runpy, sys; sys.argv[1:] = ['--json']\n"
        "runpy.run_path('benchmarks/sm90.py', run_name='__main__')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=environment | {"PYTHONPATH": str(ROOT)}, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_another_number_of_images_or_tokens_does_not_recompile(printed):
    rows = [line.split() for line in printed[:-1]]
    assert len(rows) == 5
    for kernel, *names in rows:
        assert not {"batch", "length", "segment", "parts", "count"} & {*names}, kernel


@pytest.mark.slow
def test_registers_spills_and_instructions_stay_within_what_was_recorded(printed):
    counted = json.loads(printed[-1])
    version = ".".join(counted["triton"].split(".")[:2])
    if version not in BOUNDS:
        pytest.skip(f"compiled; no bounds were recorded for Triton {version}")
    for name, (registers, spilled, per_element) in BOUNDS[version].items():
        row = counted["kernels"][name]
        assert row["registers"] <= registers, name
        assert row["spilled"] <= spilled, name
        assert row["per_element"] <= per_element, name
