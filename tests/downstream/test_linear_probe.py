"""The linear probe: what it writes, how it chooses, and that the test set has no say in it."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import finish, start

from vim_ssl import VimEncoder, cli, save_encoder
from vim_ssl.data import ImageData
from vim_ssl.downstream import linear_probe
from vim_ssl.evaluation import baselines, comparison
from vim_ssl.evaluation.extract import Features
from vim_ssl.evaluation.readout import C_GRID

SMALL = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 16, "depth": 2,
         "num_classes": 0}  # fmt: skip
ROWS = ["pretrained encoder", "same encoder, untrained", "raw pixels"]


def draw(folder: Path, each: int, classes: int = 3, seed: int = 0, shift: int = 0) -> Path:
    """Noise with a bright band whose height tells the class; ``shift`` mislabels all of them."""
    rng = np.random.default_rng(seed)
    for label in range(classes):
        for i in range(each):
            values = rng.integers(0, 160, (28, 28), dtype=np.uint8)
            values[8 * label : 8 * label + 8] += 60
            path = folder / f"class{(label + shift) % classes}" / f"{label}-{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(path)
    return folder


@pytest.fixture(scope="module")
def bands(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("bands"), 20)


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return save_encoder(VimEncoder(**SMALL), tmp_path_factory.mktemp("encoder"))


def make_run(
    folder: Path, data: Path | str | None, seconds: int = 0, recipe: str = "mim_pretrain", **args
) -> Path:
    """A run directory as a recipe leaves it, written so many seconds after 2020."""
    weights = save_encoder(VimEncoder(**(SMALL | args)), folder)
    if data is not None:
        (folder / "config.json").write_text(json.dumps({"recipe": recipe, "data": str(data)}))
    os.utime(weights, (1577836800 + seconds,) * 2)
    return folder


def probe(*argv: str) -> dict:
    assert linear_probe.main(list(argv)) == 0
    output = Path(argv[argv.index("--output") + 1])
    return json.loads((output / "metrics.json").read_text())


# ------------------------------------------------------------------ what it writes


@pytest.fixture(scope="module")
def metrics(bands, encoder_file, tmp_path_factory) -> dict:
    (bands / "class1" / "broken.png").write_bytes(b"no image")
    output = tmp_path_factory.mktemp("probe") / "deep" / "out"
    found = probe("--encoder", str(encoder_file), "--data", str(bands), "--output", str(output))
    (bands / "class1" / "broken.png").unlink()
    return found | {"folder": output}


def test_the_record_says_what_was_done(metrics, bands, encoder_file):
    assert metrics["task"] == "linear_probe"
    assert metrics["encoder"] == str(encoder_file)
    assert str(bands) in metrics["data"]
    assert metrics["train"] + metrics["test"] == 61
    assert [name.partition(":")[0] for name in metrics["skipped"]] == ["class1/broken.png"]
    assert (metrics["split"], metrics["n"]) == ("held out", metrics["test"] - 1)  # one is broken
    assert metrics["protocol"]["knn_k"] == 0
    assert {"hardware", "versions", "seconds"} <= set(metrics)


def test_the_predictions_are_those_of_the_table_and_images_explain_them(metrics):
    with open(metrics["folder"] / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    right = [row["label"] == row["predicted"] for row in rows]
    assert len(rows) == metrics["n"]
    assert 100 * sum(right) / len(rows) == pytest.approx(metrics["rows"][0]["logistic"], abs=0.01)
    assert all(float(row["confidence"]) >= float(row["label_probability"]) for row in rows)
    examples = json.loads((metrics["folder"] / "examples" / "examples.json").read_text())
    assert {row["id"] for row in examples["mistakes"]} == {
        row["id"] for row, hit in zip(rows, right, strict=True) if not hit
    }
    assert examples["neighbours"]
    assert examples["maps"]["rows"]
    files = {row["image"] for row in (*examples["neighbours"], *examples["maps"]["rows"])}
    assert all((metrics["folder"] / "examples" / name).is_file() for name in files)


def test_there_is_a_row_for_the_encoder_and_for_each_baseline(metrics):
    assert [row["features"] for row in metrics["rows"]] == ROWS
    for row in metrics["rows"]:
        for figure in ("logistic", "knn"):
            low, high = row[f"{figure}_ci"]
            assert 0 <= low < row[figure] <= high <= 100
        assert row["C"] in C_GRID
    assert metrics["rows"][2]["dim"] == 28 * 28
    assert metrics["rows"][2]["logistic"] > 80  # bands are easy


def test_the_table_shows_what_the_record_holds(bands, encoder_file, tmp_path, capsys):
    argv = ("--encoder", str(encoder_file), "--data", str(bands), "--output", str(tmp_path))
    row = probe(*argv, "--no-baselines")["rows"][0]
    shown = capsys.readouterr().out
    assert f"{row['logistic']:5.1f} % [{row['logistic_ci'][0]:.1f}" in shown
    assert ROWS[0] in shown
    assert ROWS[1] not in shown


def test_pixels_of_large_images_are_shrunk_first(bands, encoder_file, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "MAX_PIXELS", 27 * 28)
    monkeypatch.setattr(baselines, "SHRUNK", 7)
    argv = ("--encoder", str(encoder_file), "--data", str(bands), "--output", str(tmp_path))
    row = probe(*argv, "--readouts", "avg")["rows"][2]
    assert (row["features"], row["dim"]) == ("raw pixels, 7x7", 7 * 7)
    assert row["logistic"] > 80


def test_the_same_seed_gives_the_same_figures(bands, encoder_file, tmp_path):
    argv = ("--encoder", str(encoder_file), "--data", str(bands), "--readouts", "avg")
    first, again = (probe(*argv, "--output", str(tmp_path / name))["rows"] for name in "ab")
    assert first == again


# ------------------------------------------------------------------ the choice


def parts(groups: bool = False) -> tuple[Features, Features]:
    """Three classes; columns 0-3 are good features, 4-7 noise."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for n in (90, 60):
        y = torch.arange(n) % 3
        x = torch.randn(n, 8, generator=draw)
        x[:, :3] += 2 * torch.eye(3)[y]
        names = [str(i) for i in range(n)]
        made.append(Features(x, y, names, [], [str(i // 6) for i in range(n)] if groups else None))
    return made[0], made[1]


READERS = {"noise": slice(4, 8), "good": slice(0, 4), "again": slice(0, 4)}


def test_validation_chooses_the_readout_and_on_a_tie_the_first():
    row, *_ = linear_probe.probe("x", *parts(), READERS, linear_probe.Config())
    assert (row["readout"], row["dim"]) == ("good", 4)
    assert row["logistic"] > 70


@pytest.mark.parametrize("what", ["labels", "features"])
def test_the_test_set_has_no_say_in_the_choice(what):
    """Test data made for the noise columns, or test labels turned around, change no choice."""
    train, test = parts()
    honest, *_ = linear_probe.probe("x", train, test, READERS, linear_probe.Config())
    if what == "labels":
        test.y = (test.y + 1) % 3
    else:
        test.x = test.x.flip(1)
    turned, *_ = linear_probe.probe("x", train, test, READERS, linear_probe.Config())
    chosen = ("readout", "C", "validation", "dim")
    assert [turned[name] for name in chosen] == [honest[name] for name in chosen]
    assert turned["logistic"] < honest["logistic"] - 20


def test_mislabelled_test_images_change_the_score_and_nothing_else(tmp_path, encoder_file):
    """The same through the script, on folders with a test split."""
    rows = []
    for name, shift in (("honest", 0), ("turned", 1)):
        draw(tmp_path / name / "train", 12)
        draw(tmp_path / name / "test", 8, seed=1, shift=shift)
        argv = ("--encoder", str(encoder_file), "--data", str(tmp_path / name))
        rows.append(probe(*argv, "--output", str(tmp_path / f"{name}-out"))["rows"])
    for honest, turned in zip(*rows, strict=True):
        chosen = ("readout", "C", "validation", "dim")
        assert [turned[key] for key in chosen] == [honest[key] for key in chosen]
    assert rows[1][2]["logistic"] < 30 < 70 < rows[0][2]["logistic"]


def test_groups_are_not_torn_apart_for_validation(monkeypatch):
    train, test = parts(groups=True)
    train.x[:, 0] = torch.arange(90) // 6  # the group
    sides = []
    monkeypatch.setattr(
        linear_probe,
        "choose_readout",
        lambda x, y, x_val, y_val, readouts, grid: sides.append((x, x_val)) or ("all", 1.0, 1.0),
    )
    linear_probe.probe("x", train, test, {"all": slice(None)}, linear_probe.Config())
    fitted, validated = ({*x[:, 0].tolist()} for x in sides[0])
    assert fitted
    assert validated
    assert not fitted & validated


def test_an_encoder_without_class_token_is_read_by_its_patches(bands, tmp_path):
    torch.manual_seed(0)
    run = make_run(tmp_path / "run", bands, cls_position="none")
    row = probe("--encoder", str(run), "--output", str(tmp_path / "out"))["rows"][0]
    assert row["readout"] in ("avg", "layers")
    with pytest.raises(ValueError, match="needs a class token"):
        probe("--encoder", str(run), "--output", str(tmp_path / "other"), "--readouts", "token")


# ------------------------------------------------------------------ heads, few labels, several


def test_encoders_are_compared_on_the_same_images(bands, encoder_file, tmp_path, capsys):
    torch.manual_seed(1)
    other = save_encoder(VimEncoder(**SMALL), tmp_path / "other")
    argv = ("--encoder", str(encoder_file), "--data", str(bands), "--output", str(tmp_path / "out"))
    found = probe(*argv, "--readouts", "avg", "--against", str(other), "--no-baselines")
    first, second = found["rows"]
    assert (first["features"], second["features"]) == ("pretrained encoder", str(other))
    (gain,) = found["differences"]
    assert (gain["features"], gain["over"]) == (first["features"], second["features"])
    low, high = gain["logistic_ci"]
    assert gain["logistic"] == pytest.approx(first["logistic"] - second["logistic"], abs=0.011)
    assert low <= gain["logistic"] <= high
    printed = capsys.readouterr().out
    for sentence in found["summary"]:
        assert str(other) in sentence
        assert sentence in printed


def test_few_labels_are_few_and_every_readout_is_shown(monkeypatch):
    seen = []
    fit = linear_probe.fit_logistic
    monkeypatch.setattr(
        linear_probe, "fit_logistic", lambda x, y, C: seen.append(y.tolist()) or fit(x, y, C)
    )
    config = linear_probe.Config(shots=(1, 8), shot_seeds=2)
    train, test = parts()
    rows = linear_probe.few_shots("x", train, test, READERS, config)
    assert [(row["shots"], row["readout"]) for row in rows] == [
        (shots, readout) for shots in (1, 8) for readout in READERS
    ]
    assert {tuple(sorted(labels)) for labels in seen} == {
        (0, 1, 2), tuple(sorted([0, 1, 2] * 8)),
    }  # fmt: skip
    good, noise = (next(r for r in rows[3:] if r["readout"] == name) for name in ("good", "noise"))
    assert good["mean"] > noise["mean"] + 15
    assert len(good["values"]) == 2
    assert good["std"] >= 0


def test_few_labels_through_the_script(bands, encoder_file, tmp_path, capsys):
    argv = ("--encoder", str(encoder_file), "--data", str(bands), "--output", str(tmp_path))
    found = probe(*argv, "--no-baselines", "--readouts", "avg", "--shots", "1", "4")
    assert [row["shots"] for row in found["few_shot"]] == [1, 4]
    shown = capsys.readouterr().out
    assert f"{found['few_shot'][1]['mean']:.1f} ± {found['few_shot'][1]['std']:.1f}" in shown


def test_the_head_of_mae(bands, encoder_file, tmp_path, capsys):
    argv = ["--encoder", str(encoder_file), "--data", str(bands), "--head", "lars"]
    found = probe(*argv, "--readouts", "avg", "--output", str(tmp_path / "weak"))
    pixels = found["rows"][2]
    assert pixels["C"] is None
    hint = re.search(r"try --lars-lr (\S+)\.", capsys.readouterr().out)
    found = probe(*argv, "--lars-lr", hint[1], "--output", str(tmp_path / "strong"))
    assert found["rows"][2]["logistic"] > 80
    assert "--lars-lr" not in capsys.readouterr().out


def several_labels(folder: Path) -> ImageData:
    """Two bands, there or not, each a label of its own."""
    draw, names, labels = np.random.default_rng(0), [], []
    for i in range(80):
        values = draw.integers(0, 160, (28, 28), dtype=np.uint8)
        labels.append([i % 2, int(i % 3 == 0)])
        for place, there in enumerate(labels[-1]):
            values[14 * place : 14 * place + 8] += 60 * np.uint8(there)
        path = folder / f"{i}.png"
        Image.fromarray(values).save(path)
        names.append(str(path))
    return ImageData(names, names, name="bands", labels=labels, classes=["upper", "lower"])


def test_images_with_several_labels_are_judged_by_average_precision(
    encoder_file, tmp_path, monkeypatch, capsys
):
    data = several_labels(tmp_path)
    halves = data.subset(range(0, 60)), data.subset(range(60, 80))
    monkeypatch.setattr(comparison, "labelled_splits", lambda *_: halves)
    argv = ("--encoder", str(encoder_file), "--data", "bands", "--output", str(tmp_path / "out"))
    found = probe(*argv)
    assert found["figure"] == "mAP"
    trained, _, pixels = found["rows"]
    for key in ("logistic", "logistic_micro", "knn", "knn_micro"):
        low, high = trained[f"{key}_ci"]
        assert 0 <= low <= trained[key] <= high <= 100
        # Of raw pixels every ranking is right, whichever images are drawn.
        assert (pixels[key], pixels[f"{key}_ci"]) == (100, None)
    printed = capsys.readouterr().out
    assert "Mean average precision" in printed
    assert "100.0 % [none: the resamples have the same value]" in printed
    with pytest.raises(ValueError, match=r"is multi-label; --shots"):
        probe(*argv[:-1], str(tmp_path / "other"), "--shots", "1")


@pytest.mark.parametrize(
    ("name", "labels"), [("breastmnist", 2), ("bloodmnist", 8), ("chestmnist", 14)]
)
def test_medmnist_has_its_own_figures_too(name, labels, encoder_file, tmp_path, capsys):
    draw, count = np.random.default_rng(0), 64
    truth = (np.arange(count) % labels)[:, None]
    if labels == 14:
        truth = draw.integers(0, 2, (count, labels))
    images = draw.integers(0, 128, (count, 28, 28), dtype=np.uint8)
    images[:, 14:] += (truth[:, :1, None] * 8).astype(np.uint8)  # something to find
    arrays = {f"{part}_{what}": values for part in ("train", "val", "test")
              for what, values in (("images", images), ("labels", truth))}  # fmt: skip
    np.savez(tmp_path / f"{name}.npz", **arrays)
    data = f"medmnist:{tmp_path / name}.npz"
    argv = ["--encoder", str(encoder_file), "--data", data, "--output", str(tmp_path / "out")]
    rows = probe(*argv)["rows"]
    printed = capsys.readouterr().out
    for row in rows:
        assert f"AUC {row['auc']:.3f}, ACC {row['acc']:.3f}" in printed
        assert 0.5 < row["auc"] <= 1  # tested on what was trained on
        if labels != 14:  # the share of right answers, which MedMNIST gives as a part of 1
            assert row["acc"] == pytest.approx(row["logistic"] / 100, abs=1e-4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shots", "0"], "1 or more"),
        (["--c-grid", "1", "0.1"], "in ascending order"),
        (["--head", "svm"], "not a valid choice"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        linear_probe.main(argv)
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------ several processes


@pytest.mark.slow
def test_two_processes_give_the_answer_of_one(bands, encoder_file, tmp_path):
    (bands / "class1" / "broken.png").write_bytes(b"no image")
    argv = ["--encoder", str(encoder_file), "--data", str(bands), "--no-cache", "--batch-size", "7"]
    alone = probe(*argv, "--output", str(tmp_path / "one"))
    shown = finish(start(2, linear_probe.__file__, *argv, "--output", str(tmp_path / "two")))
    (bands / "class1" / "broken.png").unlink()
    together = json.loads((tmp_path / "two" / "metrics.json").read_text())
    for key in ("rows", "differences", "skipped", "train", "test"):
        assert together[key] == alone[key]
    assert shown.count("Written:") == 1


# ------------------------------------------------------------------ which run, which data


def test_without_arguments_the_newest_run_is_probed_on_its_own_data(bands, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "a-newest", bands, seconds=30)
    make_run(tmp_path / "runs" / "b-old", "sample:nothing", seconds=10)
    make_run(tmp_path / "runs" / "c-tuned", "sample:nothing", seconds=50, recipe="finetune")
    (tmp_path / "runs" / "d-unfinished").mkdir()
    assert linear_probe.main([]) == 0
    found = json.loads(Path("runs/a-newest/linear_probe/metrics.json").read_text())
    assert str(bands) in found["data"]
    assert not list(tmp_path.glob("runs/b-old/linear_probe"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "No run with an encoder under .*mim_pretrain"),
        (["--encoder", "bare"], "bare does not say which images it was trained on"),
        (["--encoder", "unlabelled"], "labels of fewer than two classes"),
        (["--encoder", "bare", "--data", "flat"], "labels of fewer than two classes"),
        (["--encoder", "bare", "--data", "nowhere"], "The folder 'nowhere' does not exist"),
    ],
    ids=["no-run", "no-record", "trained-without-labels", "unlabelled", "no-data"],
)
def test_a_mistake_is_told_in_one_line(argv, message, bands, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIM_SSL_TRACEBACK", raising=False)
    Path("flat").mkdir()
    for i in range(4):
        Image.new("L", (28, 28), i).save(f"flat/{i}.png")
    make_run(tmp_path / "bare", None)
    make_run(tmp_path / "unlabelled", tmp_path / "flat")
    make_run(tmp_path / "labelled", bands)
    assert cli.main(["linear-probe", *argv]) == 2
    shown = capsys.readouterr().err.strip()
    assert len(shown.splitlines()) == 1
    assert re.search(message, shown)
