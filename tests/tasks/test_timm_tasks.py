"""Tasks on encoders of timm: timm's features and logits of the same weights, or a plain refusal."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform as timm_transform
from timm.data import resolve_model_data_config
from timm_encoders import BEIT, CNN, CONVNEXT, DISTILLED, EVA, EVERY, POOLED, SWIN, VIT, WHOLE

import vim_ssl
from vim_ssl import cli, load_encoder, load_model, save_encoder
from vim_ssl.data.open import open_data
from vim_ssl.downstream import finetune
from vim_ssl.evaluation.features import encode_data
from vim_ssl.evaluation.readout import READOUTS, available_readouts, readout_columns
from vim_ssl.objectives.classification import Classification
from vim_ssl.tasks.classification import _match_head
from vim_ssl.tasks.detection import Detection
from vim_ssl.tasks.segmentation import Segmentation, load_segmentation
from vim_ssl.training.accelerator import Average

every = pytest.mark.parametrize(("source", "args"), EVERY.values(), ids=EVERY)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two splits of two classes, of other sizes than the encoders'."""
    folder, rng = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for i in range(24):
        path = folder / ("test" if i % 3 == 0 else "train") / f"class{i % 2}" / f"{i:02}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        low = rng.integers(0, 128, (5, 4, 3), np.uint8) + np.uint8(100 * (i % 2))
        Image.fromarray(low).resize((44, 52)).save(path)
    return folder


def timms(source: str, args: dict, file: Path, classes: int = 0):
    """timm's model with the weights of a file, in eval mode, and its transform."""
    name = source.removeprefix("timm:")
    model = timm.create_model(name, num_classes=classes, checkpoint_path=file, **args).eval()
    config = resolve_model_data_config(model)
    if "img_size" in args:  # timm describes the published weights
        config["input_size"] = (3, args["img_size"], args["img_size"])
    return model, timm_transform(**config)


@torch.no_grad()
def outputs(model, transform, files) -> torch.Tensor:
    images = [transform(Image.open(file).convert("RGB")) for file in files]
    return torch.cat([model(image[None]) for image in images])


@every
def test_probes_read_timms_features(tmp_path, photos, source, args):
    encoder = load_encoder(source, **args)
    file = save_encoder(encoder, tmp_path)
    data = open_data(f"{photos}?split=test")
    features = encode_data(load_encoder(tmp_path), data, cache=False)
    model, transform = timms(source, args, file)
    files = [next(photos.rglob(Path(id).name)) for id in features.ids]
    expected = outputs(model, transform, files)
    readouts = available_readouts(encoder, READOUTS)
    assert ("token" in readouts) == bool(encoder.cls_names)
    pooled = "avg" if encoder.features_by_head else "token"
    torch.testing.assert_close(features.x[:, readouts[pooled]], expected, rtol=1e-6, atol=1e-6)
    assert readout_columns(encoder, "max").stop == features.x.shape[1]


