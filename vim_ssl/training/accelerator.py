"""Set up accelerate, and the moving average."""

import os
from datetime import timedelta
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from vim_ssl.training.config import TrainConfig
from vim_ssl.utils.distributed import cores

PATIENCE = timedelta(hours=2)  # the others wait while the first process evaluates; NCCL's is 10 min


def make_accelerator(config: TrainConfig):
    """accelerate's Accelerator, or an error if the launcher's processes do not know one another, or
    have nothing to share: a model is judged as it is by one."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, TorchDynamoPlugin

    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and getattr(config, "eval_only", False):
        raise ValueError(
            f"--eval-only judges in one process, and the launcher started {world}; start it "
            "without a launcher."
        )
    # Launchers set OMP_NUM_THREADS=1, which would leave a single process on one core.
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(config.threads or max(cores() // local, 1))
    if world > 1 and not torch.cuda.is_available():
        # Otherwise accelerate looks for GPUs and, finding none, lets every process believe that
        # it is alone.
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(mixed_precision=config.precision, kwargs_handlers=[patience])
    # A second Accelerator in a process keeps what the first one was told.
    backend = "inductor" if config.compile else None
    accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend=backend)
    if world != accelerator.num_processes:
        raise ValueError(
            f"The launcher started {world} processes but accelerate sees "
            f"{accelerator.num_processes}: each would train alone and write the same files. "
            "Check `accelerate env` and the launcher's flags."
        )
    if config.ema and accelerator.distributed_type == "FSDP":
        raise ValueError(
            "ema keeps a whole copy of the encoder, which FSDP has in shards; use --ema 0, or DDP."
        )
    return accelerator


def make_average(model: nn.Module, config: TrainConfig) -> ModelEmaV3 | None:
    """The moving average that ``config.ema`` asks for, of an encoder, or of a whole objective where
    heads belong to it; its ``module`` is what is averaged.

    The decay rises over the steps, 1 - (1 + step)^(-2/3), until it is ``config.ema``.
    """
    if not config.ema:
        return None
    average = ModelEmaV3(model, config.ema, use_warmup=True)
    average.requires_grad_(False)
    return average


def to_device(value: Any, device: torch.device) -> Any:
    """The same with all tensors on the device, those in dicts and lists too."""
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, list):
        return [to_device(v, device) for v in value]
    return value.to(device, non_blocking=True) if torch.is_tensor(value) else value
