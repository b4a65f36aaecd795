"""The trainer's promises: exact gradients, exact resume, whole checkpoints, a guard against NaN."""

import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from processes import Process, finish, run, start
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from vim_ssl import load_encoder
from vim_ssl.cli import guarded
from vim_ssl.data.images import BadImage
from vim_ssl.data.loading import streamed
from vim_ssl.data.loading.indexed import EpochBatches, SeededSamples, stable_hash, training_loader
from vim_ssl.data.loading.order import stream_order
from vim_ssl.downstream import detection, finetune, segmentation, slide, video
from vim_ssl.objectives.base import StepOutput
from vim_ssl.recipes import clip_pretrain, mim_pretrain, supervised_pretrain
from vim_ssl.training.accelerator import make_accelerator, make_average
from vim_ssl.training.config import TrainConfig
from vim_ssl.training.loop import fit, forward_backward
from vim_ssl.training.monitor import bottleneck
from vim_ssl.training.run import Run, read_metrics
from vim_ssl.training.schedule import Progress
from vim_ssl.utils.config import save

ROOT = Path(__file__).parents[2]
SMALL = [
    "--preset", "demo", "--epochs", "3", "--batch-size", "8", "--accumulation", "2",
    "--warmup-epochs", "1", "--threads", "1", "--log-every", "1", "--eval-every", "100",
    "--decoder-dim", "16",
    "--model-args", "depth=2", "embed_dim=16", "drop_path_rate=0.3",
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """40 small images in two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(40):
        values = rng.integers(0, 100, (28, 28), dtype=np.uint8)
        values[:, : 14 if i % 2 else 28] += 100
        path = folder / f"class{i % 2}" / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(values).save(path)
    return folder


def losses(folder: Path) -> list[tuple[int, str]]:
    return [(row["step"], repr(row["loss"])) for row in read_metrics(folder)]


class Linear(torch.nn.Module):
    """Least squares on the sample's own number; fails at a step of the test's choice."""

    def __init__(self, fail_at: tuple[int, ...] = ()):
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)
        self.fail_at, self.calls = fail_at, 0

    def forward(self, batch):
        error = (self.linear(batch["x"])[:, 0] - batch["y"]).square()
        self.calls += 1
        if self.calls in self.fail_at:
            error = error * float("nan")
        return StepOutput(error.sum(), len(error), {"mae": error.sqrt().sum()})


class Numbers(torch.utils.data.Dataset):
    def __init__(self, size: int, broken: tuple[int, ...] = ()):
        self.size, self.broken = size, broken

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.broken:
            raise BadImage(f"image {index}", "is broken")
        return {"i": index}


def noisy(item):
    return {"x": torch.randn(4), "y": torch.tensor(float(item["i"]))}


def train(tmp_path, objective, size=32, broken=(), transform=noisy, **settings):
    settings = {
        "epochs": 2, "batch_size": 4, "workers": 0, "threads": 1, "log_every": 1, "base_lr": 0.1,
        "warmup_epochs": 0.0, "output": str(tmp_path), **settings,
    }  # fmt: skip
    config = TrainConfig(**settings)
    accelerator = make_accelerator(config)
    run = Run.open("test", config, accelerator)
    samples = SeededSamples(Numbers(size, broken), transform, config.seed)
    with contextlib.closing(run):
        return fit(objective, samples, config, run, accelerator), run


# ------------------------------------------------------------------ order and randomness


def test_the_order_of_an_epoch_covers_the_data_once_and_differs_between_epochs():
    batches = EpochBatches(20, 5, seed=3)
    first = [i for batch in batches for _, i in batch]
    batches.epoch = 1
    second = [i for batch in batches for _, i in batch]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_together_see_what_one_process_sees(world):
    whole = [key for batch in EpochBatches(32, 8, seed=1) for key in batch]
    parts = [list(EpochBatches(32, 8 // world, rank=r, world=world, seed=1)) for r in range(world)]
    joined = [key for step in zip(*parts, strict=True) for part in step for key in part]
    assert joined == whole


@pytest.mark.parametrize("start", [0, 2, 4])
def test_an_epoch_started_in_the_middle_is_the_rest_of_the_whole(start):
    batches = EpochBatches(20, 4, seed=5)
    whole = list(batches)
    batches.start = start
    assert list(batches) == whole[start:]
    assert len(batches) == len(whole) - start


def test_a_sample_does_not_depend_on_the_number_of_workers():
    def all_samples(workers):
        samples = SeededSamples(Numbers(12), noisy, seed=1)
        loader = training_loader(samples, EpochBatches(12, 4), num_workers=workers)
        return torch.cat([batch["x"] for batch in loader])

    assert torch.equal(all_samples(0), all_samples(2))


def drawn_thrice(item):
    """A draw of each generator that augmentations use."""
    legacy = np.random.rand()  # noqa: NPY002 (what timm draws from)
    return {"torch": torch.rand(()).item(), "numpy": legacy, "random": random.random()}


@pytest.mark.parametrize("generator", ["torch", "numpy", "random"])
def test_a_sample_is_drawn_from_seed_epoch_and_index_alone(generator):
    def draw(epoch, index, seed=1):
        samples = SeededSamples(Numbers(12), drawn_thrice, seed)
        for reseed in (np.random.seed, random.seed, torch.seed):  # as after a resume
            reseed()
        return samples[(epoch, index)][generator]

    draws = {key: draw(*key) for key in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 2)]}
    assert len(set(draws.values())) == len(draws)
    assert all(draw(*key) == value for key, value in draws.items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_go_on_after_a_signal_to_all_processes(number):
    """The trainer has had it too, and is about to save."""
    samples = SeededSamples(Numbers(40), noisy, seed=1)
    batches = iter(training_loader(samples, EpochBatches(40, 4), num_workers=1))
    next(batches)
    (worker,) = psutil.Process().children()
    worker.send_signal(number)
    time.sleep(0.2)
    assert len(list(batches)) == 9


def test_a_batch_larger_than_the_data_is_refused_with_a_size_that_fits():
    with pytest.raises(ValueError, match="at most 5"):
        EpochBatches(10, 8, world=2)


def test_the_hash_is_the_same_on_every_machine():
    assert stable_hash("order", 0, 1) == 1706904728


# ------------------------------------------------------------------ the loop


def test_accumulation_gives_the_large_batch_gradient(tmp_path):
    torch.manual_seed(0)
    large, small = Linear(), Linear()
    small.load_state_dict(large.state_dict())
    train(tmp_path / "a", large, batch_size=8, accumulation=1, max_steps=3)
    train(tmp_path / "b", small, batch_size=2, accumulation=4, max_steps=3)
    torch.testing.assert_close(large.linear.weight, small.linear.weight)


def test_the_last_short_accumulation_of_an_epoch_is_weighted_by_its_own_size(tmp_path):
    """12 samples as 3 micro-batches, 2 a step: the second step averages over 4 samples, not 8."""
    objective = Linear()
    train(tmp_path, objective, size=12, batch_size=4, accumulation=2, epochs=1, clip_grad=None)
    rows = read_metrics(tmp_path)
    assert [row["samples"] for row in rows] == [8, 12]
    # with a halved gradient the norm of the second step would lie far below
    assert rows[1]["grad_norm"] > 0.6 * rows[0]["grad_norm"]


class Residual(torch.nn.Module):
    """Least squares with an encoder that can recompute itself."""

    def __init__(self):
        super().__init__()
        self.encoder = load_encoder("vim_nano_patch4_28", depth=1, embed_dim=16)
        self.head = torch.nn.Linear(16, 1)

    def forward(self, batch):
        error = (self.head(self.encoder(batch["image"]))[:, 0] - batch["y"]).square()
        return StepOutput(error.sum(), len(error))


def drawn(item):
    return {"image": torch.randn(1, 28, 28), "y": torch.tensor(item["i"] / 32)}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["compile", "grad_checkpointing"])
def test_compiled_or_recomputed_a_run_is_the_same_and_its_checkpoint_fits_any(tmp_path, way):
    before = counters["frames"]["ok"]
    for name, parts in (
        ("plain", [{}]),
        ("way", [{way: True, "max_steps": 3}, {way: True, "resume": "auto"}]),
    ):
        for settings in parts:
            torch.manual_seed(0)
            objective = Residual()
            train(tmp_path / name, objective, transform=drawn, epochs=1, **settings)
    assert objective.encoder.grad_checkpointing == (way == "grad_checkpointing")
    assert (counters["frames"]["ok"] > before) == (way == "compile")
    plain, other = ([row["loss"] for row in read_metrics(tmp_path / n)] for n in ("plain", "way"))
    assert len(other) == 8
    np.testing.assert_allclose(other, plain, rtol=1e-4)
    train(tmp_path / "way", Residual(), transform=drawn, epochs=2, resume="auto")  # without it
    assert read_metrics(tmp_path / "way")[-1]["step"] == 16


def test_an_average_is_refused_where_the_encoder_is_in_shards(monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: "FSDP"))
    with pytest.raises(ValueError, match="--ema 0, or DDP"):
        make_accelerator(TrainConfig(ema=0.99))


def test_processes_wait_for_a_long_evaluation():
    handler = make_accelerator(TrainConfig()).init_handler
    assert handler.timeout.total_seconds() >= 3600


def test_a_rate_that_would_rise_to_its_end_is_told(tmp_path):
    with pytest.warns(
        UserWarning, match=r"the learning rate, 1e-05 for a batch of 4, is below min"
    ):
        train(tmp_path, Linear(), epochs=1, base_lr=1e-5, lr_reference_batch=4, min_lr=1e-4)


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 4), (1.26, 10), (2, 16), (0.001, 1)])
def test_a_run_may_end_within_an_epoch_with_its_schedule(tmp_path, epochs, steps):
    train(tmp_path, Linear(), epochs=epochs)
    rows = read_metrics(tmp_path)
    assert rows[-1]["step"] == steps
    assert rows[-1]["lr"] <= rows[0]["lr"] * (np.pi / steps) ** 2  # the cosine's foot


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path):
    objective = Linear(fail_at=(3,))
    before = None

    def remember(module, args):
        nonlocal before
        if module.calls in (2, 3):  # weights as the failing step and the one after it see them
            now = module.linear.weight.detach().clone()
            if module.calls == 3:
                assert torch.equal(now, before)
            before = now

    objective.register_forward_pre_hook(remember)
    train(tmp_path, objective)
    assert [row["bad_steps"] for row in read_metrics(tmp_path)][:4] == [0, 0, 1, 1]
    assert torch.isfinite(objective.linear.weight).all()


def test_a_step_that_is_not_finite_is_skipped_whatever_precision_was_requested(tmp_path):
    config = TrainConfig(
        precision="fp16", epochs=2, batch_size=4, workers=0, threads=1, output=str(tmp_path),
        base_lr=0.1, log_every=1, warmup_epochs=0,
    )  # fmt: skip
    accelerator = make_accelerator(dataclasses.replace(config, precision="no"))
    objective, run = Linear(fail_at=(3,)), Run.open("test", config, accelerator)
    with contextlib.closing(run):
        fit(objective, SeededSamples(Numbers(32), noisy, 0), config, run, accelerator)
    assert read_metrics(tmp_path)[-1]["bad_steps"] == 1
    assert torch.isfinite(objective.linear.weight).all()


def test_a_precision_that_the_device_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"fp16 is not active on this device \(cpu\).*bf16 or no"):
        train(tmp_path, Linear(), precision="fp16")
    assert not list(tmp_path.iterdir())


class Dropping(Linear):
    """Records what dropout kept in each call, and the mode of each call."""

    def __init__(self):
        super().__init__()
        self.kept, self.modes = [], []

    def forward(self, batch):
        self.modes.append(self.training)
        self.kept.append(torch.nn.functional.dropout(torch.ones(64), training=self.training))
        return super().forward(batch)


def test_dropout_differs_between_steps_and_micro_batches(tmp_path):
    objective = Dropping()
    train(tmp_path, objective, size=16, epochs=2, accumulation=2)
    kept = torch.stack(
        [kept for kept, mode in zip(objective.kept, objective.modes, strict=True) if mode]
    )
    assert len(kept) == 8
    assert len(kept.unique(dim=0)) == 8


def test_previews_are_made_in_eval_mode_and_training_goes_on_in_its_own(tmp_path):
    objective = Dropping()
    train(tmp_path, objective, size=16, epochs=2, eval_every=1)
    assert objective.modes == [True] * 4 + [False] + [True] * 4 + [False]
    assert objective.training


class TwoProcesses:
    """What `forward_backward` needs of accelerate, in the first of two processes; the other one has
    the same batch. DDP averages gradients, so the average is this process's."""

    num_processes, process_index, device = 2, 0, torch.device("cpu")

    def backward(self, loss):
        loss.backward()

    def no_sync(self, model):
        return contextlib.nullcontext()

    def reduce(self, sums):
        return 2 * sums


def test_the_gradient_of_two_processes_is_that_of_their_joint_batch():
    objective = Linear()
    batch = {"x": torch.randn(6, 4), "y": torch.randn(6), "index": torch.arange(6), "skipped": []}
    halves = [{key: value[:2] for key, value in batch.items()},
              {key: value[2:] for key, value in batch.items()}]  # fmt: skip
    forward_backward(TwoProcesses(), objective, objective, halves, TrainConfig(), Progress())
    gradient = objective.linear.weight.grad.clone()
    objective.zero_grad()
    out = objective(batch)
    (out.loss_sum / 6).backward()
    torch.testing.assert_close(gradient, objective.linear.weight.grad)


def test_a_second_run_of_a_process_has_its_own_precision(tmp_path):
    for precision in ("no", "bf16", "no"):
        config = TrainConfig(precision=precision)
        assert make_accelerator(config).mixed_precision == precision


def test_a_step_in_which_nothing_counts_is_no_bad_step(tmp_path):
    """As when no pixel of a batch is labelled."""

    class Empty(Linear):
        def forward(self, batch):
            out = super().forward(batch)
            return StepOutput(out.loss_sum * 0, 0.0) if self.calls == 2 else out

    objective = Empty()
    figures, run = train(tmp_path, objective, size=16)
    rows = read_metrics(run.folder)
    assert rows[1]["loss"] == rows[1]["grad_norm"] == rows[-1]["bad_steps"] == 0
    assert figures["loss"] > 0
    assert torch.isfinite(objective.linear.weight).all()


def test_too_many_bad_steps_in_a_row_end_the_run_and_keep_the_checkpoint(tmp_path):
    objective = Linear(fail_at=(5, 6, 7))
    with pytest.raises(FloatingPointError, match=r"3 consecutive steps.*resume auto"):
        train(tmp_path, objective, max_bad_steps=3, save_steps=4)
    assert [p.name for p in Run(tmp_path).checkpoints()] == ["step-4"]


def test_broken_images_are_replaced_named_and_counted(tmp_path, capsys):
    _, run = train(tmp_path, Linear(), broken=(3, 7))
    assert run.skipped == {"image 3: is broken", "image 7: is broken"}
    output = capsys.readouterr().out
    assert "image 3" in output
    assert "2 broken samples skipped, replaced by others." in output
    assert read_metrics(tmp_path)[-1]["skipped"] == 2


def test_old_checkpoints_go_and_leftovers_of_a_kill_are_not_taken_for_whole(tmp_path):
    train(tmp_path, Linear(), save_steps=2, keep_checkpoints=2)
    run = Run(tmp_path)
    assert [p.name for p in run.checkpoints()] == ["step-14", "step-16"]
    (tmp_path / "checkpoints" / "partial-99").mkdir()
    assert run.checkpoints()[-1].name == "step-16"


def test_a_run_is_not_overwritten(tmp_path):
    train(tmp_path, Linear())
    with pytest.raises(FileExistsError, match="--resume auto"):
        train(tmp_path, Linear())


def test_a_second_process_is_kept_out_of_a_folder_while_a_run_trains_there(tmp_path):
    """Tried from the middle of a step; what the first run then writes is what it writes alone."""
    second = """
import sys
from vim_ssl.training.run import Run
from vim_ssl.training.accelerator import make_accelerator
from vim_ssl.training.config import TrainConfig
for resume in ("never", "auto"):
    config = TrainConfig(epochs=2, batch_size=4, warmup_epochs=0.0, base_lr=0.1, resume=resume,
                         output=sys.argv[1], workers=0, threads=1, log_every=1)
    try:
        Run.open("test", config, make_accelerator(config))
    except BlockingIOError as error:
        print(f"{resume}: {error}")
"""
    objective, refused = Linear(), []

    def meanwhile(module, args):
        if module.calls == 6:
            refused.append(run(second, str(tmp_path / "run")))

    torch.manual_seed(0)
    train(tmp_path / "alone", Linear(), save_steps=8)
    torch.manual_seed(0)
    objective.load_state_dict(Linear().state_dict())
    objective.register_forward_pre_hook(meanwhile)
    train(tmp_path / "run", objective, save_steps=8)
    (done,) = refused
    assert done.returncode == 0, done.stderr
    never, auto = done.stdout.splitlines()
    assert never.startswith("never: another process is training in")
    assert auto.startswith("auto: another process is training in")
    assert losses(tmp_path / "run") == losses(tmp_path / "alone")
    train(tmp_path / "run", Linear(), resume="auto")  # free again


def test_a_folder_of_another_program_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(FileExistsError, match="no run"):
        train(tmp_path, Linear())
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_run_that_is_refused_lets_go_of_its_folder(tmp_path):
    train(tmp_path, Linear(), max_steps=4)
    try:
        train(tmp_path, Linear(), size=40, resume="auto")
    except ValueError as error:
        kept = error  # as a notebook keeps it
    train(tmp_path, Linear(), resume="auto")
    assert "epoch of the checkpoint has" in str(kept)


def test_a_tracker_that_fails_is_left_out_and_training_goes_on(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    def fail(*args, **more):
        raise ConnectionError("out of reach")

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    train(tmp_path, Linear())
    assert capsys.readouterr().out.count("tensorboard failed and is dropped: out of reach") == 1
    assert read_metrics(tmp_path)[-1]["step"] == 16


@pytest.mark.parametrize(
    "setting",
    [{"workers": -1}, {"max_steps": -1}, {"clip_grad": -1.0}, {"base_lr": float("nan")},
     {"weight_decay": -0.1}, {"betas": (1.5, 0.9)}, {"layer_decay": 0.0}, {"epochs": 0}],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        TrainConfig(**setting)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    train(tmp_path, Linear())
    before = losses(tmp_path)
    train(tmp_path, Linear(), resume="auto")
    assert losses(tmp_path) == before


def test_launcher_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    with pytest.raises((RuntimeError, ValueError)):
        make_accelerator(TrainConfig())


def test_the_learning_rate_follows_from_the_effective_batch(tmp_path, capsys):
    train(tmp_path, Linear(), batch_size=4, accumulation=2, base_lr=0.256)
    assert (
        "batch 4 x 2 (accumulation) x 1 (processes) = 8 · lr 0.256 x 8/256 = 0.008"
        in capsys.readouterr().out
    )
    assert max(row["lr"] for row in read_metrics(tmp_path)) == pytest.approx(0.008)


# ------------------------------------------------------------------ exact resume, real recipe


def pretrain(folder: Path, images: Path, *more: str) -> None:
    mim_pretrain.main([*SMALL, "--data", str(images), "--output", str(folder), *more])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "objective"),
    [(1, "mae"), (3, "simmim"), (4, "distill")],
    ids=lambda v: f"stop-at-{v}" if isinstance(v, int) else v,
)
def test_resume_is_bit_identical(tmp_path, images, stop, objective):
    """40 samples, 5 micro-batches, 3 steps an epoch: the stops fall inside and between epochs.
    The average that teaches in `distill` is a part of the state."""
    what = ("--objective", objective)
    pretrain(tmp_path / "whole", images, *what, "--workers", "0")
    pretrain(tmp_path / "parts", images, *what, "--workers", "2", "--max-steps", str(stop))
    pretrain(tmp_path / "parts", images, *what, "--workers", "1", "--resume", "auto")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 9


@pytest.mark.slow
def test_the_average_lags_behind_the_weights_and_goes_on_after_a_stop(tmp_path, images):
    for name, *parts in (("whole", ()), ("parts", ("--max-steps", "4"), ("--resume", "auto"))):
        for part in parts:
            pretrain(tmp_path / name, images, "--ema", "0.99", "--workers", "0", *part)
    whole, parts = (load_file(tmp_path / n / "encoder_ema.safetensors") for n in ("whole", "parts"))
    weights = load_file(tmp_path / "whole" / "encoder.safetensors")
    for key, value in whole.items():
        assert torch.equal(value, parts[key]), key
    assert not torch.equal(whole["norm_f.weight"], weights["norm_f.weight"])
    loaded = load_encoder(tmp_path / "whole").state_dict()
    assert torch.equal(loaded["norm_f.weight"], whole["norm_f.weight"])  # what is loaded by default


def test_the_average_is_the_mean_that_its_decay_asks_for(tmp_path):
    """Its decay at step s is 1 - s^(-2/3), at most the one given; a step that was not finite is
    none."""
    objective, seen = Linear(fail_at=(4,)), []
    objective.encoder = objective.linear
    config = TrainConfig(
        epochs=1, batch_size=4, workers=0, threads=1, warmup_epochs=0.0, base_lr=1.0,
        output=str(tmp_path), ema=0.5,
    )  # fmt: skip
    average = make_average(objective.encoder, config)
    start = objective.linear.weight.detach().clone()

    def remember(module, args):
        seen.append(module.linear.weight.detach().clone())

    objective.register_forward_pre_hook(remember)
    accelerator = make_accelerator(config)
    samples = SeededSamples(Numbers(32), noisy, 0)
    fit(objective, samples, config, Run.open("test", config, accelerator), accelerator,
        average=average)  # fmt: skip
    expected = start
    for step, weight in enumerate([*seen[1:8], objective.linear.weight.detach()], start=1):
        if step == 4:
            continue
        decay = min(0.5, 1 - step ** (-2 / 3)) if step > 1 else 0.0
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(average.module.weight, expected)


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [("tensorbord", ValueError, "Did you mean 'tensorboard'"), ("clearml", ImportError, "clearml")],
)
def test_a_tracker_that_cannot_run_is_refused_before_training(tmp_path, name, error, says):
    with pytest.raises(error, match=says):
        train(tmp_path / "run", Linear(), trackers=(name,))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("names", "wanted"), [(("auto",), True), (("none",), False)])
