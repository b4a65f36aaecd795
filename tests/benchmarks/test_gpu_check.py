"""What a GPU will be asked to do in one go runs here on a CPU, tiny."""

import csv
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu_check(monkeypatch):
    """The script's `main`; each of its sections is a process of its own."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_check").main


@pytest.mark.slow
def test_dry_run(tmp_path, gpu_check, capfd):
    """No share of the budget ends here: how long a section takes is not what is tested."""
    pytest.importorskip("triton")
    code = gpu_check(["--dry-run", "--out", str(tmp_path), "--budget", "6000"])
    assert code == 0, "".join(text[-3000:] for text in capfd.readouterr())
    for name in ("ceilings", "accuracy", "kernels", "models", "pretraining"):
        with open(tmp_path / f"{name}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows, name
        assert all(row["commit"] and row["date"] for row in rows)
    (row,) = rows
    assert row["resume_bitwise"] == "True"
    assert float(row["knn_top1"]) >= 0


def test_a_section_is_cut_off_when_its_time_is_up(tmp_path, gpu_check, capfd):
    argv = ["--dry-run", "--only", "models", "--out", str(tmp_path), "--budget", "2"]
    assert gpu_check(argv) == 0
    assert "=== models: CUT OFF" in capfd.readouterr().out


def test_without_a_gpu_one_line_says_so(tmp_path, gpu_check, capfd):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_check(["--out", str(tmp_path)]) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("gpu_check.py: torch finds no CUDA device")
