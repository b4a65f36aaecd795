"""Checkpoints are whole or absent, and a damaged or stray neighbour costs nothing."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import Mean, train

from vim_ssl.training import checkpoint
from vim_ssl.training.checkpoint import Checkpoints
from vim_ssl.training.run import read_metrics


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run of eight steps with checkpoints of the third and the sixth."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    train(folder, save_steps=3, max_steps=6)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> torch.Tensor:
    """The weight after eight steps without a stop."""
    return train(tmp_path_factory.mktemp("whole")).weight.detach()


@pytest.fixture
def run(stopped, tmp_path) -> Path:
    return shutil.copytree(stopped, tmp_path / "run")


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder)]


def test_a_run_goes_on_from_its_newest_checkpoint_and_logs_each_step_once(run, whole, capsys):
    with open(run / "metrics.jsonl", "a") as log:  # of steps after the checkpoint, and of a kill
        log.write('{"step": 7, "loss": 1.0}\n[1]\n\n{"step": "x"}\n{"step": 8, "lo')
    assert torch.equal(train(run, resume="auto").weight, whole)
    assert "Resumed at step 6" in capsys.readouterr().out
    assert steps(run) == list(range(1, 9))


@pytest.mark.parametrize(
    "name",
    ["step-3.bak", "step-9 (copy)", "._step-12", ".DS_Store", "step-", "step-x", "damaged-step-9"],
)
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_strangers_among_the_checkpoints_are_passed_over(run, name, kind, capsys):
    stranger = run / "checkpoints" / name
    shutil.copytree(run / "checkpoints/step-3", stranger) if kind == "folder" else stranger.touch()
    (run / "checkpoints/step-99").touch()  # a file, though of such a name
    assert [path.name for path in Checkpoints(run).checkpoints()] == ["step-3", "step-6"]
    if kind == "folder":
        train(run, resume="auto")
        assert "Resumed at step 6" in capsys.readouterr().out
        assert stranger.is_dir()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))  # as a disk may leave it after a power failure


DAMAGES = {"truncated": truncate, "zeros": overwrite, "missing": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "progress.json"])
def test_a_damaged_checkpoint_is_named_and_the_older_one_is_used(run, whole, name, damage, capsys):
    DAMAGES[damage](run / "checkpoints/step-6" / name)
    assert torch.equal(train(run, resume="auto").weight, whole)
    printed = capsys.readouterr().out
    assert f"step-6 is damaged ({name}" in printed
    assert "Resumed at step 3" in printed
    assert (run / "checkpoints/damaged-step-6").is_dir()
    assert steps(run) == list(range(1, 9))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin"])
def test_a_damaged_checkpoint_of_an_earlier_version_is_noticed(run, name, damage, capsys):
    """It did not record the sizes of its files."""
    progress = run / "checkpoints/step-6/progress.json"
    progress.write_text(json.dumps({"step": 6, "epoch": 1, "batch": 2}))
    DAMAGES[damage](progress.with_name(name))
    train(run, resume="auto")
    assert f"step-6 is damaged ({name}" in capsys.readouterr().out


def test_without_a_whole_checkpoint_nothing_is_overwritten(run):
    for step in (3, 6):
        truncate(run / f"checkpoints/step-{step}/optimizer.bin")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"step-6 is damaged .*step-3 is damaged .*no older one"):
        train(run, resume="auto")
    assert (run / "metrics.jsonl").read_bytes() == before
    assert (run / "checkpoints/step-6").is_dir()


def test_a_trained_model_whose_checkpoints_are_gone_is_not_overwritten(run):
    shutil.rmtree(run / "checkpoints")
    (run / "encoder.safetensors").write_bytes(b"trained")
    for resume in ("auto", "never"):
        with pytest.raises(FileExistsError, match="no checkpoint to resume from"):
            train(run, resume=resume)
    assert (run / "encoder.safetensors").read_bytes() == b"trained"
    assert steps(run) == list(range(1, 7))


def test_a_checkpoint_has_everything_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls: list[tuple[str, Path]] = []
    fsync, replace = checkpoint.fsync_path, os.replace
    monkeypatch.setattr(
        checkpoint, "fsync_path", lambda path: (calls.append(("sync", path)), fsync(path))
    )

    def renamed(source, target):
        if Path(source).name.startswith("partial-"):
            files = {path for path in Path(source).rglob("*") if path.is_file()}
            assert Path(source, "progress.json") in files
            assert files <= {path for kind, path in calls if kind == "sync"}
            calls.append(("rename", Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", renamed)
    train(tmp_path)
    assert calls[-2:] == [
        ("rename", tmp_path / "checkpoints/step-8"), ("sync", tmp_path / "checkpoints"),
    ]  # fmt: skip


def test_what_a_killed_save_has_left_is_removed_at_the_start(run):
    leftover = run / "checkpoints/partial-7"
    shutil.copytree(run / "checkpoints/step-6", leftover)
    train(run, resume="auto", max_steps=6)
    assert not leftover.exists()


def test_the_settings_are_replaced_whole_or_not_at_all(run, monkeypatch):
    before, replace = (run / "config.json").read_text(), Path.replace

    def full(self, target):
        if Path(target).name == "config.json":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            train(run, resume="auto", epochs=3)
    assert (run / "config.json").read_text() == before


def test_the_model_is_written_before_the_checkpoint_of_its_step(tmp_path):
    """A run that is killed in between repeats steps; it never ends with an older model."""
    present: list[list[str]] = []

    def save(folder: Path, **_) -> None:
        present.append(sorted(path.name for path in (folder / "checkpoints").glob("step-*")))

    train(tmp_path, save=save, save_steps=4)
    assert present[:2] == [[], ["step-4"]]


def test_previews_are_computed_in_eval_mode_and_training_goes_on_in_its_own(tmp_path):
    model = train(tmp_path, model=Mean(), eval_every=1)
    assert model.modes == [(True, True)] * 4 + [(False, False)] + [(True, True)] * 4 + [
        (False, False)
    ]
    assert model.training


def test_images_that_could_not_be_read_stay_counted_after_a_resume(tmp_path):
    train(tmp_path, broken=range(8), max_steps=4)
    assert read_metrics(tmp_path)[-1]["skipped"] == 8
    train(tmp_path, resume="auto")
    assert {row["skipped"] for row in read_metrics(tmp_path)[4:]} == {8}


def test_weights_are_those_of_the_newest_checkpoint(run):
    newest = load_file(run / "checkpoints/step-6/model.safetensors")["weight"]
    older = load_file(run / "checkpoints/step-3/model.safetensors")["weight"]
    model = train(run, resume="auto", max_steps=6)
    assert torch.equal(model.weight.detach(), newest)
    assert not torch.equal(newest, older)
