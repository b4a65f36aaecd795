"""The help of every script that appends rows to a tracked CSV file, and the paper presets."""

import importlib
import json
from pathlib import Path

import pytest
from processes import run

from vim_ssl.data import boxed_splits, labelled_splits, masked_splits
from vim_ssl.downstream import detection, finetune, segmentation, video
from vim_ssl.recipes import clip_pretrain, mim_pretrain, supervised_pretrain
from vim_ssl.training import loop as training

ROOT = Path(__file__).parents[2]
SCRIPTS = (
    "compare_commits",
    "costs",
    "cpu",
    "dense",
    "dense_transfer",
    "digits",
    "efficiency",
    "emoji_clip",
    "exits",
    "gpu_check",
    "learning/study",
    "long_video",
    "objectives",
    "presets",
    "readers",
    "resume",
    "step_profile",
    "transfer",
    "slides",
)
# One preset of every made-up set, with what makes it small.
SMALLER = {
    "ade20k_upernet_tiny": {
        "short_side": 64, "crop": 64, "slide": 43, "taps": (0, 1, 2, 3), "channels": 16},
    "coco_cascade_tiny": {
        "size": 64, "channels": 16, "convs": 0, "hidden": 32, "anchor": 8, "samples": 16},
    "kinetics_small": {},
}  # fmt: skip
HELP = """
import contextlib, io, json, runpy, sys
texts = []
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    run = runpy.run_path if name.endswith(".py") else runpy.run_module
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        run(name, run_name="__main__")
    texts.append(out.getvalue())
print(json.dumps(texts))
"""


def test_every_preset_for_gpus_is_measured_through_the_trainer(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    presets = importlib.import_module("presets")
    for_a_cpu = {"demo", "mae_nano_64", "offline_rgb", "emoji_clip"}
    scripts = (mim_pretrain, supervised_pretrain, clip_pretrain, finetune, segmentation, detection,
               video)  # fmt: skip
    named = {name for script in scripts for name in script.PRESETS if not name.startswith("cpu_")}
    assert {name for name in named if not name.endswith("_minute")} - for_a_cpu == set(presets.OF)
    assert presets.runner.fit is training.fit


def test_made_up_data_of_the_presets_can_be_read(monkeypatch, tmp_path):
    """With a training and a test part, and the number of classes that shapes the heads."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    presets = importlib.import_module("presets")
    parts = {}
    for name, make, opened in (
        ("pixels", presets.labelled_pixels, masked_splits),
        ("objects", presets.outlined_objects, boxed_splits),
        ("clips", presets.moving_images, labelled_splits),
    ):
        parts[name] = opened(make(tmp_path / name), 0.2, 0)
    sizes = {name: (len(train), len(test)) for name, (train, test) in parts.items()}
    assert sizes == {"pixels": (8, 1), "objects": (8, 1), "clips": (7, 2)}
    assert {name: len(train.classes) for name, (train, _) in parts.items()} == {
        "pixels": 150, "objects": 80, "clips": 2,
    }  # fmt: skip
    (clip,) = parts["clips"][0][0]["image"].clips()
    assert len(clip) == presets.FRAMES
    assert parts["objects"][0].has_outlines


@pytest.mark.slow
@pytest.mark.parametrize("preset", SMALLER)
def test_a_preset_of_every_made_up_set_trains(preset, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    presets = importlib.import_module("presets")
    script = presets.OF[preset]
    changes = {
        "data": presets.SMALL_DATA[script.data](tmp_path / "data"), "encoder": "vim_nano_patch8_64",
        "batch_size": 2, "max_steps": 3, "workers": 0, "log_every": 1, "threads": 1,
        "precision": "no",  # of a process all trainings have the first one's
    }  # fmt: skip
    row = presets.train(preset, tmp_path / "run", changes | SMALLER[preset])
    assert row["preset"] == preset
    assert min(row[key] for key in ("cpu_seconds_a_step", "trained_parameters", "full_hours")) > 0


@pytest.mark.slow
def test_every_option_has_help_with_its_default_and_rows_can_go_elsewhere():
    folder = ROOT / "benchmarks"
    names = [str(folder / f"{name}.py") for name in SCRIPTS]
    names.append(str(folder / "kernels" / "timing.py"))
    paths = [str(path) for path in (ROOT, folder, folder / "learning", folder / "kernels")]
    done = run(f"import sys; sys.path[:0] = {paths}\n{HELP}", *names)
    assert done.returncode == 0, done.stderr
    for name, text in zip(names, json.loads(done.stdout), strict=True):
        options = text.split("\n  --")[1:]
        assert any(option.startswith("out FOLDER") for option in options), name
        for option in options:
            assert "(default:" in option, f"{name}: {option}"
