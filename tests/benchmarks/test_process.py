"""Measurements in a fresh process: their results, and errors that show the process's output."""

import importlib
import math
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def process(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("process")


def test_a_function_runs_in_another_process(process, capfd):
    assert process.run_apart(math.sqrt, 4.0) == 2.0
    assert process.run_apart(os.getpid) != os.getpid()
    process.run_apart(print, "a training prints much")
    assert capfd.readouterr().out == ""


def test_a_failure_shows_the_output(process):
    code = "print('epoch 1', flush=True); raise ValueError('no data')"
    with pytest.raises(RuntimeError, match=r"exec failed: no data\nepoch 1"):
        process.run_apart(exec, code)
    with pytest.raises(RuntimeError, match="_exit failed"):  # as if killed for its memory
        process.run_apart(os._exit, 9)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_process_ends_if_its_parent_is_killed(tmp_path):
    code = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"from process import run_apart; run_apart(exec, {code!r})"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")},
    )  # fmt: skip

    def running() -> bool:
        stat = Path("/proc", (tmp_path / "pid").read_text(), "stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    assert running()
    parent.kill()
    parent.wait()
    wait_until(lambda: not running())


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux alone")
def test_the_peak_is_that_since_the_reset(process):
    if not process.reset_peak():
        pytest.skip("this kernel does not reset the peak")
    before = process.peak_mib()
    block = mmap.mmap(-1, 64 * 2**20)  # the allocator may have kept as much
    block[::4096] = bytes(len(block) // 4096)
    rise = process.peak_mib() - before
    block.close()
    assert 60 < rise < 80
    process.reset_peak()
    assert process.peak_mib() < before + 30
    assert process.rusage_peak_mib() == pytest.approx(process.peak_mib(), rel=0.2)
