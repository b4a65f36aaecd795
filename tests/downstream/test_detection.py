"""Detection by the script: it overfits, resumes, judges; and what hostile data do to it."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vim_ssl import VimEncoder, cli, load_encoder, save_encoder
from vim_ssl.downstream import detection
from vim_ssl.tasks.detection import load_detection
from vim_ssl.training.run import read_metrics

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_classes": 0}
NAMES = ["disc", "square"]
# As a test of the machinery: what is learned by heart is shown as it is.
AS_IT_IS = ["--scale", "1", "1", "--hflip", "0"]
QUICK = [
    "--threads", "1", "--size", "64", "--channels", "16", "--convs", "0", "--hidden", "32",
    "--samples", "16", "--most", "20", "--trackers", "none", "--batch-size", "2",
    "--lr-reference-batch", "2",
]  # fmt: skip


def draw(seed: int, side: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """A bright disc and a dark square on noise; the image and their masks."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    cy, cx, top = rng.uniform(0.25, 0.75), rng.uniform(0.2, 0.3), rng.uniform(0.1, 0.5)
    disc = np.hypot(y - cy, x - cx) < 0.18
    square = (y >= top) & (y < top + 0.35) & (x >= 0.55) & (x < 0.9)
    values = np.array([[110, 120, 90], [220, 200, 60], [20, 30, 120]])[disc + 2 * square]
    values = (values + rng.integers(-20, 21, values.shape)).clip(0, 255).astype(np.uint8)
    return values, [disc, square]


def shapes(root: Path, count: int = 2, side: int = 64, masks: bool = True) -> Path:
    """The same images to train and to test on, in COCO's layout; ids 10, 20, …, classes 3, 8."""
    for split in ("train", "val"):
        images, annotations = [], []
        for i in range(count):
            values, outlines = draw(i, side)
            (root / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(root / split / f"{i}.png")
            images.append(
                {"id": 10 * i + 10, "file_name": f"{i}.png", "width": side, "height": side}
            )
            for category, outline in zip((3, 8), outlines, strict=True):
                rows, columns = np.nonzero(outline)
                left, top = int(columns.min()), int(rows.min())
                flat = outline.T.reshape(-1).astype(int)
                ends = np.flatnonzero(np.diff(flat)) + 1
                annotations.append(
                    {
                        "id": len(annotations) + 1, "image_id": 10 * i + 10,
                        "category_id": category, "iscrowd": 0, "area": int(outline.sum()),
                        "bbox": [left, top, int(columns.max()) + 1 - left,
                                 int(rows.max()) + 1 - top],
                    }
                    | ({"segmentation": {
                        "size": [side, side],
                        "counts": np.diff([0, *ends, flat.size]).tolist(),
                    }} if masks else {})
                )  # fmt: skip
        write(root, split, images, annotations)
    return root


def write(root: Path, split: str, images: list, annotations: list, names=NAMES) -> None:
    (root / "annotations").mkdir(exist_ok=True)
    categories = [{"id": 3 + 5 * i, "name": name} for i, name in enumerate(names)]
    table = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"{split}.json").write_text(json.dumps(table))


def read(root: Path, split: str) -> dict:
    return json.loads((root / "annotations" / f"{split}.json").read_text())


