"""What the studies share: costs measured in turns and remembered, runs of which one may fail."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import pathlib, sys
out, _, name, number = sys.argv[2:]
assert sys.argv[1] == "--out"
if name == "bad":
    sys.exit("no such arm")
(pathlib.Path(out) / f"{name}-{number}").touch()
"""


@pytest.fixture(scope="module")
def campaign():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("campaign")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_costs_are_measured_in_turns_once(campaign, tmp_path):
    """The first turn, which compiles, does not count, and of three the one that was disturbed
    does not either."""
    spent = {"a": iter([90.0, 10.0, 70.0, 12.0]), "b": iter([90.0, 4.0, 6.0, 5.0])}
    asked = []

    def train(arm: str, steps: int) -> float:
        asked.append(arm)
        return next(spent[arm]) * steps

    file = tmp_path / "costs.csv"
    expected = {"a": 12.0, "b": 5.0}
    assert campaign.costs(file, "digits", ["a", "b"], train, steps=2) == expected
    assert asked == ["a", "b"] * 4
    assert campaign.costs(file, "digits", ["a", "b"], train) == expected
    assert len(asked) == 8
    with pytest.raises(StopIteration):  # of other data nothing is remembered
        campaign.costs(file, "colour", ["a"], train)


def test_a_run_that_fails_is_told_and_the_others_go_on(campaign, tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    jobs = [("a", 0), ("bad", 1), ("b", 2)]
    assert campaign.run_jobs(str(script), tmp_path, jobs, 2) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"script.py", "a-0", "b-2"}
    told = capsys.readouterr().out
    assert "bad 1 failed:\nno such arm" in told
    assert "a 0 \n" in told
