"""Segmentation by the script: it overfits, resumes, judges; and what hostile data do to it."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import finish, start
from safetensors.torch import load_file

from vim_ssl import VimEncoder, cli, load_encoder, save_encoder
from vim_ssl.downstream import segmentation
from vim_ssl.tasks.segmentation import load_segmentation
from vim_ssl.training.run import read_metrics

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_classes": 0}
NAMES = ["ground", "disc", "square"]
# As a test of the machinery: what is learned by heart is shown as it is.
AS_IT_IS = [
    "--scale", "1", "1", "--hflip", "0", "--no-photometric", "--max-share", "1",
]  # fmt: skip
QUICK = ["--threads", "1", "--crop", "32", "--channels", "16", "--trackers", "none"]


def draw(path: Path, seed: int, width: int, height: int) -> None:
    """A bright disc and a dark square on noise; images/PATH.png and masks/PATH.png."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    unit = min(width, height)
    mask = np.zeros((height, width), np.uint8)
    cy, cx = rng.uniform(0.3, 0.7) * height, rng.uniform(0.25, 0.35) * width
    mask[np.hypot(y - cy, x - cx) < 0.22 * unit] = 1
    top, left = int(rng.uniform(0.1, 0.5) * height), int(0.6 * width)
    mask[top : top + int(0.4 * unit), left : left + int(0.35 * unit)] = 2
    values = np.array([[110, 120, 90], [220, 200, 60], [20, 30, 120]])[mask]
    values = (values + rng.integers(-20, 21, values.shape)).clip(0, 255).astype(np.uint8)
    root, name = path.parents[1], f"{path.parent.name}/{path.name}.png"
    for kind, content in (("images", values), ("masks", mask)):
        (root / kind / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(content).save(root / kind / name)


def shapes(root: Path, count: int = 4, size=(32, 32)) -> Path:
    """The same images to train and to test on."""
    for split in ("train", "val"):
        for i in range(count):
            draw(root / split / f"{i}", i, *size)
    (root / "classes.txt").write_text("\n".join(NAMES))
    return root


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
    argv = ["--encoder", encoder, "--data", f"masks:{data}", "--output", str(output), *QUICK]
    argv += ["--warmup-epochs", "0", "--batch-size", "4", "--lr-reference-batch", "4"]
    assert segmentation.main([*argv, "--layer-decay", "none", *more]) == 0
    return json.loads((output / "metrics.json").read_text())


@pytest.mark.parametrize("head", ["upernet", "linear"])
def test_it_overfits_four_images(tmp_path, encoder, data, head):
    """The whole chain, cut down: 32 px, two blocks. A guess, all ground, would be 24 %."""
    metrics = train(
        encoder, data, tmp_path / "run", *AS_IT_IS, "--epochs", "30", "--head", head,
        "--base-lr", "5e-3", "--channels", "32",
    )  # fmt: skip
    assert metrics["miou"] > 45


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 64), (96, 64)], ids=str)
def test_it_overfits_four_larger_images(tmp_path, encoder, size):
    data = shapes(tmp_path / "data", size=size)
    metrics = train(
        encoder, data, tmp_path / "run", *AS_IT_IS, "--crop", "64", "--epochs", "150",
        "--base-lr", "3e-3", "--channels", "32",
    )  # fmt: skip
    assert metrics["miou"] >= 95
    assert min(float(row["iou"]) for row in read_csv(tmp_path / "run/classes.csv")) > 0.9


def read_csv(path: Path) -> list[dict]:
    with open(path) as file:
        return list(csv.DictReader(file))


def test_the_record_is_whole_and_can_be_judged_again(tmp_path, encoder, data, capsys):
    run = tmp_path / "run"
    metrics = train(encoder, data, run, "--epochs", "2", "--eval-every", "1")
    assert (metrics["task"], metrics["encoder"]) == ("segmentation", encoder)
    assert (metrics["train"], metrics["test"], metrics["skipped"]) == (4, 4, [])
    assert metrics["classes"] == NAMES
    assert f"{metrics['miou']:.1f} %" in (run / "report.html").read_text()
    assert metrics["miou_ci"] is None
    assert {"aacc", "macc", "mdice", "hardware", "versions"} <= set(metrics)
    assert [row["class"] for row in read_csv(run / "classes.csv")] == NAMES
    assert len(read_csv(run / "predictions.csv")) == 4
    assert Image.open(run / "predictions.png").width > 300
    assert list((run / "images").glob("preview-*.png"))
    rows = read_metrics(run)
    assert "test_miou" in rows[-1]
    printed = capsys.readouterr().out
    assert "IoU" in printed
    assert (metrics["split"], metrics["n"]) == ("val", 4)
    assert "validation split, n = 4 images" in printed
    (baseline,) = metrics["baselines"].items()
    assert baseline[0] == "predicting ground everywhere"
    assert 0 < baseline[1]["miou"] < 34  # of three classes, one is partly right
    assert baseline[0] in metrics["summary"][0]
    assert metrics["summary"][0] in printed

    argv = ["--eval-only", "--encoder", str(run), "--data", f"masks:{data}"]
    assert segmentation.main([*argv, "--output", str(tmp_path / "again"), "--threads", "1"]) == 0
    again = json.loads((tmp_path / "again/metrics.json").read_text())
    assert [again[k] for k in ("miou", "aacc", "mdice")] == [
        metrics[k] for k in ("miou", "aacc", "mdice")
    ]
    image = Image.open(data / "images/val/0.png")
    assert load_segmentation(run).predict(image).shape == (32, 32)


