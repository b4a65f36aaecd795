"""The benchmark: right backends are timed into a CSV, and a wrong one stops it."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vim_ssl.kernels.selective_scan import torch_backend

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "kernels"))

import providers  # noqa: E402
import timing  # noqa: E402
from providers import Shape  # noqa: E402

TINY = Shape(1, 6, 4, 2)
CPU = ["numba", "torch", "reference"]


@pytest.fixture(autouse=True)
def uninterpreted(monkeypatch):
    """Without the Triton backend, which takes seconds for everything in its interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_rows_tell_what_was_measured_where(tmp_path, capsys):
    rows = timing.measure(
        "cpu", shapes=[TINY], dtypes=["fp32"], budget_s=0.01, groups=CPU, say=print
    )
    timing.append_rows(tmp_path / "kernels.csv", timing.COLUMNS, rows)
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
    assert timing.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "torch, fp32: y is wrong: relative error 1.0e-02" in printed.err
    assert " ms " not in printed.out


def test_a_peer_that_is_wrong_is_left_out_with_words(monkeypatch):
    peer = providers.Provider("peer", lambda **m: 2 * timing.bi_selective_scan(**m))
    monkeypatch.setattr(timing, "providers", lambda *a: ([peer], []))
    said = []
    rows = timing.measure("cpu", shapes=[TINY], dtypes=["fp32"], say=said.append)
    assert list(rows) == []
    assert said[0].startswith("skipped: peer, fp32. y is wrong")


def test_a_case_that_fails_is_left_out_and_reported_at_the_end(monkeypatch):
    """As for want of memory: the other cases are timed."""
    inputs = timing.inputs

    def failing(shape, dtype, device, seed=0):
        if shape == Shape(1, 7, 4, 2):
            raise MemoryError("too long")
        return inputs(shape, dtype, device, seed)

    monkeypatch.setattr(timing, "inputs", failing)
    said = []
    shapes = [TINY, Shape(1, 7, 4, 2), Shape(1, 8, 4, 2)]
    rows = timing.measure(
        "cpu", shapes=shapes, dtypes=["fp32"], budget_s=0.0, groups=["torch"], say=said.append
    )
    timed = [next(rows)["shape"] for _ in range(4)]
    assert timed == ["b1-l6-d4-n2"] * 2 + ["b1-l8-d4-n2"] * 2
    with pytest.raises(RuntimeError, match="2 cases failed: torch"):
        next(rows)
    assert said[-1] == "BROKEN: torch, b1-l7-d4-n2, fp32, backward. MemoryError: too long"


def test_what_is_cut_off_says_so():
    said = []
    rows = timing.measure(
        "cpu", shapes=[TINY], dtypes=["fp32"], groups=CPU, until=0.0, say=said.append
    )
    assert list(rows) == []
    assert said[-1] == "cut off before b1-l6-d4-n2, fp32, forward: the time is up"


def test_floors_of_the_scan():
    """An H200 at 1.98 GHz: 132 multiprocessors with 16 exponentials and 128 FMA a clock."""
    ceilings = pytest.importorskip("ceilings", exc_type=ImportError)
    rates = ceilings.Ceilings(16 * 132 * 1.98e9, 128 * 132 * 1.98e9, 4.3e12, 1980.0)
    assert rates.floor_ms("forward", 128, 197, 384, 16) == pytest.approx(0.088, rel=0.01)
    assert rates.floor_ms("backward", 128, 197, 384, 16) == pytest.approx(0.111, rel=0.01)


@pytest.mark.slow
def test_the_associative_scan_peer_is_right():
    """Its Triton kernel in the interpreter, over three tiles, the last one cut."""
    pytest.importorskip("triton")
    code = """
import providers, timing
timing.CHECKED = providers.Shape(1, 19, 3, 4)
peer = providers.load_peer(providers.PEERS / "associative_scan.py")
peer.TOKENS = 8
(provider,) = peer.providers()
assert [timing.check(provider, dtype, "cpu") for dtype in ("fp32", "bf16")] == [None, None]
"""
    paths = f"{ROOT}{os.pathsep}{ROOT / 'benchmarks' / 'kernels'}"
    env = os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
