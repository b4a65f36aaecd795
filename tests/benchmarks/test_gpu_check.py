"""What a GPU will be asked to do in one go runs here on a CPU, tiny."""

import csv
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


TABLES = {
    "machine": "ceilings",
    "correctness": "accuracy",
    "kernels": "kernels",
    "models": "models",
    "pretraining": "pretraining",
}


@pytest.fixture
def gpu_check(monkeypatch):
    """The script's `main`; each of its sections is a process of its own."""
    for folder in ("benchmarks", "benchmarks/kernels"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module("gpu_check").main


def rows_of(folder: Path, name: str) -> list[dict[str, str]]:
    with open(folder / f"{TABLES[name]}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows, name
    assert all(row["commit"] and row["date"] for row in rows)
    return rows


@pytest.mark.slow
def test_a_section_is_a_process_with_a_log(tmp_path, gpu_check, capfd):
    """No share of the budget ends here: how long a section takes is not what is tested."""
    pytest.importorskip("triton")
    argv = ["--dry-run", "--only", "machine", "--out", str(tmp_path), "--budget", "6000"]
    code, printed = gpu_check(argv), capfd.readouterr()
    assert code == 0, printed.out[-3000:] + printed.err[-3000:]
    assert "=== machine: done after" in printed.out
    assert "exp2" in (tmp_path / "gpu_check-machine.log").read_text()
    assert float(rows_of(tmp_path, "machine")[0]["exp2_per_s"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["correctness", "kernels", "models", "pretraining"])
def test_a_section_writes_its_rows(tmp_path, gpu_check, monkeypatch, name):
    """Here in this process, as `--section` does in its own."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    argv = ["--dry-run", "--section", name, "--out", str(tmp_path), "--budget", "6000"]
    assert gpu_check(argv) == 0
    rows = rows_of(tmp_path, name)
    if name == "pretraining":
        assert rows[0]["resume_bitwise"] == "True"
        assert float(rows[0]["knn_top1"]) >= 0
    if name == "models":
        assert {row["what"] for row in rows} == {"forward", "training step"}


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