@pytest.fixture
def data(tmp_path) -> Path:
    return shapes(tmp_path / "data")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """A folder with an untrained encoder."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    save_encoder(VimEncoder(**TINY), folder)
    return str(folder)


def train(encoder, data, output, *more: str) -> dict:
    argv = ["--encoder", encoder, "--data", f"coco:{data}", "--output", str(output), *QUICK]
    argv += ["--warmup-epochs", "0", "--layer-decay", "none"]
    assert detection.main([*argv, *more]) == 0
    return json.loads((output / "metrics.json").read_text())


@pytest.mark.slow
def test_it_learns_two_images_by_heart(tmp_path, encoder, data):
    """The whole chain, cut down: 64 px, two blocks, both classes, boxes and masks."""
    metrics = train(
        encoder, data, tmp_path / "run", *AS_IT_IS, "--epochs", "50", "--base-lr", "5e-3",
        "--channels", "32", "--hidden", "64", "--samples", "32",
    )  # fmt: skip
    assert metrics["box_ap50"] > 90
    assert metrics["mask_ap50"] > 90
    assert metrics["box_ap"] > 40


def read_csv(path: Path) -> list[dict]:
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("head", ["cascade", "rcnn"])
def test_the_record_is_whole_and_can_be_judged_again(tmp_path, encoder, data, capsys, head):
    run = tmp_path / "run"
    metrics = train(encoder, data, run, "--epochs", "2", "--eval-every", "1", "--head", head)
    assert (metrics["task"], metrics["encoder"]) == ("detection", encoder)
    assert (metrics["train"], metrics["test"], metrics["skipped"]) == (2, 2, [])
    assert metrics["classes"] == NAMES
    assert {"box_ap", "box_ap75", "mask_ap", "mask_ar", "hardware", "versions"} <= set(metrics)
    assert [row["class"] for row in read_csv(run / "classes.csv")] == NAMES
    assert [row["objects"] for row in read_csv(run / "classes.csv")] == ["2", "2"]
    results = json.loads((run / "results.json").read_text())
    assert {result["image_id"] for result in results} <= {10, 20}
    assert {result["category_id"] for result in results} <= {3, 8}
    assert Image.open(run / "predictions.png").width > 300
    assert list((run / "images").glob("preview-*.png"))
    assert "test_box_ap" in read_metrics(run)[-1]
    printed = capsys.readouterr().out
    assert "box AP" in printed
    assert "validation split, n = 2 images" in printed
    assert metrics["summary"][0] in printed
    assert "no trivial baseline" in metrics["summary"][0]

    argv = ["--eval-only", "--encoder", str(run), "--data", f"coco:{data}"]
    assert detection.main([*argv, "--output", str(tmp_path / "again"), "--threads", "1"]) == 0
    again = json.loads((tmp_path / "again/metrics.json").read_text())
    assert [again[k] for k in ("box_ap", "mask_ap50")] == [
        metrics[k] for k in ("box_ap", "mask_ap50")
    ]
    assert json.loads((tmp_path / "again/results.json").read_text()) == results


@pytest.mark.parametrize("more", [["?label=boxes"], ["", "--no-masks"]], ids=["data", "flag"])
def test_boxes_alone_will_do(tmp_path, encoder, data, more):
    query, *flags = more
    metrics = train(encoder, f"{data}{query}", tmp_path / "run", "--epochs", "1", *flags)
    assert "box_ap" in metrics
    assert "mask_ap" not in metrics
    found = load_detection(tmp_path / "run").predict(Image.new("RGB", (64, 64)))
    assert "masks" not in found


def test_it_starts_from_the_encoders_weights_or_forgets_them(encoder):
    start = load_encoder(encoder).state_dict()
    for scratch in (False, True):
        config = detection.Config(size=64, channels=8, from_scratch=scratch)
        model = detection.build_model(config, encoder, NAMES)
        same = torch.equal(
            model.encoder.state_dict()["layers.0.mixer.in_proj.weight"],
            start["layers.0.mixer.in_proj.weight"],
        )
        assert same is not scratch


@pytest.mark.parametrize("ema", ["0", "0.9"])
def test_resume_is_bit_identical(tmp_path, encoder, data, ema):
    settings = ["--epochs", "3", "--log-every", "1", "--ema", ema]
    train(encoder, data, tmp_path / "whole", *settings)
    argv = ["--encoder", encoder, "--data", f"coco:{data}", "--output", str(tmp_path / "cut")]
    argv += [*QUICK, "--warmup-epochs", "0", "--layer-decay", "none", *settings]
    detection.main([*argv, "--max-steps", "1"])
    detection.main(["--output", str(tmp_path / "cut"), "--resume", "auto"])
    losses = [[r["loss"] for r in read_metrics(tmp_path / name)] for name in ("whole", "cut")]
    assert losses[0] == losses[1]
    for name in ("encoder.safetensors", "detection.safetensors"):
        whole, cut = (load_file(tmp_path / run / name) for run in ("whole", "cut"))
        assert all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.parametrize("preset", detection.PRESETS)
def test_a_papers_preset_trains(tmp_path, encoder, data, preset):
    """Its settings, on little: large-scale jitter, layer decay, a fall in steps. (bfloat16 is for a
    process of its own.)"""
    argv = ["--encoder", encoder, "--data", f"coco:{data}", "--output", str(tmp_path / "run")]
    argv += ["--preset", preset, *QUICK, "--anchor", "8", "--max-steps", "2", "--precision", "no"]
    assert detection.main([*argv, "--workers", "0", "--epochs", "3"]) == 0
    config = detection.PRESETS[preset]()
    assert round(config.epochs * detection.COCO_STEPS_AN_EPOCH) == 184_375
    assert round(config.warmup_epochs * detection.COCO_STEPS_AN_EPOCH) == 250
    assert (config.size, config.scale, config.schedule) == (1024, (0.1, 2.0), "steps")
    assert (config.layer_decay, config.base_lr, config.weight_decay) == (0.837, 1e-4, 0.1)
    assert (config.precision, config.head, config.masks) == ("bf16", "cascade", True)
    assert all(np.isfinite(row["loss"]) for row in read_metrics(tmp_path / "run"))


# ------------------------------------------------------------------------- hostile data


def test_what_cannot_be_used_is_passed_over_and_named(tmp_path, encoder):
    """A broken image, one of another size, an outline that is none, in both parts; and images
    without an object, which are tested on and not learned from."""
    data = shapes(tmp_path / "data", count=5)
    for split in ("train", "val"):
        (data / split / "1.png").write_bytes(b"no image")
        Image.new("RGB", (9, 9)).save(data / split / "2.png")
        table = read(data, split)
        for annotation in table["annotations"]:
            if annotation["image_id"] == 40:
                annotation["segmentation"] = {"size": [64, 64], "counts": [5]}
        table["annotations"] = [a for a in table["annotations"] if a["image_id"] != 50]
        write(data, split, table["images"], table["annotations"])
    metrics = train(encoder, data, tmp_path / "run", "--epochs", "2")
    assert (metrics["train"], metrics["test"]) == (4, 2)
    reasons = "\n".join(metrics["skipped"])
    for text in ("val/1.png: ", "val/2.png: the image has 9×9 pixels, its annotations are for",
                 "val/3.png: annotation 7: the counts of an RLE do not sum to 4096"):  # fmt: skip
        assert text in reasons
    assert read_metrics(tmp_path / "run")[-1]["skipped"] == 3


def test_images_without_any_object_do_no_harm(tmp_path, encoder, data):
    table = read(data, "train")
    write(data, "train", table["images"], table["annotations"][:1])
    metrics = train(encoder, data, tmp_path / "run", "--epochs", "2", "--empty")
    assert metrics["train"] == 2
    assert all(np.isfinite(row["loss"]) for row in read_metrics(tmp_path / "run"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere"], "The folder 'nowhere' does not exist"),
        (["--data", "coco:nowhere"], "has no annotations/; it does not exist"),
        (["--data", "DATA/train"], "has no boxes; give a folder in COCO's layout"),
        (["--size", "96"], "size 96 is not a multiple of 64"),
        (["--eval-only"], "has no detection.safetensors"),
        (["--anchor", "0"], "anchor is 0; it must be 1 or more"),
        (["--samples", "0"], "samples is 0; it must be 1 or more"),
        (["--score", "2"], "score is 2; it must be 0 to 1"),
    ],
)
def test_a_mistake_is_told_in_one_line(more, message, encoder, data, capsys, monkeypatch):
    monkeypatch.delenv("VIM_SSL_TRACEBACK", raising=False)
    more = [word.replace("DATA", str(data)) for word in more]
    argv = ["--encoder", encoder, "--data", f"coco:{data}", *more]
    try:
        code = cli.main(["detection", *argv])
    except SystemExit as left:  # what the parser refuses
        code = left.code
    assert code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_nothing_to_learn_is_told(tmp_path, encoder, data):
    write(data, "train", read(data, "train")["images"], [])
    with pytest.raises(ValueError, match="contains an object; there is nothing to learn"):
        train(encoder, data, tmp_path / "run")


@pytest.mark.parametrize("more", [[], ["--eval-only"]], ids=["train", "eval-only"])
def test_nothing_to_judge_by_is_told_before_the_training(encoder, data, tmp_path, more):
    write(data, "val", read(data, "val")["images"], [])
    with pytest.raises(ValueError, match=r"none of the 2 test images of .* nothing to evaluate"):
        train(encoder, data, tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()


def test_other_classes_are_refused(tmp_path, encoder, data):
    train(encoder, data, tmp_path / "run", "--epochs", "1")
    for split in ("train", "val"):
        table = read(data, split)
        write(data, split, table["images"], table["annotations"], ["disc", "cube"])
    argv = ["--eval-only", "--encoder", str(tmp_path / "run"), "--data", f"coco:{data}"]
    with pytest.raises(ValueError, match=r"1 classes that are not among the 2 of .*: cube"):
        detection.main(argv)
