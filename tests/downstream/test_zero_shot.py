"""Zero-shot: classes by their names, images and captions by each other."""

import json
import shutil
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vim_ssl import load_encoder
from vim_ssl.data import open_data
from vim_ssl.data.open import open_split
from vim_ssl.downstream import zero_shot
from vim_ssl.evaluation.extract import Features
from vim_ssl.evaluation.retrieval import PairFeatures
from vim_ssl.models.text import TextEncoder
from vim_ssl.models.tokenizers import train_bpe
from vim_ssl.objectives.clip import Clip, save_clip
from vim_ssl.training.run import newest_run

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue_sky": (40, 60, 220)}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A run with a model of random weights."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    torch.manual_seed(0)
    tokenizer = train_bpe([*COLOURS, "a photo of a green sky"], vocab_size=300, context_length=12)
    text = TextEncoder(tokenizer.vocab_size, eos_id=2, context_length=12, width=16, depth=1,
                       heads=2)  # fmt: skip
    encoder = load_encoder("vim_nano_patch8_64", depth=1, embed_dim=16, img_size=32)
    save_clip(Clip(encoder, text, embed_dim=8, tokenizer=tokenizer), folder)
    return folder


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    """Colours in class folders, with captions beside the images."""
    folder = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for i in range(4):
            values = np.clip(np.array(colour) + rng.integers(-20, 20, (32, 32, 3)), 0, 255)
            Image.fromarray(values.astype(np.uint8)).save(folder / name / f"{i}.png")
            (folder / name / f"{i}.txt").write_text(f"{name} {i}\na {name} image\n")
    return folder


def shoot(*argv: str) -> dict:
    assert zero_shot.main(list(argv)) == 0
    return json.loads((Path(argv[argv.index("--output") + 1]) / "metrics.json").read_text("utf-8"))


def test_classes_are_told_by_their_names(model, classes, tmp_path, capsys):
    found = shoot("--encoder", str(model), "--data", str(classes), "--output", str(tmp_path))
    figures = found["classification"]
    assert (figures["classes"], figures["pictures"], figures["chance"]) == (3, 12, 33.33)
    assert 0 <= figures["top1"] <= figures["top5"] == 100.0
    assert found["names"] == ["blue sky", "green", "red"]
    assert len(found["named"]) == 8
    assert "retrieval" not in found
    printed = capsys.readouterr().out
    assert "3 classes by name" in printed
    assert "Accuracy, all images, n = 12." in printed
    assert "top-5" not in printed  # of three classes it is always 100 %
    (sentence,) = found["summary"]
    assert sentence in printed
    assert sentence.startswith(f"Zero-shot top-1 {figures['top1']:.1f} %: ")
    assert "chance (33.33 %) (95 % interval " in sentence


def test_top5_is_printed_for_ten_classes():
    result = {"classes": 10, "pictures": 40, "chance": 10.0}
    result |= {key: value for k in (1, 5) for key, value in
               ((f"top{k}", 50.0), (f"top{k}_ci", (40.0, 60.0)))}  # fmt: skip
    metrics = {"classification": result, "split": "test", "skipped": [], "summary": []}
    assert "top-5" in zero_shot.table(metrics)
    assert "Accuracy, test split, n = 40 images." in zero_shot.table(metrics)


def test_images_and_captions_are_found_by_each_other(model, classes, tmp_path, capsys):
    found = shoot("--encoder", str(model), "--data", f"pairs:{classes}", "--output", str(tmp_path))
    figures = found["retrieval"]
    assert (figures["pictures"], figures["captions"]) == (12, 24)
    for way in ("image_to_text", "text_to_image"):
        values = [figures[f"{way}_r{k}"] for k in (1, 5, 10)]
        assert values == sorted(values)
    assert "classification" not in found
    shown = found["examples"]
    assert len(shown["pairs"]) == len(shown["cosines"]) == len(shown["cosines"][0]) == 8
    for pair in shown["pairs"]:
        assert (tmp_path / pair["picture"]).exists()
        assert len(pair["nearest"]) == 3
        name = pair["id"].split("/")[0]
        assert pair["own"].startswith(name)
        right = {text for text, own in zip(pair["nearest"], pair["right"], strict=True) if own}
        assert right <= {pair["own"], f"a {name} image"}
    assert not found["trained_on"]
    # Half of the captions are those of four images: a random answer is right for 1 or 4 of 12.
    assert figures["chance_r1"] == 20.833
    printed = capsys.readouterr().out
    assert "Retrieval, all images, n = 12, 24 captions; chance at R@1: 20.833 %" in printed
    assert len(found["summary"]) == 2
    assert all(f"chance ({figures['chance_r1']} %)" in one for one in found["summary"])
    assert all(one in printed for one in found["summary"])


