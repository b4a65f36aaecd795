"""The profile of what surrounds training: stages that follow one another, and their table."""

import importlib
import time
from pathlib import Path

import pytest


@pytest.fixture
def costs(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the script sets
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("costs")


def test_stages_follow_one_another_and_count_per_image(costs, monkeypatch):
    clock = iter(range(0, 1000, 8))
    monkeypatch.setattr(time, "process_time", lambda: next(clock))
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    stages = costs.Clock()
    assert stages.add("images", lambda: "result", of=4) == "result"
    stages.stop("the rest")
    assert stages.stages == [("images", 2.0, 0.0), ("the rest", 8.0, 0.0)]


def test_the_table_has_the_newest_run_alone(costs):
    rows = [{"run": run, "part": "data", "stage": f"read {run}", "cpu_seconds": "0.0125"}
            for run in ("1", "2", "2")]  # fmt: skip
    lines = costs.table(rows).splitlines()
    assert lines[2:] == ["| data | read 2 | 12.5 |"] * 2