def test_a_run_is_judged_by_what_it_had_held_out(tmp_path, encoder):
    """Another draw of the same images would judge it by some that it has learned from."""
    for i in range(6):
        draw(tmp_path / "data/all" / f"{i}", i, 32, 32)
    (tmp_path / "data/classes.txt").write_text("\n".join(NAMES))
    train(encoder, tmp_path / "data", tmp_path / "run", "--epochs", "1", "--seed", "5",
          "--test", "0.5")  # fmt: skip
    argv = ["--eval-only", "--encoder", str(tmp_path / "run"), "--threads", "1"]
    assert segmentation.main([*argv, "--output", str(tmp_path / "again")]) == 0
    tested = [
        [row["id"] for row in read_csv(tmp_path / name / "predictions.csv")]
        for name in ("run", "again")
    ]
    assert tested[0] == tested[1] != []


def test_it_starts_from_the_encoders_weights_or_forgets_them(encoder, tmp_path):
    start = load_encoder(encoder).state_dict()
    for scratch in (False, True):
        config = segmentation.Config(crop=32, from_scratch=scratch)
        model = segmentation.build_model(config, encoder, NAMES)
        same = torch.equal(
            model.encoder.state_dict()["layers.0.mixer.in_proj.weight"],
            start["layers.0.mixer.in_proj.weight"],
        )
        assert same is not scratch