def test_figures_go_to_tensorboard_where_it_is_installed(tmp_path, names, wanted):
    pytest.importorskip("tensorboard")
    _, run = train(tmp_path, Linear(), trackers=names)
    run.close()
    assert bool(list(tmp_path.glob("trackers/events*"))) == wanted


def arguments(folder: Path, images: Path | str, *more: str) -> list[str]:
    return [*SMALL, "--data", str(images), "--output", str(folder), *more]


def start_pretraining(processes: int, *args) -> list[Process]:
    return start(processes, ROOT / "recipes" / "mim_pretrain.py", *arguments(*args))


SIGNALLED = f"""
import os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook

rank, step, number = (int(sys.argv.pop(1)) for _ in range(3))
done = []

def count(*_):
    done.append(1)
    if len(done) == step and int(os.environ.get("RANK", 0)) == rank:
        os.kill(os.getpid(), number)

register_optimizer_step_post_hook(count)
runpy.run_path({str(ROOT / "recipes" / "mim_pretrain.py")!r}, run_name="__main__")
"""


def start_signalled(processes: int, rank: int, step: int, number: int, *args) -> list[Process]:
    """One rank sends itself a signal after an update: the same one on a fast or busy machine."""
    return start(processes, SIGNALLED, str(rank), str(step), str(int(number)), *arguments(*args))


