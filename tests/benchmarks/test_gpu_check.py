"""What a GPU will be asked to do in one go runs here on a CPU, tiny."""

import csv
import importlib
import os
import signal
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


@pytest.fixture
def stand_in(tmp_path, module, monkeypatch):
    """Returns a function that sets the program to run instead of every section."""

    def set_program(text: str) -> None:
        (tmp_path / "stand_in.py").write_text(text)
        monkeypatch.setattr(module, "__file__", str(tmp_path / "stand_in.py"))

    return set_program


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
    monkeypatch.setenv("FORCE_COLOR", "1")  # pytest's lines are read
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
    tmp_path, module, stand_in, monkeypatch, capfd
):
    stand_in(STAND_IN)
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


@pytest.mark.parametrize("end", ["time.sleep(100)", "", "sys.exit(3)"],
                         ids=["stopped", "ended", "said-so"])  # fmt: skip
def test_a_check_that_failed_counts(tmp_path, module, stand_in, monkeypatch, end):
    """Also if its section is stopped afterwards, or loses its exit code."""
    stand_in(f"import sys, time\nprint('[1 s, 9 left] BROKEN: y 9e9', flush=True)\n{end}")
    monkeypatch.setattr(module, "SECTIONS", {"machine": 1, "correctness": 1})
    budget = "3" if "sleep" in end else "60"  # what ends by itself has the time to start
    argv = ["--dry-run", "--budget", budget, "--only", "correctness", "--out", str(tmp_path)]
    assert module.main(argv) == 12
    line = next(m for m in (tmp_path / "summary.md").read_text().splitlines() if "correctness" in m)
    assert ("STOPPED" in line) == ("sleep" in end)


@pytest.mark.parametrize(
    ("section", "code"),
    [({}, 0), ({"failures": 1}, 3), ({"cut": True}, 4), ({"failures": 1, "cut": True}, 1)],
    ids=["whole", "failed", "cut", "both"],
)
def test_a_section_says_by_its_exit_code_whether_every_check_ran(
    module, monkeypatch, section, code
):
    sections = importlib.import_module("sections")
    monkeypatch.setitem(sections.SECTIONS, "machine", lambda one: vars(one).update(section))
    assert sections.run("machine", Path(), Path(), 0, 0, dry=True) == code
    assert (module.targets.STATES.get(code) in module.targets.ENDED) == ("cut" not in section)


def test_a_failure_is_printed_at_once(capsys, module):
    section = importlib.import_module("section").Section("tests", Path(), Path(), 0, 0, True)
    section.fail("FAILED tests/kernels/test_scan.py::test_x")
    assert section.failures == 1
    assert "] BROKEN: FAILED tests/" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_section_too(tmp_path, module, stand_in, monkeypatch, number):
    stand_in(
        "import os, sys, time\n"
        "open(os.path.join(sys.argv[4], 'pid'), 'w').write(str(os.getpid()))\n"
        f"os.kill(os.getppid(), {int(number)})\ntime.sleep(100)\n"
    )
    earlier = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGTERM, signal.SIGHUP)}
    try:
        module.end_on_signals()
        with pytest.raises(SystemExit) as stop:
            module.main(["--dry-run", "--only", "machine", "--budget", "9", "--out", str(tmp_path)])
    finally:
        for one, handler in earlier.items():
            signal.signal(one, handler)
    assert stop.value.code == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert "| machine | not run |" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize("name", ["HF_HOME", "NUMBA_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR",
                                  "TRITON_CACHE_DIR", "VIM_SSL_CACHE"])  # fmt: skip
def test_a_cache_is_below_out_or_where_its_variable_points(tmp_path, module, monkeypatch, name):
    monkeypatch.setattr(module, "ROOT", Path("/proc/read-only"))
    monkeypatch.chdir(tmp_path)  # a section runs in the checkout
    for key in module.CACHES:
        monkeypatch.delenv(key, raising=False)
    assert (
        tmp_path / "out"
        in Path(module._environment("kernels", tmp_path / "out", False)[name]).parents
    )
    monkeypatch.setenv(name, "warm")
    assert module._environment("kernels", tmp_path / "out", False)[name] == str(tmp_path / "warm")
    assert module._cache(tmp_path / "one") != module._cache(tmp_path / "two")


def test_the_summary_is_of_this_call(tmp_path, module, stand_in, capfd):
    """Not of rows of other commits and cards, and also if every section is skipped."""
    head = "commit,hardware,versions,backend,quantity,holds\n"
    (tmp_path / "accuracy.csv").write_text(f"{head}old,A100,torch 1,triton,y,False\n")
    (tmp_path / "summary.md").write_text("of an earlier call")
    argv = ["--dry-run", "--only", "machine", "correctness", "--out", str(tmp_path)]
    assert module.main([*argv, "--budget", "0"]) == 0
    printed = capfd.readouterr().out
    assert "earlier" not in printed
    assert "| machine | skipped: the time is up" in printed
    assert "| correctness | skipped: the time is up" in printed
    assert "this run has no rows" in printed
    stand_in("import sys\nif sys.argv[2] == 'machine':\n"
             "    with open(sys.argv[4] + '/accuracy.csv', 'a') as file:\n"
             "        file.write('new,H200,torch 2,triton,y,True\\n')\n")  # fmt: skip
    assert module.main([*argv, "--budget", "60"]) == 0
    summary = (tmp_path / "summary.md").read_text()
    assert "- new, H200, torch 2\n" in summary
    assert "A100" not in summary
    line = next(m for m in summary.splitlines() if m.startswith("| every backend against float64"))
    assert line.endswith("| violated 0 (expected 0–0) | dry run |")
    assert "| every backend against" in (tmp_path / "gpu_check.log").read_text()


@pytest.mark.parametrize(
    ("rows", "state", "cells"),
    [
        (["triton,y,True"], "done", "violated 0 (expected 0–0) | yes"),
        (["triton,y,True"], "done, but a check is BROKEN", "violated 0 (expected 0–0) | yes"),
        (["triton,y,True"], "done, but cut off", "violated 0 (expected 0–0) | incomplete"),
        (["triton,y,True"], "STOPPED, …", "violated 0 (expected 0–0) | incomplete"),
        (["triton,y,True"], "FAILED (1)", "violated 0 (expected 0–0) | incomplete"),
        (["triton,y,False"], "STOPPED, …", "violated 1 (expected 0–0) <<< OUTSIDE | **no**"),
        (["auto,y,True"], "done", "not measured | "),
        (["triton,y,"], "done", "not measured | "),
    ],
)
def test_a_check_that_did_not_run_meets_no_target(targets, tmp_path, rows, state, cells):
    text = "\n".join(["backend,quantity,holds", *rows])
    (tmp_path / "accuracy.csv").write_text(text + "\n")
    lines = targets.summary(tmp_path, [("correctness", state, "9")]).splitlines()
    line = next(m for m in lines if m.startswith("| every backend against float64"))
    assert line.endswith(f" | {cells} |")


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
    assert cells("forward against mamba-ssm")[1] == "incomplete |"
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