def test_no_parameter_is_left_without_a_gradient(tmp_path):
    """Several processes would refuse it: pretraining's mask token, blocks above the last tap."""
    save_encoder(VimEncoder(**TINY, use_mask_token=True), tmp_path)
    for taps in ((), (0, 0, 0, 0)):
        config = segmentation.Config(crop=32, channels=8, taps=taps)
        model = segmentation.build_model(config, str(tmp_path), NAMES).train()
        batch = {"image": torch.randn(2, 3, 32, 32), "mask": torch.zeros(2, 32, 32).long()}
        model(batch).loss_sum.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_average_of_encoder_and_head_is_judged_and_kept(tmp_path, encoder, data):
    settings = ["--epochs", "4", "--base-lr", "5e-3", "--log-every", "1"]
    for name, ema in (("plain", "0"), ("averaged", "0.99")):
        found = train(encoder, data, tmp_path / name, *settings, "--ema", ema)
    plain, averaged = (
        {**load_file(tmp_path / name / "encoder.safetensors"),
         **load_file(tmp_path / name / "segmentation.safetensors")}
        for name in ("plain", "averaged")
    )  # fmt: skip
    losses = [[r["loss"] for r in read_metrics(tmp_path / name)] for name in ("plain", "averaged")]
    assert losses[0] == losses[1]  # what is averaged does not disturb what is trained
    trained = [k for k, v in plain.items() if v.is_floating_point() and v.ndim > 1]
    assert {"patch_embed.proj.weight"} < set(trained)
    assert not any(torch.equal(plain[key], averaged[key]) for key in trained)
    argv = ["--eval-only", "--encoder", str(tmp_path / "averaged"), "--data", f"masks:{data}"]
    assert segmentation.main([*argv, "--output", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert (again["miou"], again["aacc"]) == (found["miou"], found["aacc"])


def test_resume_is_bit_identical(tmp_path, encoder, data):
    settings = ["--epochs", "4", "--batch-size", "2", "--log-every", "1"]
    train(encoder, data, tmp_path / "whole", *settings)
    argv = ["--encoder", encoder, "--data", f"masks:{data}", "--output", str(tmp_path / "cut")]
    argv += [*QUICK, "--warmup-epochs", "0", "--lr-reference-batch", "4", "--layer-decay", "none"]
    argv += settings
    segmentation.main([*argv, "--max-steps", "3"])
    segmentation.main(["--output", str(tmp_path / "cut"), "--resume", "auto"])
    losses = [[r["loss"] for r in read_metrics(tmp_path / name)] for name in ("whole", "cut")]
    assert losses[0] == losses[1]
    for name in ("encoder.safetensors", "segmentation.safetensors"):
        whole, cut = (load_file(tmp_path / run / name) for run in ("whole", "cut"))
        assert all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.slow
def test_two_processes_train_one_model_and_write_one_record(tmp_path, encoder, data):
    shown = finish(start(
        2, segmentation.__file__, *QUICK, "--encoder", encoder, "--data", f"masks:{data}",
        "--output", str(tmp_path / "run"), "--batch-size", "2", "--epochs", "2",
        "--eval-every", "1", "--warmup-epochs", "0", "--log-every", "1",
    ))  # fmt: skip
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]  # four images, all at once
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (metrics["train"], metrics["test"]) == (4, 4)
    assert len(read_csv(tmp_path / "run/predictions.csv")) == 4
    assert shown.count("Report: ") == 1
    assert load_segmentation(tmp_path / "run").classes == NAMES


@pytest.mark.parametrize("preset", segmentation.PRESETS)
def test_a_papers_preset_trains(tmp_path, encoder, data, preset):
    """Its settings, on little: batch norm, layer decay, a straight fall, windows."""
    train(
        encoder, data, tmp_path / "run", "--preset", preset, "--crop", "32", "--slide", "20",
        "--short-side", "40", "--taps", "0", "0", "1", "1", "--max-steps", "2", "--workers", "0",
        "--epochs", "3", "--batch-size", "2",
    )  # fmt: skip
    config = segmentation.PRESETS[preset]()
    assert round(config.epochs * segmentation.ADE20K_STEPS_AN_EPOCH) == 60_000
    assert (config.crop, config.slide, config.schedule) == (512, 341, "linear")
    stored = json.loads((tmp_path / "run/config.json").read_text())
    assert (stored["norm"], stored["betas"]) == ("batch", [0.9, 0.999])
    assert config.layer_decay == {"tiny": 0.92, "small": 0.95}[preset.rpartition("_")[2]]


def test_volumes_are_judged_as_a_whole(tmp_path, encoder, monkeypatch):
    nibabel = pytest.importorskip("nibabel", reason="needs pip install 'vim-ssl[medical]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mask = np.zeros((32, 32, 3), np.uint8)
    mask[8:24, 8:24] = 1
    for kind, values in (("images", 200.0 * mask), ("masks", mask)):
        for i in range(4):
            (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
            affine = np.diag([2.0, 2, 5, 1])
            name = tmp_path / "data" / kind / f"{i}.nii"
            nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), affine), name)
    metrics = train(
        encoder, "", tmp_path / "run", "--data", f"nifti:{tmp_path}/data", "--test", "0.5",
        "--epochs", "1", "--head", "linear", *AS_IT_IS,
    )  # fmt: skip
    assert (metrics["train"], metrics["test"], metrics["volumes"]) == (6, 6, 2)
    assert metrics["volumes_incomplete"] == []
    rows = read_csv(tmp_path / "run/volumes.csv")
    assert [row["class"] for row in rows] == ["1", "1"]
    mean = np.mean([float(row["dice"]) for row in rows])
    assert metrics["volume_dice"] == pytest.approx(100 * mean, abs=0.02)
    # All planes are alike: the figure is that of one of them, and all volumes are.
    classes = read_csv(tmp_path / "run/classes.csv")
    assert float(classes[1]["dice"]) == pytest.approx(mean, abs=2e-4)
    assert metrics["volume_hd95"] == pytest.approx(float(rows[0]["hd95_mm"]), abs=0.01)


def test_rasters_are_labelled_where_they_lie(tmp_path, encoder):
    rasterio = pytest.importorskip("rasterio", reason="needs pip install 'vim-ssl[remote-sensing]'")
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)}
    mask = np.zeros((40, 48), np.uint8)
    mask[:, 24:] = 1
    bands = (mask + np.arange(1, 6)[:, None, None]).astype(np.uint16) * 1000
    for kind, values in (("images", bands), ("masks", mask[None])):
        for i in range(4):
            path = tmp_path / "data" / kind / f"{i}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            size = {"width": 48, "height": 40, "count": len(values), "dtype": values.dtype}
            with rasterio.open(path, "w", **size, **place) as file:
                file.write(values)
    run = tmp_path / "run"
    metrics = train(
        encoder, "", run, "--data", f"geotiff:{tmp_path}/data", "--test", "0.25", "--epochs", "1",
        "--head", "linear", "--from-scratch",
    )  # fmt: skip
    assert (metrics["train"], metrics["test"]) == (3, 1)
    (written,) = (run / "predictions").iterdir()
    with rasterio.open(written) as file:
        assert (file.crs, file.transform) == tuple(place.values())
        assert (file.read(1) == mask).mean() == pytest.approx(metrics["aacc"] / 100, abs=1e-4)
    model = load_segmentation(run)
    assert model.encoder.data_config["bands"] == tuple(f"band{i}" for i in range(1, 6))
    assert max(model.encoder.data_config["mean"]) > 1000
    assert list((run / "images").glob("preview-*.png"))


