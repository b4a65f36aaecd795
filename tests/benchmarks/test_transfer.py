"""The ViT beside the suite's own encoder: trained for the same time, found again, probed alike."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vim_ssl.recipes.mim_pretrain import build_model, mae_minute, offline_rgb

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def transfer(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(FOLDER / "learning"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIM_SSL_CACHE", str(tmp_path / "cache"))
    return importlib.import_module("transfer")


def test_it_is_as_large_as_the_encoder(transfer):
    config = offline_rgb()
    vit = transfer.anchor.study.with_vit(config, transfer.anchor.SIZE)
    encoders = [build_model(settings) for settings in (config, vit)]
    sizes = [sum(p.numel() for p in encoder.parameters()) for encoder in encoders]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


def test_it_trains_for_the_same_time_and_has_rows_of_its_own(transfer, monkeypatch, tmp_path):
    anchor = transfer.anchor
    with pytest.raises(FileNotFoundError, match=r"train it: python benchmarks/learning/anchor\.py"):
        anchor.load()
    short = replace(mae_minute(), data="sample:mnist5k?split=train&limit=64", epochs=1, threads=1)
    monkeypatch.setattr(anchor, "preset", lambda: short)
    seconds = {anchor.VIM: 3.0, anchor.VIT: 2.0}
    monkeypatch.setattr(anchor, "steps", lambda arm, count: seconds[arm] * count)
    assert anchor.train(tmp_path, anchor.FOLDER) == 1.5
    trained = anchor.load().model.norm.weight
    assert torch.equal(trained, anchor.load().model.norm.weight)
    assert not torch.equal(trained, torch.ones(192))

    monkeypatch.setitem(transfer.TASKS, "digits", ("sample:mnist5k?limit=100", "", "MNIST"))
    (row,) = transfer.measure("digits", transfer.VIT, 0)
    assert (row["encoder"], row["train"], row["test"]) == ("vit", 100, 100)
    assert row["logistic_low"] < row["logistic"] < row["logistic_high"]
    text = transfer.summary([row])
    assert "| ViT, MAE for the same time |" in text.splitlines()[0]
