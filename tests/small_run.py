"""A training of milliseconds: fit one number to the indices of the samples."""

from typing import Any

import torch

from vim_ssl.data import ImageData
from vim_ssl.data.images import BadImage
from vim_ssl.objectives.base import StepOutput
from vim_ssl.tasks.runner import train_run
from vim_ssl.training.accelerator import make_accelerator
from vim_ssl.training.config import TrainConfig


class Mean(torch.nn.Module):
    """Fits one number. ``at`` (call → function) is called in the forward pass."""

    def __init__(self, at=None, depends_on=None):
        super().__init__()
        self.weight, self.at, self.calls = torch.nn.Parameter(torch.zeros(1)), at or {}, 0
        self.modes: list[tuple[bool, bool]] = []  # of every call: in training, with gradients
        self.depends_on = depends_on or {}

    def dependencies(self) -> dict[str, str]:
        return self.depends_on

    def forward(self, batch):
        self.calls += 1
        self.modes.append((self.training, torch.is_grad_enabled()))
        self.at.get(self.calls, lambda: None)()
        error = (self.weight - batch["index"].float()).square()
        return StepOutput(error.sum(), len(error))


class Numbers(torch.utils.data.Dataset):
    name, kind = "numbers", "image"

    def __init__(self, size: int, broken: tuple[int, ...] = ()):
        self.size, self.broken, self.fingerprint = size, broken, f"{size} numbers"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.broken:
            raise BadImage(f"number {index}", "is broken")
        return {"x": torch.zeros(1)}


def train(
    folder, at=None, size=32, repeats=1, stop=None, broken=(), save=None, model=None,
    depends_on=None, **settings: Any,
) -> Mean:  # fmt: skip
    """Train on ``size`` numbers: by default eight steps in two epochs. Returns the model."""
    config = TrainConfig(**{
        "epochs": 2, "batch_size": 8, "workers": 0, "threads": 1, "log_every": 1,
        "warmup_epochs": 0.0, "base_lr": 1.0, "trackers": ("none",), "output": str(folder),
        **settings,
    })  # fmt: skip
    samples = ImageData.samples(Numbers(size, tuple(broken)), dict, repeats=repeats)  # type: ignore[arg-type]
    model = model or Mean(at)
    train_run(
        "mim_pretrain", config, model, samples, make_accelerator(config), model=model,
        data="numbers", save=save, should_stop=stop, depends_on=depends_on,
    )  # fmt: skip
    return model
