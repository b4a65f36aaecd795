"""What a GPU will be asked to do in one go runs here on a CPU, tiny."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def gpu_check(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_dry_run(tmp_path):
    """No share of the budget ends here: how long a section takes is not what is tested."""
    pytest.importorskip("triton")
    done = gpu_check("--dry-run", "--out", str(tmp_path), "--budget", "6000")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in ("ceilings", "accuracy", "kernels", "models", "pretraining"):
        with open(tmp_path / f"{name}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows, name
        assert all(row["commit"] and row["date"] for row in rows)
    (row,) = rows
    assert row["resume_bitwise"] == "True"
    assert float(row["knn_top1"]) >= 0


def test_a_section_is_cut_off_when_its_time_is_up(tmp_path):
    done = gpu_check("--dry-run", "--only", "models", "--out", str(tmp_path), "--budget", "2")
    assert "=== models: CUT OFF" in done.stdout
    assert done.returncode == 0


def test_without_a_gpu_one_line_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = gpu_check("--out", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("gpu_check.py: torch finds no CUDA device")
