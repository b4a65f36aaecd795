"""Training with labels: losses, augmentation of batches, figures, the best epoch, tables."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import average_precision_score

from vim_ssl import VimEncoder, create_transform, load_encoder, save_encoder
from vim_ssl.data import ImageData, open_data
from vim_ssl.data.loading.indexed import EpochBatches, SeededSamples
from vim_ssl.data.sources.eurosat import EUROSAT_CLASSES
from vim_ssl.downstream import finetune
from vim_ssl.evaluation.validation import BEST, Validation
from vim_ssl.metrics.classification import (
    MAIN_METRIC,
    classification_metrics,
    confusion_matrix,
    outputs,
    predicted,
    write_tables,
)
from vim_ssl.metrics.medmnist import medmnist_accuracy, medmnist_auc
from vim_ssl.objectives.classification import Classification, balanced_weights
from vim_ssl.recipes import supervised_pretrain
from vim_ssl.tasks.classification import (
    ClassificationConfig,
    build_classifier,
    check_labels,
    evaluate,
)
from vim_ssl.training.run import read_metrics

SMALL = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 16, "depth": 2}
QUICK = ["--threads", "1", "--workers", "0", "--warmup-epochs", "0", "--batch-size", "8"]


@pytest.fixture(scope="module")
def bands(tmp_path_factory) -> Path:
    """32 images of four classes: noise with a bright band at the class's height."""
    folder, rng = tmp_path_factory.mktemp("bands"), np.random.default_rng(0)
    for i in range(32):
        values = rng.integers(0, 80, (28, 28), dtype=np.uint8)
        values[7 * (i % 4) : 7 * (i % 4) + 7] += 120
        for part in ("train", "test"):
            path = folder / part / f"class{i % 4}" / f"{i:02}.png"
            path.parent.mkdir(exist_ok=True, parents=True)
            Image.fromarray(values).save(path)
    return folder


def batch(labels) -> dict:
    torch.manual_seed(0)
    return {"image": torch.randn(len(labels), 1, 28, 28), "label": torch.as_tensor(labels)}


# ------------------------------------------------------------------ the loss


def test_each_kind_of_target_has_its_loss():
    encoder = VimEncoder(**SMALL, num_classes=3).eval()
    whole = batch([0, 2, 1, 2])
    logits = encoder(whole["image"])
    found = Classification(encoder).eval()(whole)
    expected = F.cross_entropy(logits, whole["label"], reduction="sum")
    torch.testing.assert_close(found.loss_sum, expected)
    hits = (logits.argmax(1) == whole["label"]).sum()
    assert found.metrics["top1"] == 100 * hits

    many = batch([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    found = Classification(encoder, targets="multi-label").eval()(many)
    expected = F.binary_cross_entropy_with_logits(logits, many["label"].float()) * 4
    torch.testing.assert_close(found.loss_sum, expected)

    ranked = batch([0, 3, 1, 2])  # of four classes: more than 0? more than 1? more than 2?
    found = Classification(encoder, targets="ordinal").eval()(ranked)
    asked = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]).float()
    expected = F.binary_cross_entropy_with_logits(logits, asked) * 4
    torch.testing.assert_close(found.loss_sum, expected)
    assert outputs("ordinal", 4) == 3


def test_rare_classes_weigh_more_and_all_samples_one_in_the_mean():
    labels = [0] * 6 + [1] * 2
    weights = balanced_weights(labels, 2)
    assert weights[1] == 3 * weights[0]
    assert weights[labels].mean() == 1
    encoder = VimEncoder(**SMALL, num_classes=2).eval()
    whole = batch(labels)
    found = Classification(encoder, class_weights=weights).eval()(whole).loss_sum
    each = F.cross_entropy(encoder(whole["image"]), whole["label"], reduction="none")
    torch.testing.assert_close(found, (each * weights[labels]).sum())


