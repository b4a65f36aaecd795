"""The comparison of two commits: pairs of turns, what counts as slower, and the measures."""

import csv
import importlib
import math
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A measure in a process: it is ready, then takes 2 or, in the folder "head", 3 seconds each turn.
MEASURE = """
import json, os, sys
seconds = 3.0 if os.environ["PYTHONPATH"].endswith("head") else 2.0
assert sys.argv[1] != "broken", "no such thing"
print(json.dumps({"preparation": [99, 99]}), flush=True)
for _ in sys.stdin:
    print(json.dumps({"a": [seconds, 7.0], sys.argv[1]: [1.0, 1.0]}), flush=True)
"""


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("compare_commits")


@pytest.fixture
def sides(compare, monkeypatch, tmp_path):
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    monkeypatch.setattr(compare, "SCRIPT", script)
    return [compare.Checkout(name, tmp_path / name) for name in ("base", "head")]


def test_two_processes_take_turns(compare, sides):
    pairs = compare.take_turns("b", *sides, 3)
    assert list(pairs) == ["a", "b"]
    assert pairs["a"] == [((2.0, 7.0), (3.0, 7.0))] * 3
    row = compare.summarised("a", pairs["a"], "cpu")
    assert (row["ratio"], row["turns"], row["head_cpu_seconds"]) == ("1.500", 3, "3.00000")
    assert compare.summarised("a", pairs["a"], "wall")["ratio"] == "1.000"


def test_a_measure_that_fails_shows_its_errors(compare, sides):
    with pytest.raises(RuntimeError, match=r"(?s)base: broken failed.*no such thing"):
        compare.take_turns("broken", *sides, 3)


def test_the_others_are_measured_after_one_that_fails(
    compare, sides, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(compare, "checkout", lambda *_: sides[0])
    monkeypatch.setattr(compare, "NAMES", ("broken", "b"))
    argv = ["", "main", "--only", "broken", "b", "--turns", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    assert compare.main() == 1
    printed = capsys.readouterr().out
    assert "broken FAILED: base: broken failed:" in printed
    assert "no such thing" in printed
    assert printed.endswith("Slower: none.\nFailed: broken.\n")
    table = (tmp_path / compare.FILE).read_text()
    assert [row["measure"] for row in csv.DictReader(table.splitlines())] == ["a", "b"]


@pytest.mark.parametrize("linked", [True, False])
def test_a_measure_is_of_its_checkout_also_behind_a_link(compare, monkeypatch, tmp_path, linked):
    measures = importlib.import_module("measures")
    (tmp_path / "link").symlink_to(ROOT)
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / ("link" if linked else "other")))
    with nullcontext() if linked else pytest.raises(AssertionError, match="not the commit's"):
        measures.check_package()


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ((1.1, 1.1, 1.1), "SLOWER"),
        ((1.02, 1.02, 1.02), ""),  # below the threshold
        ((0.8, 0.9, 1.1, 1.2, 1.3), ""),  # a quarter of the turns or more is faster
        ((0.8, 1.05, 1.1, 1.2, 1.3), "SLOWER"),
        ((0.8, 0.9, 0.9, 0.9, 1.2), "faster"),
        ((1.5,), "SLOWER"),
    ],
)
def test_slower_is_what_exceeds_threshold_and_spread(compare, ratios, expected):
    row = compare.summarised("a", [((1.0, 1.0), (ratio, math.nan)) for ratio in ratios], "cpu")
    assert compare.verdict(row, 0.03) == expected
    assert compare.text_of(row, 0.03).endswith(expected or ")")
    assert row["head_wall_seconds"] == ""  # not measured


def test_a_program_is_measured_to_its_end_or_until_a_file_appears(compare, tmp_path):
    here = compare.Checkout("base", ROOT)

    def spent(code: str, **options):
        return compare.spent([sys.executable, "-c", code], here, tmp_path, **options)

    cpu, wall = spent("import subprocess, time; subprocess.run(['sleep', '0.2'])")
    assert wall > 0.2 > cpu > 0
    file = tmp_path / "log.jsonl"
    spent(f"open({str(file)!r}, 'w'); import time; time.sleep(600)", until=file)
    with pytest.raises(RuntimeError, match=r"(?s)base: .*python.* failed:.*ZeroDivisionError"):
        spent("1 / 0", until=tmp_path / "never")


def test_a_commit_is_extracted(compare, tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("needs a clone")
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True)
    at = compare.checkout("HEAD", tmp_path)
    assert head.startswith(at.name)
    assert (tmp_path / "vim_ssl" / "cli.py").exists()
    assert not (tmp_path / ".git").exists()
    assert at.environment(A="1").items() >= {"PYTHONPATH": str(tmp_path), "A": "1"}.items()
    assert compare.checkout(None, tmp_path).folder == ROOT


@pytest.mark.slow
def test_measures_run_with_this_commit(compare, monkeypatch, tmp_path):
    measures = importlib.import_module("measures")
    monkeypatch.setattr(measures, "TURN_SECONDS", 0)
    monkeypatch.setattr(measures, "STEPS", 2)
    times = measures.data(tmp_path)()
    assert [name.partition(",")[0] for name in times] == ["data"] * 3
    times["step"] = measures.trained("demo", "sample:mnist5k?split=train&limit=16", tmp_path)
    assert all(min(seconds) > 0 for seconds in times.values())
