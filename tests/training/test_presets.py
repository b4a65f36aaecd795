"""The preset of a recipe that was given none: by the machine and the user's images."""

import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from vim_ssl.recipes import clip_pretrain, mim_pretrain, supervised_pretrain
from vim_ssl.training.presets import short_side
from vim_ssl.utils.config import parse

RECIPES = {
    "mim": (mim_pretrain, "", "cpu_mae", "mae_small_224"),
    "clip": (clip_pretrain, "pairs:", "cpu_clip", "cc3m_small_224"),
    "supervised": (supervised_pretrain, "", "cpu_supervised", "vim_small_224"),
}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def fill(folder, count: int, side: int) -> str:
    """Images of ``side`` x 1.5 ``side`` px in two classes, with captions."""
    for i in range(count):
        path = folder / f"class{i % 2}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (3 * side // 2, side), i % 256).save(path)
        path.with_suffix(".txt").write_text(f"image {i}")
    return str(folder)


def chosen(recipe, *argv: str):
    return parse(recipe.Config, recipe.PRESETS, argv, default_preset=recipe.default_preset)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("side", "suffix"), [(28, "_32"), (40, "_32"), (48, ""), (300, "")])
def test_on_a_cpu_it_fits_the_size_of_the_images(tmp_path, capsys, recipe, side, suffix):
    module, scheme, preset, _ = RECIPES[recipe]
    config = chosen(module, "--data", f"{scheme}{fill(tmp_path, 20, side)}")
    assert config.preset == f"{preset}{suffix}"
    encoder = module.PRESETS[config.preset]()
    assert (config.encoder, config.model_args) == (encoder.encoder, encoder.model_args)
    output = capsys.readouterr().out
    assert f"Preset {preset}{suffix}, as there is no GPU and the images are about {side} px" in (
        output
    )
    assert "--preset NAME chooses another" in output
    assert output.count("\n") == 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_on_a_gpu_it_is_the_paper_preset(tmp_path, capsys, monkeypatch, recipe):
    module, scheme, _, preset = RECIPES[recipe]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    data = f"{scheme}{fill(tmp_path, 6, 28)}"
    assert chosen(module, "--data", data).preset == preset
    assert f"Preset {preset}, as there is a GPU" in capsys.readouterr().out
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert chosen(module, "--data", data).preset.startswith("cpu_")


@pytest.mark.parametrize(
    ("count", "batch"), [(10, 10), (64, 64), (65, 64), (100, 50), (140, 46), (256, 64)]
)
def test_the_batch_leaves_out_no_image_needlessly(tmp_path, capsys, count, batch):
    data = fill(tmp_path, count, 64)
    assert chosen(mim_pretrain, "--data", data).batch_size == batch
    assert (f"with a batch of {batch}" in capsys.readouterr().out) == (batch != 64)
    assert chosen(mim_pretrain, "--data", data, "--batch-size", "8").batch_size == 8
    assert "with a batch" not in capsys.readouterr().out
    assert chosen(mim_pretrain, "--data", data, "--preset", "cpu_mae").batch_size == 64


def test_an_encoder_that_is_given_keeps_its_shape(tmp_path):
    given = ("--data", fill(tmp_path, 6, 28), "--encoder", "vim_tiny_patch16_224")
    assert chosen(mim_pretrain, *given).model_args == {}
    given = (*given, "--model-args", "depth=1")
    assert chosen(mim_pretrain, *given).model_args == {"depth": 1}


def test_data_that_cannot_be_opened_is_left_to_the_recipe_to_report(tmp_path, capsys):
    assert chosen(mim_pretrain, "--data", str(tmp_path / "none")).preset == "cpu_mae"
    (tmp_path / "broken.png").write_bytes(b"broken")
    assert chosen(mim_pretrain, "--data", str(tmp_path)).preset == "cpu_mae"
    assert "px" not in capsys.readouterr().out


def test_a_stream_has_no_more_workers_than_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("VIM_SSL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    fill(folder, 8, 30)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for path in sorted(folder.rglob("*.png")):
            tar.add(path, path.name)
    config = chosen(mim_pretrain, "--data", f"wds:{tmp_path}/shard.tar")
    assert (config.preset, config.workers) == ("cpu_mae_32", 1)


def test_a_batch_of_videos_has_about_as_many_tokens_as_one_of_images(tmp_path):
    for i in range(40):
        fill(tmp_path / f"{i}", 4, 64)
        for path in (tmp_path / f"{i}").rglob("*.png"):
            path.rename(tmp_path / f"{i}" / path.name)
    config = chosen(mim_pretrain, "--data", f"video:{tmp_path}?frames=16")
    assert config.preset == "cpu_mae"
    assert config.batch_size == 64 * 2 // 16


@pytest.mark.parametrize(
    "image",
    [lambda side: np.zeros((900, side), np.uint8), lambda side: Image.new("L", (side, 900))],
    ids=["array", "pil"],
)
def test_the_size_is_the_median_of_shorter_sides(image):
    class Data:
        is_stream, kind = False, "image"
        sides = (10, 100, 30, 20, 500)

        def __len__(self):
            return len(self.sides)

        def raw(self, index):
            return image(self.sides[index])

    assert short_side(Data()) == 30


def test_a_resumed_run_keeps_its_preset(tmp_path, monkeypatch, capsys):
    seen: list = []
    monkeypatch.setattr(mim_pretrain, "run", seen.append)
    record = {"recipe": "mim_pretrain", "preset": "cpu_mae_32", "data": "gone", "batch_size": 7}
    (tmp_path / "config.json").write_text(json.dumps(record))
    mim_pretrain.main(["--output", str(tmp_path), "--resume", "auto"])
    assert (seen[0].preset, seen[0].batch_size) == ("cpu_mae_32", 7)
    assert capsys.readouterr().out == ""


def test_the_old_name_of_a_preset_gives_the_same_settings():
    old, new = (chosen(mim_pretrain, "--preset", name, "--data", "x")
                for name in ("mae_nano_64", "cpu_mae"))  # fmt: skip
    assert old == new
    assert old.preset == new.preset == "cpu_mae"


CPU = [(module, name) for module, *_ in RECIPES.values() for name in module.PRESETS
       if name.startswith("cpu_")]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), CPU, ids=[name for _, name in CPU])
def test_a_preset_for_a_cpu_has_a_small_encoder_of_enough_tokens(module, name):
    config = module.PRESETS[name]()
    with torch.device("meta"):
        encoder = vim_ssl_encoder(config)
    rows, columns = encoder.grid_size
    assert 16 <= rows * columns <= 144
    assert sum(p.numel() for p in encoder.parameters()) < 2.5e6
    assert encoder.data_config["input_size"][1] == int((name + "_64").split("_")[2])


def vim_ssl_encoder(config):
    from vim_ssl import load_encoder

    return load_encoder(config.encoder, **config.model_args)
