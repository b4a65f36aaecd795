"""What a GPU will be asked to do in one go runs here on a CPU, tiny."""

import csv
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
TABLES = {
    "machine": "ceilings",
    "correctness": "accuracy",
    "kernels": "kernels",
    "models": "models",
    "pretraining": "pretraining",
}
# Instead of a section's work: one crashes, one hangs with a child that holds the output open.
STAND_IN = """
import subprocess, sys
name, out = sys.argv[2], sys.argv[4]
print("begin", name, flush=True)
if name == "correctness":
    raise SystemError("the driver gave up")
if name == "kernels":
    subprocess.run(["sleep", "100"])
"""


@pytest.fixture
def module(monkeypatch):
    for folder in ("benchmarks/kernels", "benchmarks/gpu", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module("gpu_check")


@pytest.fixture
def gpu_check(module):
    """The script's `main`; each of its sections is a process of its own."""
    return module.main


@pytest.fixture
def targets(module):
    return module.targets


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
    assert "exp2" in (tmp_path / "gpu_check.log").read_text()
    assert "| ceilings: copy, exp2" in (tmp_path / "summary.md").read_text()
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
        assert all(float(row["saved_mb"]) > 0 for row in rows if row["what"] == "training step")
    if name == "correctness":
        assert {row["case"][:7] for row in rows} == {"encoder", "one way"}
        with open(tmp_path / "tests.csv", newline="") as file:
            assert next(csv.DictReader(file))["test"].startswith("tests/kernels/test_")


def test_a_section_that_fails_or_hangs_leaves_the_others_their_time(
    tmp_path, module, monkeypatch, capfd
):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "stand_in.py"))
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    names = ["machine", "correctness", "kernels", "models"]
    monkeypatch.setattr(module, "SECTIONS", dict.fromkeys(names, 30) | {"kernels": 1})
    code = module.main(["--dry-run", "--budget", "60", "--only", *names, "--out", str(tmp_path)])
    assert code == 12  # the second section
    states = {line.split()[1]: line for line in capfd.readouterr().out.splitlines()
              if line.startswith("=== ") and " after " in line}  # fmt: skip
    ends = [line.split()[2].rstrip(",") for line in states.values()]
    assert ends == ["done", "FAILED", "STOPPED", "done"]
    log = (tmp_path / "gpu_check.log").read_text()
    assert "SystemError: the driver gave up" in log
    assert "begin models" in log
    assert "| kernels | STOPPED" in (tmp_path / "summary.md").read_text()


def test_compiled_kernels_can_be_brought_along(tmp_path, module, monkeypatch):
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    assert module._environment("kernels", False)["TRITON_CACHE_DIR"] == str(
        tmp_path / "cache" / "triton"
    )
    monkeypatch.chdir(tmp_path)  # a section runs in the checkout
    monkeypatch.setenv("TRITON_CACHE_DIR", "warm")
    assert module._environment("kernels", False)["TRITON_CACHE_DIR"] == str(tmp_path / "warm")


def test_without_a_gpu_one_line_says_so(tmp_path, gpu_check, capfd):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_check(["--out", str(tmp_path)]) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("gpu_check.py: torch finds no CUDA device")


def test_every_line_of_the_table_of_targets_is_measured(targets):
    lines = [result for result, *_ in targets.debts()]
    assert len(lines) > 20
    assert set(lines) == {quantity.line for quantity in targets.QUANTITIES}
    assert all(low <= high for low, high in (q.expected for q in targets.QUANTITIES))
    for quantity in targets.QUANTITIES:
        assert f"    {quantity.source} " in targets.__doc__, quantity


def kernel_row(**changed) -> dict:
    row = {"provider": "triton", "direction": "forward", "dtype": "bf16", "timing": "calls",
           "shape": "b128-l197-d384-n16", "x_floor": 1.2, "p50_ms": 0.1}  # fmt: skip
    return row | changed


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({}, "× floor 1.2 (expected 1–1.7)"),
        ({"x_floor": 0.4}, "× floor 0.4 (expected 1–1.7) <<< OUTSIDE"),
        ({"provider": "torch"}, ""),
    ],
    ids=["as-expected", "impossible", "without-a-target"],
)
def test_a_value_stands_beside_what_is_expected(targets, changed, text):
    assert targets.remarks("kernels.csv", kernel_row(**changed)) == text


def test_the_summary_compares_with_the_targets(targets, tmp_path):
    rows = [
        kernel_row(),
        kernel_row(direction="backward", x_floor=3.4),
        kernel_row(provider="mamba-ssm, flips", p50_ms=0.6, x_floor=""),
    ]
    with open(tmp_path / "kernels.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with open(tmp_path / "accuracy.csv", "w") as file:
        file.write("backend,quantity,holds\ntriton,y,True\ntriton,two runs,False\n")
    lines = targets.summary(tmp_path).splitlines()

    def cells(result: str) -> list[str]:
        return next(line for line in lines if line.startswith(f"| {result}")).split(" | ")[2:]

    forward = "forward, Vim-Ti, 197 tokens b128, bf16"
    assert cells(forward) == ["× floor 1.2 (expected 1–1.7)", "yes |"]
    assert cells(forward.replace("forward", "backward"))[1] == "**no** |"
    assert (
        cells("forward against mamba-ssm")[0] == "Vim-Ti, 197 tokens, × as fast 6 (expected 3–12)"
    )
    assert cells("two runs of the Triton scan")[1] == "**no** |"
    assert cells("one Vim block")[0] == "not measured"
    assert "- two runs of the Triton scan: violated 1 (expected 0–0) <<< OUTSIDE" in lines


def test_compilations_are_heard_by_everyone_who_listens(module):
    knobs = pytest.importorskip("triton.knobs")
    compiles = importlib.import_module("compiles")
    inner, outer = [], []
    with compiles.heard(outer.append), compiles.heard(inner.append):
        knobs.compilation.listener(
            src=SimpleNamespace(
                name="forward_kernel", constants={(1,): 16, (2,): True, (0,): None},
                fn=SimpleNamespace(arg_names=["start", "N", "SAVE"]),
            ),
            metadata={}, metadata_group={}, times=SimpleNamespace(total=2_000_000),
            cache_hit=False,
        )  # fmt: skip
    assert knobs.compilation.listener is None
    assert inner == outer == [compiles.Compilation("forward_kernel", "N=16 SAVE=1", 2.0, False)]
