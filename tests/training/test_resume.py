"""A resumed run depends on the same things as at its beginning, whatever they are called now."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import Mean, Numbers, train

from vim_ssl import load_encoder, save_encoder
from vim_ssl.data import ImageData
from vim_ssl.data.open import open_split
from vim_ssl.models.text import TextEncoder
from vim_ssl.models.tokenizers import train_bpe
from vim_ssl.objectives.clip import Clip
from vim_ssl.objectives.distill import Distill
from vim_ssl.recipes import mim_pretrain
from vim_ssl.training.config import TrainConfig
from vim_ssl.training.resume import check_dependencies, check_settings, located
from vim_ssl.training.run import read_metrics
from vim_ssl.training.schedule import Progress, Schedule
from vim_ssl.training.state import recorded

TINY = ["depth=1", "embed_dim=8", "d_state=4", "img_size=16", "patch_size=8"]
PRETRAIN = [
    "--preset", "cpu_mae", "--model-args", *TINY, "--decoder-dim", "8", "--epochs", "2",
    "--warmup-epochs", "0", "--batch-size", "4", "--workers", "0", "--threads", "1",
    "--trackers", "none", "--log-every", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"{i}.bmp")
    return folder


# ---------------------------------------------------------------- what lies outside


def test_what_a_step_depends_on_outside_the_checkpoint_must_be_the_same(tmp_path):
    train(tmp_path, model=Mean(depends_on={"teacher": "1"}), max_steps=4)
    assert recorded(tmp_path, "depends_on")["teacher"] == "1"
    before = (tmp_path / "config.json").read_text(), (tmp_path / "metrics.jsonl").read_text()
    for other in ({"teacher": "2"},):
        with pytest.raises(ValueError, match=r"the teacher is not that of the run .* changed"):
            train(tmp_path, model=Mean(depends_on=other), resume="auto")
    after = (tmp_path / "config.json").read_text(), (tmp_path / "metrics.jsonl").read_text()
    assert before == after
    train(tmp_path, model=Mean(depends_on={"teacher": "1"}), resume="auto")
    assert read_metrics(tmp_path)[-1]["step"] == 8


@pytest.mark.parametrize("what", ["test data", "validation data", "encoder", "versions"])
def test_a_change_that_no_step_depends_on_is_reported(tmp_path, what, capsys):
    train(tmp_path, depends_on={what: "1"}, max_steps=4)
    stored = json.loads((tmp_path / "state.json").read_text())
    stored["depends_on"][what] = "vim_ssl 0.0"
    (tmp_path / "state.json").write_text(json.dumps(stored))
    capsys.readouterr()
    train(tmp_path, depends_on={what: "2"}, resume="auto")
    printed = capsys.readouterr().out
    assert ("The run began with vim_ssl 0.0" if what == "versions" else what) in printed


def test_a_run_of_an_earlier_version_recorded_nothing_and_goes_on(tmp_path):
    train(tmp_path, max_steps=4)
    (tmp_path / "state.json").unlink()
    train(tmp_path, model=Mean(depends_on={"teacher": "2"}), resume="auto")
    assert read_metrics(tmp_path)[-1]["step"] == 8


def test_a_frozen_teacher_and_the_captions_tower_are_recorded_by_content():
    args = {"depth": 1, "embed_dim": 8, "d_state": 4, "num_classes": 0}
    student = load_encoder("vim_nano_patch8_64", use_mask_token=True, **args)
    teachers = [load_encoder("vim_nano_patch8_64", **args) for _ in range(2)]
    hashes = [Distill(student, teacher).dependencies()["teacher"] for teacher in teachers]
    assert hashes[0] != hashes[1]
    assert Distill(student, teachers[0]).dependencies()["teacher"] == hashes[0]
    assert Distill(student).dependencies() == {}  # its average is in the checkpoint

    def clip(captions: list[str], width: int = 8) -> dict[str, str]:
        tokenizer = train_bpe(captions, vocab_size=300, context_length=8)
        text = TextEncoder(
            tokenizer.vocab_size, eos_id=tokenizer.eos_id, context_length=8, width=width, depth=1,
            heads=1,
        )  # fmt: skip
        return Clip(teachers[0], text, embed_dim=4, tokenizer=tokenizer).dependencies()

    known = clip(["red cat", "blue dog"])
    assert clip(["red cat", "blue dog"]) == known
    assert clip(["green frog", "blue hog"])["tokenizer"] != known["tokenizer"]
    assert clip(["red cat", "blue dog"], width=16)["text"] != known["text"]


# ---------------------------------------------------------------- places


@pytest.mark.parametrize(
    ("key", "what"),
    [("teacher", "teacher"), ("tokenizer", "tokenizer"), ("val", "validation data"),
     ("encoder", "encoder"), ("test_features", "test data"), ("text", "text")],
)  # fmt: skip
def test_a_place_of_another_name_is_accepted_with_the_same_content(tmp_path, key, what):
    stored, now = {key: "here"}, {key: "there"}
    check_settings("run", stored, now, {what: "1"})
    with pytest.raises(ValueError, match=f"was trained with {key} = 'here', not 'there'"):
        check_settings("run", stored, now, {})  # of an earlier version, which did not record it
    (tmp_path / "state.json").write_text(json.dumps({"depends_on": {what: "1"}}))
    assert check_dependencies(tmp_path, stored, now, {what: "1"}) == []
    for other in ({what: "2"}, {}):
        with pytest.raises(ValueError, match=rf"the {what} \(there\) is not that of the run"):
            check_dependencies(tmp_path, stored, now, other)


def test_other_settings_may_not_change():
    with pytest.raises(ValueError, match="was trained with seed = 0, not 1"):
        check_settings("run", {"seed": 0}, {"seed": 1}, {"seed": "known"})
    check_settings("run", {"epochs": 1}, {"epochs": 2}, {})
    check_settings("run", {"encoder": ""}, {"encoder": "runs/newest"}, {})


@pytest.mark.parametrize(
    ("value", "there"),
    [
        ("photos", "{}/photos"),
        ("photos/sub?split=all", "{}/photos/sub?split=all"),
        ("geotiff:photos/*.tif", "geotiff:{}/photos/*.tif"),
        ("3 * photos + sample:aerial", "3 * {}/photos + sample:aerial"),
        ("hf:timm/eurosat", "hf:timm/eurosat"),
        ("../start/photos", "{}/photos"),
        ("vim_nano_patch8_64", "vim_nano_patch8_64"),
        ("/photos", "/photos"),
        ("", ""),
        (None, None),
        (["a"], ["a"]),
    ],
)
def test_relative_places_are_found_from_another_folder(tmp_path, monkeypatch, value, there):
    start, elsewhere = tmp_path / "start", tmp_path / "a/b"
    (start / "photos").mkdir(parents=True)
    elsewhere.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    expected = there.format(start) if isinstance(there, str) else there
    assert located(value, str(start)) == expected
    monkeypatch.chdir(start)
    assert located(value, str(start)) == value


def test_a_folder_of_the_same_first_name_does_not_hide_the_data(tmp_path, monkeypatch):
    start, elsewhere = tmp_path / "start", tmp_path / "elsewhere"
    (start / "data/X").mkdir(parents=True)
    (elsewhere / "data").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    assert located("data/X", str(start)) == f"{start}/data/X"
    assert located("geotiff:data/X/*.tif?split=all", str(start)) == (
        f"geotiff:{start}/data/X/*.tif?split=all"
    )
    assert located("./data/X", str(start)) == f"{start}/data/X"
    assert located("data/Y", str(start)) == "data/Y"
    (elsewhere / "data/X").mkdir()
    assert located("data/X", str(start)) == "data/X"


def test_a_run_goes_on_from_another_folder_and_after_its_data_moved(photos, tmp_path, monkeypatch):
    start = tmp_path / "start"
    start.mkdir()
    shutil.copytree(photos, start / "photos")
    monkeypatch.chdir(start)
    run = str(tmp_path / "run")
    mim_pretrain.main([*PRETRAIN, "--data", "photos", "--output", run, "--max-steps", "1"])
    monkeypatch.chdir(tmp_path)
    mim_pretrain.main(["--output", run, "--resume", "auto", "--max-steps", "2"])
    os.rename(start, tmp_path / "moved")
    there = ["--output", run, "--resume", "auto", "--data", str(tmp_path / "moved/photos")]
    mim_pretrain.main([*there, "--max-steps", "3"])
    assert [row["step"] for row in read_metrics(Path(run))] == [1, 2, 3]
    (tmp_path / "moved/photos/0.bmp").unlink()
    with pytest.raises(ValueError, match="images are not those of the checkpoint"):
        mim_pretrain.main([*there, "--batch-size", "4"])


@pytest.mark.parametrize("kind", ["bmp", "tiff", "masks", "captions"])
def test_images_written_again_with_the_same_sizes_are_refused_and_a_copy_is_not(tmp_path, kind):
    """As a conversion does that is started once more with other settings."""
    here, extension = tmp_path / "here", kind if kind == "tiff" else "bmp"
    rng = np.random.default_rng(0)
    spec = {"masks": "masks:", "captions": "pairs:"}.get(kind, "")
    images, masks = (here / "images", here / "masks") if kind == "masks" else (here, here)
    images.mkdir(parents=True)
    masks.mkdir(exist_ok=True)

    def write(i: int, change: int) -> None:
        pixels = rng.integers(0, 255, (16, 16), np.uint8)
        if kind in ("bmp", "tiff") or not change:
            Image.fromarray(pixels).save(images / f"{i}.{extension}")
        if kind == "masks":
            Image.fromarray(pixels % 2).save(masks / f"{i}.bmp")
        if kind == "captions":
            (here / f"{i}.txt").write_text(f"a house, {change}")

    for i in range(8):
        write(i, 0)
    shutil.copytree(here, tmp_path / "copy", copy_function=shutil.copyfile)
    one = SimpleNamespace(
        num_processes=1, process_index=0, is_main_process=True, device=torch.device("cpu")
    )

    def begin(folder: Path, progress: Progress) -> None:
        data = open_split(f"{spec}{folder}")
        config = TrainConfig(batch_size=4, workers=0, warmup_epochs=0)
        Schedule(data.samples(dict), config, one).check_resume(progress)

    progress = Progress()
    begin(here, progress)
    begin(tmp_path / "copy", progress)
    before = open_split(f"{spec}{here}").fingerprint
    for i in range(8):
        write(i, 1)
    assert open_split(f"{spec}{here}").fingerprint == before
    with pytest.raises(ValueError, match=r"same names, sizes and labels, but another content"):
        begin(here, progress)
    progress.content = ""  # of an earlier version
    begin(here, progress)


def test_the_encoder_that_a_run_started_from_is_known_by_its_weights(photos, tmp_path, capsys):
    args = {"depth": 1, "embed_dim": 8, "d_state": 4, "img_size": 16, "patch_size": 8}
    encoders = [load_encoder("vim_nano_patch8_64", **args) for _ in range(2)]
    for name, encoder in zip("abc", [encoders[0], encoders[0], encoders[1]], strict=True):
        save_encoder(encoder, tmp_path / name)
    run = ["--output", str(tmp_path / "run")]
    begin = [*PRETRAIN, "--data", str(photos), "--encoder", str(tmp_path / "a"), *run]
    mim_pretrain.main([*begin, "--max-steps", "1"])
    resume = [*run, "--resume", "auto"]
    mim_pretrain.main([*resume, "--encoder", str(tmp_path / "b"), "--max-steps", "2"])
    with pytest.raises(ValueError, match=r"the encoder \(.*c\) is not that of the run"):
        mim_pretrain.main([*resume, "--encoder", str(tmp_path / "c")])
    capsys.readouterr()
    save_encoder(encoders[1], tmp_path / "b")  # trained on in the meantime
    mim_pretrain.main([*resume, "--max-steps", "3"])
    assert "has other weights now; the run continues" in capsys.readouterr().out
    scaled = load_encoder(tmp_path / "b", data_config={"mean": (0.1, 0.2, 0.3)})
    save_encoder(scaled, tmp_path / "b")
    with pytest.raises(ValueError, match="the input of the encoder is not that of the run"):
        mim_pretrain.main(resume)


# ---------------------------------------------------------------- length and processes


def test_a_longer_schedule_says_how_the_learning_rate_jumps(tmp_path, capsys):
    train(tmp_path)
    rate = read_metrics(tmp_path)[-1]["lr"]
    capsys.readouterr()
    train(tmp_path, resume="auto", epochs=4)
    printed = capsys.readouterr().out
    rows = read_metrics(tmp_path)
    assert (
        "The schedule has 4 epochs instead of 2: the learning rate of the next step is" in printed
    )
    assert f"{rows[8]['lr']:.3g}, that of the last step was {rate:.3g}" in printed
    train(tmp_path, resume="auto", epochs=4)
    assert "The schedule has" not in capsys.readouterr().out


def processes(schedule, progress, count: int, batch: int):
    progress.processes, progress.effective_batch = count, batch
    return schedule.check_resume(progress)


def test_another_number_of_processes_needs_the_same_effective_batch():
    one = SimpleNamespace(
        num_processes=1, process_index=0, is_main_process=True, device=torch.device("cpu")
    )
    config = TrainConfig(batch_size=8, workers=0, warmup_epochs=0)
    schedule = Schedule(ImageData.samples(Numbers(32), dict), config, one)
    progress = Progress()
    assert schedule.check_resume(progress) == ""
    assert "The run began with 2 processes, now 1" in processes(schedule, progress, 2, 8)
    assert processes(schedule, progress, 0, 0) == ""  # a checkpoint of an earlier version
    with pytest.raises(
        ValueError, match=r"effective batch was 16, now 8\. Resume with 2 processes"
    ):
        processes(schedule, progress, 2, 16)
    progress.epoch_batches = 2
    with pytest.raises(ValueError, match=r"Resume with 2 processes \(accelerate launch --num_pro"):
        processes(schedule, progress, 2, 16)
    with pytest.raises(ValueError, match="same data and the same number of processes"):
        processes(schedule, progress, 0, 0)
