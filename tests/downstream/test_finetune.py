"""Fine-tuning: few labels are few, the weights start where they should, the record is whole; and
judging as it is: which images, by which weights."""

import contextlib
import csv
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_weights import write_golden
from PIL import Image
from timm.data import create_transform as timm_transform

from vim_ssl import VimEncoder, cli, load_encoder, save_encoder
from vim_ssl.checkpoints.loading import made_by
from vim_ssl.checkpoints.verify import verify
from vim_ssl.data import ImageData
from vim_ssl.downstream import finetune, video
from vim_ssl.evaluation import baselines, validation
from vim_ssl.tasks import classification, runner
from vim_ssl.training.run import read_metrics

SMALL = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 16, "depth": 2,
         "num_classes": 0}  # fmt: skip
QUICK = ["--threads", "1", "--warmup-epochs", "0", "--batch-size", "6"]


@pytest.fixture(scope="module")
def bands(tmp_path_factory) -> Path:
    """60 images of three classes: noise with a bright band at the class's height."""
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
        runner,
        "fit",
        lambda objective, *_, **__: caught.append(
            {k: v.clone() for k, v in objective.encoder.state_dict().items()}
        ),
    )
    return caught


def test_it_learns_and_writes_the_whole_record(run, bands, tmp_path, capsys):
    (bands / "class0" / "broken.png").write_bytes(b"no image")
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
    assert (metrics["split"], metrics["n"]) == ("held out", metrics["test"])
    assert list(metrics["baselines"]) == ["the most frequent class", "kNN on raw pixels"]
    assert metrics["baselines"]["the most frequent class"]["top1"] == pytest.approx(33, abs=9)
    printed = capsys.readouterr().out
    assert f"held-out images, n = {metrics['n']}, trained on {metrics['train']}" in printed
    (sentence,) = metrics["summary"]
    assert sentence in printed
    assert " points above the most frequent class (95 % interval " in sentence
    with open(tmp_path / "predictions.csv") as file:
        for row in csv.DictReader(file):
            right = row["label"] == row["predicted"]
            assert (row["label_probability"] == row["confidence"]) == right


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


def test_ranks_are_told_in_their_order(run, tmp_path, first_weights, capsys):
    for name in ("10", "9", "1"):
        (tmp_path / "grades" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("L", (28, 28), i).save(tmp_path / "grades" / name / f"{i}.png")
    argv = ["--encoder", str(run), "--output", str(tmp_path / "out"), *QUICK]
    finetune.main([*argv, "--data", str(tmp_path / "grades"), "--targets", "ordinal"])
    assert "ranks: 1 < 9 < 10\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "every"),
    [
        (["--validation", "0.1", "--patience", "5"], 1),
        (["--validation", "0.1", "--eval-every", "3"], 3),
        (["--validation", "0.1", "--preset", "ssl_224"], 5),
        ([], 1e9),
    ],
    ids=["validation", "given", "preset", "none"],
)
def test_a_validation_part_is_looked_at_every_epoch(argv, every, monkeypatch):
    for script in (finetune, video) if "--preset" not in argv else (finetune,):
        seen = []
        monkeypatch.setattr(script, "run", seen.append)
        script.main(argv)
        assert seen[0].eval_every == every


def test_patience_ends_a_training_that_gets_no_better(run, tmp_path):
    argv = ["--validation", "0.1", "--patience", "2", "--encoder", str(run), "--base-lr", "0"]
    finetune.main([*argv, "--output", str(tmp_path), *QUICK, "--epochs", "5"])
    rows = read_metrics(tmp_path)
    assert [row["epoch"] for row in rows if "val_top1" in row] == [1, 2, 3]
    assert rows[-1]["epoch"] == 3


@pytest.mark.parametrize("judged", ["trained", "as-it-is"])
def test_images_are_judged_in_batches_by_workers_as_asked(
    judged, run, bands, tmp_path, monkeypatch
):
    save_encoder(VimEncoder(**SMALL | {"num_classes": 3}), tmp_path / "head")
    asked = []
    extract = classification.extract_features

    def watched(*args, batch_size, workers, **more):
        asked.append((batch_size, workers))
        return extract(*args, batch_size=batch_size, workers=0, **more)

    for module in (baselines, classification, validation):
        monkeypatch.setattr(module, "extract_features", watched)
    encoder = ["--eval-only", "--encoder", str(tmp_path / "head")]
    if judged == "trained":
        encoder = ["--encoder", str(run), "--eval-every", "1", "--epochs", "1", "--max-steps", "1"]
        monkeypatch.setattr(runner, "fit", lambda *_, evaluate, **__: evaluate())
    more = ["--data", str(bands), "--judge-batch", "7", "--workers", "3"]
    finetune.main([*encoder, *QUICK, *more, "--output", str(tmp_path / "out")])
    # The validation, the test, and the raw pixels of both splits; or only the test.
    assert asked == [(7, 3)] * (4 if judged == "trained" else 1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "No run with an encoder"),
        (["--data", "flat"], "labels of fewer than two classes"),
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