def test_mixup_follows_from_the_seed_and_leaves_evaluation_and_the_batch_alone():
    objective = Classification(VimEncoder(**SMALL, num_classes=3), mixup=0.8, cutmix=1.0)
    whole = batch([0, 2, 1, 2])
    before = whole["image"].clone()

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return objective.train()(whole).loss_sum.item()

    assert loss(1) == loss(1)
    assert len({loss(seed) for seed in range(4)}) == 4
    assert torch.equal(whole["image"], before)
    plain = Classification(objective.encoder).eval()(whole).loss_sum
    assert objective.eval()(whole).loss_sum == plain


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mixup": 0.8, "targets": "ordinal"}, "cannot be used with targets ordinal"),
        ({"patience": 3}, "patience needs a validation fraction"),
        (
            {"validation": 0.1, "patience": 3, "epochs": 60},
            "4 evaluations, one every 20 epochs, do not fit into 60 epochs",
        ),
        ({"targets": "multi-label", "class_weights": True}, "class_weights cannot be used with"),
        ({"repeats": 0}, "repeats is 0"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale is 0.5 0.2; expected 0 < low <= high"),
        ({"hflip": 3}, "hflip is 3; it must be 0 to 1"),
        ({"color_jitter": -1}, "color_jitter is -1; it must be 0 or more"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        ClassificationConfig(**settings)


# ------------------------------------------------------------------ repeated augmentation


def test_an_image_comes_so_many_times_in_a_row_and_each_time_another_way():
    batches = [i for batch in EpochBatches(12, 6, seed=3, repeats=3) for _, i in batch]
    assert len(batches) == 12
    places = [i % 12 for i in batches]
    assert places == [place for place in places[::3] for _ in range(3)]
    assert len(set(places)) == 4
    samples = SeededSamples([{"image": i} for i in range(12)], lambda item: item, repeats=3)
    samples.transform = lambda item: {"image": item["image"], "draw": torch.rand(()).item()}
    first, second = samples[(0, 5)], samples[(0, 5 + 12)]
    assert first["image"] == second["image"] == 5
    assert first["index"] == second["index"] == 5
    assert first["draw"] != second["draw"]


# ------------------------------------------------------------------ figures


def test_figures_of_classes_are_what_counting_gives():
    logits = torch.tensor([[3.0, 1, 0], [0, 2, 1], [0, 2, 1], [0, 1, 2]])
    found = classification_metrics(logits, torch.tensor([0, 1, 2, 2]), "class")
    assert found["top1"] == 75
    assert found["confusion"] == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert found["balanced_accuracy"] == pytest.approx(100 * (1 + 1 + 0.5) / 3, abs=0.01)
    wide = torch.eye(8).repeat(1, 1)
    assert classification_metrics(wide, torch.arange(8), "class")["top5"] == 100


def test_figures_of_ranks_say_how_far_off_they_are():
    logits = torch.tensor([[-1.0, -1, -1], [1, 1, -1], [1, 1, 1]])
    assert predicted(logits, "ordinal").tolist() == [0, 2, 3]
    found = classification_metrics(logits, torch.tensor([0, 1, 3]), "ordinal")
    assert (found["top1"], found["mean_error"]) == (66.67, 0.3333)


@pytest.mark.parametrize("how", ["macro", "micro"])
def test_the_mean_average_precision_is_scikit_learns(how):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 4, generator=draw)
    truth = (torch.rand(50, 4, generator=draw) < 0.3).long()
    truth[:, 3] = 0  # a class without samples has no precision
    counted = 3 if how == "macro" else 4  # micro ranks all pairs of image and class
    expected = average_precision_score(truth[:, :counted], logits[:, :counted], average=how)
    assert classification_metrics(logits, truth, "multi-label")[f"map_{how}"] == pytest.approx(
        100 * expected, abs=0.01
    )


@pytest.mark.parametrize("targets", ["class", "ordinal", "multi-label"])
def test_every_figure_has_its_interval_and_a_patient_counts_as_one(targets):
    draw = torch.Generator().manual_seed(0)
    patients = torch.arange(240) // 10
    labels = torch.randint(0, 7, (24,), generator=draw)
    asked = F.one_hot(labels, 7)
    truth = labels[:, None] > torch.arange(6) if targets == "ordinal" else asked
    noise = torch.randn(truth.shape, generator=draw)
    logits = (truth.float() - 0.5 + 0.5 * noise)[patients]  # alike of a patient
    labels = (asked if targets == "multi-label" else labels)[patients]
    plain = classification_metrics(logits, labels, targets)
    grouped = classification_metrics(
        logits, labels, targets, groups=[str(i) for i in patients.tolist()]
    )
    names = {name for name in plain if f"{name}_ci" in plain}
    assert names == {name for name in plain if not name.endswith("_ci")} - {"confusion"}
    for name in names:
        assert plain[name] == grouped[name]
        (low, high), wide = plain[f"{name}_ci"], grouped[f"{name}_ci"]
        assert low <= plain[name] <= high, name
        assert wide[1] - wide[0] > 1.5 * (high - low) or plain[name] == 100, name
    alone = [str(i) for i in range(240)]
    assert classification_metrics(logits, labels, targets, groups=alone) == plain


def test_a_balanced_accuracys_interval_weighs_classes_alike():
    """Of a class with few images less is known, however many the others have."""
    labels = torch.tensor([0] * 990 + [1] * 10)
    logits = F.one_hot(torch.where(torch.arange(1000) % 10 == 0, 1 - labels, labels), 2).float()
    found = classification_metrics(logits, labels, "class")
    low, high = found["top1_ci"]
    assert high - low < 4
    low, high = found["balanced_accuracy_ci"]
    assert 10 < high - low < 25


def test_the_tables_name_images_and_classes(tmp_path):
    logits = torch.tensor([[3.0, 1], [0, 2], [0, 2]])
    labels = torch.tensor([0, 1, 0])
    found = classification_metrics(logits, labels, "class")
    names = ["x", "y", "z"], ["cat", "dog"]
    write_tables(tmp_path, found, logits, labels, *names, "class", ["p1", "p1", "p2"])
    with open(tmp_path / "predictions.csv") as file:
        lines = list(csv.DictReader(file))
    assert [(r["id"], r["label"], r["predicted"]) for r in lines] == [
        ("x", "cat", "cat"), ("y", "dog", "dog"), ("z", "cat", "dog"),
    ]  # fmt: skip
    assert [row["group"] for row in lines] == ["p1", "p1", "p2"]
    with open(tmp_path / "classes.csv") as file:
        cat, dog = csv.DictReader(file)
    assert (cat["samples"], cat["recall"], cat["most_taken_for"]) == ("2", "0.5000", "dog")
    assert (dog["precision"], dog["most_taken_for"]) == ("0.5000", "")


# ------------------------------------------------------------------ runs


def test_32_images_are_learnt_by_heart(bands, tmp_path):
    argv = [*QUICK, "--preset", "demo", "--data", str(bands), "--output", str(tmp_path)]
    more = ["--epochs", "25", "--crop-scale", "1", "1", "--model-args", "embed_dim=32", "depth=2"]
    assert supervised_pretrain.main([*argv, *more, "--base-lr", "5e-3", "--eval-every", "25"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["top1"] >= 99
    assert metrics["train"] == metrics["test"] == 32
    assert read_metrics(tmp_path)[-1]["val_top1"] == metrics["top1"]
    again = load_encoder(tmp_path, num_classes=None)
    assert again.num_classes == 4


def test_the_validation_part_chooses_the_epoch_and_ends_the_training(bands, tmp_path):
    argv = [*QUICK, "--preset", "demo", "--data", str(bands), "--output", str(tmp_path)]
    more = ["--model-args", "embed_dim=16", "depth=1", "--base-lr", "0", "--eval-every", "1"]
    watch = ["--epochs", "9", "--validation", "0.25", "--patience", "2"]
    supervised_pretrain.main([*argv, *more, *watch])
    values = [row["val_top1"] for row in read_metrics(tmp_path) if "val_top1" in row]
    assert len(values) == 3  # without learning the first stays the best: two more are enough
    assert json.loads((tmp_path / "metrics.json").read_text())["train"] == 24
    assert (tmp_path / BEST).exists()
    supervised_pretrain.main(["--output", str(tmp_path), "--resume", "auto"])  # still enough
    assert len([r for r in read_metrics(tmp_path) if "val_top1" in r]) == 3


def test_a_validation_part_without_any_label_is_told_before_training(tmp_path, monkeypatch):
    labels = [[1, 0], [0, 1]] + 30 * [[0, 0]]
    data = ImageData([np.zeros((28, 28), np.uint8)] * 32, map(str, range(32)), name="x",
                     labels=labels)  # fmt: skip
    monkeypatch.setattr(supervised_pretrain, "labelled_splits", lambda *_: (data, data))
    argv = [*QUICK, "--preset", "demo", "--targets", "multi-label", "--validation", "0.1"]
    with pytest.raises(
        ValueError, match=r"none of the .* images of the validation split of x has a label"
    ):
        supervised_pretrain.main([*argv, "--data", "x", "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_the_best_weights_are_those_taken(bands, tmp_path):
    encoder = VimEncoder(**SMALL, num_classes=4)
    data = open_data(bands, split="test")
    watch = Validation(encoder, data, tmp_path, "class", keep_best=True, patience=0)
    best = watch()["val_top1"]
    kept = encoder.head.weight.detach().clone()
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "val_top1": best}) + "\n")
    with torch.no_grad():
        encoder.head.weight.zero_()
    watch()  # not better: one class for all
    watch.take_best()
    assert torch.equal(encoder.head.weight, kept)


@pytest.mark.parametrize("training", [True, False])
def test_figures_are_measured_in_eval_mode(bands, tmp_path, training):
    """Of validation and of the test; stochastic depth would drop blocks of the encoder."""
    torch.manual_seed(0)
    encoder = VimEncoder(**SMALL | {"depth": 4, "drop_path_rate": 0.9}, num_classes=4).eval()
    data, transform = open_data(bands, split="test"), create_transform(encoder)
    with torch.no_grad():
        logits = encoder(torch.stack([transform(item["image"]) for item in data]))
    expected = classification_metrics(logits, torch.tensor(data.labels), "class")
    encoder.train(training)
    watch = Validation(encoder, data, tmp_path, "class", keep_best=False, patience=0)
    assert watch()["val_top1"] == expected["top1"]
    assert encoder.training == training
    found = evaluate(encoder, data, tmp_path, "class", data.classes)
    assert found["confusion"] == expected["confusion"]
    with open(tmp_path / "predictions.csv", encoding="utf-8") as file:
        sure = [float(row["confidence"]) for row in csv.DictReader(file)]
    assert sure == pytest.approx(logits.softmax(1).amax(1).tolist(), abs=1e-4)


def test_the_result_is_written_although_a_table_or_the_page_fails(bands, tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise RuntimeError("no ink")

    encoder = VimEncoder(**SMALL, num_classes=4).eval()
    save_encoder(encoder, tmp_path / "encoder")
    for what in ("classification.write_tables", "classification.write_examples",
                 "runner.write_report"):  # fmt: skip
        monkeypatch.setattr(f"vim_ssl.tasks.{what}", fail)
    argv = ["--eval-only", "--encoder", str(tmp_path / "encoder"), "--data", str(bands)]
    with (
        pytest.warns(UserWarning, match="the worst mistakes could not be written"),
        pytest.warns(UserWarning, match=r"predictions.csv .* could not be written .*no ink"),
    ):
        finetune.main([*argv, "--output", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out/metrics.json").read_text(encoding="utf-8"))["n"] == 32


@pytest.mark.parametrize(
    ("labels", "says"),
    [([0, 1, -1], "from -1 to 1"), ([0, 1, 3], "from 0 to 3; expected 0 to 2"), ([], "0 labels")],
)
def test_labels_that_are_none_of_the_classes_are_refused(labels, says):
    for targets, columns in (("class", 3), ("ordinal", 2)):
        with pytest.raises(ValueError, match=says):
            classification_metrics(torch.zeros(len(labels), columns), torch.tensor(labels), targets)


def test_counts_do_not_overflow_and_half_precision_is_read():
    labels = torch.full((300,), 40, dtype=torch.uint8)
    assert confusion_matrix(labels, labels, 41)[40, 40] == 300
    logits = torch.eye(3)[torch.arange(300) % 3].bfloat16()
    for targets, truth in (("class", torch.arange(300) % 3), ("multi-label", logits.long())):
        found = classification_metrics(logits, truth, targets)
        assert found[MAIN_METRIC[targets]] == 100


def test_an_encoder_with_a_head_is_judged_as_it_is(bands, tmp_path):
    torch.manual_seed(0)
    encoder = VimEncoder(**SMALL, num_classes=4).eval()
    save_encoder(encoder, tmp_path / "encoder")
    argv = ["--eval-only", "--encoder", str(tmp_path / "encoder"), "--data", str(bands)]
    assert finetune.main([*argv, "--output", str(tmp_path / "out"), "--batch-size", "7"]) == 0
    data, transform = open_data(bands, split="test"), create_transform(encoder)
    with torch.no_grad():
        logits = encoder(torch.stack([transform(item["image"]) for item in data]))
    expected = 100 * (logits.argmax(1) == torch.tensor(data.labels)).float().mean().item()
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["top1"] == pytest.approx(expected, abs=0.01)
    with open(tmp_path / "out" / "predictions.csv") as file:
        guesses = [row["predicted"] for row in csv.DictReader(file)]
    assert guesses == [data.classes[i] for i in logits.argmax(1)]
    examples = json.loads((tmp_path / "out" / "examples" / "examples.json").read_text())
    labels = dict(zip(data.ids, data.labels, strict=True))
    wrong = [id for id, i in zip(data.ids, logits.argmax(1), strict=True) if i != labels[id]]
    assert {row["id"] for row in examples["mistakes"]} <= set(wrong)
    assert len(examples["mistakes"]) == min(len(wrong), 24)


@pytest.mark.parametrize(
    ("name", "labels", "targets"),
    [
        ("breastmnist", 2, "class"), ("bloodmnist", 8, "class"), ("retinamnist", 5, "class"),
        ("retinamnist", 5, "ordinal"), ("chestmnist", 14, "multi-label"),
        ("nodulemnist3d", 2, "class"),
    ],
)  # fmt: skip
def test_medmnist_is_judged_by_its_own_figures(name, labels, targets, tmp_path, capsys):
    draw = np.random.default_rng(0)
    shape, count = (4, 28, 28) if name.endswith("3d") else (28, 28), 20
    truth = (np.arange(count) % labels)[:, None]
    if targets == "multi-label":
        truth = draw.integers(0, 2, (count, labels))
    arrays = {f"{part}_{what}": values for part in ("train", "val", "test") for what, values in (
        ("images", draw.integers(0, 256, (count, *shape), dtype=np.uint8)), ("labels", truth),
    )}  # fmt: skip
    np.savez(tmp_path / f"{name}.npz", **arrays)
    encoder = VimEncoder(**SMALL, num_classes=outputs(targets, labels)).eval()
    save_encoder(encoder, tmp_path / "encoder")
    spec = f"medmnist:{tmp_path / name}.npz" + ("?axis=0" if name.endswith("3d") else "")
    argv = ["--eval-only", "--encoder", str(tmp_path / "encoder"), "--data", spec]
    finetune.main([*argv, "--targets", targets, "--output", str(tmp_path / "out")])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    data, transform = open_data(spec, split="test"), create_transform(encoder)
    with torch.no_grad():
        logits = encoder(torch.stack([transform(item["image"]) for item in data]))
    scores = logits.softmax(1) if targets == "class" else logits.sigmoid()
    if targets == "ordinal":
        more = torch.cat([torch.ones(count, 1), scores, torch.zeros(count, 1)], 1)
        scores = more[:, :-1] - more[:, 1:]
    scores = scores.unflatten(0, (count, -1)).mean(1).numpy()  # of a volume's planes
    assert metrics["auc"] == pytest.approx(medmnist_auc(truth, scores, data.task), abs=1e-4)
    assert metrics["acc"] == pytest.approx(medmnist_accuracy(truth, scores, data.task), abs=1e-4)
    printed = f"AUC {metrics['auc']:.3f}, ACC {metrics['acc']:.3f} · test split, n = {len(data)} "
    assert printed in capsys.readouterr().out


def test_a_head_for_other_classes_is_refused(bands, tmp_path):
    save_encoder(VimEncoder(**SMALL, num_classes=7), tmp_path)
    with pytest.raises(ValueError, match=r"head of 7 outputs.* has 4 classes"):
        finetune.main(["--eval-only", "--encoder", str(tmp_path), "--data", str(bands)])


@pytest.mark.parametrize(
    ("labels", "targets", "says"),
    [
        ([0, 1, 3], "class", r"x has labels from 0 to 3; expected 0 to 2 for 3 classes"),
        ([0, -1, 2], "ordinal", "labels from -1 to 2"),
        (
            [[0, 1, 1]],
            "class",
            r"shape \(1, 3\), which does not match --targets class.*multi-label",
        ),
        ([0, 1], "multi-label", r"shape \(2,\), which does not match --targets multi-label"),
        ([[0, 1]], "multi-label", "2 labels per image; expected one for each of 3 classes"),
        ([[0, 0, 0]], "multi-label", r"none of the 1 images of x has a label"),
    ],
    ids=["above", "below", "several", "one", "fewer", "none"],
)
def test_labels_that_do_not_fit_are_told(labels, targets, says):
    with pytest.raises(ValueError, match=says):
        check_labels("x", labels, targets, ["a", "b", "c"])


def test_a_class_without_training_images_is_named(bands, tmp_path):
    shutil.copytree(bands, tmp_path / "data")
    odd = tmp_path / "data" / "test" / "unseen" / "0.png"
    odd.parent.mkdir()
    shutil.copy(next(bands.rglob("*.png")), odd)
    argv = [*QUICK, "--preset", "demo", "--data", str(tmp_path / "data"), "--max-steps", "1"]
    with pytest.warns(UserWarning, match="no training image: unseen"):
        supervised_pretrain.main([*argv, "--output", str(tmp_path / "run")])


@pytest.mark.parametrize("targets", ["class", "multi-label"])
def test_a_stored_head_gives_its_outputs_in_the_order_of_the_data(tmp_path, targets):
    stored = VimEncoder(**SMALL, num_classes=3)
    save_encoder(stored, tmp_path, record={"classes": [*"abc"]})
    config = ClassificationConfig(targets=targets)
    labels = [[1, 0, 0]] if targets == "multi-label" else [0]
    data = ImageData(["0"], ["0"], name="x", labels=labels, classes=[*"cab"])
    encoder = build_classifier(str(tmp_path), data, config)
    assert torch.equal(encoder.head.weight, stored.head.weight[[2, 0, 1]])
    assert torch.equal(encoder.head.bias, stored.head.bias[[2, 0, 1]])
    data.classes = [*"abd"]
    with pytest.warns(UserWarning, match=r"head for other classes \(a, b, c …\)"):
        encoder = build_classifier(str(tmp_path), data, config)
    assert not torch.equal(encoder.head.weight[:2], stored.head.weight[:2])


# ------------------------------------------------------------------ the paper's numbers

# Vim's scripts; Vim-B after FastVim, which trains with LayerNorm after the scan.
PAPER = {
    "vim_tiny_224": (1024, 1e-3, 0.1, 0.0, 0.99996),
    "vim_small_224": (512, 1e-3, 0.05, 0.05, 0.99996),
    "vim_base_224": (1024, 2e-3, 0.05, 0.4, 0.9999),
}


@pytest.mark.parametrize("preset", PAPER)
def test_the_presets_have_the_papers_numbers(preset):
    config = supervised_pretrain.PRESETS[preset]()
    batch, lr, decay, drop_path, ema = PAPER[preset]
    assert config.batch_size * 8 == batch  # on eight GPUs
    assert config.base_lr * batch / config.lr_reference_batch == pytest.approx(lr)
    assert (config.weight_decay, config.drop_path, config.ema) == (decay, drop_path, ema)
    assert (config.epochs, config.warmup_epochs) == (300, 5)
    assert (config.min_lr, config.warmup_lr) == (1e-5, 1e-6)
    assert (config.mixup, config.cutmix, config.label_smoothing) == (0.8, 1.0, 0.1)
    assert (config.auto_augment, config.erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (config.repeats, config.clip_grad) == (3, None)


def test_the_finer_preset_moves_at_a_constant_rate():
    config = finetune.PRESETS["finer_224"]()
    rate = config.base_lr * 1024 / config.lr_reference_batch
    assert rate == pytest.approx(1e-5)
    assert config.min_lr == config.warmup_lr == 1e-5
    assert (config.stride, config.epochs, config.weight_decay) == (8, 30, 1e-8)


def test_a_mask_token_left_from_pretraining_is_dropped(bands, tmp_path):
    save_encoder(VimEncoder(**SMALL, num_classes=0, use_mask_token=True), tmp_path / "encoder")
    argv = [*QUICK, "--encoder", str(tmp_path / "encoder"), "--data", str(bands)]
    finetune.main([*argv, "--max-steps", "1", "--output", str(tmp_path / "run")])
    assert load_encoder(tmp_path / "run").mask_token is None


# ------------------------------------------------------------------ other bands


def test_an_rgb_encoder_is_fine_tuned_on_rasters_and_keeps_their_statistics(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    rng = np.random.default_rng(0)
    for i in range(30):
        name = EUROSAT_CLASSES[i % 10]
        path = tmp_path / "eurosat" / name / f"{name}_{i}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = rng.integers(500, 3000 + 200 * (i % 10), (13, 28, 28)).astype(np.uint16)
        with rasterio.open(
            path, "w", driver="GTiff", height=28, width=28, count=13, dtype="uint16"
        ) as file:
            file.write(values)
    torch.manual_seed(0)
    rgb = {k: v for k, v in SMALL.items() if k != "in_chans"}
    save_encoder(VimEncoder(**rgb, num_classes=0), tmp_path / "rgb")
    argv = [*QUICK, "--data", f"eurosat:{tmp_path / 'eurosat'}", "--max-steps", "1"]
    finetune.main([*argv, "--encoder", str(tmp_path / "rgb"), "--output", str(tmp_path / "first")])
    first = load_encoder(tmp_path / "first", num_classes=None)
    assert first.in_chans == 13
    assert max(first.data_config["mean"]) > 500
    again = ["--encoder", str(tmp_path / "first"), "--seed", "3"]  # another split, other statistics
    finetune.main([*argv, *again, "--output", str(tmp_path / "second")])
    second = load_encoder(tmp_path / "second", num_classes=None)
    assert second.data_config["mean"] == first.data_config["mean"]
