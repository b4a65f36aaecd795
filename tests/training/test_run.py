"""The run that commands choose, and whether it is finished; the command that resumes one."""

import json
import sys

import pytest

from vim_ssl.training.run import (
    Run,
    evaluation_folder,
    newest_run,
    pretrained_on,
    resume_command,
    unfinished,
)


def make(folder, step: int = 4, recipe: str = "mim_pretrain", **config):
    """A run of two epochs of ten steps, with a checkpoint."""
    (folder / "checkpoints" / f"step-{step}").mkdir(parents=True)
    progress = {"step": step, "epoch_steps": 10}
    (folder / f"checkpoints/step-{step}/progress.json").write_text(json.dumps(progress))
    (folder / "config.json").write_text(json.dumps({"recipe": recipe, "epochs": 2} | config))
    for model in ("encoder", "clip"):
        (folder / f"{model}.safetensors").touch()
    return folder


@pytest.mark.parametrize(
    ("step", "config", "state"),
    [
        (4, {}, "step 4 of 20"),
        (20, {}, ""),
        (4, {"max_steps": 4}, ""),
        (3, {"max_steps": 4}, "step 3 of 4"),
        (1100, {"epochs": 200}, "step 1,100 of 2,000"),
    ],
)
def test_an_unfinished_run_has_steps_left(tmp_path, step, config, state):
    assert unfinished(make(tmp_path / "run", step, **config)) == state


def test_a_run_with_a_result_is_finished_and_one_without_checkpoints_unknown(tmp_path):
    run = make(tmp_path / "run")
    (run / "metrics.json").write_text("{}")  # as after early stopping
    assert unfinished(run) == ""
    assert unfinished(tmp_path) == ""


@pytest.mark.parametrize("recipe", ["mim_pretrain", "clip_pretrain"])
def test_choosing_an_unfinished_run_is_reported(tmp_path, capsys, monkeypatch, recipe):
    run = make(tmp_path / "runs" / "one", recipe=recipe)
    kind = "clip_pretrain" if recipe == "clip_pretrain" else "pretrain"
    assert newest_run(tmp_path / "runs", kind) == run
    assert capsys.readouterr().out == f"The newest run, {run}, is unfinished: step 4 of 20.\n"
    monkeypatch.setenv("RANK", "1")
    newest_run(tmp_path / "runs", kind)
    make(run, 20, recipe=recipe)
    monkeypatch.delenv("RANK")
    newest_run(tmp_path / "runs", kind)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("script", "processes", "command"),
    [
        ("vim-ssl mim-pretrain", 1, "vim-ssl mim-pretrain --output 'a run' --resume auto"),
        ("recipes/mim_pretrain.py", 1,
         "python recipes/mim_pretrain.py --output 'a run' --resume auto"),
        ("my_script.py", 1, "vim-ssl mim-pretrain --output 'a run' --resume auto"),
        ("recipes/mim_pretrain.py", 2, "accelerate launch (options as before) "
         "recipes/mim_pretrain.py --output 'a run' --resume auto"),
    ],
)  # fmt: skip
def test_the_command_to_resume_is_the_one_that_started_the_run(
    monkeypatch, tmp_path, script, processes, command
):
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.chdir(tmp_path)
    run = Run("a run")
    run.recipe = "mim_pretrain"
    assert resume_command(run, processes) == command


@pytest.mark.parametrize(
    ("recipe", "trained", "spec", "split", "seen"),
    [
        ("mim_pretrain", "photos", "", "held out", True),
        ("mim_pretrain", "photos", "photos", "test", False),  # its training split alone
        ("mim_pretrain", "photos?split=all", "photos", "test", True),
        ("clip_pretrain", "pairs:photos", "photos", "held out", True),
        ("mim_pretrain", "photos", "others", "held out", False),
        ("finetune", "photos", "", "held out", False),  # holds the same images out
    ],
)
def test_pretraining_on_test_images_is_known(
    recipe, trained, spec, split, seen, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"recipe": recipe, "data": trained}))
    assert pretrained_on("run", spec, split) is seen


def test_evaluations_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20260102-030405")
    names = [evaluation_folder().name for _ in range(3)]
    assert names == [f"evaluation-20260102-030405{end}" for end in ("", "-2", "-3")]
