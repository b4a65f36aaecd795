"""`TrainConfig`: the settings of the training loop."""

import math
from dataclasses import dataclass
from typing import Any

from vim_ssl.training.optim import SCHEDULES, check_optimizer
from vim_ssl.utils.config import opt


@dataclass
class TrainConfig:
    """Settings of the loop; every recipe's configuration extends these."""

    epochs: float = opt(300, "passes over the data; 0.5: half of one", group="optimiser")
    batch_size: int = opt(64, "samples a process and micro-batch", group="optimiser")
    accumulation: int = opt(1, "micro-batches an optimiser step", group="optimiser")
    optimizer: str = opt("adamw", "by timm's name: adamw, lamb, lars …", group="optimiser")
    base_lr: float = opt(1.5e-4, "learning rate per lr_reference_batch samples", group="optimiser")
    lr_reference_batch: int = opt(256, "samples that base_lr is meant for", group="optimiser")
    min_lr: float = opt(0.0, "learning rate at the end, not scaled", group="optimiser")
    schedule: str = opt(
        "cosine", "how the rate falls to min_lr", group="optimiser", choices=SCHEDULES
    )
    warmup_epochs: float = opt(40.0, "linear warm-up", group="optimiser")
    warmup_lr: float = opt(0.0, "learning rate it starts from, not scaled", group="optimiser")
    weight_decay: float = opt(0.05, "not on A_log, D, biases, norms, tokens", group="optimiser")
    betas: tuple[float, float] = opt((0.9, 0.95), "of AdamW", group="optimiser")
    eps: float | None = opt(None, "of AdamW; none: its own, 1e-8", group="optimiser")
    clip_grad: float | None = opt(1.0, "largest gradient norm; none: off", group="optimiser")
    layer_decay: float | None = opt(
        None, "lr factor from a block to the one below", group="optimiser"
    )
    ema: float = opt(
        0.0, "decay of the encoder's moving average, kept beside it; 0: none", group="optimiser"
    )
    precision: str = opt("no", "autocast", group="run", choices=("no", "bf16", "fp16"))
    compile: bool = opt(False, "torch.compile the model", group="run")
    grad_checkpointing: bool = opt(
        False, "recompute the blocks in backward: a third slower, less memory", group="run"
    )
    workers: int = opt(2, "data loading processes a rank", group="run")
    threads: int = opt(0, "CPU threads a process; 0: the cores, shared out", group="run")
    seed: int = opt(0, "of everything random", group="run")
    output: str = opt("", "run directory; default: a new one under runs/", group="run")
    resume: str = opt(
        "never",
        "auto: go on from the newest whole checkpoint in output",
        group="run",
        choices=("never", "auto"),
    )
    log_every: int = opt(10, "optimiser steps between lines of metrics.jsonl", group="run")
    eval_every: float = opt(20.0, "epochs between evaluations and images", group="run")
    save_every: float = opt(15.0, "minutes between checkpoints", group="run")
    save_steps: int = opt(0, "optimiser steps between checkpoints; 0: by save_every", group="run")
    keep_checkpoints: int = opt(2, "older ones are deleted", group="run")
    max_steps: int = opt(0, "stop after so many optimiser steps; 0: never", group="run")
    max_bad_steps: int = opt(20, "give up after so many non-finite steps in a row", group="run")
    trackers: tuple[str, ...] = opt(
        ("auto",), "by accelerate's names; auto: tensorboard where installed; none", group="run"
    )

    @classmethod
    def derive_defaults(cls, defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """For `vim_ssl.utils.config.parse`: a run made shorter keeps its share of warm-up."""
        share = given.get("epochs", math.inf) / defaults["epochs"]
        if "warmup_epochs" in given or not 0 < share < 1:
            return defaults
        return defaults | {"warmup_epochs": share * defaults["warmup_epochs"]}

    def __post_init__(self):
        for name in ("batch_size", "accumulation", "log_every", "keep_checkpoints",
                     "max_bad_steps", "lr_reference_batch"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        for name in ("workers", "threads", "max_steps", "save_steps", "weight_decay", "min_lr",
                     "warmup_lr", "base_lr", "clip_grad"):  # fmt: skip
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; each must be at least 0 and below 1.")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; it must be above 0, at most 1.")
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs is {self.epochs}; it must be above 0.")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs:g} does not fit into {self.epochs:g} epochs; "
                f"try --warmup-epochs {self.epochs / 20:g}."
            )
        check_optimizer(self.optimizer)
        if self.eval_every <= 0:
            raise ValueError(f"eval_every is {self.eval_every:g} epochs; it must be above 0.")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema:g}; expected 0 (none) or a decay below 1.")
