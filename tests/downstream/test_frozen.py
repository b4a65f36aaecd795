"""A frozen encoder: only the heads are trained, on the same features as in every step."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import finish, start
from safetensors.torch import load_file

import vim_ssl
from vim_ssl import VimEncoder, load_encoder, save_encoder
from vim_ssl.downstream import detection, finetune, segmentation, video
from vim_ssl.models.video import inflate
from vim_ssl.tasks import classification
from vim_ssl.training.run import Run, read_metrics

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 0}
QUICK = ["--threads", "1", "--warmup-epochs", "0", "--batch-size", "2", "--trackers", "none"]
PLAIN = ["--crop-scale", "1", "1", "--hflip", "0"]  # without augmentation
FRAMES = 2
SCRIPTS = {"finetune": finetune, "segmentation": segmentation, "detection": detection,
           "video": video}  # fmt: skip
SETTINGS = {
    "finetune": [],
    "segmentation": ["--crop", "32", "--channels", "16"],
    "detection": ["--size", "64", "--channels", "16", "--hidden", "32", "--samples", "8"],
    "video": [],
}
SPECS = {"finetune": "{}/classes", "segmentation": "masks:{}/masks", "detection": "coco:{}/coco",
         "video": "video:{}/videos?frames=2"}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight images of noise with a bright square: with a class, a mask, a box, and as a clip."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    images, annotations = [], []
    for i in range(8):
        values = rng.integers(0, 100, (32, 32, 3), dtype=np.uint8)
        top = 4 + 12 * (i % 2)
        values[top : top + 12, 8:24] += 120
        mask = np.zeros((32, 32), np.uint8)
        mask[top : top + 12, 8:24] = 1
        name, kind = f"{i}.png", ("high", "low")[i % 2]
        paths = [root / "classes" / kind / name, root / "masks" / "images" / name,
                 root / "coco" / "train" / name, root / "coco" / "val" / name]  # fmt: skip
        paths += [root / "videos" / kind / str(i) / f"{t}.png" for t in range(FRAMES)]
        for path in (*paths, root / "masks" / "masks" / name):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask if path.parent.name == "masks" else values).save(path)
        images.append({"id": i, "file_name": name, "width": 32, "height": 32})
        annotations.append({"id": i, "image_id": i, "category_id": 1, "iscrowd": 0,
                            "area": 192, "bbox": [8, top, 16, 12]})  # fmt: skip
    (root / "coco" / "annotations").mkdir()
    table = {"images": images, "annotations": annotations,
             "categories": [{"id": 1, "name": "square"}]}  # fmt: skip
    for split in ("train", "val"):
        (root / "coco" / "annotations" / f"{split}.json").write_text(json.dumps(table))
    return root


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    model = VimEncoder(**TINY)
    with torch.no_grad():
        model.patch_embed.proj.bias.fill_(-0.0)  # an average would change the sign of its zeros
    save_encoder(model, folder)
    return str(folder)


def train(task: str, encoder: str, data: Path, output: Path, *more: str) -> dict:
    argv = ["--encoder", encoder, "--data", SPECS[task].format(data), "--output", str(output)]
    assert SCRIPTS[task].main([*argv, *QUICK, *SETTINGS[task], *more]) == 0
    return json.loads((output / "metrics.json").read_text())


def source(task: str, encoder: str) -> VimEncoder:
    """The encoder as the task adapts it."""
    if task == "detection":
        return load_encoder(encoder, img_size=64)
    plain = load_encoder(encoder)
    return inflate(plain, frames=FRAMES, tubelet=1) if task == "video" else plain


def raw(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in state.items()}


@pytest.mark.parametrize("task", SCRIPTS)
def test_only_the_heads_are_trained(task, encoder, data, tmp_path):
    metrics = train(
        task, encoder, data, tmp_path, "--frozen", "--epochs", "2", "--ema", "0.5",
        "--accumulation", "2", "--base-lr", "1e-2", "--grad-checkpointing",
    )  # fmt: skip
    before = raw(source(task, encoder).state_dict())
    for file in tmp_path.glob("encoder*.safetensors"):
        state = {k: v for k, v in load_file(file).items() if not k.startswith("head.")}
        assert raw(state) == before, file
    optimizer = torch.load(Run(tmp_path).checkpoints()[-1] / "optimizer.bin")
    moments = [state["exp_avg"].numel() for state in optimizer["state"].values()]
    assert metrics["trained_parameters"] == sum(moments) > 0
    assert metrics["frozen"] is True
    norms = [row["grad_norm"] for row in read_metrics(tmp_path)]
    assert min(norms) > 0
    assert "Frozen" in (tmp_path / "report.html").read_text()


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder)]


LOGGED = ["--frozen", "--epochs", "3", "--base-lr", "1e-2", "--log-every", "1"]


def test_features_computed_once_give_the_run_of_features_computed_in_every_step(
    encoder, data, tmp_path, monkeypatch
):
    """To rounding: their batches are others. A broken image has no features, so another counts."""
    broken = data / "classes" / "high" / "8.png"
    broken.write_bytes(b"no image")
    more = ["--validation", "0.3", "--seed", "3"]
    train("finetune", encoder, data, tmp_path / "once", *LOGGED, *PLAIN, *more)

    def same_images(encoder, data, accelerator, seed, **_):
        transform = classification.LabelledTransform(classification.create_transform(encoder))
        return classification.SeededSamples(data, transform, seed)

    monkeypatch.setattr(classification, "feature_samples", same_images)
    train("finetune", encoder, data, tmp_path / "often", *LOGGED, *PLAIN, *more)
    broken.unlink()
    once, often = (read_metrics(tmp_path / name) for name in ("once", "often"))
    assert {row["skipped"] for row in once} != {0}
    for key in ("loss", "grad_norm", "val_top1", "val_balanced_accuracy", "skipped"):
        got, expected = ([row[key] for row in rows if key in row] for rows in (once, often))
        assert got
        assert got == pytest.approx(expected, rel=1e-5), key


@pytest.mark.parametrize("more", [PLAIN, []], ids=["computed-once", "augmented"])
def test_a_frozen_run_resumes_bit_for_bit(encoder, data, tmp_path, monkeypatch, more):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train("finetune", encoder, data, whole, *LOGGED, *more)
    train("finetune", encoder, data, parts, *LOGGED, *more, "--max-steps", "4")
    monkeypatch.setenv("VIM_SSL_CACHE", str(tmp_path / "other"))  # the features are computed again
    train("finetune", encoder, data, parts, "--resume", "auto")
    assert len(losses(whole)) == 9
    assert losses(parts) == losses(whole)
    files = [(folder / "encoder.safetensors").read_bytes() for folder in (whole, parts)]
    assert files[0] == files[1]


def test_a_resumed_head_reads_the_features_of_its_checkpoint(encoder, data, tmp_path):
    """The encoder's file has other weights when the run goes on, as after more pretraining."""
    source, whole, parts = (tmp_path / name for name in ("source", "whole", "parts"))
    shutil.copytree(encoder, source)
    train("finetune", str(source), data, whole, *LOGGED, *PLAIN)
    train("finetune", str(source), data, parts, *LOGGED, *PLAIN, "--max-steps", "4")
    other = load_encoder(source)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    save_encoder(other, source)
    train("finetune", str(source), data, parts, "--resume", "auto")
    assert losses(parts) == losses(whole)