def test_without_a_run_of_captions_it_is_told_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = Path("runs/digits")
    other.mkdir(parents=True)
    (other / "encoder.safetensors").write_bytes(b"")
    (other / "config.json").write_text('{"recipe": "mim_pretrain"}')
    with pytest.raises(FileNotFoundError, match=r"No run of clip_pretrain.*launch recipes/clip_pr"):
        zero_shot.main([])


def test_the_newest_run_may_have_an_image_tower_of_timm(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path(shutil.copytree(model, "runs/timm"))
    (run / "config.json").write_text(json.dumps({"recipe": "clip_pretrain", "data": "x"}))
    assert newest_run(recipe="clip_pretrain") == run
    (run / "encoder.safetensors").unlink()  # it is in clip.safetensors
    assert newest_run(recipe="clip_pretrain") == run


def test_other_data_than_the_runs_own_has_a_folder_of_its_own(model, classes, tmp_path):
    run = shutil.copytree(model, tmp_path / "run")
    (run / "config.json").write_text(json.dumps({"val": f"pairs:{classes}"}))
    zero_shot.main(["--encoder", str(run)])
    zero_shot.main(["--encoder", str(run), "--data", str(classes)])
    own, other = sorted(run.glob("zero_shot*/metrics.json"))
    assert own.parent.name == "zero_shot"
    assert "retrieval" in json.loads(own.read_text("utf-8"))
    assert "classification" in json.loads(other.read_text("utf-8"))


def test_top_k_counts_what_is_among_the_nearest():
    classifier = F.normalize(torch.eye(6) + 0.1 * torch.arange(6), dim=-1)
    labels = torch.tensor([0, 1, 2, 3, -1])
    x = torch.eye(6)[[0, 1, 2, 4, 5]]
    figures, best = zero_shot.classify(Features(x, labels, list("abcde"), []), classifier)
    assert figures["top1"] == 75.0
    assert figures["pictures"] == 4
    assert best[:3, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("grouped", [False, True])
def test_intervals_draw_an_images_captions_and_a_groups_images_as_a_whole(classes, grouped):
    """Two captions an image, both right or both wrong: no surer than one."""
    data = open_data(f"pairs:{classes}")
    if grouped:
        data.groups = [str(i // 2) for i in range(12)]
    right = torch.tensor([1.0, 1, 1, 1, -1, -1, 1, 1, 1, 1, -1, -1])  # group by group
    texts = torch.eye(12).repeat_interleave(2, 0)
    owner = torch.arange(12).repeat_interleave(2)
    captions = [f"caption {i}" for i in range(24)]
    pairs = PairFeatures(torch.eye(12) * right[:, None], texts, owner, data.ids, captions, [])
    figures = zero_shot.search(pairs, data)
    assert figures["image_to_text_r1"] == figures["text_to_image_r1"] == 66.67
    widths = [high - low for low, high in (figures[f"{way}_r1_ci"] for way in
                                           ("image_to_text", "text_to_image"))]  # fmt: skip
    assert min(widths) > (60 if grouped else 45)  # of 24 apart: 36


def test_a_class_is_the_mean_direction_of_its_sentences(model):
    clip = zero_shot.load_clip(model)
    rows = zero_shot.text_classifier(clip, ["red", "green"], ["a {}", "the {} sky"])
    expected = clip.encode_text(["a green", "the green sky"]).mean(0)
    torch.testing.assert_close(rows[1], expected / expected.norm())
    braces = zero_shot.text_classifier(clip, ["red"], ["{x} {} {"])
    torch.testing.assert_close(braces[0], clip.encode_text("{x} red {")[0])


def test_names_come_from_a_file_or_imagenet(model, classes, tmp_path):
    data = open_split(str(classes))
    (tmp_path / "names.txt").write_text("\ufeffazure\nemerald\ncrimson\n", encoding="utf-8")
    assert zero_shot.class_names(data, str(tmp_path / "names.txt")) == [
        "azure", "emerald", "crimson"
    ]  # fmt: skip
    (tmp_path / "names.txt").write_text("azure\n")
    with pytest.raises(ValueError, match=r"has 1 names; .* has 3"):
        zero_shot.class_names(data, str(tmp_path / "names.txt"))
    (tmp_path / "names.txt").write_text("azure\nazure\nred\n")
    with pytest.raises(ValueError, match="two classes named 'azure'"):
        zero_shot.class_names(data, str(tmp_path / "names.txt"))
    data.classes = ["n01440764", "n02012849", "n03126707"]
    fish, bird, machine = zero_shot.class_names(data, "")
    assert fish == "tench"
    assert bird.startswith("crane: ")
    assert "boom" in machine


def test_the_runs_own_training_images_are_told_apart(model, classes, tmp_path, capsys):
    run = shutil.copytree(model, tmp_path / "run")
    (run / "config.json").write_text(json.dumps({"data": f"pairs:{classes}"}))
    assert shoot("--encoder", str(run), "--output", str(tmp_path / "out"))["trained_on"]
    assert "trained on these images; this is not a test" in capsys.readouterr().out
    some = f"{classes}?limit=6"
    outputs = (str(tmp_path / f"out{i}") for i in count())

    def trained_on(spec: str) -> bool:
        argv = ["--encoder", str(run), "--output", next(outputs), "--data", spec]
        return shoot(*argv)["trained_on"]

    assert trained_on(some)
    (run / "config.json").write_text(json.dumps({"data": f"folder:{tmp_path} + 2 * pairs:{some}"}))
    assert trained_on(f"pairs:{classes}")
    (run / "config.json").write_text(json.dumps({"data": f"pairs:{tmp_path}"}))
    assert not trained_on(some)
    both = f"{classes}?limit=3 + {classes}"
    assert len(open_split(both)) == 15


def test_a_training_that_did_not_record_its_images_is_named(model, classes, tmp_path, capsys):
    run = shutil.copytree(model, tmp_path / "run")
    settings = json.loads((run / "clip_config.json").read_text())
    entry = {"recipe": "clip_pretrain", "data": "wds:x.tar", "labels": False}
    settings["made_by"] = {"trainings": [entry]}
    (run / "clip_config.json").write_text(json.dumps(settings))
    (run / "config.json").write_text(json.dumps({"data": "wds:x.tar"}))
    metrics = shoot("--encoder", str(run), "--data", str(classes), "--output", str(tmp_path / "o"))
    remark = "It is not recorded which images were trained on by clip_pretrain on wds:x.tar"
    assert not metrics["trained_on"]
    assert metrics["summary"][-1].startswith(remark)
    assert capsys.readouterr().out.count(remark) == 2  # at the start, and at the end


@pytest.mark.parametrize(
    ("folders", "spec", "split"),
    [
        (("train", "val", "test"), "", "test"),
        (("train", "val"), "", "val"),
        (("train", "val"), "?split=train", "train"),
        (("a", "b"), "", "all"),
    ],
)
def test_the_part_that_is_tested_on(folders, spec, split, tmp_path):
    for name in folders:
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x.png")
    assert open_split(f"{tmp_path}{spec}").split == split


def test_mistakes_are_told(model, classes, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="neither labels nor captions"):
        zero_shot.main(["--encoder", str(model), "--data", str(tmp_path)])
    (tmp_path / "unknown.csv").write_text("path,label\nx.png,\n")
    rows = np.zeros((2, 3), np.uint8)  # several labels an image
    many = {
        f"{part}_{what}": values
        for part in ("train", "val", "test")
        for what, values in (("images", np.zeros((2, 28, 28), np.uint8)), ("labels", rows))
    }
    np.savez(tmp_path / "chestmnist.npz", **many)
    for spec in ("csv:unknown.csv", "medmnist:chestmnist.npz"):
        scheme, _, name = spec.partition(":")
        with pytest.raises(ValueError, match="neither labels nor captions"):
            zero_shot.main(["--encoder", str(model), "--data", f"{scheme}:{tmp_path}/{name}"])
    with pytest.raises(ValueError, match="templates is empty"):
        zero_shot.Config(templates=())
    with pytest.raises(ValueError, match=r"must contain \{\} once"):
        zero_shot.Config(templates=("a photo",))
    with pytest.raises(FileNotFoundError, match="clip_pretrain run"):
        zero_shot.main(["--encoder", str(tmp_path), "--data", str(classes)])


def test_without_a_run_it_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"recipes/clip_pretrain\.py"):
        zero_shot.main([])
