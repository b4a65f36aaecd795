"""The benchmark: right backends are timed into a CSV, and a wrong one stops it."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernels import timing as benchmark
from benchmarks.kernels.timing import Shape
from vim_ssl.kernels.selective_scan import torch_backend

ROOT = Path(__file__).parents[2]
TINY = Shape(1, 6, 4, 2)


@pytest.fixture(autouse=True)
def uninterpreted(monkeypatch):
    """Without the Triton backend, which takes seconds for everything in its interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_rows_tell_what_was_measured_where(tmp_path, capsys):
    rows = benchmark.measure(
        "cpu", shapes=[TINY], dtypes=["fp32"], budget_s=0.01, compiled=False, say=print
    )
    benchmark.append_rows(tmp_path / "kernels.csv", benchmark.COLUMNS, rows)
    with open(tmp_path / "kernels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(r["provider"], r["direction"]) for r in rows} == {
        (name, way) for name in ("numba", "torch", "reference") for way in ("forward", "backward")
    }
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert row["shape"] == "b1-l6-d4-n2"
        assert row["device"]
        assert row["commit"]


def test_no_speed_is_printed_for_a_wrong_backend(monkeypatch, capsys, tmp_path):
    right = torch_backend.bi_selective_scan
    monkeypatch.setattr(torch_backend, "bi_selective_scan", lambda *a, **k: 1.01 * right(*a, **k))
    assert benchmark.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "torch, fp32: y is wrong: relative error 1.0e-02" in printed.err
    assert " ms " not in printed.out


def test_a_peer_that_is_wrong_is_left_out_with_words(monkeypatch):
    peer = benchmark.Provider("peer", lambda **m: 2 * benchmark.bi_selective_scan(**m))
    monkeypatch.setattr(benchmark, "providers", lambda *a: ([peer], []))
    said = []
    rows = benchmark.measure("cpu", shapes=[TINY], dtypes=["fp32"], say=said.append)
    assert list(rows) == []
    assert said[0].startswith("left out: peer, fp32. y is wrong")


def test_what_is_cut_off_says_so():
    said = []
    rows = benchmark.measure("cpu", shapes=[TINY], dtypes=["fp32"], compiled=False,
                             until=0.0, say=said.append)  # fmt: skip
    assert list(rows) == []
    assert said[-1] == "cut off before b1-l6-d4-n2, fp32, forward: the time is up"


def test_floors_of_the_scan():
    """An H200 at 1.98 GHz: 132 multiprocessors with 16 exponentials and 128 FMA a clock."""
    ceilings = pytest.importorskip("benchmarks.kernels.ceilings", exc_type=ImportError)
    rates = ceilings.Ceilings(16 * 132 * 1.98e9, 128 * 132 * 1.98e9, 4.3e12, 1980.0)
    assert rates.floor_ms("forward", 128, 197, 384, 16) == pytest.approx(0.088, rel=0.01)
    assert rates.floor_ms("backward", 128, 197, 384, 16) == pytest.approx(0.111, rel=0.01)


@pytest.mark.slow
def test_the_associative_scan_peer_is_right():
    """Its Triton kernel in the interpreter, over three tiles, the last one cut."""
    pytest.importorskip("triton")
    code = """
from vim_ssl.kernels.selective_scan import benchmark
benchmark.CHECKED = benchmark.Shape(1, 19, 3, 4)
peer = benchmark._module(benchmark.CHECKOUT / "benchmarks/peers/associative_scan.py")
peer.TOKENS = 8
(provider,) = peer.providers()
assert [benchmark.check(provider, dtype, "cpu") for dtype in ("fp32", "bf16")] == [None, None]
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