# ------------------------------------------------------------------------- hostile data


def test_images_whose_masks_do_not_fit_are_passed_over_and_named(tmp_path, encoder, data):
    """Another size, a number that is no class, a broken file, in both parts."""
    for split in ("train", "val"):
        masks = data / "masks" / split
        Image.new("L", (9, 9)).save(masks / "1.png")
        Image.new("L", (32, 32), 7).save(masks / "2.png")
        (masks / "3.png").write_bytes(b"no image")
    metrics = train(encoder, data, tmp_path / "run", "--epochs", "2")
    assert metrics["test"] == 1
    reasons = "\n".join(metrics["skipped"])
    for text in ("val/1.png: the mask has 9×9 pixels, its image 32×32",
                 "val/2.png: the mask contains the value 7; expected 3 classes",
                 "val/3.png: the mask cannot be read"):  # fmt: skip
        assert text in reasons
    assert read_metrics(tmp_path / "run")[-1]["skipped"] == 3


def test_a_mask_without_any_label_does_no_harm(tmp_path, encoder, data):
    for i in range(4):
        Image.new("L", (32, 32), 255).save(data / f"masks/train/{i}.png")
    Image.new("L", (32, 32), 255).save(data / "masks/val/0.png")
    metrics = train(encoder, data, tmp_path / "run", "--epochs", "2")
    rows = read_metrics(tmp_path / "run")
    assert all(row["loss"] == 0 and row["bad_steps"] == 0 for row in rows)
    assert metrics["test"] == 4
    assert read_csv(tmp_path / "run/predictions.csv")[0]["labelled_pixels"] == "0"


def test_one_class_in_all_images_is_a_result(tmp_path, encoder, data):
    for path in (data / "masks").rglob("*.png"):
        Image.new("P", (32, 32), 1).save(path)  # a palette file
    metrics = train(
        encoder, data, tmp_path / "run", "--epochs", "10", "--base-lr", "5e-3",
    )  # fmt: skip
    assert metrics["miou"] == metrics["aacc"] == 100


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere"], "The folder 'nowhere' does not exist"),
        (["--data", "masks:nowhere"], "has no images/ and no masks/; it does not exist"),
        (["--data", "ade20k:DATA"], "has no annotations/; it contains classes.txt, images, masks"),
        (["--crop", "30"], "img_size 30 is not divisible by patch_size 8"),
        (["--norm", "batch", "--batch-size", "1"], "norm batch needs two crops"),
        (["--eval-only"], "has no segmentation.safetensors"),
        (["--hflip", "2"], "hflip is 2; it must be 0 to 1"),
        (["--drop-path", "1.5"], "drop_path is 1.5; it must be 0 to 1"),
        (["--dice", "-1"], "dice is -1; it must be 0 or more"),
        (["--channels", "-4"], "channels is -4; it must be 0 or more"),
    ],
)
def test_a_mistake_is_told_in_one_line(more, message, encoder, data, capsys, monkeypatch):
    monkeypatch.delenv("VIM_SSL_TRACEBACK", raising=False)
    more = [word.replace("DATA", str(data)) for word in more]
    argv = ["--encoder", encoder, "--data", f"masks:{data}", "--crop", "32", *more]
    try:
        code = cli.main(["segmentation", *argv])
    except SystemExit as left:  # what the parser refuses
        code = left.code
    assert code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_other_classes_are_refused(tmp_path, encoder, data):
    train(encoder, data, tmp_path / "run", "--epochs", "1")
    (data / "classes.txt").write_text("a\nb\nc\nd")
    argv = ["--eval-only", "--encoder", str(tmp_path / "run"), "--data", f"masks:{data}"]
    with pytest.raises(ValueError, match=r"4 classes that are not among the 3 of .*: a, b, c, d"):
        segmentation.main(argv)


def test_classes_in_another_order_are_evaluated_by_name(tmp_path, encoder, data):
    metrics = train(encoder, data, tmp_path / "run", "--epochs", "4", "--base-lr", "5e-3")
    (data / "classes.txt").write_text("square\nground\ndisc")
    for path in data.glob("masks/*/*.png"):
        mask = np.array([1, 2, 0], np.uint8)[np.array(Image.open(path))]
        Image.fromarray(mask).save(path)
    segmentation.main([
        "--eval-only", "--encoder", str(tmp_path / "run"), "--data", f"masks:{data}",
        "--output", str(tmp_path / "again"),
    ])  # fmt: skip
    again = json.loads((tmp_path / "again/metrics.json").read_text())
    assert (again["miou"], again["aacc"]) == (metrics["miou"], metrics["aacc"])
    assert again["classes"] == NAMES