@pytest.mark.parametrize(("source", "args"), [VIT, CNN], ids=["vit", "cnn"])
def test_a_fine_tuned_run_predicts_timms_logits(tmp_path, photos, source, args, capsys):
    """From a run of timm's encoder, with the default pool, which timm does not have."""
    save_encoder(load_encoder(source, **args), tmp_path / "encoder")
    run = tmp_path / "run"
    finetune.main([
        "--encoder", str(tmp_path / "encoder"), "--data", str(photos), "--output", str(run),
        "--epochs", "2", "--warmup-epochs", "0", "--batch-size", "8", "--threads", "1",
        "--trackers", "none", "--drop-path", "0.1",
    ])  # fmt: skip
    assert "timm has no pool token+avg" in capsys.readouterr().out
    model, transform = timms(source, args, run / "encoder.safetensors", classes=2)
    with (run / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    ids = [next(photos.rglob(Path(row["id"]).name)) for row in rows]
    probabilities = outputs(model, transform, ids).softmax(1)
    classifier = load_model(run)
    mine = np.stack([classifier.predict(path).probabilities for path in ids])
    torch.testing.assert_close(torch.from_numpy(mine), probabilities, rtol=1e-6, atol=1e-6)
    metrics = json.loads((run / "metrics.json").read_text())
    labels = torch.tensor([int(path.parent.name[-1]) for path in ids])
    accuracy = 100 * (probabilities.argmax(1) == labels).float().mean().item()
    assert metrics["top1"] == pytest.approx(accuracy, abs=0.01)


@pytest.mark.parametrize(("source", "args"), [CNN, POOLED], ids=["cnn", "map"])
def test_a_frozen_encoder_gives_its_classifier_timms_features(source, args):
    encoder = load_encoder(source, num_classes=2, **args)
    objective = Classification(encoder)
    objective.freeze_encoder()
    images, labels = torch.randn(4, *encoder.input_shape), torch.tensor([0, 1, 0, 1])
    objective.train()
    expected = torch.nn.functional.cross_entropy(encoder.model(images), labels, reduction="sum")
    loss = objective({"image": images, "label": labels}).loss_sum
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    trained = {name for name, p in encoder.named_parameters() if p.grad is not None}
    assert {name.rpartition(".")[2] for name in trained} == {"weight", "bias"}
    assert len(trained) == 2


def test_a_head_of_two_classifiers_cannot_be_trained_alone():
    encoder = load_encoder(DISTILLED[0], num_classes=2, **DISTILLED[1])
    with pytest.raises(ValueError, match="has 2 classifiers that read different tokens"):
        Classification(encoder).freeze_encoder()


def test_the_python_functions_take_an_encoder_in_memory(photos, tmp_path):
    encoder = load_encoder(VIT[0], **VIT[1])
    vectors = vim_ssl.embed(encoder, f"{photos}?split=test", output=str(tmp_path / "o"))
    data = open_data(f"{photos}?split=test")
    expected = encode_data(encoder, data, cache=False).x[:, : encoder.embed_dim]
    torch.testing.assert_close(torch.as_tensor(vectors.x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("command", ["linear-probe", "knn", "embed"])
@pytest.mark.parametrize(("source", "args"), [VIT, SWIN], ids=["vit", "swin"])
def test_a_command_takes_a_run_and_a_local_file(tmp_path, photos, command, source, args):
    file = save_encoder(load_encoder(source, num_classes=2, **args), tmp_path / "run")
    for name in ("encoder.safetensors", "encoder.json"):
        assert (tmp_path / "run" / name).is_file()
    data = f"{photos}?split=all" if command == "embed" else str(photos)
    argv = [command, "--encoder", str(file.parent), "--data", data, "--output", str(tmp_path / "o")]
    argv += ["--format", "npy"] if command == "embed" else ["--no-cache", "--validation", "0.4"]
    assert cli.main(argv) == 0
    if command != "embed":
        rows = json.loads((tmp_path / "o" / "metrics.json").read_text())["rows"]
        assert {row["features"] for row in rows} >= {"pretrained encoder", "raw pixels"}


def test_a_published_name_is_a_source_of_commands(tmp_path, photos, capsys):
    """Fresh weights here: an encoder without training is a baseline."""
    argv = ["--encoder", "timm:test_resnet", "--data", str(photos), "--output", str(tmp_path / "o")]
    assert cli.main(["knn", *argv, "--no-cache", "--no-baselines", "--readouts", "avg"]) == 0
    assert "timm:test_resnet" in capsys.readouterr().out
    assert cli.main(["predict", *argv]) == 2
    assert "timm:test_resnet has no head that predicts classes" in capsys.readouterr().err


@pytest.mark.parametrize("head", ["upernet", "linear"])
@pytest.mark.parametrize(
    ("source", "args"), [VIT, CNN, SWIN, CONVNEXT, EVA, BEIT],
    ids=["vit", "cnn", "swin", "convnext", "eva", "beit"],
)  # fmt: skip
def test_segmentation_reads_the_maps_of_any_encoder(tmp_path, head, source, args):
    encoder = load_encoder(source, **args)
    model = Segmentation(encoder, ["a", "b"], head=head, window=32, norm="layer", channels=8)
    images = torch.randn(2, 3, 32, 32)
    batch = {"image": images, "mask": torch.randint(2, (2, 32, 32))}
    model.train()(batch).loss_sum.backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle  # several processes would wait for their gradient
    model.eval().save(tmp_path)
    again = load_segmentation(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(model.maps(images), again.maps(images), strict=True)
    )
    if head == "upernet" and source in (CNN[0], SWIN[0]):
        sides = [m.shape[-1] for m in again.maps(images)]
        assert sides == [8, 4, 2, 1]


@pytest.mark.parametrize("name", ["levit_128s", "deit_tiny_distilled_patch16_224"])
def test_a_head_follows_the_order_of_the_classes(name):
    """LeViT's classifiers begin with a norm of the features, which has no classes."""
    args = {} if name.startswith("levit") else DISTILLED[1]
    encoder = load_encoder(f"timm:{name}", num_classes=3, **args)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight)
    images = torch.randn(2, *encoder.input_shape)
    before = encoder(images)
    encoder.classes = ["a", "b", "c"]
    _match_head(encoder, name, ["c", "a", "b"], "class")
    torch.testing.assert_close(encoder(images), before[:, [2, 0, 1]], rtol=0, atol=1e-6)
    assert encoder.classes == ["c", "a", "b"]


def test_the_average_leaves_frozen_weights_out():
    """By the names of the state dict, which for an encoder of timm are timm's."""
    encoder = load_encoder(VIT[0], num_classes=2, **VIT[1])
    encoder.requires_grad_(False)
    encoder.get_classifier().requires_grad_(True)
    average = Average(encoder, 0.5)
    assert average._frozen == {k for k in encoder.state_dict() if not k.startswith("head.")}


def test_detection_takes_maps_of_one_stride(tmp_path):
    args = {"size": 64, "channels": 8, "hidden": 16, "convs": 1}
    model = Detection(load_encoder(VIT[0], **VIT[1] | {"img_size": 64}), ["a"], **args)
    assert len(model.eval().detect(torch.randn(1, 3, 64, 64))[0]) == 1
    for source, other in WHOLE.values():
        with pytest.raises(ValueError, match=r"strides .*; detection makes its pyramid from maps"):
            Detection(load_encoder(source, **other), ["a"], **args)


def test_videos_are_refused(tmp_path):
    from vim_ssl.data.clips import Sampling

    class Videos:
        kind, name, sampling = "video", "clips", Sampling(4, None, 1)

    with pytest.raises(ValueError, match=r"clips contains videos, and timm:vit.* use a Vim"):
        load_encoder(VIT[0], **VIT[1]).for_data(Videos())
