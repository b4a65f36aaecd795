"""Pretraining of timm's encoders by the recipes: exact resume, several processes, files of timm."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from processes import finish, start
from safetensors.torch import load_file
from timm_encoders import CNN, VIT, WHOLE, flags

from vim_ssl import cli, load_encoder, load_model
from vim_ssl.checkpoints.verify import verify
from vim_ssl.recipes import mim_pretrain, supervised_pretrain
from vim_ssl.training.run import read_metrics

RECIPE = Path(mim_pretrain.__file__)
QUICK = [
    "--threads", "1", "--workers", "0", "--warmup-epochs", "0", "--log-every", "1", "--trackers",
    "none", "--epochs", "2",
]  # fmt: skip
MAE = ["--preset", "cpu_mae", "--decoder-dim", "32", "--decoder-depth", "1", "--crop-scale", "0.5",
       "1", *QUICK, "--eval-every", "100"]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for i in range(16):
        (folder / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        values = rng.integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(values).save(folder / f"class{i % 2}" / f"{i:02}.bmp")
    return folder


def arguments(encoder, output, photos, *more: str) -> list[str]:
    source, args = encoder
    return ["--encoder", source, "--model-args", *flags(args), "--data", str(photos),
            "--output", str(output), *more]  # fmt: skip


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run)]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mae", "simmim", "distill"])
def test_resume_is_bit_identical(tmp_path, photos, objective):
    """With drop path, whose draws a resumed run repeats; the stop is inside an epoch."""
    vit = VIT[0], VIT[1] | {"drop_path_rate": 0.3}
    what = (*MAE, "--objective", objective, "--batch-size", "4", "--mask-unit", "8")
    for name, *parts in (("whole", ()), ("parts", ("--max-steps", "3"), ("--resume", "auto"))):
        for part in parts:
            mim_pretrain.main([*arguments(vit, tmp_path / name, photos, *what), *part])
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = (load_file(tmp_path / n / "encoder.safetensors") for n in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, photos):
    what = (*MAE, "--mask-unit", "8", "--optimizer", "sgd", "--base-lr", "0.1")
    mim_pretrain.main(arguments(VIT, tmp_path / "one", photos, *what, "--batch-size", "8"))
    finish(start(
        2, RECIPE, *arguments(VIT, tmp_path / "two", photos, *what, "--batch-size", "4")
    ))  # fmt: skip
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, two = (load_file(tmp_path / n / "encoder.safetensors") for n in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("encoder", [VIT, CNN], ids=["vit", "cnn"])
def test_a_supervised_run_is_a_model_of_timm_and_of_this_package(tmp_path, photos, encoder):
    run = tmp_path / "run"
    supervised_pretrain.main(arguments(
        encoder, run, photos, *QUICK, "--batch-size", "8", "--ema", "0.9", "--test", "0.25",
        "--layer-decay", "0.8",
    ))  # fmt: skip
    source, args = encoder
    name = source.removeprefix("timm:")
    encoder = load_encoder(run, num_classes=None)
    assert encoder.classes == ["class0", "class1"]
    images = torch.randn(2, *encoder.input_shape)
    for file, ema in (("encoder.safetensors", False), ("encoder_ema.safetensors", True)):
        model = timm.create_model(name, num_classes=2, checkpoint_path=run / file, **args).eval()
        assert torch.equal(load_encoder(run, num_classes=None, ema=ema)(images), model(images))
    prediction = load_model(run).predict(photos / "class0" / "00.bmp")
    assert prediction.classes == ["class0", "class1"]
    assert verify(run).loads, verify(run)
    assert f"{name} of timm" in (run / "report.html").read_text("utf-8")
    described = json.loads((run / "encoder.json").read_text())
    assert described["made_by"]["trainings"]  # which images it saw
    other = shutil.copytree(run, tmp_path / "other")
    assert cli.main(["compare", str(run), str(other), "--output", str(tmp_path / "both")]) == 0


@pytest.mark.parametrize("objective", ["mae", "simmim", "ar", "distill"])
@pytest.mark.parametrize("encoder", WHOLE.values(), ids=WHOLE)
def test_the_recipe_says_what_the_architecture_lacks(tmp_path, photos, objective, encoder):
    argv = arguments(encoder, tmp_path / "run", photos, *MAE, "--objective", objective)
    with pytest.raises(ValueError, match=r"whose layers need the whole image|only a Vim reads in"):
        mim_pretrain.main(argv)
    assert not (tmp_path / "run").exists()
