"""`vim-ssl predict` writes what the models predict from Python."""

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from earlier_runs import EARLIER, pixels
from PIL import Image

import vim_ssl
from vim_ssl import cli, save_encoder
from vim_ssl.downstream import predict
from vim_ssl.evaluation.embeddings import Embedded, write_shard
from vim_ssl.models.video import VideoEncoder
from vim_ssl.tasks.slides import SlideClassifier


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch) -> Path:
    """The current folder, with images in ``new`` (one broken) and two runs in ``runs``."""
    (tmp_path / "new").mkdir()
    for i in range(5):
        Image.fromarray(pixels(i, i % 2, 32)).save(tmp_path / "new" / f"{i}.png")
    (tmp_path / "new/3.png").write_text("no image")
    for name in ("mae", "finetune", "clip"):
        shutil.copytree(EARLIER / "runs" / name, tmp_path / "runs" / name)
    (tmp_path / "runs/finetune/encoder.json").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIM_SSL_TRACEBACK", raising=False)
    return tmp_path


def rows(path: str | Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_same(row: dict[str, str], result) -> None:
    assert row["class"] == result.name
    for name, probability in zip(result.classes, result.probabilities, strict=True):
        assert float(row[f"p_{name}"]) == pytest.approx(probability, abs=2e-6)


def test_the_newest_run_predicts_a_folder_without_labels(capsys):
    assert cli.main(["predict", "--data", "new"]) == 0
    table = rows("runs/finetune/predict-new/predictions.csv")
    assert [row["id"] for row in table] == ["0.png", "1.png", "2.png", "4.png"]
    model = vim_ssl.load_model("runs/finetune")
    for row in table:
        assert_same(row, model.predict(f"new/{row['id']}"))
    printed = capsys.readouterr().out
    assert "Model runs/finetune: classification, 2 classes (plain, steep)" in printed
    assert "1 could not be read: 3.png: not an image" in printed
    assert "Written: 4 predictions in runs/finetune/predict-new/predictions.csv" in printed
    for name in {row["class"] for row in table}:
        count = sum(row["class"] == name for row in table)
        assert f"{name:5}  {count:10} {25 * count:6.1f} %" in printed


def tar(path: Path) -> str:
    with tarfile.open(path, "w") as file:
        for name in ("0", "3", "4"):
            content = Path(f"new/{name}.png").read_bytes()
            member = tarfile.TarInfo(f"{name}.png")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize("kind", ["file", "shards", "list", "split"])
def test_any_data_are_predicted(workplace, kind):
    data, ids = {
        "file": ("new/4.png", ["4.png"]),
        "shards": ("some.tar", ["some.tar/0", "some.tar/4"]),
        "list": ("list.csv", ["new/4.png", "new/0.png"]),
        "split": ("splits", ["train/0.png", "test/4.png"]),
    }[kind]
    tar(workplace / "some.tar")
    (workplace / "list.csv").write_text("path\nnew/4.png\nnew/0.png\n")
    for id in ("train/0.png", "test/4.png"):
        (workplace / "splits" / id).parent.mkdir(parents=True)
        shutil.copy(f"new/{id[-5:]}", workplace / "splits" / id)
    predict.main(["--data", data, "--output", "out"])
    table = {row["id"]: row for row in rows("out/predictions.csv")}
    assert list(table) == ids
    model = vim_ssl.load_model("runs/finetune")
    for id, row in table.items():
        assert_same(row, model.predict(f"new/{id[-5:].removesuffix('.png')[-1]}.png"))


@pytest.mark.parametrize(
    "given",
    [["--classes", "red", "a_green"], ["--classes", "names.txt"], ["--texts", "red", "a_green"]],
)
def test_classes_by_name(workplace, given):
    (workplace / "names.txt").write_text("red\n\na_green\n")
    argv = ["--encoder", "runs/clip", "--data", "new", "--output", "out.jsonl", *given]
    predict.main(argv)
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    clip = vim_ssl.load_clip("runs/clip")
    option = "texts" if "--texts" in given else "classes"
    results = clip.predict([f"new/{row['id']}" for row in lines], **{option: ["red", "a_green"]})
    assert len(lines) == 4
    for row, result in zip(lines, results, strict=True):
        assert_same(row, result)
    with pytest.raises(ValueError, match=r"predictions with different .*classes"):
        predict.main([*argv[:6], "--classes", "blue", "grey"])


def test_classes_of_the_data_are_the_default_of_an_image_text_run(workplace):
    for name in ("red_square", "blue"):
        (workplace / "sorted" / name).mkdir(parents=True)
        shutil.copy("new/0.png", workplace / "sorted" / name / "0.png")
    predict.main(["--encoder", "runs/clip", "--data", "sorted", "--output", "out.csv"])
    assert {"p_blue", "p_red square"} <= set(rows("out.csv")[0])


def test_videos_are_predicted_with_the_frames_of_training(workplace, capsys):
    encoder = VideoEncoder(
        img_size=16, patch_size=8, embed_dim=8, depth=1, num_classes=2, frames=4, tubelet=2
    )
    record = {"classes": ["a", "b"], "data": "video:elsewhere?frames=4&clips=2"}
    save_encoder(encoder, "runs/video", record=record)
    for clip in ("x", "y"):
        (workplace / "clips" / clip).mkdir(parents=True)
        for i in (0, 1, 2, 4):
            shutil.copy(f"new/{i}.png", workplace / "clips" / clip / f"{i}.png")
    predict.main(["--encoder", "runs/video", "--data", "clips", "--output", "out.csv"])
    assert "vim_ssl.load_model('runs/video').predict('clip.mp4')" in capsys.readouterr().out
    table, model = rows("out.csv"), vim_ssl.load_model("runs/video")
    assert [row["id"] for row in table] == ["x", "y"]
    assert_same(table[1], model.predict("clips/y"))
    assert json.loads(Path("out.csv.record.json").read_text())["unit"] == "videos"


def test_slides_are_predicted_from_the_features_of_their_tiles(workplace):
    model = SlideClassifier(["benign", "malignant"], dim=8, hidden=4).eval()
    (workplace / "runs/slide").mkdir()
    model.save("runs/slide")
    x, shards = torch.randn(6, 8), workplace / "tiles/shards"
    shards.mkdir(parents=True)
    ids = [f"{name}.tif@{i},0" for name in "ab" for i in range(3)]
    write_shard(shards, Embedded("0", x, ids, [None] * 6, [None] * 6), format="npy")
    (workplace / "tiles/record.json").write_text('{"finished": true}')
    predict.main(["--encoder", "runs/slide", "--data", "tiles", "--output", "out.csv"])
    table = rows("out.csv")
    assert [row["id"] for row in table] == ["a.tif", "b.tif"]
    assert_same(table[1], model.predict(x[3:]))


def test_labels_above_the_threshold_are_written(capsys):
    shutil.copytree("runs/finetune", "runs/several")
    description = json.loads(Path("runs/several/encoder.json").read_text())
    description["made_by"]["targets"] = "multi-label"
    Path("runs/several/encoder.json").write_text(json.dumps(description))
    argv = ["--encoder", "runs/several", "--data", "new", "--output", "out.csv"]
    predict.main([*argv, "--threshold", "0"])
    assert {row["classes"] for row in rows("out.csv")} == {"plain|steep"}
    assert capsys.readouterr().out.count("4  100.0 %") == 2  # of the images, not of the labels
    model = vim_ssl.load_model("runs/several")
    assert_same(rows("out.csv")[0], model.predict("new/0.png"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "data is empty; give the images to predict"),
        (["--data", "nowhere"], "'nowhere' does not exist"),
        (["--data", "new", "--encoder", "runs/mae"], "Fine-tune it with vim-ssl finetune"),
        (["--data", "new", "--classes", "a", "b"], "runs/finetune has its classes (plain, steep)"),
        (["--data", "new", "--encoder", "runs/clip"], "needs the classes to choose from"),
        (["--data", "video:new"], "but the run was trained on images"),
        (["--data", "new", "--output", "out.xlsx"], "expected .csv, .parquet, .jsonl"),
        (["--data", "new", "--batch-size", "0"], "batch_size is 0"),
        (["--data", "new", "--top-k", "0"], "top_k is 0"),
    ],
)
def test_a_mistake_is_reported_in_one_line(workplace, argv, message, capsys):
    if "video:new" in argv:
        shutil.move("new", "clip")
        (workplace / "new").mkdir()
        shutil.move("clip", "new/clip")
    try:
        code = cli.main(["predict", *argv])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_values_of_other_bands_are_refused_before_predicting(workplace):
    rasterio = pytest.importorskip("rasterio")
    profile = {"width": 8, "height": 8, "count": 3, "dtype": "uint16"}
    (workplace / "scenes").mkdir()
    with rasterio.open("scenes/a.tif", "w", driver="GTiff", **profile) as file:
        file.write(np.full((3, 8, 8), 3000, np.uint16))
    with pytest.raises(ValueError, match="are not scaled to 0"):
        predict.main(["--data", "geotiff:scenes", "--output", "out.csv"])
    assert not Path("out.csv.record.json").exists()
