"""`TrainConfig`: the settings of the training loop."""

import math
from dataclasses import dataclass, field
from typing import Any

from vim_ssl.training.optim import SCHEDULES, check_optimizer
from vim_ssl.utils.config import check_between, opt

NEVER = 1e9  # epochs; longer than any run


@dataclass
class TrainConfig:
    """Settings of the loop; the configuration of every recipe extends these."""

    # Where the settings come from makes no difference between two configurations.
    preset: str = field(default="", compare=False)
    epochs: float = opt(300, "passes over the data; may be fractional", "optimiser")
    batch_size: int = opt(64, "samples per process and micro-batch", "optimiser")
    accumulation: int = opt(1, "micro-batches per optimiser step", "optimiser")
    optimizer: str = opt("adamw", "timm's name: adamw, lamb, lars …", "optimiser")
    base_lr: float = opt(1.5e-4, "learning rate per lr_reference_batch samples", "optimiser")
    lr_reference_batch: int = opt(
        256, "effective batch size for which base_lr is specified", "optimiser"
    )
    min_lr: float = opt(0.0, "final learning rate, not scaled by the batch", "optimiser")
    schedule: str = opt("cosine", "learning-rate schedule", "optimiser", choices=SCHEDULES)
    warmup_epochs: float = opt(40.0, "epochs of linear warm-up", "optimiser")
    warmup_lr: float = opt(0.0, "initial learning rate, not scaled by the batch", "optimiser")
    weight_decay: float = opt(
        0.05, "weight decay, except on A_log, D, biases, norms, tokens", "optimiser"
    )
    betas: tuple[float, float] = opt(
        (0.9, 0.95), "betas of the optimiser (AdamW, LAMB …)", "optimiser"
    )
    eps: float | None = opt(None, "epsilon of the optimiser; none: timm's default", "optimiser")
    clip_grad: float | None = opt(1.0, "maximum gradient norm; none: no clipping", "optimiser")
    layer_decay: float | None = opt(
        None, "learning-rate factor per block, from top to bottom; none: off", "optimiser"
    )
    ema: float = opt(
        0.0, "decay of a moving average of the encoder, saved next to it; 0: off", "optimiser"
    )
    precision: str = opt("no", "dtype of autocast", "run", choices=("no", "bf16", "fp16"))
    compile: bool = opt(False, "torch.compile the model", "run")
    grad_checkpointing: bool = opt(
        False, "recompute blocks in the backward pass: less memory, a third slower", "run"
    )
    workers: int = opt(2, "data loading processes per rank", "run")
    threads: int = opt(0, "CPU threads per process; 0: cores / processes", "run")
    seed: int = opt(0, "seed of all random number generators", "run")
    output: str = opt("", "run directory; default: a new one under runs/", "run")
    resume: str = opt(
        "never", "auto: resume from the newest checkpoint in output", "run", ("never", "auto")
    )
    log_every: int = opt(10, "optimiser steps between lines of metrics.jsonl", "run")
    eval_every: float = opt(
        20.0, "epochs between evaluations and images; never: only at the end", "run",
        words={"never": NEVER},
    )  # fmt: skip
    save_every: float = opt(15.0, "minutes between checkpoints", "run")
    save_steps: int = opt(0, "optimiser steps between checkpoints; 0: use save_every", "run")
    keep_checkpoints: int = opt(2, "number of checkpoints kept", "run")
    max_steps: int = opt(0, "stop after this optimiser step; 0: off", "run")
    max_bad_steps: int = opt(20, "stop after this many consecutive non-finite steps", "run")
    trackers: tuple[str, ...] = opt(
        ("auto",),
        "names of accelerate trackers; auto: tensorboard if installed; none: no tracker", "run",
    )  # fmt: skip

    @classmethod
    def derive_defaults(cls, defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Shorten the warm-up in proportion if fewer epochs are given; called by `parse`."""
        share = given.get("epochs", math.inf) / defaults["epochs"]
        if "warmup_epochs" in given or not 0 < share < 1:
            return defaults
        return defaults | {"warmup_epochs": share * defaults["warmup_epochs"]}

    def __post_init__(self):
        check_between(self, 1, math.inf, "batch_size", "accumulation", "log_every",
                      "keep_checkpoints", "max_bad_steps", "lr_reference_batch")  # fmt: skip
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
