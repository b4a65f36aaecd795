"""The CPU benchmarks: what is repeated, resumed, compared and counted, without measuring."""

import importlib
import math
import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch):
    """Import a module of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def cpu(module):
    return module("cpu")


def measurement(cpu, what: str, runs: int = 1, part: str = "scan", value: str = "x"):
    return cpu.Measurement(part, what, "1 thread", value, dict, (), runs)


@pytest.fixture
def measure(cpu, monkeypatch):
    """Measure without a process: (measurements, known rows) -> rows, counted from 1."""

    def measure(measurements, known=()):
        count = iter(range(1, 100))
        monkeypatch.setattr(cpu, "run_apart", lambda *_: {"x": (float(next(count)), "ms")})
        rows: list[dict] = []
        table = cpu.measure_all(measurements, list(known), rows.extend)
        return rows, table

    return measure


def test_runs_are_repeated_in_turns(cpu, measure):
    plan = [measurement(cpu, "a", 2), measurement(cpu, "b", 2), measurement(cpu, "c", part="step")]
    rows, table = measure(plan)
    assert [(row["what"], row["conditions"], row["value"]) for row in rows] == [
        ("a, x", "1 thread; run 1 of 2", 1.0),
        ("b, x", "1 thread; run 1 of 2", 2.0),
        ("a, x", "1 thread; run 2 of 2", 3.0),
        ("b, x", "1 thread; run 2 of 2", 4.0),
        ("c, x", "1 thread", 5.0),
    ]
    medians = {row["what"]: row for row in cpu.derived(table)}
    assert medians["a, x"] == {
        "what": "a, x", "value": 2.0, "unit": "ms", "conditions": "1 thread; median of 2 runs"
    }  # fmt: skip
    assert "c, x" not in medians
    assert table.ratio(("b, x", "1 thread"), ("a, x", "1 thread")) == (2 / 1 + 4 / 3) / 2


def test_rows_of_an_interrupted_benchmark_are_kept(cpu, measure):
    plan = [measurement(cpu, "a", 2), measurement(cpu, "a, b", 2)]
    first, _ = measure(plan)
    again, table = measure(plan, first[:2])
    assert [(row["what"], row["conditions"]) for row in again] == [
        ("a, x", "1 thread; run 2 of 2"), ("a, b, x", "1 thread; run 2 of 2")
    ]  # fmt: skip
    assert table.values["a, x", "1 thread"] == {1: 1.0, 2: 1.0}
    assert measure(plan, first)[0] == []


@pytest.fixture
def command(cpu, monkeypatch, tmp_path):
    """Run the command on the scan: (options, where) -> what it measured, and all its rows."""
    measured: list[float] = []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # restored afterwards

    def scan(_, direction, sketch, turns):
        measured.append(float(len(measured)))
        return dict.fromkeys(["numba", "C++"] if sketch else ["numba"], (measured[-1], "ms"))

    def command(*options: str, **changes: str):
        here = {"date": "today", "commit": "abc", "hardware": "h", "versions": "v", **changes}
        monkeypatch.setattr(cpu, "origin", lambda: here)
        monkeypatch.setattr(cpu, "run_apart", scan)
        monkeypatch.setattr("sys.argv", ["", "--only", "scan", "--out", str(tmp_path), *options])
        before = len(measured)
        cpu.main()
        rows = cpu.read_rows(tmp_path / cpu.FILE)
        return measured[before:], [row for row in rows if row["what"] != "load before"]

    return command


SKETCH = "sketch.so"


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ((), {"commit": "other"}),
        ((), {"hardware": "other"}),
        ((), {"versions": "other"}),
        (("--turns", "40"), {}),
        (("--runs", "2"), {}),
        (("--sketch", SKETCH), {}),
    ],
    ids=["commit", "hardware", "versions", "turns", "runs", "sketch"],
)
def test_rows_of_other_measurements_are_not_resumed(command, options, changes, tmp_path):
    (tmp_path / SKETCH).write_bytes(b"1")
    options = [str(tmp_path / word) if word == SKETCH else word for word in options]
    assert command("--runs", "3")[0] == [0, 1, 2, 3, 4, 5]  # forward and backward in turns
    assert command("--runs", "3")[0] == []
    runs = 2 if "--runs" in options else 3
    values, rows = command("--runs", "3", *options, **changes)
    assert values == [float(6 + i) for i in range(2 * runs)]
    *_, median = (row for row in rows if row["what"] == "scan forward, numba")
    assert float(median["value"]) == 5 + runs
    library = ", C++ 6b86b273" if "--sketch" in options else ""
    assert median["conditions"].endswith(f" turns{library}; median of {runs} runs")
    if "--sketch" in options:  # of the same name
        assert command("--runs", "3", *options)[1] == rows
        (tmp_path / SKETCH).write_bytes(b"2")
        assert len(command("--runs", "3", *options)[0]) == 6


@pytest.mark.parametrize("commit", ["abc-dirty", "unknown"])
def test_rows_of_code_without_a_name_are_not_resumed(command, commit):
    command(commit=commit)
    values, rows = command(commit=commit)
    assert len(values) == 10
    assert len(rows) == 2 * 12  # with the medians


def test_the_duration_of_a_training_is_in_its_rows(cpu):
    for seconds in (8.0, 0.5):
        plan = [one for one in cpu.plan(5, 30, seconds, "") if one.part == "waiting"]
        assert {one.conditions_of(1) for one in plan} == {f"{cpu.DEMO}; {seconds:g} s; run 1 of 5"}


def test_every_value_of_the_plan_is_recognised_when_resumed(cpu):
    """Else an earlier row would stand for two measurements."""
    plan = cpu.plan(5, 30, 8.0, "")
    keys = [(f"{one.what}, {one.value}", one.conditions) for one in plan]
    assert len(set(keys)) == len(keys)
    assert {one.part for one in plan} == set(cpu.PARTS)
    compared = {key for _, *pair in cpu.ratios() for key in pair}
    assert compared <= set(keys)


@pytest.mark.parametrize(
    ("policy", "variables"),
    [
        ("passive", {}),
        ("active", {"OMP_WAIT_POLICY": "active"}),
        ("default", {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}),
    ],
)
def test_a_policy_is_all_that_its_process_reads(cpu, monkeypatch, policy, variables):
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    before = dict(os.environ)
    with cpu.environment(cpu.WAITING[policy]):
        names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
        assert {k: os.environ[k] for k in names if k in os.environ} == variables
    assert dict(os.environ) == before


def test_the_busy_processes_end_with_the_measurement(cpu, monkeypatch):
    started, popen = [], cpu.subprocess.Popen
    monkeypatch.setattr(
        cpu.subprocess, "Popen", lambda *args: started.append(popen(*args)) or started[-1]
    )
    alive: list = []

    def interrupted():
        with cpu.neighbours(2):
            time.sleep(0.1)
            alive.extend(process.poll() is None for process in started)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert alive == [True, True]
    assert all(process.poll() is not None for process in started)


@pytest.mark.parametrize(
    ("ratios", "pixels"),
    [
        ({500: 2.0, 1000: 0.5}, 500 * 2**0.5),
        ({500: 2.0, 700: 0.9, 800: 1.1, 1000: 1 / 1.1}, (800 * 1000) ** 0.5),  # the last one
        ({500: 0.9, 1000: 0.5}, 500),
        ({500: 2.0, 1000: 1.5}, math.inf),
    ],
    ids=["between", "twice", "below", "beyond"],
)
def test_the_crossover_is_interpolated(module, ratios, pixels):
    assert module("cpu_models").crossing(ratios) == pytest.approx(pixels)


def test_without_all_sizes_there_is_no_crossover(module):
    assert math.isnan(module("cpu_models").crossing({500: 2.0, 700: math.nan, 1000: 0.5}))


@pytest.mark.parametrize(
    ("what", "value", "text"),
    [
        ("crossover with DeiT-Ti", 800, "at most 800: met"),
        ("crossover with DeiT-Ti", math.inf, "at most 800: missed"),
        ("waiting, passive, beside 1 busy process / alone", 0.44, "at least 0.45: missed"),
        ("training, demo, step", 1, ""),
    ],
)
def test_a_value_is_compared_with_its_target(cpu, what, value, text):
    assert cpu.verdict(what, value) == text


def test_targets_are_those_of_values_that_are_measured(cpu):
    known = {f"{one.what}, {one.value}" for one in cpu.plan(5, 30, 8.0, "")}
    known |= {what for what, *_ in cpu.ratios()} | {"crossover with DeiT-Ti"}
    by_ratio = {"encoder 224 px, Vim-Ti / DeiT-Ti", "scan forward, numba's operator / C++"}
    assert cpu.TARGETS.keys() <= known | by_ratio


class Twice(nn.Module):
    """Saves its input, its weight, and a product that two operators save."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10))

    def forward(self, x):
        y = x * self.weight
        return y.square() + y[:, :5].exp().sum()  # exp saves its output, square y


def test_saved_bytes_are_those_of_storages_once_without_parameters(module):
    x = torch.ones(8, 10)
    expected = 4 * (8 * 10 + 8 * 10 + 8 * 5)  # x, y, exp's output
    model = Twice()
    assert module("process").saved_bytes(lambda: model(x), model.parameters()) == expected


def test_the_steps_of_a_preset_are_timed(module, monkeypatch):
    training = module("cpu_training")
    monkeypatch.setattr(training, "STEPS", 6)
    torch.set_num_threads(2)  # the measurement sets its number
    steps, batch = training.training_steps(
        "demo", 1, 100.0, time.process_time, batch_size=4, decoder_dim=16,
        model_args={"depth": 1, "embed_dim": 16},
    )  # fmt: skip
    assert torch.get_num_threads() == 1
    assert (len(steps), batch) == (6 - training.WARM_UP - 1, 4)
    assert all(0 < seconds < 10 for seconds in steps)
