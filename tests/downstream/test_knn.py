"""Nearest neighbours: every k and readout, votes as scikit-learn counts them, selected settings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vim_ssl import VimEncoder, cli, save_encoder
from vim_ssl.data import ImageData
from vim_ssl.downstream import knn, linear_probe
from vim_ssl.evaluation import comparison
from vim_ssl.evaluation.extract import Features

SMALL = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 16, "depth": 2,
         "num_classes": 0}  # fmt: skip


FEATURES = {"pretrained encoder": ("token", "avg"), "same encoder, untrained": ("token", "avg"),
            "raw pixels": ("pixels",)}  # fmt: skip


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
        for features, readouts in FEATURES.items()
        for readout in readouts
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
    assert [row["k"] for row in rows] == [1, 7]  # there are no 500 neighbours among 200 images
    for row in rows:
        other = KNeighborsClassifier(
            row["k"], metric="cosine", algorithm="brute",
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


def test_both_commands_give_one_result_for_the_same_features(bands, encoder_file, tmp_path, capsys):
    argv = ["--encoder", str(encoder_file), "--data", str(bands), "--readouts", "token", "avg"]
    results, printed = {}, {}
    for command in ("knn", "linear-probe"):
        assert cli.main([command, *argv, "--output", str(tmp_path / command)]) == 0
        printed[command] = capsys.readouterr().out
        results[command] = json.loads((tmp_path / command / "metrics.json").read_text())
    neighbours, probe = results["knn"], results["linear-probe"]
    for one, other in zip(neighbours["selected"], probe["rows"], strict=True):
        assert one["features"] == other["features"]
        for key, of_probe in (("knn", "knn"), ("knn_ci", "knn_ci"), ("k", "knn_k"),
                              ("readout", "knn_readout"), ("metric", "knn_metric"),
                              ("validation", "knn_validation")):  # fmt: skip
            assert one[key] == other[of_probe], key
        line = f"readout {one['readout']}, k {one['k']}, {one['metric']}"
        assert all(line in text for text in printed.values())
    assert neighbours["summary"][0] == probe["summary"][1]
    for key in ("split", "n"):
        assert neighbours[key] == probe[key]
    assert (neighbours["split"], neighbours["n"]) == ("test", 23)  # one of 24 is broken
    for text in printed.values():
        assert "Accuracy, test split, n = 23 images" in text
        assert neighbours["summary"][0] in text
        assert text.count("cache") == 2  # one short line: --no-cache and the folder


def test_a_k_above_the_number_of_training_images_is_left_out_or_refused(
    bands, encoder_file, tmp_path, capsys
):
    argv = ["--encoder", str(encoder_file), "--data", str(bands), "--output", str(tmp_path)]
    argv += ["--readouts", "avg", "--no-baselines"]
    knn.main(argv)
    printed = capsys.readouterr().out
    assert "k = 100, 200 left out: more than the 48 training images." in printed
    assert "k = 20" in printed
    assert "no baseline was evaluated" in printed
    for command, flag in ((knn, "--k"), (linear_probe, "--knn-k")):
        with pytest.raises(ValueError, match=r"k is 49, .* only 48 training images; use a k of at"):
            command.main([*argv, flag, "49", "--output", str(tmp_path / flag)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--k", "0"], "each 1 or more"), (["--temperature", "0"], "above 0")],
)
def test_a_setting_that_means_nothing_is_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        knn.main(argv)
    assert message in capsys.readouterr().err