# ------------------------------------------------------------------ judged as it is


@pytest.fixture
def head(tmp_path) -> Path:
    """An encoder with a head for the bands' three classes."""
    save_encoder(VimEncoder(**SMALL | {"num_classes": 3}), tmp_path / "head")
    return tmp_path / "head"


def judge(encoder: Path, data: str, output: Path, *more: str) -> tuple[dict, list[dict]]:
    """metrics.json and the lines of predictions.csv."""
    argv = ["--eval-only", "--encoder", str(encoder), "--data", data, "--output", str(output)]
    assert finetune.main([*argv, "--threads", "1", *more]) == 0
    with open(output / "predictions.csv") as file:
        return json.loads((output / "metrics.json").read_text()), list(csv.DictReader(file))


def test_a_released_file_is_judged_on_all_of_imagenets_validation_part(
    tmp_path, monkeypatch, capsys
):
    """Beside the published top-1; by timm's crop, of 256 pixels on the shorter side."""
    draw = np.random.default_rng(0)
    for i, synset in enumerate(["n01440764", "n15075141", "n15075141"]):
        path = tmp_path / "imagenet/val" / synset / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (260, 300 + i, 3), dtype=np.uint8)).save(path)
    file = write_golden(tmp_path / "vim_t_midclstok_76p1acc.pth")
    kept = {}
    write = classification.write_tables

    def keep(folder, judged, logits, labels, *rest):
        kept.update(logits=logits, labels=labels.tolist())
        write(folder, judged, logits, labels, *rest)

    monkeypatch.setattr(classification, "write_tables", keep)
    metrics, rows = judge(file, f"imagenet:{tmp_path / 'imagenet'}", tmp_path / "out")
    assert (metrics["split"], metrics["test"], metrics["published_top1"]) == ("val", 3, 76.1)
    assert kept["labels"] == [0, 999, 999]
    transform = timm_transform(
        (3, 224, 224), interpolation="bicubic", crop_pct=0.875,
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    images = [Image.open(tmp_path / "imagenet" / row["id"]) for row in rows]
    with torch.inference_mode():
        expected = load_encoder(file, num_classes=None)(torch.stack([*map(transform, images)]))
    torch.testing.assert_close(kept["logits"], expected, rtol=1e-4, atol=1e-4)
    shown = capsys.readouterr().out
    assert "validation split, n = 3 images (Vim-Ti, published: 76.1 on ImageNet)" in shown
    assert "top-5" in shown


@pytest.mark.parametrize(
    ("parts", "option", "split", "count"),
    [
        ([], "", "all", 6),
        (["train", "val"], "", "val", 6),
        (["train", "val", "test"], "", "test", 6),
        (["train", "val", "test"], "?split=train", "train", 6),
        (["train", "val", "test"], "?split=all", "all", 18),
    ],
    ids=["folder", "val", "test", "named", "all"],
)
def test_every_image_of_one_part_is_judged(head, tmp_path, parts, option, split, count):
    for part in parts or [""]:
        for i in range(6):
            path = tmp_path / "data" / part / f"class{i % 3}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (28, 28), i).save(path)
    metrics, rows = judge(head, f"{tmp_path / 'data'}{option}", tmp_path / "out")
    assert (metrics["split"], metrics["test"], len(rows)) == (split, count, count)


def test_unlabelled_images_are_left_out_and_a_part_of_such_passed_over(head, tmp_path):
    for split in ("train", "val", "test"):
        for i in range(4):
            path = tmp_path / f"{split}{i}.png"
            Image.new("L", (28, 28), i).save(path)
    lines = [f"{split}{i}.png,{split},{'' if split == 'test' or i == 3 else f'class{i}'}"
             for split in ("train", "val", "test") for i in range(4)]  # fmt: skip
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["image,split,label", *lines]))
    metrics, rows = judge(head, f"csv:{table}", tmp_path / "out")
    assert metrics["split"] == "val"
    assert [row["label"] for row in rows] == ["class0", "class1", "class2"]
    command = f"vim-ssl predict --encoder {head} --data csv:{table}"
    with pytest.raises(ValueError, match=re.escape(command)):
        judge(head, f"csv:{table}?split=test", tmp_path / "none")