LONG = ("--epochs", "20", "--save-steps", "5", "--workers", "1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, images) -> list[tuple[int, str]]:
    """The losses of 60 steps in one go, started as the runs that are compared with them."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(start_pretraining(1, folder, images, *LONG))
    return losses(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM], ids=["kill-9", "sigterm"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, images, whole, kill):
    (process,) = start_signalled(1, 0, 12, kill, tmp_path / "killed", images, *LONG)
    output, _ = process.communicate(timeout=200)
    if kill == signal.SIGTERM:
        assert process.returncode == 0, output
        assert f"--output {tmp_path / 'killed'} --resume auto" in output
        assert "of the time waiting for data" in output
    else:
        assert process.returncode != 0
    finish(start_pretraining(1, tmp_path / "killed", images, *LONG, "--resume", "auto"))
    resumed = losses(tmp_path / "killed")
    if resumed != whole:  # is that the resuming, or does no run repeat another here?
        finish(start_pretraining(1, tmp_path / "again", images, *LONG))
        if losses(tmp_path / "again") != whole:
            loss, expected = ([float(value) for _, value in rows] for rows in (resumed, whole))
            np.testing.assert_allclose(loss, expected, rtol=1e-5)
            pytest.skip("two whole runs differ in the last bit on this machine: nothing to compare")
    assert resumed == whole


@pytest.mark.slow
def test_two_processes_train_as_one_and_a_sigterm_to_one_of_them_loses_nothing(tmp_path, images):
    """Both stop at the same step and save; the rest is what it would have been."""
    shared = ("--epochs", "8", "--workers", "0", "--model-args", "depth=2", "embed_dim=16")
    one, two = (*shared, "--batch-size", "8"), (*shared, "--batch-size", "4")
    pretrain(tmp_path / "one", images, *one)
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu",
                "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
                "--dynamo_backend", "no", "--main_process_port", "0",
                str(ROOT / "recipes" / "mim_pretrain.py")]  # fmt: skip
    done = subprocess.run(
        [*launcher, *arguments(tmp_path / "two", images, *two)], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    a, b = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert [r["step"] for r in a] == [r["step"] for r in b] == list(range(1, 25))
    # Rounding grows from step to step.
    np.testing.assert_allclose([r["loss"] for r in a[:9]], [r["loss"] for r in b[:9]], rtol=1e-5)

    ranks = start_signalled(2, 1, 5, signal.SIGTERM, tmp_path / "parts", images, *two)
    assert f"--output {tmp_path / 'parts'} --resume auto" in finish(ranks)
    stopped = len(losses(tmp_path / "parts"))
    assert [p.name for p in Run(tmp_path / "parts").checkpoints()] == [f"step-{stopped}"]
    assert 1 <= stopped < 24
    finish(start_pretraining(2, tmp_path / "parts", images, *two, "--resume", "auto"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "two")


def test_the_run_directory_holds_what_it_promises(tmp_path, images, capsys):
    pretrain(tmp_path / "run", images, "--warmup-epochs", "0", "--epochs", "1", "--workers", "0")
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "images", "report.html",
            "encoder.safetensors", "encoder.json"} <= names  # fmt: skip
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    fields = {f.name for f in dataclasses.fields(mim_pretrain.Config)}
    assert fields <= set(config)
    assert config["preset"] == "demo"
    encoder = load_encoder(tmp_path / "run")
    size = f"{sum(p.numel() for p in encoder.parameters()) / 1e6:.2g} M parameters"
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("mim_pretrain mae · preset demo · ")]
    assert f"encoder vim_nano_patch4_28: {size}, " in line
    assert line.endswith(" M in training · input 28 x 28 px, 1 channel · cpu, 1 thread, float32")
    following = lines[lines.index(line) + 1 :]
    assert following[0] == f"Data folder:{images}: 40 images"
    assert following[1].startswith("3 steps (1 epoch of 3), 0 of warm-up · batch 8 x 2 ")


# ------------------------------------------------------------------ streams


@pytest.fixture
def shards(tmp_path, images, monkeypatch) -> str:
    """The images in four tars, one of them cut off, one image broken."""
    monkeypatch.setenv("VIM_SSL_CACHE", str(tmp_path / "cache"))
    files = sorted(images.glob("*/*.png"), key=lambda path: path.name)
    for number in range(4):
        with tarfile.open(tmp_path / f"shard-{number}.tar", "w") as tar:
            for path in files[10 * number : 10 * number + 10]:
                tar.add(path, path.name)
            if number == 1:
                (tmp_path / "broken.png").write_bytes(b"broken")
                tar.add(tmp_path / "broken.png", "broken.png")
    cut = tmp_path / "shard-2.tar"
    cut.write_bytes(cut.read_bytes()[:-10_000])
    return f"wds:{tmp_path}/shard-{{0..3}}.tar"


def stream_run(folder: Path, shards: str, *more: str) -> None:
    pretrain(folder, shards, "--batch-size", "3", *more)


def test_a_stream_is_trained_on_and_resumed_bit_for_bit(tmp_path, shards, capsys):
    """39 images: 13 micro-batches, 7 steps an epoch."""
    stream_run(tmp_path / "whole", shards, "--workers", "2", "--epochs", "2")
    output = capsys.readouterr().out
    rows = read_metrics(tmp_path / "whole")
    assert re.search(r"^Data wds:.*: 39 images$", output, re.MULTILINE)
    assert "shard-2.tar is damaged after" in output
    assert rows[-1]["skipped"] == 2  # the tar and, sooner or later, the broken image
    parts = tmp_path / "parts"
    stream_run(parts, shards, "--workers", "2", "--epochs", "2", "--max-steps", "4")
    stream_run(parts, shards, "--workers", "1", "--epochs", "2", "--resume", "auto")
    assert losses(parts) == losses(tmp_path / "whole")
    assert len(rows) == 14


def test_an_earlier_run_on_a_stream_goes_on_in_its_order(tmp_path, shards, monkeypatch):
    earlier = functools.partial(stream_order, stored="1 process(es) x 2 worker(s)")

    def order(*args, stored="", **more):
        return earlier(*args, **more)

    with monkeypatch.context() as before:
        before.setattr(streamed, "stream_order", order)
        for name, steps in (("whole", "4"), ("parts", "2")):
            stream_run(tmp_path / name, shards, "--workers", "2", "--max-steps", steps)
    with pytest.raises(ValueError, match=r"the order of 1 process\(es\) x 2 worker\(s\)"):
        stream_run(tmp_path / "parts", shards, "--workers", "1", "--resume", "auto")
    stream_run(tmp_path / "parts", shards, "--workers", "2", "--max-steps", "4", "--resume", "auto")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_stream_and_resume_exactly(tmp_path, shards):
    two = ("--batch-size", "2", "--workers", "2")
    finish(start_pretraining(2, tmp_path / "whole", shards, *two))
    finish(start_pretraining(2, tmp_path / "parts", shards, *two, "--max-steps", "5"))
    finish(start_pretraining(2, tmp_path / "parts", shards, *two, "--resume", "auto"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


# ------------------------------------------------------------------ warm-up

TRAINING = [mim_pretrain, clip_pretrain, supervised_pretrain, detection, finetune, segmentation,
            slide, video]  # fmt: skip


@pytest.fixture
def settings(monkeypatch):
    """A script and its arguments -> the configuration that it would run."""

    def parsed(script, *argv: str):
        seen: list = []
        monkeypatch.setattr(script, "run", seen.append)
        script.main(argv)
        return seen[0]

    return parsed


@pytest.mark.parametrize("script", TRAINING, ids=lambda script: script.__name__.rpartition(".")[2])
def test_a_run_made_shorter_keeps_its_share_of_warm_up(settings, script, capsys):
    usual = settings(script)
    short = settings(script, "--epochs", str(usual.epochs / 100))
    assert short.warmup_epochs == pytest.approx(usual.warmup_epochs / 100)
    assert 0 < short.warmup_epochs < short.epochs
    longer = settings(script, "--epochs", str(2 * usual.epochs))
    assert longer.warmup_epochs == usual.warmup_epochs
    own = settings(script, "--epochs", "1", "--warmup-epochs", "0.9")
    assert own.warmup_epochs == 0.9
    with pytest.raises(SystemExit) as left:
        settings(script, "--epochs", "1", "--warmup-epochs", "2")
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "warmup_epochs 2 does not fit into 1 epochs; try --warmup-epochs 0.05." in said
    assert said.count("\n") == 1


def test_a_run_taken_up_keeps_the_warm_up_it_was_started_with(settings, tmp_path):
    started = settings(mim_pretrain, "--output", str(tmp_path), "--epochs", "1")
    save(started, tmp_path / "config.json")
    for epochs in ("0.5", "1", "9"):
        again = settings(
            mim_pretrain, "--output", str(tmp_path), "--resume", "auto", "--epochs", epochs
        )
        assert again.warmup_epochs == started.warmup_epochs == 0.25


# ------------------------------------------------------------------ signals


class Interrupted(Linear):
    """Least squares with batch norm; a signal comes in the forward pass of one micro-batch, which
    would take a minute."""

    def __init__(self, signal_at: int = 0, number: int = signal.SIGTERM):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)
        self.signal_at, self.number = signal_at, number

    def forward(self, batch):
        out = super().forward(batch | {"x": self.norm(batch["x"])})
        if self.calls == self.signal_at:
            os.kill(os.getpid(), self.number)
            for _ in range(6000):
                time.sleep(0.01)
        return out


def interrupted_run(folder: Path, *objectives: Interrupted) -> dict[str, torch.Tensor]:
    """Train and resume with one objective after the other; return the last one's state."""
    torch.manual_seed(0)
    start = Interrupted().state_dict()
    for number, objective in enumerate(objectives, start=1):
        objective.load_state_dict(start)
        ends = contextlib.nullcontext() if number == len(objectives) else pytest.raises(SystemExit)
        with ends as left:
            train(folder, objective, accumulation=2, resume="auto" if number > 1 else "never")
        if left:
            assert left.value.code == 0
    return objective.state_dict()


@pytest.mark.parametrize(
    ("micro_batch", "number"),
    [(1, signal.SIGTERM), (2, signal.SIGTERM), (6, signal.SIGINT), (12, signal.SIGTERM)],
)
def test_a_signal_ends_a_long_step_at_once_and_the_run_resumes_exactly(
    tmp_path, micro_batch, number
):
    """8 micro-batches in 4 steps an epoch; the batch norm's means changed in the step dropped."""
    whole = interrupted_run(tmp_path / "whole", Interrupted())
    began = time.perf_counter()
    parts = interrupted_run(tmp_path / "parts", Interrupted(micro_batch, number), Interrupted())
    assert time.perf_counter() - began < 30
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for name, value in whole.items():
        assert torch.equal(parts[name], value), name


def test_a_signal_lets_a_compilation_of_kernels_end(tmp_path, monkeypatch):
    """LLVM may crash the process otherwise; the step ends before the run stops."""
    from vim_ssl.kernels import numba_kernels

    class Signalled(Linear):
        def forward(self, batch):
            if self.calls == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(batch)

    monkeypatch.setattr(numba_kernels.NOTICE, "running", 1)
    with pytest.raises(SystemExit):
        train(tmp_path, Signalled(), epochs=2, accumulation=2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


@pytest.mark.parametrize(
    ("micro_batch", "says"),
    [
        (1, "Stopped at step 0 of 8, in the first step, so nothing is saved; 8 steps left"),
        (6, "Stopped at step 2 of 8, saved in {run}/checkpoints/step-2; 6 steps left, "),
    ],
)
def test_a_stopped_run_reports_its_state_and_the_command_to_resume(
    tmp_path, capfd, monkeypatch, micro_batch, says
):
    run = tmp_path / "a run"
    monkeypatch.setattr(sys, "argv", ["vim-ssl test"])
    with pytest.raises(SystemExit):
        train(run, Interrupted(micro_batch), accumulation=2)
    output, errors = capfd.readouterr()
    assert says.format(run=run) in output
    assert f"  vim-ssl test --output '{run}' --resume auto" in output.splitlines()
    assert "Stopping and saving; Ctrl-C ends at once" in errors


def test_a_second_ctrl_c_does_not_wait_for_the_checkpoint(tmp_path, monkeypatch):
    def impatient(run, *args, **more):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal was ignored")

    monkeypatch.setattr(Run, "save", impatient)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Interrupted(3, signal.SIGINT))
    assert Run(tmp_path).checkpoints() == []


# ------------------------------------------------------------------ what a run says


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_run_of_one_step_tells_its_steps_and_makes_no_noise(tmp_path, capsys, caplog, schedule):
    train(tmp_path, Linear(), size=4, epochs=1, schedule=schedule)
    assert "1 step (1 epoch of 1), 0 of warm-up · batch 4 · lr " in capsys.readouterr().out
    assert not caplog.records


def test_the_first_step_tells_no_pace(tmp_path, capsys):
    train(tmp_path, Linear(), size=4, epochs=1)
    output, bar = capsys.readouterr()
    assert "images/s" not in output
    assert "loss" in bar
    assert "img/s" not in bar


def test_the_time_left_is_printed_once_it_can_be_estimated(tmp_path, capsys, monkeypatch):
    """A first step of 60 s, which compiles, then 16 steps of 6 s each, and an evaluation."""
    clock = [0.0]
    monkeypatch.setattr("vim_ssl.training.monitor.time.perf_counter", lambda: clock[0])
    objective = Linear()

    def tick(module, args):
        clock[0] += 60 if module.calls == 0 else 6

    objective.register_forward_pre_hook(tick)
    train(tmp_path, objective, epochs=1, eval_every=0.5)
    output, bar = capsys.readouterr()
    lines = [line for line in output.splitlines() if "Time left" in line]
    assert lines == ["Time left: 36 s for 6 steps, without evaluations."]
    assert "6 s left" in bar
    assert "0 s left" not in bar.replace("30 s left", "")


def test_a_run_says_at_its_end_whether_the_data_set_the_pace(tmp_path, capsys):
    train(tmp_path, Linear())
    output = capsys.readouterr().out
    assert "images/s" in output
    assert "of the time waiting for data" in output
    assert all(0 <= row["data_wait"] <= 1 for row in read_metrics(tmp_path))


def test_the_advice_follows_from_the_time_spent_waiting():
    assert "50 images/s, 60 %" in bottleneck(500, 10, 6, workers=0)
    assert bottleneck(2, 10, 6, workers=0).startswith("0.2 images/s")
    assert "data loading limits the speed; more --workers than 0" in bottleneck(
        500, 10, 6, workers=0
    )
    assert "data loading slows the model down; more" in bottleneck(500, 10, 2, workers=0)
    assert "a worker on every core" in bottleneck(500, 10, 6, workers=10_000)
    assert "the model limits the speed" in bottleneck(500, 10, 0.5, workers=0)


# ------------------------------------------------------------------ disks that take no more


@pytest.mark.parametrize("place", ["a-file", "below-a-file", "read-only"])
def test_a_place_that_cannot_be_written_is_told_before_training(tmp_path, place):
    objective = Linear()
    (tmp_path / "file").touch()
    output = {"a-file": "file", "below-a-file": "file/run", "read-only": "closed/run"}[place]
    (tmp_path / "closed").mkdir(mode=0o555)
    if place == "read-only" and os.access(tmp_path / "closed", os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(OSError, match=r"cannot be written: .* Choose another --output") as caught:
        train(tmp_path / output, objective)
    assert "\n" not in str(caught.value)
    assert objective.calls == 0


def test_a_run_whose_folder_of_checkpoints_is_closed_is_told_before_training(tmp_path):
    train(tmp_path, Linear(), max_steps=4)
    (tmp_path / "checkpoints").chmod(0o555)
    try:
        if os.access(tmp_path / "checkpoints", os.W_OK):
            pytest.skip("this user may write everywhere")
        with pytest.raises(OSError, match=r"checkpoints.* cannot be written"):
            train(tmp_path, Linear(), resume="auto")
    finally:
        (tmp_path / "checkpoints").chmod(0o755)


def test_a_folder_in_which_a_run_did_not_get_to_its_settings_is_free(tmp_path):
    """As where the disk was full at the start."""
    for name in ("checkpoints", "images"):
        (tmp_path / name).mkdir()
    (tmp_path / ".lock").touch()
    train(tmp_path, Linear(), max_steps=1)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


@contextlib.contextmanager
def full_disk(file: str):
    """Let no file grow beyond ``file`` of the first checkpoint once that one is whole: the system
    refuses what is written, as a full disk would."""
    import resource

    save, before = Run.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def until_full(run, *args, **more):
        if checkpoints := run.checkpoints():
            size = (checkpoints[-1] / file).stat().st_size - 1000
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        save(run, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", until_full)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


WITH_CHECKPOINTS = ("--workers", "0", "--save-steps", "2")


@pytest.fixture(scope="module")
def whole_here(tmp_path_factory, images) -> list[dict]:
    """The log of a run in this process that writes all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pretrain(folder, images, *WITH_CHECKPOINTS)
    return read_metrics(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits of Unix")
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin"])
def test_a_checkpoint_that_the_disk_does_not_take_leaves_the_one_before(
    tmp_path, images, whole_here, file, monkeypatch, capsys
):
    monkeypatch.delenv("VIM_SSL_TRACEBACK", raising=False)
    run = tmp_path / "run"
    with full_disk(file):
        argv = [*SMALL, "--data", str(images), "--output", str(run), *WITH_CHECKPOINTS]
        assert guarded(mim_pretrain.main, argv) == 2
    errors = capsys.readouterr().err
    *_, said = errors.splitlines()  # the progress bar comes before
    assert "the checkpoint of step 4 cannot be written in" in said
    assert "Traceback" not in errors
    assert said.endswith(f"go on from step-2: --output {run} --resume auto.")
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-2"]
    assert mim_pretrain.main(["--output", str(run), "--resume", "auto"]) == 0
    resumed = read_metrics(run)
    assert [row["step"] for row in resumed] == list(range(1, 10))
    # Bit for bit is another test's matter.
    for key in ("loss", "lr"):
        ours, theirs = ([row[key] for row in rows] for rows in (resumed, whole_here))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_are_all_broken_are_told_in_one_line(tmp_path, workers, monkeypatch, capfd):
    """In a process of its own where workers may add noise when it ends."""
    for i in range(30):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{i:02}.png").write_bytes(b"broken")
    argv = [*SMALL, "--workers", str(workers),
            "--data", str(tmp_path / "data"), "--output", str(tmp_path / "run")]  # fmt: skip
    monkeypatch.delenv("VIM_SSL_TRACEBACK", raising=False)
    if workers:
        done = run(ROOT / "recipes" / "mim_pretrain.py", *argv)
        code, errors = done.returncode, done.stderr
    else:
        code = guarded(mim_pretrain.main, argv)
        errors = capfd.readouterr().err
    assert code == 2, errors
    assert "none can be read" in errors.splitlines()[-1]
    assert "Traceback" not in errors


# ------------------------------------------------------------------ ends of processes with workers

# Its first argument is a file for the errors of a process that fails with a worker of its own.
ENDS = """
import multiprocessing, os, sys
import torch
from vim_ssl.data.loading.indexed import SeededSamples, training_loader

def one(item):
    return item

def start():
    samples = SeededSamples([{"image": torch.zeros(1)}] * 64, one)
    batches = samples.batches(1, rank=0, world=1, workers=1)
    return iter(training_loader(samples, batches, num_workers=1))

def fail():
    loaded = start()
    next(loaded)
    raise RuntimeError("boom")

if (pid := os.fork()) == 0:
    os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), 2)
    loaded = start()
    next(loaded)
    raise KeyError("the only one")
print("code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
child = multiprocessing.get_context("fork").Process(target=fail)
child.start()
child.join(60)
if child.is_alive():
    with open(f"/proc/{child.pid}/task/{child.pid}/children") as file:
        [os.kill(int(pid), 9) for pid in file.read().split()]
    sys.exit("the child hangs")
loaded = start()
if (pid := os.fork()) == 0:
    sys.exit()
os.waitpid(pid, 0)
print(len(list(loaded)), "batches")
"""
on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="looks for a hung process's workers in /proc"
)


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[subprocess.CompletedProcess, str]:
    """One process that forks those that end; the errors of the first of them."""
    errors = tmp_path_factory.mktemp("ended") / "errors.txt"
    return run(ENDS, str(errors)), errors.read_text()


@on_linux
def test_a_process_that_fails_while_its_workers_wait_ends_with_its_error_alone(ended):
    done, errors = ended
    assert done.stdout.startswith("code 1\n")
    assert errors.count("Traceback") == 1
    assert errors.endswith("'the only one'\n")


@on_linux
def test_workers_end_with_the_process_that_started_them_and_no_other(ended):
    done, _ = ended
    assert done.returncode == 0, done.stderr
    assert "boom" in done.stderr
    assert done.stdout.endswith("\n64 batches\n")
