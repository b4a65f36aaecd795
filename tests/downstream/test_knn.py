"""The neighbours' protocol: every k and readout is shown, by scikit-learn's count."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vim_ssl import VimEncoder, cli, save_encoder
from vim_ssl.data import ImageData
from vim_ssl.downstream import knn
from vim_ssl.evaluation import comparison
from vim_ssl.evaluation.extract import Features

SMALL = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 16, "depth": 2,
         "num_classes": 0}  # fmt: skip


@pytest.fixture(scope="module")
def bands(tmp_path_factory) -> Path:
    """Noise with a bright band whose height tells the class, in two splits; one is broken."""
    folder, draw = tmp_path_factory.mktemp("bands"), np.random.default_rng(0)
    for i in range(72):
        values = draw.integers(0, 60, (28, 28), dtype=np.uint8)
        values[8 * (i % 3) : 8 * (i % 3) + 8] += 120
        path = folder / ("test" if i >= 48 else "train") / f"class{i % 3}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)
    path.write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return save_encoder(VimEncoder(**SMALL), tmp_path_factory.mktemp("encoder"))


def test_every_readout_and_k_is_shown(bands, encoder_file, tmp_path, capsys):
    argv = ["--encoder", str(encoder_file), "--data", str(bands), "--output", str(tmp_path)]
    assert cli.main(["knn", *argv, "--k", "1", "5", "--readouts", "token", "avg"]) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert [(row["features"], row["readout"], row["k"]) for row in found["rows"]] == [
        (features, readout, k)
        for features in ("pretrained encoder", "same encoder, untrained")
        for readout in ("token", "avg")
        for k in (1, 5)
    ]
    assert (found["task"], found["train"], found["test"]) == ("knn", 48, 24)
    assert [name.partition(":")[0] for name in found["skipped"]] == ["test/class2/71.png"]
    for row in found["rows"]:
        low, high = row["knn_ci"]
        assert 0 <= low <= row["knn"] <= high <= 100
    assert max(row["knn"] for row in found["rows"]) > 60  # bands are easy; a guess would be 33
    shown = capsys.readouterr().out
    assert "k = 5" in shown
    assert f"{found['rows'][0]['knn']:.1f} [{found['rows'][0]['knn_ci'][0]:.1f}" in shown


def test_the_votes_are_counted_as_scikit_learn_counts_them():
    from sklearn.neighbors import KNeighborsClassifier

    draw = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 3
    x = torch.randn(300, 6, generator=draw) + 1.5 * torch.eye(6)[y]
    bank, queries = (Features(x[s], y[s], [], []) for s in (slice(0, 200), slice(200, 300)))
    config = knn.Config(k=(1, 7, 500), temperature=0.2)
    rows = knn.vote("x", bank, queries, {"all": slice(None)}, config, "cpu")
    for row in rows:
        other = KNeighborsClassifier(
            min(row["k"], 200), metric="cosine", algorithm="brute",
            weights=lambda d: np.exp((1 - d) / 0.2),
        ).fit(bank.x.numpy(), bank.y.numpy())  # fmt: skip
        expected = 100 * other.score(queries.x.numpy(), queries.y.numpy())
        assert row["knn"] == pytest.approx(expected, abs=0.01)


def test_images_with_several_labels_are_judged_by_average_precision(
    bands, encoder_file, tmp_path, monkeypatch, capsys
):
    names = sorted(map(str, bands.glob("train/*/*.png")))
    labels = [[int("class0" in name), int("class2" not in name)] for name in names]
    data = ImageData(names, names, name="bands", labels=labels)
    halves = data.subset(range(0, 48, 2)), data.subset(range(1, 48, 2))
    monkeypatch.setattr(comparison, "labelled_splits", lambda *_: halves)
    knn.main(["--encoder", str(encoder_file), "--data", "bands", "--output", str(tmp_path),
              "--k", "5", "--no-baselines"])  # fmt: skip
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["figure"] == "mAP"
    assert {"knn", "knn_ci", "knn_micro", "knn_micro_ci"} <= set(found["rows"][0])
    assert "Mean average precision" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--k", "0"], "each 1 or more"), (["--temperature", "0"], "above 0")],
)
def test_a_setting_that_means_nothing_is_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        knn.main(argv)
    assert message in capsys.readouterr().err
