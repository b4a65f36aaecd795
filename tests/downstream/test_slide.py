"""From slides to a verdict: tiles embedded, one telling tile among many found by attention."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from vim_ssl import VimEncoder, cli, save_encoder
from vim_ssl.downstream import embed, slide
from vim_ssl.evaluation.embeddings import Embedded, read_embeddings, write_shard
from vim_ssl.tasks.slides import AttentionPool, DrawTiles, Slide, Slides, group_tiles
from vim_ssl.utils.names import original


@pytest.fixture
def vectors(tmp_path) -> Path:
    """Features of 60 slides of 24 tiles; in half of them two tiles have another first value."""
    torch.manual_seed(0)
    x, ids, labels, groups = [], [], [], []
    for number in range(60):
        tiles, label = torch.randn(24, 8), number % 2
        if label:
            tiles[number % 20 : number % 20 + 2, 0] += 8
        x.append(tiles)
        ids += [f"{number:02}.tif@{64 * i},{128}" for i in range(24)]
        labels += [label] * 24
        groups += [f"patient {number // 2}" if number < 6 else None] * 24
    folder = tmp_path / "vectors"
    (folder / "shards").mkdir(parents=True)
    whole = torch.cat(x)
    for name, format, rows in (
        ("00000", "parquet", slice(0, 700)), ("00001", "npy", slice(700, None)),
    ):  # fmt: skip
        part = Embedded(name, whole[rows], ids[rows], labels[rows], groups[rows])
        write_shard(folder / "shards", part, format=format)
    (folder / "record.json").write_text(json.dumps({"finished": True}))
    return folder  # embed.py writes one format; here one after the other is read


def test_attention_finds_the_telling_tiles(vectors, tmp_path, capsys):
    argv = ["--features", str(vectors), "--output", str(tmp_path / "run"), "--threads", "1",
            "--epochs", "10", "--warmup-epochs", "1", "--base-lr", "4e-2", "--tiles", "24",
            "--hidden", "16",
            "--trackers", "none"]  # fmt: skip
    assert slide.main(argv) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["train"], metrics["test"]) == (48, 12)
    assert metrics["attention"]["top1"] >= 80
    assert {"mean", "protocol", "hardware"} <= set(metrics)
    assert (metrics["split"], metrics["n"]) == ("held out", 12)
    assert metrics["baselines"]["the mean of the tiles"]["top1"] == metrics["mean"]["top1"]
    printed = capsys.readouterr().out
    assert "held-out slides, n = 12, trained on 48" in printed
    assert metrics["summary"][0] in printed
    unknown = f"It is not recorded what the encoder of {vectors} was trained on."
    assert metrics["summary"][-1] == unknown
    assert printed.count(unknown) == 2  # at the start, and at the end
    assert "the most frequent class" in metrics["summary"][0]
    assert "Top-1 accuracy, attention" in (tmp_path / "run" / "report.html").read_text()
    with open(tmp_path / "run" / "predictions.csv", newline="") as file:
        truth = {row["id"]: int(row["label"]) for row in csv.DictReader(file)}
    weights: dict[str, dict[int, float]] = {}
    with open(tmp_path / "run" / "attention.csv", newline="") as file:
        for row in csv.DictReader(file):
            weights.setdefault(row["id"], {})[int(row["left"]) // 64] = float(row["weight"])
    for own in weights.values():
        assert sum(own.values()) == pytest.approx(1, abs=1e-3)
    told = [name for name, label in truth.items() if label]
    telling = [{int(name[:2]) % 20, int(name[:2]) % 20 + 1} for name in told]
    found = [max(weights[n], key=weights[n].get) in t for n, t in zip(told, telling, strict=True)]
    assert sum(found) >= 0.8 * len(found)


def test_a_slides_name_that_is_not_utf_8_does_not_lose_the_attention(tmp_path):
    name = os.fsdecode(b"caf\xe9,\n.svs")
    one = Slide(name, torch.zeros(2, 3), torch.tensor([[0, 0], [64, 0]]), 0, name)
    slide.write_attention(tmp_path / "a.csv", Slides([one], "x"), [torch.tensor([0.25, 0.75])])
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [original(row["id"]) for row in rows] == [name] * 2
    assert [row["weight"] for row in rows] == ["0.250000", "0.750000"]


def test_slides_hold_what_the_files_say(vectors):
    tiles = read_embeddings(vectors)
    assert tiles.x.shape == (60 * 24, 8)
    slides = group_tiles(tiles, "vectors")
    assert [slide.id for slide in slides.slides][:2] == ["00.tif", "01.tif"]
    seventh = slides.slides[7]
    rows = [i for i, id in enumerate(tiles.ids) if id.startswith("07.tif@")]
    assert torch.equal(seventh.x, tiles.x[rows])
    assert seventh.positions[:2].tolist() == [[0, 128], [64, 128]]
    assert (seventh.label, seventh.group, slides.slides[5].group) == (1, "07.tif", "patient 2")
    drawn = DrawTiles(50)(slides[7])["x"]
    assert drawn.shape == (50, 8)
    assert {tuple(row) for row in drawn.tolist()} == {tuple(row) for row in seventh.x.tolist()}


def test_the_order_of_tiles_does_not_matter():
    pool, x = AttentionPool(8, 3).eval(), torch.randn(2, 9, 8)
    order = torch.randperm(9)
    (logits, weights), (again, moved) = pool(x), pool(x[:, order])
    torch.testing.assert_close(logits, again)
    torch.testing.assert_close(weights[:, order], moved)


def test_slides_go_from_files_to_a_verdict(tmp_path):
    pytest.importorskip("tiffslide")
    tifffile = pytest.importorskip("tifffile")
    rng = np.random.default_rng(0)
    for kind, red in (("normal", 120), ("tumour", 250)):
        (tmp_path / "slides" / kind).mkdir(parents=True)
        for i in range(5):
            values = np.full((64, 96, 3), 240, np.uint8)
            values[16:48, 16:80] = (red, 60, 90)
            values[16:48, 16:80] -= rng.integers(0, 30, (32, 64, 3), dtype=np.uint8)
            tifffile.imwrite(tmp_path / "slides" / kind / f"{i}.tif", values, tile=(16, 16),
                             photometric="rgb")  # fmt: skip
    (tmp_path / "slides" / "normal" / "broken.tif").write_bytes(b"II*\0")
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_classes": 0}
    save_encoder(VimEncoder(**small), tmp_path / "encoder")
    spec = f"slide:{tmp_path}/slides?tile=16"
    embed.main(["--encoder", str(tmp_path / "encoder"), "--data", spec,
                "--output", str(tmp_path / "tiles")])  # fmt: skip
    tiles = read_embeddings(tmp_path / "tiles")
    assert len(tiles.ids) == 10 * 2 * 4
    assert tiles.made_of["classes"] == ["normal", "tumour"]
    slide.main(["--features", str(tmp_path / "tiles"), "--output", str(tmp_path / "run"),
                "--epochs", "3", "--warmup-epochs", "0", "--tiles", "8", "--threads", "1",
                "--test", "0.4", "--trackers", "none"])  # fmt: skip
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["mean"]["top1"] == 100  # the colour tells


@pytest.mark.parametrize(
    ("made_of", "says"),
    [
        ({}, "60 slides of .* are also in .*, such as 00.tif"),
        ({"classes": ["b", "a"]}, r"different classes \(None, \['b', 'a'\]\)"),
        ({"weights": "12ab"}, "were made with different weights"),
    ],
    ids=["same", "classes", "weights"],
)
def test_test_slides_are_others_of_the_same_kind(vectors, tmp_path, made_of, says):
    other = shutil.copytree(vectors, tmp_path / "other")
    (other / "record.json").write_text(json.dumps({"finished": True, "made_of": made_of}))
    config = slide.Config(features=str(vectors), test_features=str(other))
    with pytest.raises(ValueError, match=says):
        slide.build_data(config)


def test_test_slides_have_the_classes_of_the_training_slides_by_name(vectors, tmp_path):
    for folder, classes in (
        (vectors, ["healthy", "ill"]),
        (tmp_path / "other", ["ill", "healthy"]),
    ):
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        record = {"finished": True, "made_of": {"classes": classes}}
        (folder / "record.json").write_text(json.dumps(record))
    part = Embedded("0", torch.ones(2, 8), ["x.tif@0,0", "y.tif@0,0"], [0, 1], [None, None])
    write_shard(tmp_path / "other/shards", part, format="npy")
    config = slide.Config(features=str(vectors), test_features=str(tmp_path / "other"))
    train, test, _ = slide.build_data(config)
    assert (test.labels, test.made_of["classes"]) == ([1, 0], train.made_of["classes"])


def embedded(folder: Path, slides: dict[str, torch.Tensor]) -> Path:
    """Features of slides, a label for every second one."""
    (folder / "shards").mkdir(parents=True)
    (folder / "record.json").write_text('{"finished": true}')
    ids = [f"{name}@{64 * i},0" for name, x in slides.items() for i in range(len(x))]
    labels = [number % 2 for number, x in enumerate(slides.values()) for _ in x]
    rows = torch.cat(list(slides.values()))
    write_shard(
        folder / "shards", Embedded("0", rows, ids, labels, [None] * len(ids)), format="npy"
    )
    return folder


def test_a_copy_of_a_slide_is_found_whatever_its_name(tmp_path):
    """Also in another order of the tiles, and with the rounding of another batch."""
    torch.manual_seed(0)
    slides = {f"{i}.tif": torch.randn(9, 8) for i in range(6)}
    copy = slides["3.tif"].flip(0) + 1e-5 * torch.randn(9, 8)
    one = embedded(tmp_path / "one", slides)
    for name, others, says in (
        ("copied", {"x.svs": torch.randn(9, 8), "y.svs": copy}, r"1 slides .* y\.svs \(named 3"),
        ("apart", {"3.tif": torch.randn(9, 8), "y.svs": slides["3.tif"][:8]}, ""),
    ):  # fmt: skip
        other = embedded(tmp_path / name, others)
        config = slide.Config(features=str(one), test_features=str(other))
        if says:
            with pytest.raises(ValueError, match=says):
                slide.build_data(config)
        else:
            assert [len(split) for split in slide.build_data(config)[:2]] == [6, 2]
    both = embedded(tmp_path / "both", slides | {f"copy of {n}": x for n, x in slides.items()})
    with pytest.warns(UserWarning, match=r"held-out slides have the features of a training slide"):
        slide.build_data(slide.Config(features=str(both), test=0.3))


def test_a_patients_slides_stay_together(vectors, tmp_path):
    for seed in range(5):
        train, test, _ = slide.build_data(slide.Config(features=str(vectors), seed=seed))
        assert set(train.groups).isdisjoint(test.groups)
        assert len(test) in (11, 12, 13)
    (tmp_path / "other/shards").mkdir(parents=True)
    (tmp_path / "other/record.json").write_text('{"finished": true}')
    part = Embedded("0", torch.ones(1, 8), ["new.tif@0,0"], [1], ["patient 1"])
    write_shard(tmp_path / "other/shards", part, format="npy")
    config = slide.Config(features=str(vectors), test_features=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"1 groups have slides in .*, such as patient 1"):
        slide.build_data(config)


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda folder: None, "contains no embeddings"),
        (lambda folder: (folder / "record.json").write_text('{"finished": false}'), "incomplete"),
        (
            lambda folder: (
                (folder / "record.json").write_text('{"finished": true}'),
                (folder / "shards").mkdir(),
                write_shard(
                    folder / "shards", Embedded("0", torch.ones(1, 2), ["a.png"], [0]), format="npy"
                ),
            ),
            "not a tile of a slide",
        ),
    ],
    ids=["nothing", "unfinished", "pictures"],
)
def test_what_does_not_fit_is_told(tmp_path, prepare, says, capsys, monkeypatch):
    monkeypatch.delenv("VIM_SSL_TRACEBACK", raising=False)
    (tmp_path / "x").mkdir()
    prepare(tmp_path / "x")
    run = ["--features", str(tmp_path / "x"), "--output", str(tmp_path / "run")]
    assert cli.main(["slide", *run]) == 2
    assert says in capsys.readouterr().err