def test_a_run_is_judged_on_its_own_data_by_what_it_had_held_out(run, bands, tmp_path):
    argv = ["--encoder", str(run), "--output", str(tmp_path / "run"), *QUICK, "--max-steps", "1"]
    finetune.main([*argv, "--test", "0.5", "--seed", "5"])
    with open(tmp_path / "run" / "predictions.csv") as file:
        held_out = [row["id"] for row in csv.DictReader(file)]
    metrics, rows = judge(tmp_path / "run", str(bands), tmp_path / "out")
    assert [row["id"] for row in rows] == held_out
    assert len(held_out) == metrics["test"] == 30
    assert made_by(tmp_path / "run")["classes"] == ["class0", "class1", "class2"]
    assert "class0" not in str(verify(tmp_path / "run"))  # there may be thousands
    assert metrics["split"] == "held out"
    some, rows = judge(tmp_path / "run", f"{bands}?limit=20", tmp_path / "some")
    assert some["split"] == "held out"  # of those the spec selects
    assert 0 < some["test"] < 20
    assert {row["id"] for row in rows} <= set(held_out)
    assert judge(tmp_path / "run", f"{bands}?split=all", tmp_path / "all")[0]["test"] == 60


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_judged_as_the_same_images_in_a_folder(head, bands, tmp_path, workers):
    for number in range(2):
        files = {"broken.png": b""}
        for path in sorted(bands.rglob("*.png"))[number::2]:
            files[path.name] = path.read_bytes()
            files[f"{path.stem}.cls"] = path.parent.name.removeprefix("class").encode()
        files["unlabelled.png"] = path.read_bytes()
        write_tar(tmp_path / f"{number}.tar", files)
    streamed, rows = judge(
        head, f"wds:{tmp_path}", tmp_path / "out", "--workers", str(workers), "--judge-batch", "7"
    )
    metrics, others = judge(head, str(bands), tmp_path / "folder")
    for key in ("test", "top1", "confusion"):
        assert streamed[key] == metrics[key], key
    predicted = {Path(row["id"]).stem: row["predicted"] for row in rows}
    assert predicted == {Path(r["id"]).stem: r["predicted"][-1] for r in others}
    assert len(streamed["skipped"]) == 2


@pytest.mark.parametrize(
    ("data", "more", "says"),
    [
        ({"labels": [[0, 1, 1], [1, 0, 0]]}, [], "Use multi-label for several labels per image"),
        ({"labels": [0, 2]}, ["--targets", "multi-label"], "does not match --targets multi-label"),
        ({"labels": [0, 7]}, [], "labels from 0 to 7; expected 0 to 2 for 3 classes"),
        ({"labels": [0, 1], "classes": ["a", "d", "b"]}, [], "among the 3 of {} (a, b, c): d."),
        ({"labels": [0, 3], "classes": [*"abcd"]}, [], "among the 3 of {} (a, b, c): d."),
        ({"labels": [0, 1], "bands": ["B04"]}, [], "has the bands B04, the encoder has L, and"),
        ({"labels": [-1, -1]}, [], "has no labels; evaluation needs labelled images. To predict"),
        (
            {},
            ["--targets", "multi-label", "--labels-per-class", "2"],
            "labels_per_class cannot be used with multi-label",
        ),
    ],
    ids=["several", "single", "high", "names", "count", "bands", "unknown", "few"],
)
def test_what_does_not_fit_the_head_is_told_in_one_line(
    data, more, says, tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("VIM_SSL_TRACEBACK", raising=False)
    encoder = VimEncoder(**SMALL | {"num_classes": 3})
    save_encoder(encoder, tmp_path, record={"classes": ["a", "b", "c"]})
    images = [np.full((28, 28, 1), 1000, np.uint16)] * 2
    part = ImageData(images, ["0", "1"], name="pictures", **data)
    monkeypatch.setattr(finetune, "open_split", lambda *_, **__: part)
    argv = ["--eval-only", "--encoder", str(tmp_path), "--data", "pictures", *more]
    with contextlib.suppress(SystemExit):  # of a wrong flag
        assert cli.main(["finetune", *argv, "--output", str(tmp_path / "out")]) == 2
    assert says.format(tmp_path) in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("names", "truth"),
    [([*"cab"], [*"cab"]), (["B", "a"], [*"ba"])],
    ids=["another order", "some, in another letter case"],
)
def test_the_classes_of_data_are_those_of_the_head_by_name(names, truth, tmp_path, monkeypatch):
    save_encoder(VimEncoder(**SMALL | {"num_classes": 3}), tmp_path, record={"classes": [*"abc"]})
    images = [np.full((28, 28), 40 * i, np.uint8) for i in range(len(names))]
    ids, labels = [str(i) for i in range(len(names))], list(range(len(names)))
    part = ImageData(images, ids, name="images", labels=labels, classes=names)
    monkeypatch.setattr(finetune, "open_split", lambda *_, **__: part)
    _, rows = judge(tmp_path, "images", tmp_path / "out")
    assert [row["label"] for row in rows] == truth


def test_shards_with_labels_of_other_classes_are_refused(head, tmp_path):
    png = io.BytesIO()
    Image.new("L", (28, 28)).save(png, "PNG")
    write_tar(tmp_path / "0.tar", {"0.png": png.getvalue(), "0.cls": b"7"})
    with pytest.raises(ValueError, match="labels from 7 to 7; expected 0 to 2 for 3 classes"):
        judge(head, f"wds:{tmp_path}", tmp_path / "out")


@pytest.mark.parametrize("command", ["finetune", "segmentation", "detection"])
def test_several_processes_do_not_judge_one_after_the_other(head, command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("VIM_SSL_TRACEBACK", raising=False)
    assert cli.main([command, "--eval-only", "--encoder", str(head), "--data", "masks:x"]) == 2
    said = "--eval-only runs in one process, but the launcher started 2"
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
