"""The masked-image recipe as a user runs it: photographs in, a run directory and an encoder out."""

import json
import math
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from processes import run

import vim_ssl
from vim_ssl import cli, load_encoder
from vim_ssl.data.loading.indexed import SeededSamples
from vim_ssl.recipes import mim_pretrain
from vim_ssl.training import loop as training
from vim_ssl.training.optim import build_optimizer, build_schedule, param_groups
from vim_ssl.training.run import read_metrics

ROOT = Path(vim_ssl.__file__).parents[1]
PHOTOS = ["astronaut.png", "camera.png", "chelsea.png", "coffee.png", "moon.png", "rocket.jpg"]
TINY = [
    "--encoder", "vim_nano_patch8_64", "--model-args", "depth=2", "embed_dim=16",
    "--decoder-dim", "16", "--decoder-depth", "1", "--batch-size", "3", "--epochs", "2",
    "--warmup-epochs", "0", "--workers", "0", "--threads", "1", "--log-every", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Six photographs of six sizes, colour and grey, and a broken one."""
    folder = tmp_path_factory.mktemp("photos")
    source = Path(pytest.importorskip("skimage").__file__).parent / "data"
    for name in PHOTOS:
        shutil.copy(source / name, folder)
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def stripes(tmp_path_factory) -> Path:
    """24 small grey images in two classes: stripes that lie, stripes that stand."""
    folder = tmp_path_factory.mktemp("stripes")
    wave = (np.sin(np.arange(28) / 2) * 100 + 128).astype(np.uint8)
    for i in range(24):
        path = folder / ("lying", "standing")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        values = np.tile(np.roll(wave, i), (28, 1))
        Image.fromarray(values if i % 2 else values.T.copy()).save(path)
    return folder


@pytest.fixture(scope="module", params=["mae", "simmim", "ar", "distill"])
def trained(request, photos, tmp_path_factory) -> Path:
    """A run on the photographs."""
    run = tmp_path_factory.mktemp("runs") / request.param
    argv = [*TINY, "--data", str(photos), "--output", str(run), "--objective", request.param]
    assert mim_pretrain.main(argv) == 0
    return run


def settings(monkeypatch, *argv: str) -> mim_pretrain.Config:
    """The configuration that the recipe would run with."""
    caught = []
    monkeypatch.setattr(mim_pretrain, "run", caught.append)
    mim_pretrain.main(list(argv))
    return caught[0]


# ------------------------------------------------------------------ on other bands


@pytest.mark.parametrize("objective", ["mae", "simmim", "ar", "distill"])
def test_rasters_train_and_their_statistics_stay_with_the_encoder(tmp_path, objective):
    rasterio = pytest.importorskip("rasterio", reason="needs 'vim-ssl[remote-sensing]'")
    draw = np.random.default_rng(0)
    for i in range(6):
        values = draw.integers(900, 1100, (4, 64, 64), dtype=np.uint16)
        values[:, :8] = 0
        with rasterio.open(
            tmp_path / f"{i}.tif", "w", driver="GTiff", width=64, height=64, count=4,
            dtype="uint16", nodata=0, transform=rasterio.transform.from_origin(0, 0, 10, 10),
        ) as file:  # fmt: skip
            file.write(values)
            file.descriptions = ("B02", "B03", "B04", "B08")
    argv = [*TINY, "--data", f"geotiff:{tmp_path}", "--output", str(tmp_path / "run")]
    assert mim_pretrain.main([*argv, "--objective", objective]) == 0
    data = load_encoder(tmp_path / "run").data_config
    assert data["bands"] == ("B02", "B03", "B04", "B08")
    assert data["mean"] == pytest.approx((1000,) * 4, abs=5)
    assert all(math.isfinite(row["loss"]) for row in read_metrics(tmp_path / "run"))


# ------------------------------------------------------------------ on photographs


def test_photographs_of_mixed_sizes_train(trained):
    rows = read_metrics(trained)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    own = "target_std" if trained.name == "distill" else "pixel_mse"
    assert all(np.isfinite([row["loss"], row["grad_norm"], row[own]]).all() for row in rows)
    assert rows[-1]["skipped"] == 1  # the broken image
    assert "knn_top1" not in rows[-1]  # no labels, no neighbours
    assert rows[-1]["effective_rank"] > 0


def test_the_images_show_eight_or_fewer_rows_of_four_views(trained):
    paths = list((trained / "images").glob("preview-*4.png"))
    if trained.name == "distill":  # features are no images
        assert paths == []
        return
    (path,) = paths
    with Image.open(path) as image:
        assert image.width in range(4 * 64, 4 * 64 + 8)
        assert image.mode == "RGB"
        assert np.asarray(image).std() > 20


def test_the_trained_encoder_takes_images_of_another_size(trained):
    """Every patch with the position of its own place, none shifted by the class token's slot."""
    encoder = load_encoder(trained)
    x = torch.randn(1, 3, 384, 256)
    with torch.no_grad():
        (features,) = encoder.forward_intermediates(x, 1, intermediates_only=True)
        added = encoder.embed(x) - encoder.patch_embed(x)
    assert features.shape == (1, 16, 48, 32)
    table = encoder.pos_embed.detach()[0]  # 8 x 8 patches and, in row 32, the class token
    grid = torch.cat([table[:32], table[33:]]).T.view(1, 16, 8, 8)
    expected = F.interpolate(grid, (48, 32), mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(added, expected, atol=1e-5, rtol=1e-4)


def test_an_encoder_of_either_objective_can_be_trained_on_with_mae(trained, photos, tmp_path):
    encoder = TINY.index("--encoder")
    rest = [*TINY[:encoder], *TINY[encoder + 5 :]]
    argv = [*rest, "--encoder", str(trained), "--data", str(photos), "--base-lr", "0"]
    mim_pretrain.main([*argv, "--output", str(tmp_path / "run")])
    before, after = load_encoder(trained).state_dict(), load_encoder(tmp_path / "run").state_dict()
    assert set(before) - {"mask_token"} == set(after)
    assert all(torch.equal(before[name], after[name]) for name in after)


# ------------------------------------------------------------------ resuming


def test_a_run_is_not_trained_over(trained, photos):
    with pytest.raises(FileExistsError, match="--resume auto"):
        mim_pretrain.main([*TINY, "--data", str(photos), "--output", str(trained)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--batch-size", "2"], "was trained with batch_size = 3, not 2"),
        (["--accumulation", "2"], "was trained with accumulation = 1, not 2"),
        (["--model-args", "depth=2", "embed_dim=24"], "was trained with model_args = "),
        (["--base-lr", "0.5"], "was trained with base_lr = "),
    ],
    ids=["batch-size", "accumulation", "model", "lr"],
)
def test_a_resumed_run_must_fit_and_is_else_left_as_it_was(trained, photos, change, message):
    before = (trained / "config.json").read_text()
    objective = json.loads(before)["objective"]
    argv = [*TINY, "--data", str(photos), "--output", str(trained), "--objective", objective]
    with pytest.raises(ValueError, match=message) as caught:
        mim_pretrain.main([*argv, "--resume", "auto", "--epochs", "4", *change])
    assert "\n" not in str(caught.value)
    assert (trained / "config.json").read_text() == before


def test_a_finished_run_can_be_trained_for_longer(trained, photos, tmp_path):
    run = tmp_path / "longer"
    shutil.copytree(trained, run)
    objective = json.loads((run / "config.json").read_text())["objective"]
    argv = [*TINY, "--data", str(photos), "--output", str(run), "--objective", objective]
    mim_pretrain.main([*argv, "--resume", "auto", "--epochs", "3"])
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert json.loads((run / "config.json").read_text())["epochs"] == 3


def test_a_resumed_run_takes_its_own_settings(trained, tmp_path, capsys):
    run = tmp_path / "again"
    shutil.copytree(trained, run)
    mim_pretrain.main(["--output", str(run), "--resume", "auto", "--epochs", "3"])
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4, 5, 6]
    kept = json.loads((trained / "config.json").read_text())
    now = json.loads((run / "config.json").read_text())
    assert {k for k in now if now[k] != kept[k]} == {"output", "resume", "epochs"}


def test_a_resumed_run_refuses_other_images(trained, photos, tmp_path):
    run, other = tmp_path / "again", tmp_path / "photos"
    shutil.copytree(trained, run)
    shutil.copytree(photos, other)
    next(p for p in other.rglob("*.*") if p.is_file()).unlink()
    record = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(record | {"data": str(other)}))
    with pytest.raises(ValueError, match=r"not those of the checkpoint|batches in"):
        mim_pretrain.main(["--output", str(run), "--resume", "auto", "--epochs", "3"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adamww", "Did you mean 'adamw'?"),
        ("lar", "Did you mean 'lars'?"),
        ("zzz", "others are known"),
    ],
)
def test_an_unknown_optimiser_is_refused_with_the_near_name(name, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        mim_pretrain.main(["--optimizer", name, "--output", str(tmp_path / "run")])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"timm has no optimizer '{name}'. " in said
    assert message in said
    assert not (tmp_path / "run").exists()


def test_resume_without_a_run_is_refused(capsys):
    with pytest.raises(SystemExit):
        mim_pretrain.main(["--resume", "auto"])
    assert "--resume auto needs --output RUN" in capsys.readouterr().err


# ------------------------------------------------------------------ learning


GREY = [
    "--preset", "demo", "--model-args", "depth=2", "embed_dim=32", "--decoder-dim", "32",
    "--batch-size", "12", "--workers", "0", "--threads", "1", "--log-every", "1",
    "--warmup-epochs", "0",
]  # fmt: skip


@pytest.mark.parametrize("objective", ["mae", "simmim"])
def test_the_loss_falls_and_neighbours_are_asked_where_labels_are(stripes, tmp_path, objective):
    argv = [*GREY, "--data", str(stripes), "--output", str(tmp_path), "--objective", objective]
    more = ["--epochs", "20", "--base-lr", "5e-2", "--crop-scale", "1", "1", "--eval-every", "10"]
    mim_pretrain.main([*argv, *more, "--mask-ratio", "0.5"])
    rows = read_metrics(tmp_path)
    assert len(rows) == 40
    # predicting every patch's mean would give 0.94 (mae, squares) and 0.8 (simmim, distances)
    assert np.mean([row["loss"] for row in rows[-3:]]) < 0.65
    evaluated = [row for row in rows if "knn_top1" in row]
    assert [row["epoch"] for row in evaluated] == [10, 20]
    assert all(0 <= row["knn_top1"] <= 100 and row["feature_std"] > 0 for row in evaluated)
    assert all(0 <= row["linear_top1"] <= 100 and row["effective_rank"] > 1 for row in evaluated)
    sizes = {(row["check_images"], row["check_train_images"]) for row in evaluated}
    assert len(sizes) == 1
    assert min(*sizes.pop()) > 0


@pytest.mark.parametrize(("name", "base_lr"), [("lars", 200.0), ("lamb", 1.0)])
def test_large_batch_optimisers_train(stripes, tmp_path, monkeypatch, name, base_lr):
    """Through the trainer, with layer decay: every block has its own share of the schedule's lr."""
    built = []

    def keep(*args, **more):
        built.append(build_optimizer(*args, **more))
        return built[-1]

    monkeypatch.setattr(training, "build_optimizer", keep)
    argv = [*GREY, "--data", str(stripes), "--output", str(tmp_path), "--optimizer", name]
    more = ["--epochs", "6", "--crop-scale", "1", "1", "--mask-ratio", "0.5"]
    mim_pretrain.main([*argv, *more, "--base-lr", str(base_lr), "--layer-decay", "0.5"])
    rows = read_metrics(tmp_path)
    losses = [row["loss"] for row in rows]
    assert len(rows) == 12
    assert np.isfinite([[row["loss"], row["grad_norm"]] for row in rows]).all()
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    (optimizer,) = built
    assert type(optimizer).__name__.lower() == name
    last = base_lr * 12 / 64 * (1 + math.cos(math.pi * 11 / 12)) / 2
    lrs = sorted({group["lr"] for group in optimizer.param_groups})  # stem, two blocks, decoder
    assert lrs == pytest.approx([last / 8, last / 4, last / 2, last])


def test_the_seed_decides_the_initial_weights(stripes, tmp_path):
    """With a learning rate of 0 the encoder written is the one that training began with."""

    def weights(name: str, seed: int):
        argv = [*GREY, "--data", str(stripes), "--output", str(tmp_path / name)]
        mim_pretrain.main([*argv, "--epochs", "1", "--base-lr", "0", "--seed", str(seed)])
        return load_encoder(tmp_path / name).state_dict()["layers.0.mixer.in_proj.weight"]

    first, again, other = weights("a", 1), weights("b", 1), weights("c", 2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ------------------------------------------------------------------ settings


MAE_NUMBERS = {
    "objective": "mae", "mask_ratio": 0.75, "norm_pix_loss": True, "betas": (0.9, 0.95),
    "weight_decay": 0.05, "warmup_epochs": 40, "epochs": 1600, "clip_grad": None, "min_lr": 0,
    "decoder_dim": 512, "decoder_depth": 2, "crop_scale": (0.2, 1.0), "hflip": 0.5,
    "accumulation": 1, "optimizer": "adamw", "layer_decay": None,
}  # fmt: skip
SIMMIM_NUMBERS = {
    "objective": "simmim", "mask_ratio": 0.6, "mask_unit": 32, "norm_pix_loss": False,
    "betas": (0.9, 0.999), "weight_decay": 0.05, "warmup_epochs": 10, "epochs": 800,
    "clip_grad": 5.0, "min_lr": 5e-6, "crop_scale": (0.67, 1.0), "hflip": 0.5,
    "model_args": {"drop_path_rate": 0.1}, "optimizer": "adamw",
}  # fmt: skip
AR_NUMBERS = {
    "objective": "ar", "cluster": 4, "norm_pix_loss": True, "betas": (0.9, 0.95),
    "weight_decay": 0.05, "warmup_epochs": 40, "epochs": 1600, "clip_grad": 3.0, "min_lr": 0,
    "decoder_dim": 512, "decoder_depth": 4, "crop_scale": (0.2, 1.0), "hflip": 0.5,
    "encoder": "vim_small_patch16_224", "model_args": {"img_size": 192}, "optimizer": "adamw",
}  # fmt: skip
UMT_NUMBERS = {
    "objective": "distill", "mask_ratio": 0.8, "distill_loss": "cosine", "betas": (0.9, 0.95),
    "teacher": "timm:vit_base_patch16_clip_224.openai", "epochs": 800, "warmup_epochs": 40,
    "model_args": {"drop_path_rate": 0.4}, "precision": "bf16", "optimizer": "adamw",
}  # fmt: skip
PAPER = {
    "mae_tiny_224": (MAE_NUMBERS | {"encoder": "vim_tiny_patch16_224"}, 4096, 2.4e-3),
    "mae_small_224": (MAE_NUMBERS | {"encoder": "vim_small_patch16_224"}, 4096, 2.4e-3),
    "mae_base_224": (
        MAE_NUMBERS | {"encoder": "vim_base_patch16_224", "model_args": {"norm_after_scan": True}},
        4096,
        2.4e-3,
    ),
    "simmim_small_224": (SIMMIM_NUMBERS | {"encoder": "vim_small_patch16_224"}, 2048, 4e-4),
    "ar_small_192": (AR_NUMBERS, 2048, 1.2e-3),
    "distill_small_224": (UMT_NUMBERS, 2048, 1.2e-3),
}


@pytest.mark.parametrize("preset", PAPER)
def test_a_paper_preset_has_the_papers_numbers(preset, monkeypatch):
    numbers, effective_batch, lr = PAPER[preset]
    config = settings(monkeypatch, "--preset", preset, "--data", "photos")
    assert {name: getattr(config, name) for name in numbers} == numbers
    assert config.base_lr * effective_batch / config.lr_reference_batch == pytest.approx(lr)


# What weight decay must leave alone, by a name's last parts; by its last part alone: tokens,
# positions, what shapes a scan's dynamics, and every bias. Norms are told by their module.
SPARED = {
    "bias", "in_proj_bias", "A_log", "A_b_log", "D", "D_b", "pos_embed", "cls_token", "mask_token",
    "query",
}  # fmt: skip
NORMS = {"norm", "norm1", "norm2", "norm_f", "layernorm", "decoder_norm", "tap_norms"}
DECAYED = {
    "patch_embed.proj.weight", "decoder_embed.weight", "decoder_pred.weight", "head.weight",
    "mixer.in_proj.weight", "mixer.out_proj.weight", "mixer.x_proj.weight",
    "mixer.x_proj_b.weight", "mixer.dt_proj.weight", "mixer.dt_proj_b.weight",
    "mixer.conv1d.weight", "mixer.conv1d_b.weight", "attention.in_proj_weight",
    "attention.out_proj.weight", "mlp.fc1.weight", "mlp.fc2.weight",
}  # fmt: skip


@cache
def on_meta(preset: str):
    """A paper preset's settings and objective, without memory for its weights."""
    create = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda n, pretrained, **more: create(n, **more))
        config = settings(patch, "--preset", preset, "--data", "photos")
        with torch.device("meta"):
            return config, mim_pretrain.build_objective(config, mim_pretrain.build_model(config))


@pytest.mark.parametrize("preset", PAPER)
def test_a_paper_preset_decays_its_matrices_and_nothing_else(preset):
    """Every parameter's name stands on exactly one of the two lists and in the group it says."""
    config, objective = on_meta(preset)
    names = {id(p): name for name, p in objective.named_parameters()}
    groups = param_groups(objective, config.weight_decay, config.layer_decay)
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert sorted(decay) == sorted(names.values())
    for name, value in decay.items():
        parts = name.split(".")
        spared = parts[-1] in SPARED or not NORMS.isdisjoint(parts[-3:-1])
        decayed = any(name == end or name.endswith(f".{end}") for end in DECAYED)
        assert spared != decayed, name
        assert value == (0.05 if decayed else 0.0), name


class ImageNet:
    """As many images; none is asked for."""

    def __len__(self):
        return 1_281_167


class ScheduleIsBuiltError(Exception):
    """Nothing after it matters here."""


@pytest.mark.parametrize("preset", PAPER)
def test_a_paper_presets_learning_rate_has_the_papers_curve(preset, monkeypatch):
    """As the trainer sets it for the paper's effective batch: linear up, then a cosine, by step."""
    config, objective = on_meta(preset)
    numbers, effective_batch, peak = PAPER[preset]
    built = []

    def keep(optimizer, **more):
        built.extend((optimizer, build_schedule(optimizer, **more)))
        raise ScheduleIsBuiltError

    monkeypatch.setattr(training, "build_schedule", keep)
    processes = SimpleNamespace(
        num_processes=effective_batch // config.batch_size, process_index=3,
        is_main_process=False, device=torch.device("cpu"),
    )  # fmt: skip
    new: Any = SimpleNamespace(progress=dict)  # a run without checkpoints
    with pytest.raises(ScheduleIsBuiltError):
        training.fit(objective, SeededSamples(ImageNet(), dict), config, new, processes)
    optimizer, schedule = built
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["betas"] for group in optimizer.param_groups} == {numbers["betas"]}
    epoch_steps = 1_281_167 // effective_batch
    warm_up, epochs = (round(numbers[name] * epoch_steps) for name in ("warmup_epochs", "epochs"))

    def lr(step: int) -> float:
        schedule.step_update(step)
        (value,) = {group["lr"] for group in optimizer.param_groups}
        return value

    end = numbers.get("min_lr", 0.0)
    assert lr(0) == 0
    assert lr(1) == pytest.approx(peak / warm_up)
    assert lr(warm_up // 2) == pytest.approx(peak / 2, rel=1e-3)
    assert lr(warm_up) == pytest.approx(peak)
    for part in (0.25, 0.5, 0.75):
        step = warm_up + round(part * (epochs - warm_up))
        cosine = (1 + math.cos(math.pi * (step - warm_up) / (epochs - warm_up))) / 2
        assert lr(step) == pytest.approx(end + (peak - end) * cosine)
    assert lr(epochs - 1) == pytest.approx(end, abs=1e-6 * peak)
    assert lr(epochs) == pytest.approx(end)


@pytest.mark.parametrize(
    ("argv", "gpu", "preset"),
    [
        ([], True, "demo"),
        (["--epochs", "3"], False, "demo"),
        (["--data", "photos"], False, "cpu_mae"),
        (["--data", "photos"], True, "mae_small_224"),
    ],
    ids=["nothing", "no-data", "data", "data-and-gpu"],
)
def test_without_a_preset_data_and_machine_choose_it(argv, gpu, preset, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    expected = settings(monkeypatch, "--preset", preset, *argv)
    chosen = settings(monkeypatch, *argv)
    assert chosen == expected
    assert chosen.preset == preset


def test_the_demo_gives_the_scan_at_least_49_tokens():
    encoder = mim_pretrain.build_model(mim_pretrain.demo())
    assert encoder.grid_size[0] * encoder.grid_size[1] >= 49


def test_a_batch_is_never_larger_than_the_data(photos, tmp_path, capsys):
    mim_pretrain.main([*TINY, "--data", str(photos), "--batch-size", "50",
                       "--output", str(tmp_path / "run")])  # fmt: skip
    assert "batch 7 · lr" in capsys.readouterr().out
    assert read_metrics(tmp_path / "run")


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        (["--mask-unit", "12"], ValueError, "mask_unit 12 px is not a multiple of the 8-px patch"),
        (["--mask-unit", "24"], ValueError, "mask_unit 3 .patches. does not divide the 8x8 grid"),
        (["--mask-ratio", "1"], ValueError, "between 0 and 1"),
        (["--decoder-dim", "18"], ValueError, "not divisible by 4"),
        (["--model-args", "stride=4"], ValueError, "overlap"),
        (["--objective", "ar", "--model-args", "directions=both"], ValueError, "has already seen"),
        (["--objective", "ar", "--cluster", "3"], ValueError, "do not divide the 8x8 grid"),
        (
            ["--objective", "distill", "--teacher", "timm:no_such"],
            ValueError,
            "timm has no model .no_such",
        ),
        (["--mask", "row", "--mask-ratio", "0"], ValueError, "between 0 and 1"),
        (["--model-args", "dept=2"], ValueError, "Did you mean 'depth'"),
        (["--data", "no/such/folder"], FileNotFoundError, "no/such/folder' does not exist"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_mistake_is_told_before_training(argv, error, message, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        mim_pretrain.main([*TINY, "--data", str(photos), *argv])
    assert not list(tmp_path.glob("runs/*/metrics.jsonl"))


# ------------------------------------------------------------------ commands


def test_the_command_shows_flags_and_presets(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["mim-pretrain", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("--mask-ratio", "--resume", *mim_pretrain.PRESETS))


HELP = """
import contextlib, io, json, os, runpy, sys
shown = {}
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    sys.path.insert(0, os.path.dirname(script))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            shown[script] = (stop.code, out.getvalue())
    del sys.path[0]
print(json.dumps(shown))
"""


@pytest.mark.slow
def test_scripts_show_their_help_when_called_by_path(tmp_path, monkeypatch):
    scripts = ["recipes/mim_pretrain.py", "downstream/linear_probe.py", "downstream/knn.py",
               "downstream/embed.py", "downstream/finetune.py"]  # fmt: skip
    paths = [str(ROOT / script) for script in scripts]
    monkeypatch.chdir(tmp_path)
    done = run(HELP, *paths)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert list(shown) == paths
    for code, text in shown.values():
        assert code == 0
        assert "--encoder" in text
        assert "--data" in text


@pytest.mark.parametrize(
    ("argv", "idle"),
    [
        (["--objective", "ar", "--mask", "block", "--cluster", "1"], "mask"),
        (["--cluster", "3", "--teacher-momentum", "0.5"], "cluster, teacher_momentum"),
        (["--mask-ratio", "0.5", "--no-keep-order"], ""),
    ],
)
def test_settings_that_the_objective_does_not_use_are_told(argv, idle, monkeypatch):
    config = settings(monkeypatch, "--data", "x", *argv)
    assert ", ".join(mim_pretrain.not_used(config)) == idle
