"""Fine-tuning: few labels are few, the weights start where they should, the record is whole."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vim_ssl import VimEncoder, classification, cli, load_encoder, save_encoder
from vim_ssl.downstream import finetune

SMALL = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 16, "depth": 2,
         "num_classes": 0}  # fmt: skip
QUICK = ["--threads", "1", "--warmup-epochs", "0", "--batch-size", "6"]


@pytest.fixture(scope="module")
def bands(tmp_path_factory) -> Path:
    """60 pictures of three classes: noise with a bright band at the class's height."""
    folder, rng = tmp_path_factory.mktemp("bands"), np.random.default_rng(0)
    for i in range(60):
        values = rng.integers(0, 80, (28, 28), dtype=np.uint8)
        values[8 * (i % 3) : 8 * (i % 3) + 8] += 120
        path = folder / f"class{i % 3}" / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(values).save(path)
    return folder


@pytest.fixture(scope="module")
def run(bands, tmp_path_factory) -> Path:
    """A run directory as a recipe leaves it."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    save_encoder(VimEncoder(**SMALL), folder)
    (folder / "config.json").write_text(json.dumps({"data": str(bands)}))
    return folder


@pytest.fixture
def first_weights(monkeypatch) -> list[dict]:
    """Caught instead of training: the weights that training would start from."""
    caught = []
    monkeypatch.setattr(
        classification,
        "fit",
        lambda objective, *_, **__: caught.append(
            {k: v.clone() for k, v in objective.encoder.state_dict().items()}
        ),
    )
    return caught


def test_it_learns_and_writes_the_whole_record(run, bands, tmp_path):
    (bands / "class0" / "broken.png").write_bytes(b"no picture")
    argv = ["--encoder", str(run), "--output", str(tmp_path), *QUICK, "--epochs", "12"]
    assert finetune.main([*argv, "--base-lr", "2e-2", "--crop-scale", "1", "1"]) == 0
    (bands / "class0" / "broken.png").unlink()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["task"], metrics["encoder"]) == ("finetune", str(run))
    assert str(bands) in metrics["data"]
    assert metrics["train"] + metrics["test"] + len(metrics["skipped"]) == 61
    assert metrics["protocol"]["epochs"] == 12
    assert {"hardware", "versions"} <= set(metrics)
    low, high = metrics["top1_ci"]
    assert 75 < metrics["top1"] <= 100  # a guess would be 33
    assert low <= metrics["top1"] <= high
    assert f"{metrics['top1']:.1f} %" in (tmp_path / "report.html").read_text()


def test_it_starts_from_the_encoder_of_the_run(run, tmp_path, first_weights):
    finetune.main(["--encoder", str(run), "--output", str(tmp_path), *QUICK])
    (weights,) = first_weights
    for name, value in load_encoder(run).state_dict().items():
        assert torch.equal(weights[name], value), name
    assert weights["head.weight"].shape == (3, 32)  # class token and mean of the patches


def test_from_scratch_forgets_the_weights(run, tmp_path, first_weights):
    finetune.main(["--encoder", str(run), "--output", str(tmp_path / "a"), *QUICK])
    finetune.main(
        ["--encoder", str(run), "--output", str(tmp_path / "b"), "--from-scratch", *QUICK]
    )
    trained, fresh = first_weights
    assert {k: v.shape for k, v in trained.items()} == {k: v.shape for k, v in fresh.items()}
    name = "layers.0.mixer.in_proj.weight"
    assert not torch.equal(trained[name], fresh[name])


@pytest.mark.parametrize("count", [2, 5])
def test_so_many_labels_of_each_class_are_used(run, tmp_path, count, first_weights):
    argv = ["--encoder", str(run), "--output", str(tmp_path), *QUICK]
    finetune.main([*argv, "--labels-per-class", str(count)])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["train"], metrics["test"]) == (3 * count, 12)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "No run with an encoder"),
        (["--data", "flat"], "no labels of two classes"),
    ],
    ids=["no-run", "unlabelled"],
)
def test_a_mistake_is_told_in_one_line(argv, message, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIM_SSL_TRACEBACK", raising=False)
    Path("flat").mkdir()
    for i in range(4):
        Image.new("L", (28, 28), i).save(f"flat/{i}.png")
    encoder = ["--encoder", str(run)] if argv else []
    assert cli.main(["finetune", *encoder, *argv]) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert message in shown[-1]
