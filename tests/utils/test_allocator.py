"""Programs that train keep the memory that they free."""

import ctypes
import platform
import subprocess
import sys

import pytest

from vim_ssl.utils.allocator import keep_freed_memory

FAULTS = """
import resource
import numpy as np
from vim_ssl.utils.allocator import keep_freed_memory

def step():
    [np.ones(2**17) for _ in range(64)]  # 64 MiB, 16384 pages

keep_freed_memory()
for _ in range(3):
    step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="concerns glibc")
def test_a_step_uses_the_memory_of_the_one_before():
    done = subprocess.run([sys.executable, "-c", FAULTS], stdout=subprocess.PIPE, check=True)
    first, _, last = map(int, done.stdout.split())
    assert last - first < 1000


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_settings_in_the_environment_win(name, monkeypatch):
    monkeypatch.setenv(name, "1000000")
    monkeypatch.delattr(ctypes, "CDLL")
    keep_freed_memory()
