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
COUNTED = ("backward", 16)  # what the test below compiles: the default model's training

SPECIALISED = """
from triton.runtime import JITFunction
from vim_ssl.kernels.selective_scan import triton_backward, triton_kernels
for name, kernel in (vars(triton_kernels) | vars(triton_backward)).items():
    if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
        print(name, *(p.name for p in kernel.params if not (p.is_constexpr or p.do_not_specialize)))
"""


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """The lines that one process without the interpreter prints, the counts as JSON last."""
    kernel, n = COUNTED
    code = SPECIALISED + (
        f"import runpy, sys; sys.argv[1:] = ['--only', '{kernel}', '--states', '{n}', '--json']\n"
        "runpy.run_path('benchmarks/sm90.py', run_name='__main__')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join((str(ROOT), str(ROOT / "benchmarks")))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=environment | {"PYTHONPATH": path}, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_another_number_of_images_or_tokens_does_not_recompile(printed):
    rows = [line.split() for line in printed[:-1]]
    assert len(rows) == 5
    for kernel, *names in rows:
        assert not {"batch", "length", "segment", "parts", "count", "zero"} & {*names}, kernel


@pytest.mark.slow
def test_the_backward_pass_reaches_its_target(printed):
    (row,) = json.loads(printed[-1])
    assert row["spilled_bytes"] <= 16, row
    assert row["instructions_per_element"] <= 36, row
