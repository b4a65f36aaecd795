"""What a run prints of its data and steps before the first one."""

import os
from types import SimpleNamespace

import pytest
import torch

from vim_ssl.data import ImageData
from vim_ssl.data.loading.indexed import SeededSamples
from vim_ssl.training.config import TrainConfig
from vim_ssl.training.schedule import Schedule, fitting_batch
from vim_ssl.utils import cores
from vim_ssl.utils.names import plural, rough_time


def summary(count: int, world: int = 1, left_out: dict | None = None, **settings) -> list[str]:
    data = ImageData([""] * count, [str(i) for i in range(count)], name="pics")
    data.left_out = left_out or {}
    processes = SimpleNamespace(
        num_processes=world, process_index=0, is_main_process=True, device=torch.device("cpu")
    )
    config = TrainConfig(**{"epochs": 10, "warmup_epochs": 1, "workers": 0, **settings})
    return Schedule(SeededSamples(data, dict), config, processes).summary.splitlines()


@pytest.mark.parametrize(
    ("count", "more", "line"),
    [
        (128, {}, "Data pics: 128 images"),
        (200, {}, "Data pics: 200 images; 8 left out of each epoch, drawn anew: batches are whole "
                  "(--batch-size 50 leaves out none)"),
        (130, {}, "Data pics: 130 images; 2 left out of each epoch, drawn anew: batches are whole"),
        (200, {"world": 2, "batch_size": 64}, "Data pics: 200 images; 72 left out of each epoch, "
                  "drawn anew: batches are whole (--batch-size 50 leaves out none)"),
        (160, {"batch_size": 32, "left_out": {"without a label": 3, "held out for testing": 1200}},
         "Data pics: 160 images (3 without a label, 1,200 held out for testing)"),
    ],
)  # fmt: skip
def test_the_data_and_what_an_epoch_leaves_out(count, more, line):
    assert summary(count, **more)[0] == line


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"lr_reference_batch": 64, "base_lr": 1e-3},
         "20 steps (10 epochs of 2), 2 of warm-up · batch 64 · lr 0.001 · 0 workers"),
        ({"max_steps": 5, "base_lr": 0.4},
         "5 steps (of 20 in 10 epochs of 2), 2 of warm-up · batch 64 · lr 0.4 x 64/256 = 0.1 · "
         "0 workers"),
        ({"accumulation": 2, "base_lr": 0.4, "epochs": 1, "warmup_epochs": 0},
         "1 step (1 epoch of 1), 0 of warm-up · batch 64 x 2 (accumulation) x 1 (processes) = 128 "
         "· lr 0.4 x 128/256 = 0.2 · 0 workers"),
    ],
)  # fmt: skip
def test_the_steps_the_batch_and_the_learning_rate(more, line):
    assert summary(128, **more)[1] == line


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("machine", "workers"), [(16, 8), (4, 4)])
def test_workers_follow_the_machine_not_the_quota(monkeypatch, machine, workers):
    """As in earlier versions: the order of a stream depends on them."""
    monkeypatch.setattr(cores, "quota", lambda *_: 3.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(machine)), raising=False)
    assert cores.cores() == 3
    assert summary(128, workers=8)[1].endswith(f"{workers} workers")


@pytest.mark.parametrize("size", [1, 2, 5, 63, 64, 65, 66, 100, 127, 129, 191, 200, 203, 5000])
def test_a_fitting_batch_leaves_out_fewer_and_is_not_much_smaller(size):
    fitted = fitting_batch(size, 64)
    assert 1 <= fitted <= min(size, 64)
    assert size % fitted <= max(size % min(size, 64), 0.02 * size)
    assert size % fitted <= 0.02 * size or size < 150
    assert fitted >= min(size, 64) // 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (42, "42 s"), (720, "12 min"), (3.5 * 3600, "3.5 h"), (96 * 3600, "4 days")],
)
def test_a_duration_is_rounded_for_reading(seconds, text):
    assert rough_time(seconds) == text


def test_a_count_has_its_noun():
    assert [plural(n, "step") for n in (0, 1, 1200, 0.5)] == [
        "0 steps", "1 step", "1,200 steps", "0.5 steps"
    ]  # fmt: skip
