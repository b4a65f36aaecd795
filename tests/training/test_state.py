"""What a run records of itself: its state, its plan, and how the page, `compare` and
`vim_ssl.Run` read them."""

import json
import signal

import pytest
from small_run import train

from vim_ssl.report import write_report
from vim_ssl.report.compare import compare_runs
from vim_ssl.results import Run
from vim_ssl.training.run import unfinished
from vim_ssl.training.state import read_state, state_of


def fail():
    raise RuntimeError("<b>no\nmemory</b>")


@pytest.mark.parametrize(
    ("how", "state"),
    [
        ({}, "finished"),
        ({"max_steps": 3}, "finished"),
        ({"stop": lambda training: True, "eval_every": 1}, "stopped early at step 4 of 8"),
        ({"at": {3: lambda: signal.raise_signal(signal.SIGTERM)}},
         "interrupted at step 2 of 8: SIGTERM"),
        ({"at": {3: fail}}, "failed at step 0 of 8: <b>no memory</b>"),
    ],
    ids=["finished", "max_steps", "early", "signal", "error"],
)  # fmt: skip
def test_a_run_records_how_it_ended_and_every_reader_says_so(how, state, tmp_path):
    try:
        train(tmp_path / "run", **how)
    except (SystemExit, RuntimeError):
        assert "at" in how
    assert Run(tmp_path / "run").state == state
    page = write_report(tmp_path / "run").read_text().replace("&lt;", "<").replace("&gt;", ">")
    assert state[0].upper() + state[1:] in page
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    compared = compare_runs([tmp_path / "run", other])
    assert f"<td>{state.replace('<', '&lt;').replace('>', '&gt;')}" in compared
    assert unfinished(tmp_path / "run") == (state if "at" in how else "")


def test_a_run_is_running_until_it_ends_and_a_killed_one_was_interrupted(tmp_path):
    seen = []
    train(tmp_path, {3: lambda: seen.append(Run(tmp_path).state)})
    assert seen == ["running at step 0 of 8"]
    stored = read_state(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps(stored | {"state": "running", "step": 4}))
    killed = "interrupted at step 4 of 8: its process ended without saving"
    assert str(state_of(tmp_path)) == killed
    elsewhere = stored | {"state": "running", "host": "another machine"}
    (tmp_path / "state.json").write_text(json.dumps(elsewhere))
    assert Run(tmp_path).state == "running at step 8 of 8"  # its locks are not seen here
    assert "Still running" in write_report(tmp_path).read_text()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"state": "lost"}', '{"plan": [1]}'])
def test_a_state_that_cannot_be_read_is_that_of_an_earlier_version(content, tmp_path):
    train(tmp_path)
    (tmp_path / "state.json").write_text(content)
    run = Run(tmp_path)
    assert (run.state, run.plan) == ("", {})
    assert "Finished" in write_report(tmp_path).read_text()  # by its log


def test_the_page_and_results_have_the_plan_not_the_means_of_the_log(tmp_path):
    # Four batches an epoch: the second group of an epoch has one batch instead of three.
    train(tmp_path / "run", accumulation=3, base_lr=0.256)
    plan = Run(tmp_path / "run").plan
    assert plan["effective_batch"] == 24
    assert plan["peak_lr"] == pytest.approx(0.024)
    assert (plan["epoch_steps"], plan["total_steps"], plan["processes"]) == (2, 4, 1)
    page = write_report(tmp_path / "run").read_text()
    assert "24 = 8 × 3 (accumulation) × 1 (processes)" in page
    assert ">0.024<" in page
    train(tmp_path / "other", accumulation=1, base_lr=0.256)
    compared = compare_runs([tmp_path / "run", tmp_path / "other"])
    assert "effective batch" in compared
    assert "0.008" in compared


def test_repeated_images_leave_out_the_others_of_an_epoch(tmp_path, capsys):
    train(tmp_path, repeats=3)
    assert "32 images; 21 left out of each epoch" in capsys.readouterr().out
    assert Run(tmp_path).plan["left_out"] == 21
    assert "32, 21 left out of each epoch" in write_report(tmp_path).read_text()