@pytest.mark.slow
def test_two_processes_train_the_head_as_one(encoder, data, tmp_path):
    """DDP does not wait for gradients of the encoder, whose features the processes have computed
    together."""
    train("finetune", encoder, data, tmp_path / "one", *LOGGED, *PLAIN)
    argv = ["--encoder", encoder, "--data", SPECS["finetune"].format(data), *QUICK, *LOGGED, *PLAIN]
    finish(
        start(2, finetune.__file__, *argv, "--batch-size", "1", "--output", str(tmp_path / "two"))
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_from_scratch_the_features_are_random(encoder, data, tmp_path):
    train("finetune", encoder, data, tmp_path, *LOGGED, "--from-scratch")
    states = [load_encoder(folder).state_dict() for folder in (encoder, tmp_path)]
    name = "layers.0.mixer.in_proj.weight"
    assert not torch.equal(states[0][name], states[1][name])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"frozen": True, "drop_path": 0.1}, "drop_path is 0.1, but frozen trains only the heads"),
        ({"frozen": True, "lr_encoder": 0.1}, "a frozen encoder has no learning rate; omit one"),
        ({"lr_encoder": 0.0}, r"must be above 0. To train only the heads, use --frozen"),
        ({"lr_encoder": math.inf}, "lr_encoder is inf"),
    ],
    ids=["drop-path", "both", "zero", "infinite"],
)
@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_settings_that_contradict_each_other_are_refused(script, settings, says):
    with pytest.raises(ValueError, match=says):
        script.Config(**settings)


def test_python_takes_the_same_settings(encoder, tmp_path):
    images = [(Image.new("RGB", (32, 32), 9 * i), i % 2) for i in range(8)]
    settings = {"epochs": 2, "warmup_epochs": 0, "batch_size": 2, "threads": 1}
    run = vim_ssl.finetune(encoder, images, frozen=True, output=tmp_path / "frozen", **settings)
    assert run.metrics["trained_parameters"] == 2 * 32 + 2
    run = vim_ssl.finetune(encoder, images, lr_encoder=0.1, output=tmp_path / "slow", **settings)
    assert run.metrics["frozen"] is False
    assert "0.1 × that of the heads" in (tmp_path / "slow" / "report.html").read_text()
